# A swap file as a device: slots of 4 KiB, allocated in runs from clusters of 512 (2 MiB), read and
# written through one file descriptor with O_DIRECT where the file system allows it. Knows nothing of
# what is in a slot. Opening and checking paths is Python's (swapfiles.py).
from libc.stdint cimport int64_t, uint32_t, uint64_t

cdef enum:
    SLOT_BYTES = 4096
    CLUSTER_SLOTS = 512
    TIDY_SLOTS = 16             # free ones in a row, in a cluster that is in use, that are worth a hole

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void* iov_base
        size_t iov_len

cdef struct SwapFile

# `limit`: most bytes the file may have. The descriptor is owned from now on and closed by delete.
cdef SwapFile* swapfile_new(int fd, uint64_t limit, const char* name) noexcept nogil
# `discard`: what is in the file is given back to the file system (not for a file that another process uses).
cdef void swapfile_delete(SwapFile* f, bint discard) noexcept nogil
cdef const char* swapfile_name(SwapFile* f) noexcept nogil
# A device that failed: no more slots are given out. Whether it was one until now.
cdef bint swapfile_retire(SwapFile* f) noexcept nogil
cdef bint swapfile_retired(SwapFile* f) noexcept nogil
# Errors on purpose, for tests: what the n-th system call of a kind shall meet instead (`inject` in swapfile.pyx).
cdef enum:
    IO_READ = 1
    IO_WRITE = 2
    IO_SCATTER = 3
    IO_PUNCH = 4
    IO_OPEN = 5
cdef bint swapfile_refused(int kind) noexcept nogil             # with errno set
# A run of `n` (1 .. 512) slots within one cluster: its first slot, or -ENOSPC.
cdef int64_t swapfile_alloc(SwapFile* f, int n) noexcept nogil
# Marks a given run of free slots as used: for a swap map whose ids are slots. Not together with swapfile_alloc.
cdef void swapfile_take(SwapFile* f, int64_t slot, int n) noexcept nogil
# Frees any part of a run; a cluster that becomes empty is given back to the file system (hole punched).
cdef void swapfile_free(SwapFile* f, int64_t slot, int n) noexcept nogil
# Whole transfers of n * SLOT_BYTES at a 4096-aligned buffer, EINTR and short transfers handled: 0 or -errno.
cdef int swapfile_write(SwapFile* f, int64_t slot, int n, const void* buffer) noexcept nogil
cdef int swapfile_read(SwapFile* f, int64_t slot, int n, void* buffer) noexcept nogil
# One system call for what lies in a row from a slot on, to several places (at most 64, whole slots, 4096-aligned).
# False: not all of it came. Whoever wants to know why reads one by one.
cdef bint swapfile_scatter(SwapFile* f, int64_t slot, iovec* parts, int count) noexcept nogil
# A word of RAM for each slot, from this one on: the seal of what is in a run (backends/seal), by who has the slots.
cdef uint64_t* swapfile_seals(SwapFile* f, int64_t slot) noexcept nogil
cdef int64_t swapfile_used(SwapFile* f) noexcept nogil          # slots in use
cdef uint64_t swapfile_slots(SwapFile* f) noexcept nogil        # at most
# For a fork, with nobody at it: sets the bits of the slots in use in a bitmap that is as long as swapfile_words says.
cdef uint64_t swapfile_words(SwapFile* f) noexcept nogil
cdef void swapfile_copy(SwapFile* f, uint64_t* bits) noexcept nogil
# Gives the blocks of n slots back, of which nobody makes any use, in a file where nobody takes slots any more.
cdef void swapfile_punch(SwapFile* f, int64_t slot, int64_t n) noexcept nogil
cdef int64_t swapfile_metadata(SwapFile* f) noexcept nogil      # bytes of RAM for bitmaps and owners

# ---- owners: what storage remembers of whose a run is, a word at its first slot. 0: nobody's (yet) ----
# While a run has an owner, the owner lives (see swap/map.pxd): whoever ends the owner's id frees the run before, or
# says that it is nobody's. Freeing forgets it, too.
cdef void swapfile_set_owner(SwapFile* f, int64_t slot, uint64_t owner) noexcept nogil
cdef uint64_t swapfile_owner(SwapFile* f, int64_t slot) noexcept nogil
# Called with the file's mutex held: must try-lock what the owner has, if that is the run at this slot.
ctypedef bint (*swapfile_try)(void* ctx, uint64_t owner, int64_t slot) noexcept nogil
# Locks up to `n` runs of a cluster (1 .. swapfile_clusters) that have an owner, in the order of their slots from `at`
# (0 .. 511, where to go on) on, all within `most` slots, if a run has at most `longest`: how many. `busy`: passed over.
cdef int swapfile_collect(SwapFile* f, uint32_t cluster, uint32_t* at, int n, int most, int longest, int64_t* slots,
                          uint64_t* owners, swapfile_try locked, void* ctx, int64_t* busy) noexcept nogil
cdef uint32_t swapfile_clusters(SwapFile* f) noexcept nogil     # that were ever used
# The one of those in use that was begun first; 0: none but what is being filled. Then it goes to the end of the queue.
cdef uint32_t swapfile_oldest(SwapFile* f) noexcept nogil
# Gives back what is free in one more of the clusters that stay partly used, if there is enough in a row to be worth
# it. False: there was none, so there is none any more until something is freed.
cdef bint swapfile_tidy(SwapFile* f) noexcept nogil
