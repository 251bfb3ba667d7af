"""Readahead: the table of windows that were asked for, and the thread that fills them (see ahead.pxd).

The thread is made by ordinary code (a pool's constructor), since a handler may not. It blocks all signals but
those of its own faults, is inside the gate while it works, and sleeps on a futex otherwise. A forked child has none
until it first would have use for it: then it asks ordinary code to make one, and does without until that comes by.
"""
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memset

from userswap.memory.regions cimport MemoryPool, Region
from userswap.memory.stage cimport STAGE_SLOTS
from userswap.native.thread cimport (
    Thread, thread_call, thread_may, thread_rest, thread_start, thread_wait, thread_want,
)
from userswap.native.us cimport (
    us_add, us_assert, us_chaos, us_futex_wait, us_futex_wake, us_load32, us_lock, us_mutex, us_pause, us_read,
    us_store32, us_unlock, us_write,
)

cdef extern from "<limits.h>" nogil:
    int INT_MAX

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef enum:
    FREE, ASKED, MAKING, OPEN, READY

cdef enum:
    SPINS = 400

ROOM = <uint64_t>-1

cdef us_mutex ahead_lock
cdef Job[AHEAD_JOBS] jobs
cdef uint64_t clock = 0
cdef int64_t ready = 0
cdef Thread worker
cdef const AheadOps* operations


cdef Job* find(Region* region, uint64_t first) noexcept nogil:
    cdef int i
    for i in range(AHEAD_JOBS):
        if jobs[i].state != FREE and jobs[i].region == region and jobs[i].first == first:
            return &jobs[i]
    return NULL


cdef void body(Thread* self) noexcept nogil:
    # What is ASKED when it leaves stays so, what is READY can be taken. It ends what it is at, maybe a long read.
    cdef uint32_t seen
    cdef Job* job
    cdef int i
    while not us_load32(&self.leaving):
        seen = us_load32(&self.calls)
        operations.enter()
        us_lock(&ahead_lock)
        job = NULL
        for i in range(AHEAD_JOBS):
            if jobs[i].state == ASKED and (job == NULL or jobs[i].age < job.age):
                job = &jobs[i]
        if job != NULL:
            us_write(&job.state, MAKING)
        us_unlock(&ahead_lock)
        if job != NULL:
            operations.make(job)
        operations.leave()
        if job == NULL:
            thread_wait(self, seen)


worker.body = body


cdef int ahead_start(const AheadOps* ops) noexcept nogil:
    global operations
    operations = ops
    return thread_start(&worker)


cdef bint ahead_running() noexcept nogil:
    thread_want(&worker)
    return worker.running and not worker.resting


cdef void ahead_may(void (*later)() noexcept nogil) noexcept nogil:
    worker.later = later
    thread_may(&worker)


cdef void ahead_rest() noexcept nogil:
    thread_rest(&worker)


cdef void drop(Job* job) noexcept nogil:
    """Gives back what a READY job holds. Comes with the lock and gives it up; until the end the job is not FREE: so who
    frees its region waits."""
    us_write(&job.state, MAKING)
    us_add(&ready, -1)
    us_unlock(&ahead_lock)
    us_chaos()
    operations.drop(job)
    ahead_end(job, False)


cdef Job* room_for(Region* region, uint64_t first) noexcept nogil:
    """A FREE job, or the oldest that nobody came for. NULL: all are being made, or it is asked for already."""
    cdef Job* job = NULL
    cdef int i
    if find(region, first) != NULL:
        return NULL
    for i in range(AHEAD_JOBS):
        if jobs[i].state == FREE:
            return &jobs[i]
        if (jobs[i].state == ASKED or jobs[i].state == READY) and (job == NULL or jobs[i].age < job.age):
            job = &jobs[i]
    return job


cdef void ahead_ask(Region* region, uint64_t first) noexcept nogil:
    global clock
    cdef Job* job = NULL
    while True:
        us_lock(&ahead_lock)
        job = room_for(region, first)
        if job == NULL or job.state != READY:
            break
        drop(job)
    if job != NULL:
        job.region = region
        job.first = first
        job.frames = NULL
        job.age = clock
        clock += 1
        us_write(&job.state, ASKED)
    us_unlock(&ahead_lock)
    if job != NULL:
        thread_call(&worker)


