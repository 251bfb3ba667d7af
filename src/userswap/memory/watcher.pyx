"""The watcher: see watcher.pxd. Touches pools by memory_fit and memory_shrink only; has no lock of its own."""
from libc.errno cimport errno
from libc.stdint cimport int64_t

from userswap.memory.faults cimport memory_fit, memory_next_watched, memory_shrink
from userswap.memory.regions cimport MemoryPool
from userswap.native.descriptors cimport FIRST_FD, descriptor_guard, descriptor_release, descriptor_up
from userswap.native.thread cimport pthread_join, pthread_t, us_thread
from userswap.native.us cimport us_add, us_now, us_read, us_write
from userswap.reclaim.reclaim cimport reclaim_settle, reclaim_used
from userswap.reclaim.watch cimport watch_events, watch_look, watch_pause

cdef extern from "<poll.h>" nogil:
    cdef struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd* fds, unsigned long count, int timeout)
    short POLLIN
    int POLLPRI

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd(unsigned int value, int flags)
    int EFD_CLOEXEC
    int EFD_NONBLOCK

cdef extern from "<unistd.h>" nogil:
    int getpid()
    int close(int fd)
    long read(int fd, void* to, size_t length)
    long write(int fd, const void* data, size_t length)

cdef enum:
    EVENTS = 16                 # descriptors at most that wake it
    STEADY = 64                 # a budget is left alone if it would change by less than one in so many bytes
    MOST_PAUSE = 1000           # ms
    LEAST_PAUSE = 4

cdef int64_t running = 0        # the process that has the thread
cdef int64_t resting = 0
cdef int64_t busy = 0           # it is at a pool
cdef int64_t leaving = 0
cdef int bell = -1              # wakes it, to leave
cdef int bell_of = 0            # the process that made it: a child has the same, which would wake its parent's thread
cdef pthread_t thread


cdef int64_t look(MemoryPool* pool) noexcept nogil:
    """What there is to do about a pool; ms until it is to be looked at again."""
    cdef int64_t limit = pool.reclaim.limit
    cdef int64_t budget
    # What forked children use is the family's, to be divided by it, and nothing that the budget has to leave room for.
    reclaim_settle(&pool.reclaim)
    budget = watch_look(pool.watch, reclaim_used(&pool.reclaim) + us_read(&pool.reclaim.family.others), us_now())
    if budget < pool.watch_least:
        budget = pool.watch_least
    if (budget - limit > limit // STEADY or limit - budget > limit // STEADY) and us_read(&pool.watched):
        memory_fit(pool, budget)
        if not us_read(&pool.watched):
            # Somebody gave it a budget meanwhile, which is to stay.
            memory_fit(pool, us_read(&pool.given))
    return 0 if memory_shrink(pool, WATCHER_PIECE) else watch_pause(pool.watch)


cdef void* body(void* nothing) noexcept nogil:
    cdef MemoryPool* pool
    cdef pollfd[EVENTS + 1] wakes
    cdef int[EVENTS] fds
    cdef int i, count
    cdef int64_t pause, next
    while True:
        pause = MOST_PAUSE
        count = 0
        pool = NULL
        us_add(&busy, 1)
        while not us_read(&resting):
            pool = memory_next_watched(pool)
            if pool == NULL:
                break
            next = look(pool)
            pause = next if next < pause else pause
            count = watch_events(pool.watch, fds, EVENTS)
        us_add(&busy, -1)
        if us_read(&resting) or us_read(&leaving):
            return NULL
        for i in range(count):
            wakes[i].fd = fds[i]
            wakes[i].events = <short>POLLPRI
        wakes[count].fd = bell
        wakes[count].events = POLLIN
        if pause and poll(wakes, count + 1, <int>pause) > 0 and not us_read(&leaving):
            # Somebody comes to the limit again and again: that is no reason to look all the time.
            poll(NULL, 0, LEAST_PAUSE)
    return NULL


cdef int make_bell() noexcept nogil:
    global bell, bell_of
    if bell >= 0 and bell_of == getpid():
        return 0
    if bell >= 0:
        descriptor_release(bell)
        close(bell)
    bell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
    if bell < 0:
        return -errno
    bell = descriptor_up(bell, FIRST_FD)
    descriptor_guard(bell)
    bell_of = getpid()
    return 0


cdef int watcher_start() noexcept nogil:
    cdef int error
    if us_read(&running) == getpid():
        return 0
    error = make_bell()
    if error:
        return error
    us_write(&busy, 0)
    us_write(&leaving, 0)
    us_write(&running, getpid())
    error = us_thread(body, &thread)
    if error:
        us_write(&running, 0)
    return error


cdef void watcher_rest() noexcept nogil:
    us_add(&resting, 1)
    while us_read(&busy) and us_read(&running) == getpid():
        poll(NULL, 0, 1)


cdef bint watcher_pause() noexcept nogil:
    cdef int64_t one = 1
    if us_read(&running) != getpid() or us_read(&resting):
        return False
    us_write(&leaving, 1)
    write(bell, &one, sizeof(one))
    pthread_join(thread, NULL)
    read(bell, &one, sizeof(one))
    us_write(&running, 0)
    return True
