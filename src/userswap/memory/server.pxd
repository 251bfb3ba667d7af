# The server: threads of ours that read faults from userfaultfd and serve them (BY_THREAD), those that the kernel has in
# the middle of a system call too. What is done about a fault is the fault room's (`ServerOps`).
#
# One thread at a time reads, and it never waits for anything else: a thread of ours that swaps a folio out may itself
# wait for a page of it that the program has thrown away, and has others waiting for it. Who has read a fault lets the
# next one read and serves it; if there is none, it goes on reading, and who is ready first serves it.
from libc.stdint cimport uint32_t

cdef struct ServerOps:
    # Everything that there is to be done about a fault; may wait for who reads.
    void (*serve)(char* address, bint writing, uint32_t thread) noexcept nogil
    # If the thread with this number is one that reads a folio to swap it out: what it needs, at once. Never waits.
    bint (*mend)(char* address, uint32_t thread) noexcept nogil

# Once a process; at least two threads. 0 or -errno.
cdef int server_start(const ServerOps* ops, int threads) noexcept nogil
cdef int server_renew() noexcept nogil          # in a forked child, which has no threads and another userfaultfd
