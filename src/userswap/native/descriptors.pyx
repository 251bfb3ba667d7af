"""Descriptors that the program may not close (see descriptors.pxd). Touches one bitmap, by atomics, and moves them."""
from libc.errno cimport errno
from libc.stdint cimport uint64_t

from userswap.native.us cimport us_and, us_load, us_or

cdef extern from "<fcntl.h>" nogil:
    int fcntl(int fd, int command, ...)
    int F_DUPFD_CLOEXEC

cdef extern from "<unistd.h>" nogil:
    int close(int fd)

cdef enum:
    WORDS = 1024                # DESCRIPTORS / 64

cdef uint64_t[WORDS] guarded


cdef int descriptor_up(int fd, int least) noexcept nogil:
    cdef int kept = errno
    cdef int high = fcntl(fd, F_DUPFD_CLOEXEC, least) if 0 <= fd < least else -1
    if high >= 0:
        close(fd)
        fd = high
    (&errno)[0] = kept
    return fd


cdef void descriptor_guard(int fd) noexcept nogil:
    if 0 <= fd < DESCRIPTORS:
        us_or(&guarded[fd >> 6], <uint64_t>1 << (fd & 63))


cdef void descriptor_release(int fd) noexcept nogil:
    if 0 <= fd < DESCRIPTORS:
        us_and(&guarded[fd >> 6], ~(<uint64_t>1 << (fd & 63)))


cdef bint descriptor_guarded(unsigned int fd) noexcept nogil:
    return fd < DESCRIPTORS and (us_load(&guarded[fd >> 6]) >> (fd & 63)) & 1
