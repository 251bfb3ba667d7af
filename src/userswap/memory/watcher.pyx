"""The watcher: see watcher.pxd. Touches pools by memory_fit and memory_shrink only; has no lock of its own."""
from libc.stdint cimport int64_t

from userswap.memory.faults cimport memory_family, memory_fit, memory_next_watched, memory_shrink
from userswap.memory.regions cimport MemoryPool
from userswap.native.thread cimport Thread, thread_rest, thread_start
from userswap.native.us cimport us_load32, us_now, us_read
from userswap.reclaim.watch cimport watch_events, watch_look, watch_pause

cdef extern from "<poll.h>" nogil:
    cdef struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd* fds, unsigned long count, int timeout)
    short POLLIN
    int POLLPRI

cdef enum:
    EVENTS = 16                 # descriptors at most that wake it
    STEADY = 64                 # a budget is left alone if it would change by less than one in so many bytes
    MOST_PAUSE = 1000           # ms
    LEAST_PAUSE = 4

cdef Thread watcher


cdef int64_t look(MemoryPool* pool) noexcept nogil:
    """What there is to do about a pool; ms until it is to be looked at again."""
    cdef int64_t limit = pool.reclaim.limit
    cdef int64_t budget
    # What forked children use is the family's, to be divided by it, and nothing that the budget has to leave room for.
    budget = watch_look(pool.watch, memory_family(pool), us_now())
    if budget < pool.watch_least:
        budget = pool.watch_least
    if (budget - limit > limit // STEADY or limit - budget > limit // STEADY) and us_read(&pool.watched):
        memory_fit(pool, budget)
        if not us_read(&pool.watched):
            # Somebody gave it a budget meanwhile, which is to stay.
            memory_fit(pool, us_read(&pool.given))
    return 0 if memory_shrink(pool, WATCHER_PIECE) else watch_pause(pool.watch)


cdef void body(Thread* self) noexcept nogil:
    cdef MemoryPool* pool
    cdef pollfd[EVENTS + 1] wakes
    cdef int[EVENTS] fds
    cdef int i, count
    cdef int64_t pause, next
    while True:
        pause = MOST_PAUSE
        count = 0
        pool = NULL
        while True:
            pool = memory_next_watched(pool)
            if pool == NULL:
                break
            next = look(pool)
            pause = next if next < pause else pause
            count = watch_events(pool.watch, fds, EVENTS)
        if us_load32(&self.leaving):
            return
        for i in range(count):
            wakes[i].fd = fds[i]
            wakes[i].events = <short>POLLPRI
        wakes[count].fd = self.bell
        wakes[count].events = POLLIN
        if pause and poll(wakes, count + 1, <int>pause) > 0 and not us_load32(&self.leaving):
            # Somebody comes to the limit again and again: that is no reason to look all the time.
            poll(NULL, 0, LEAST_PAUSE)


watcher.body = body
watcher.polls = True


cdef int watcher_start() noexcept nogil:
    return thread_start(&watcher)


cdef void watcher_rest() noexcept nogil:
    thread_rest(&watcher)