cdef void ahead_open(Job* job) noexcept nogil:
    us_lock(&ahead_lock)
    us_assert(job.state == MAKING, "what is opened is being made")
    us_write(&job.next, 0)
    us_write(&job.error, 0)
    us_write(&job.state, OPEN)
    us_unlock(&ahead_lock)


cdef void ahead_fetched(Job* job) noexcept nogil:
    us_store32(&job.fetched, 1)
    us_futex_wake(&job.fetched, INT_MAX)


cdef void ahead_await(Job* job) noexcept nogil:
    while us_load32(&job.fetched) == 0:
        us_futex_wait(&job.fetched, 0)


cdef void ahead_close(Job* job) noexcept nogil:
    cdef int spins = 0
    while True:
        # Helpers are at a folio each: a few microseconds.
        while us_read(&job.helpers) and spins < SPINS:
            us_pause()
            spins += 1
        us_lock(&ahead_lock)
        if us_read(&job.helpers) == 0:
            us_write(&job.state, MAKING)
            us_unlock(&ahead_lock)
            return
        us_unlock(&ahead_lock)
        sched_yield()


cdef void ahead_end(Job* job, bint is_ready) noexcept nogil:
    us_lock(&ahead_lock)
    us_assert(job.state == MAKING, "what ends was being made")
    us_write(&job.state, READY if is_ready else FREE)
    if is_ready:
        us_add(&ready, 1)
    us_unlock(&ahead_lock)


cdef Job* ahead_help(Region* region, uint64_t first) noexcept nogil:
    cdef Job* job
    if not worker.running:
        return NULL
    us_lock(&ahead_lock)
    job = find(region, first)
    if job != NULL and (job.state != OPEN or us_read(&job.next) >= STAGE_SLOTS):
        job = NULL
    if job != NULL:
        us_add(&job.helpers, 1)
    us_unlock(&ahead_lock)
    return job


cdef void ahead_helped(Job* job) noexcept nogil:
    us_lock(&ahead_lock)
    us_add(&job.helpers, -1)
    us_unlock(&ahead_lock)


cdef char* ahead_take(Region* region, uint64_t first) noexcept nogil:
    cdef Job* job
    cdef char* frames = NULL
    if us_read(&ready) == 0:
        return NULL
    us_lock(&ahead_lock)
    job = find(region, first)
    if job != NULL and job.state == READY:
        frames = job.frames
        us_write(&job.state, FREE)
        us_add(&ready, -1)
    us_unlock(&ahead_lock)
    return frames


cdef int64_t ahead_forget(MemoryPool* pool, Region* region, bint wait) noexcept nogil:
    cdef Job* job
    cdef int64_t count = 0
    cdef uint64_t now
    cdef int i = 0
    us_lock(&ahead_lock)
    now = clock                 # what others ask for from here on is not waited for: it may never end
    us_unlock(&ahead_lock)
    while i < AHEAD_JOBS:
        job = &jobs[i]
        us_lock(&ahead_lock)
        if (job.state == FREE or job.age >= now or job.region.pool != pool
                or (region != NULL and job.region != region)):
            i += 1
        elif job.state == READY:
            drop(job)
            count += 1
            continue
        elif job.state == ASKED:
            us_write(&job.state, FREE)
        elif wait:
            us_unlock(&ahead_lock)
            sched_yield()
            continue
        else:
            i += 1
        us_unlock(&ahead_lock)
    return count


cdef void ahead_renew() noexcept nogil:
    """What was READY was on a stage that the child does not have; the pool's books forget it."""
    cdef int i
    for i in range(AHEAD_JOBS):
        if jobs[i].state == READY:
            jobs[i].frames = NULL
            operations.drop(&jobs[i])
    memset(jobs, 0, sizeof(jobs))
    us_write(&ready, 0)
