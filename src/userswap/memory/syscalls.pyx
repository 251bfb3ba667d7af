from libc.stdint cimport int64_t
cdef extern from *:
    """
    #include <signal.h>
    #include <string.h>
    #include <errno.h>
    static int temp_install(void *h) { struct sigaction a; memset(&a,0,sizeof a); a.sa_sigaction=h; a.sa_flags=SA_SIGINFO|SA_NODEFER; sigfillset(&a.sa_mask); sigdelset(&a.sa_mask,SIGBUS);sigdelset(&a.sa_mask,SIGSEGV);sigdelset(&a.sa_mask,SIGABRT); return sigaction(SIGBUS,&a,0)?-errno:0;}
    static void temp_dfl(void) { signal(SIGBUS, SIG_DFL);}
    """
    int temp_install(void* h) nogil
    void temp_dfl() nogil
cdef int syscalls_install(const PinOps* ops) noexcept nogil:
    return 0
cdef int sigbus_install(void (*handler)(int, siginfo_t*, void*) noexcept nogil) noexcept nogil:
    return temp_install(<void*>handler)
cdef void sigbus_chain(int signal, siginfo_t* info, void* context) noexcept nogil:
    temp_dfl()
