"""Kin: which forked children may still read our swap files (see kin.pxd). Touches its pipes, nothing else.

Locking: fork handlers run with the gate closed, alone in the process; `kin_alive` takes a leaf mutex.
"""
from libc.errno cimport EMFILE, errno
from libc.stdint cimport int64_t

from userswap.native.descriptors cimport descriptor_guard, descriptor_release
from userswap.native.us cimport us_lock, us_mutex, us_now, us_read, us_unlock, us_write

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <fcntl.h>
    #include <poll.h>
    #include <unistd.h>
    """

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd* fds, unsigned long count, int timeout)
    short POLLHUP

cdef extern from "<unistd.h>" nogil:
    int pipe2(int* fds, int flags)
    int close(int fd)

cdef extern from "<fcntl.h>" nogil:
    int O_CLOEXEC

cdef enum:
    MOST = 256                  # children with a pipe of their own at once
    ASK_NS = 10000000

cdef us_mutex mutex
cdef int[MOST] readers          # one for each fork whose child, or a child of it, may be alive
cdef int64_t count = 0
cdef int64_t lost = 0           # 1: a fork went by without a pipe; assume its child for ever
cdef int64_t asked = 0
cdef int[2] pipe_now            # of the fork under way; -1: none


cdef int kin_before_fork() noexcept nogil:
    global count
    pipe_now[0] = pipe_now[1] = -1
    ask()
    if us_read(&count) == MOST or pipe2(pipe_now, O_CLOEXEC) != 0:
        us_write(&lost, 1)
        return -(errno if us_read(&count) < MOST else EMFILE)
    # A child that closed its end by accident would be taken for gone, and its slots be written over.
    descriptor_guard(pipe_now[0])
    descriptor_guard(pipe_now[1])
    return 0


cdef void let_go(int fd) noexcept nogil:
    descriptor_release(fd)
    close(fd)


cdef void kin_after_fork(bint child) noexcept nogil:
    cdef int64_t i
    if child:
        # Our own children are ahead of us; those of the parent are not our business. The writing end stays open.
        for i in range(us_read(&count)):
            let_go(readers[i])
        us_write(&count, 0)
        us_write(&lost, 0)
        if pipe_now[0] >= 0:
            let_go(pipe_now[0])
    elif pipe_now[0] >= 0:
        let_go(pipe_now[1])
        readers[us_read(&count)] = pipe_now[0]
        us_write(&count, us_read(&count) + 1)


cdef void ask() noexcept nogil:
    """Forgets the children that are gone. The caller has the mutex, or is alone."""
    cdef pollfd one
    cdef int64_t i = 0
    while i < us_read(&count):
        one.fd = readers[i]
        one.events = 0
        one.revents = 0
        if poll(&one, 1, 0) > 0 and one.revents & POLLHUP:
            let_go(readers[i])
            us_write(&count, us_read(&count) - 1)
            readers[i] = readers[us_read(&count)]
        else:
            i += 1


cdef bint kin_alive() noexcept nogil:
    cdef int64_t now
    cdef int kept
    if us_read(&lost):
        return True
    if us_read(&count) == 0:
        return False
    now = us_now()
    if now - us_read(&asked) > ASK_NS:
        kept = errno
        us_lock(&mutex)
        us_write(&asked, now)
        ask()
        us_unlock(&mutex)
        (&errno)[0] = kept
    return us_read(&count) > 0
