/* Threads of ours: detached, with small stacks, and deaf to the program's signals. */
#ifndef USERSWAP_NATIVE_THREAD_H
#define USERSWAP_NATIVE_THREAD_H

#include <pthread.h>
#include <signal.h>

/* It gets no signal but those of its own faults. 0 or -errno. */
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

#endif
