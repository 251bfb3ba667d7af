# Frames: how bytes get in and out of place, and how a fault is delivered. The only room that speaks to userfaultfd. One
# descriptor a process; the whole arena is registered with it once. All ranges are page-aligned, results 0 or -errno.
from libc.stdint cimport int64_t, uint64_t

cdef enum:
    BY_SIGNAL = 0               # userfaultfd, user mode only: SIGBUS in the thread that faults. Needs no privilege
    BY_THREAD = 1               # userfaultfd, the kernel's own faults too: threads of ours read them
    BY_SEGV = 2                 # no userfaultfd: protected mappings, SIGSEGV in the thread that faults (see mapped)

# Whether faults can be delivered so by this kernel to this process: 0 or -errno.
cdef int frames_probe(int delivery) noexcept nogil
# Before frames_open. `most_mappings`: as many as may be caused where that is what limits.
cdef void frames_choose(int delivery, int64_t most_mappings) noexcept nogil
cdef int frames_delivery() noexcept nogil
cdef int frames_descriptor() noexcept nogil             # the userfaultfd, for who reads it; -1: there is none
# Arms the range, all of which is accessible and untouched.
cdef int frames_open(char* start, uint64_t length) noexcept nogil
# In a forked child: the parent's registration is gone, make a new one for the same range.
cdef int frames_reopen() noexcept nogil
# Frames are moved, not copied, where the kernel can (Linux 6.8) and nobody forbids it.
cdef bint frames_can_move() noexcept nogil
# Whether frame_vacate of a whole window frees its page table, too (x86-64, Linux 6.14).
cdef bint frames_free_tables() noexcept nogil
cdef void frames_forbid_move() noexcept nogil
# Protections are those of mappings, of which there are not too many: how many folios, an aligned power of two up to
# `most`, shall come and go together (1 where it doesn't matter); and whether something should go before more comes.
cdef bint frames_mapped() noexcept nogil
cdef int frames_unit(int most) noexcept nogil
cdef bint frames_full() noexcept nogil
# False in a process that was cloned without a fork handler of ours having run, where what was open is its parent's. It
# may see what is there, or was never used, as it is: frame_expose.
cdef bint frames_ours() noexcept nogil
cdef int frame_expose(char* at, uint64_t length) noexcept nogil
# A range that is not the arena's, for frames to be moved to and from: its own misses stay the kernel's.
cdef int frames_register_stage(char* start, uint64_t length) noexcept nogil
# Bytes into a range that is not there: atomic for every other thread. `protect`: write-protected from the start.
cdef int frame_fill(char* at, const void* data, uint64_t length, bint protect) noexcept nogil
# The memory behind a range that is there to one that is not; the source is gone afterwards. Atomic for every other
# thread, page by page. It can't be done where a page is not the process's own (after a fork), or held by a device, or
# where the program changed the mapping. Into place: what can't be moved is copied.
cdef int frame_move_in(char* at, char* staged, uint64_t length) noexcept nogil
# Out of place: all of it, or nothing; nothing too where a page is missing, which the program threw away.
cdef int frame_move_out(char* at, char* staged, uint64_t length) noexcept nogil
cdef int frame_fill_zeros(char* at, uint64_t length) noexcept nogil
# One page of zeros, if it is missing in a range that should be there: 1 it was, 0 it wasn't. `frame_right`: there is no
# need to ask.
cdef int frame_mend(char* page, bint protect) noexcept nogil
cdef bint frame_right(char* page, bint protect) noexcept nogil
cdef int frame_protect(char* at, uint64_t length) noexcept nogil
cdef int frame_unprotect(char* at, uint64_t length) noexcept nogil
# Gone: the next touch faults. Where mappings are short it may fail with -ENOMEM, and the bytes are there still.
cdef int frame_vacate(char* at, uint64_t length) noexcept nogil
# Who waits for a fault there (BY_THREAD) goes on: only now, as nothing else here wakes anybody.
cdef void frame_wake(char* at, uint64_t length) noexcept nogil
# Whoever touches the page gets a bus error (BY_THREAD): 0 or -errno.
cdef int frame_poison(char* page) noexcept nogil
