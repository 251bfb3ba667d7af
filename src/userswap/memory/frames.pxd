# Frames: how bytes get in and out of place. The only room that speaks to userfaultfd. One descriptor a
# process; the whole arena is registered with it once. All ranges are page-aligned, results 0 or -errno.
from libc.stdint cimport int64_t, uint64_t

# Opens userfaultfd (signal delivery, user mode only: needs no privilege) and registers the range.
cdef int frames_open(char* start, uint64_t length) noexcept nogil
# In a forked child: the parent's registration is gone, make a new one for the same range.
cdef int frames_reopen() noexcept nogil
# Frames are moved, not copied, where the kernel can (Linux 6.8) and nobody forbids it.
cdef bint frames_can_move() noexcept nogil
# Whether frame_vacate of a whole window frees its page table, too (x86-64, Linux 6.14).
cdef bint frames_free_tables() noexcept nogil
cdef void frames_forbid_move() noexcept nogil
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
# One page of zeros, if it is missing in a range that should be there: 1 it was, 0 it wasn't.
cdef int frame_mend(char* page, bint protect) noexcept nogil
cdef int frame_protect(char* at, uint64_t length) noexcept nogil
cdef int frame_unprotect(char* at, uint64_t length) noexcept nogil
cdef int frame_vacate(char* at, uint64_t length) noexcept nogil  # gone: the next touch faults
