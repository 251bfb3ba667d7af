# Threads of ours: not Python's, and not from a handler, since that may not make one.
cdef extern from *:
    """
    #include <pthread.h>
    #include <signal.h>

    /* A thread that gets no signal but those of its own faults. `joined`: to be joined; NULL: never. */
    static inline int us_thread(void *(*body)(void *), pthread_t *joined) {
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
        pthread_attr_setstacksize(&attr, 1 << 18);
        pthread_sigmask(SIG_SETMASK, &mask, &kept);
        error = pthread_create(joined ? joined : &thread, &attr, body, NULL);
        pthread_sigmask(SIG_SETMASK, &kept, NULL);
        pthread_attr_destroy(&attr);
        return -error;
    }
    """
    ctypedef unsigned long pthread_t
    int us_thread(void* (*body)(void*) noexcept nogil, pthread_t* joined) nogil         # 0 or -errno
    int pthread_join(pthread_t thread, void** result) nogil
