# Threads of ours: not Python's, and not from a handler, since that may not make one. They get no signal but those of
# their own faults. A `Thread` is one that a process has for good: made when it is first wanted, called by who has
# something for it, ended before Python forks and made anew after, and at rest once the process ends.
from libc.stdint cimport int64_t, uint32_t

cdef struct Thread:
    # Set once, before the first start:
    void (*body)(Thread* self) noexcept nogil       # returns soon after `leaving`
    bint polls                  # it waits by poll(), of which `bell` is one; else by thread_wait
    void (*later)() noexcept nogil                  # see thread_want; NULL: in a child nobody asks for it
    void (*forked)() noexcept nogil                 # in a forked child, where it is not; NULL: nothing to do
    # For the others to read:
    bint running
    bint resting
    bint lost                   # there was one in the process that we were forked from
    uint32_t calls              # how often it was called
    uint32_t leaving
    int bell                    # an eventfd that thread_call writes to
    # The room's own:
    int64_t process             # which started it
    bint paused
    bint known
    uint32_t may
    unsigned long id
    Thread* next

cdef int thread_start(Thread* t) noexcept nogil             # once a process: 0 or -errno
cdef bint thread_end(Thread* t) noexcept nogil              # and waits until it is gone; whether there was one
cdef void thread_rest(Thread* t) noexcept nogil             # the same, for good: the process ends
# There is something to do. From a handler too, unless it polls.
cdef void thread_call(Thread* t) noexcept nogil
# By the thread: sleeps until it is called, if it was not since `calls` was `seen`; what there was to do comes before.
cdef void thread_wait(Thread* t, uint32_t seen) noexcept nogil
cdef void thread_hush(Thread* t) noexcept nogil             # by the thread: its bell is heard
# A forked child has no threads, and a handler can't make one. `later` asks ordinary code for it, from a handler: it is
# called once, when somebody first has use for the thread (thread_want), if thread_may said before that it can be.
cdef void thread_may(Thread* t) noexcept nogil
cdef void thread_want(Thread* t) noexcept nogil
# The one that is wanted as soon as the process faults on swapped memory, and who says that it does.
cdef void thread_first_use(Thread* t) noexcept nogil
cdef void threads_used() noexcept nogil

cdef void threads_pause() noexcept nogil                    # before a fork: ends them all
cdef void threads_resume() noexcept nogil                   # in the parent; who can't be made is done without
cdef void threads_renew() noexcept nogil                    # in the child: there are none

# A thread that nobody waits for. `stack`: bytes; 0: as others of ours have. 0 or -errno.
cdef int thread_detached(void* (*body)(void*) noexcept nogil, void* argument, size_t stack) noexcept nogil
