# Threads of ours: not Python's, and not from a handler, since that may not make one.
cdef extern from *:
    """
    #include <pthread.h>
    #include <signal.h>

    /* A detached thread that gets no signal but those of its own faults. */
    static inline int us_thread(void *(*body)(void *)) {
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
        pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
        pthread_attr_setstacksize(&attr, 1 << 18);
        pthread_sigmask(SIG_SETMASK, &mask, &kept);
        error = pthread_create(&thread, &attr, body, NULL);
        pthread_sigmask(SIG_SETMASK, &kept, NULL);
        pthread_attr_destroy(&attr);
        return -error;
    }
    """
    int us_thread(void* (*body)(void*) noexcept nogil) nogil        # 0 or -errno
