# Readahead: windows that a scan will want next are filled on the stage by a thread of ours while the program computes;
# its fault then only moves them into place. This room knows which windows were asked for and how far each is; what is
# done to page-table words is the fault room's (`AheadOps`).
#
#   FREE ──ask──► ASKED ──thread──► MAKING ──► OPEN ──all folios done──► READY ──take──► FREE
#                                             (who waits for it helps)
#
# An ask is a guess: it may be forgotten at any time. A READY window holds memory that is charged to the pool; while
# that is given back it is MAKING once more, so that a region is not freed as long as a job names it.
# Beside windows, the thread is asked to reclaim (a job with ROOM for its first folio), so that faults rarely have to.
# `ahead_lock` is a leaf mutex.
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from userswap.memory.regions cimport MemoryPool, Region
from userswap.memory.stage cimport STAGE_SLOTS

cdef enum:
    AHEAD_JOBS = 5
    AHEAD_DEPTH = 2             # windows ahead of a scan; of a small pool, one

cdef uint64_t ROOM

cdef struct Job:
    int64_t state
    Region* region
    uint64_t first              # its first folio
    char* frames
    int64_t next                # of `order`, the folio that is done next
    uint8_t[STAGE_SLOTS] order  # what has to be read from a swap file comes last
    int64_t far                 # and is the last so many
    uint32_t fetched            # it is read, and `entries` are for swap_unpack; a futex
    uint64_t[STAGE_SLOTS] entries
    int64_t helpers             # threads that look at the job; under the lock
    int64_t error
    uint64_t age

cdef struct AheadOps:
    # Inside the gate, from the thread: the whole of a job, MAKING to READY or FREE.
    void (*make)(Job* job) noexcept nogil
    # Gives back what a READY window holds.
    void (*drop)(Job* job) noexcept nogil
    void (*enter)() noexcept nogil
    void (*leave)() noexcept nogil

cdef int ahead_start(const AheadOps* ops) noexcept nogil        # the thread, once a process: 0 or -errno
cdef bint ahead_running() noexcept nogil
# A forked child has no thread: who would first have use for it calls `later`, if ahead_may was called (thread_want).
cdef void ahead_may(void (*later)() noexcept nogil) noexcept nogil
cdef void ahead_ask(Region* region, uint64_t first) noexcept nogil
cdef void ahead_open(Job* job) noexcept nogil                   # MAKING to OPEN: others may help
cdef void ahead_fetched(Job* job) noexcept nogil                # what is far is read
cdef void ahead_await(Job* job) noexcept nogil                  # waits for that
cdef void ahead_close(Job* job) noexcept nogil                  # waits until nobody looks at an OPEN job any more
cdef void ahead_end(Job* job, bint ready) noexcept nogil        # to READY or FREE
# An OPEN job that has something left to do, for this window: call ahead_helped after. NULL: none.
cdef Job* ahead_help(Region* region, uint64_t first) noexcept nogil
cdef void ahead_helped(Job* job) noexcept nogil
# The frames of a READY window, which are the caller's from then on; or NULL.
cdef char* ahead_take(Region* region, uint64_t first) noexcept nogil
# Forgets what was asked of a region (NULL: of any) of the pool, and drops what is READY: how many windows. With `wait`,
# what is being made too: then nothing is left of what was asked before. Not from the thread itself.
cdef int64_t ahead_forget(MemoryPool* pool, Region* region, bint wait) noexcept nogil
cdef void ahead_rest() noexcept nogil                           # the process ends: the thread does nothing any more
cdef void ahead_renew() noexcept nogil                          # in a forked child: no thread, nothing asked
