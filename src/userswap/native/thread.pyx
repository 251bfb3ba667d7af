"""Threads of ours (see thread.pxd). Touches a list of those that there are; starting, ending and forking are the
caller's to keep apart: they come from ordinary code that has the GIL, or from a fork."""
from libc.errno cimport errno
from libc.stdint cimport int64_t, uint32_t

from userswap.native.descriptors cimport FIRST_FD, descriptor_guard, descriptor_release, descriptor_up
from userswap.native.us cimport us_cas32, us_futex_wait, us_futex_wake, us_load32, us_store32, us_swap32

cdef extern from *:
    """
    #include <pthread.h>
    #include <signal.h>

    /* A thread that gets no signal but those of its own faults. `joined`: to be joined; NULL: never. */
    static inline int us_thread(void *(*body)(void *), void *argument, size_t stack, unsigned long *joined) {
        pthread_attr_t attr;
        pthread_t thread;
        sigset_t mask, kept;
        int error;
        sigfillset(&mask);
        sigdelset(&mask, SIGBUS);
        sigdelset(&mask, SIGSEGV);
        sigdelset(&mask, SIGFPE);
        sigdelset(&mask, SIGILL);
        sigdelset(&mask, SIGABRT);
        pthread_attr_init(&attr);
        if (!joined) pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
        pthread_attr_setstacksize(&attr, stack);
        pthread_sigmask(SIG_SETMASK, &mask, &kept);
        error = pthread_create(&thread, &attr, body, argument);
        pthread_sigmask(SIG_SETMASK, &kept, NULL);
        pthread_attr_destroy(&attr);
        if (!error && joined) *joined = (unsigned long)thread;
        return -error;
    }
    """
    int us_thread(void* (*body)(void*) noexcept nogil, void* argument, size_t stack, unsigned long* joined) nogil
    int pthread_join(unsigned long thread, void** result) nogil

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
    STACK = 1 << 18

cdef Thread* threads = NULL             # all that were ever started, in any process before us too
cdef Thread* first_use = NULL


cdef void* begin(void* argument) noexcept nogil:
    cdef Thread* t = <Thread*>argument
    t.body(t)
    return NULL


cdef void close_bell(Thread* t) noexcept nogil:
    if t.bell >= 0:
        descriptor_release(t.bell)
        close(t.bell)
    t.bell = -1


cdef int make_bell(Thread* t) noexcept nogil:
    if t.process != getpid():
        close_bell(t)                   # another process's thread would hear it
    if t.bell >= 0 or not t.polls:
        return 0
    t.bell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
    if t.bell < 0:
        return -errno
    t.bell = descriptor_up(t.bell, FIRST_FD)
    descriptor_guard(t.bell)
    return 0


cdef inline bint here(Thread* t) noexcept nogil:
    """Whether it runs in this process, which may be a clone that no fork handler has heard of."""
    return t.running and t.process == getpid()


cdef int thread_start(Thread* t) noexcept nogil:
    global threads
    cdef int error
    if here(t) or t.resting:
        return 0
    if not t.known:
        t.known = True
        t.bell = -1
        t.next = threads
        threads = t
    error = make_bell(t)
    if error:
        return error
    t.process = getpid()
    us_store32(&t.leaving, 0)
    t.running = True
    error = us_thread(begin, t, STACK, &t.id)
    t.running = error == 0
    return error


cdef bint thread_end(Thread* t) noexcept nogil:
    if not here(t):
        return False
    us_store32(&t.leaving, 1)
    thread_call(t)
    pthread_join(t.id, NULL)
    thread_hush(t)
    t.running = False
    return True


cdef void thread_rest(Thread* t) noexcept nogil:
    t.resting = True
    thread_end(t)


cdef void thread_call(Thread* t) noexcept nogil:
    cdef int64_t one = 1
    cdef uint32_t seen = us_load32(&t.calls)
    while not us_cas32(&t.calls, seen, seen + 1):
        seen = us_load32(&t.calls)
    if t.polls:
        write(t.bell, &one, sizeof(one))
    else:
        us_futex_wake(&t.calls, 1)


cdef void thread_wait(Thread* t, uint32_t seen) noexcept nogil:
    if not us_load32(&t.leaving):
        us_futex_wait(&t.calls, seen)


cdef void thread_hush(Thread* t) noexcept nogil:
    cdef int64_t rung
    if t.polls:
        read(t.bell, &rung, sizeof(rung))


cdef void thread_may(Thread* t) noexcept nogil:
    if t.lost and not t.running and t.later != NULL:
        us_store32(&t.may, 1)


cdef void thread_want(Thread* t) noexcept nogil:
    if not t.running and us_load32(&t.may) and us_swap32(&t.may, 0) and not t.resting:
        t.later()


cdef void thread_first_use(Thread* t) noexcept nogil:
    global first_use
    first_use = t


cdef void threads_used() noexcept nogil:
    if first_use != NULL:
        thread_want(first_use)


cdef void threads_pause() noexcept nogil:
    cdef Thread* t = threads
    while t != NULL:
        t.paused = thread_end(t)
        t = t.next


cdef void threads_resume() noexcept nogil:
    cdef Thread* t = threads
    while t != NULL:
        if t.paused:
            t.paused = False
            thread_start(t)
        t = t.next


cdef void threads_renew() noexcept nogil:
    cdef Thread* t = threads
    while t != NULL:
        t.lost = t.lost or t.running or t.paused
        t.running = t.paused = False
        us_store32(&t.may, 0)
        close_bell(t)
        if t.forked != NULL:
            t.forked()
        t = t.next


cdef int thread_detached(void* (*body)(void*) noexcept nogil, void* argument, size_t stack) noexcept nogil:
    return us_thread(body, argument, stack if stack else STACK, NULL)
