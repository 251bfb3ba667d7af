"""Descriptors that the program may not close (see descriptors.pxd). Touches one bitmap, by atomics."""
from libc.stdint cimport uint64_t

from userswap.native.us cimport us_and, us_load, us_or

cdef enum:
    WORDS = 1024                # DESCRIPTORS / 64

cdef uint64_t[WORDS] guarded


cdef void descriptor_guard(int fd) noexcept nogil:
    if 0 <= fd < DESCRIPTORS:
        us_or(&guarded[fd >> 6], <uint64_t>1 << (fd & 63))


cdef void descriptor_release(int fd) noexcept nogil:
    if 0 <= fd < DESCRIPTORS:
        us_and(&guarded[fd >> 6], ~(<uint64_t>1 << (fd & 63)))


cdef bint descriptor_guarded(unsigned int fd) noexcept nogil:
    return fd < DESCRIPTORS and (us_load(&guarded[fd >> 6]) >> (fd & 63)) & 1
