"""File descriptors that are ours (see descriptors.pxd). One bit each, changed atomically; no lock."""
from libc.stdint cimport uint64_t

from userswap.native.us cimport us_and, us_load, us_or

cdef uint64_t guarded[GUARD_WORDS]


cdef void descriptor_guard(int fd, bint on) noexcept nogil:
    if fd < 0 or fd >= DESCRIPTORS:
        return
    if on:
        us_or(&guarded[fd >> 6], <uint64_t>1 << (fd & 63))
    else:
        us_and(&guarded[fd >> 6], ~(<uint64_t>1 << (fd & 63)))


cdef bint descriptor_guarded(unsigned int fd) noexcept nogil:
    return fd < <unsigned int>DESCRIPTORS and (us_load(&guarded[fd >> 6]) >> (fd & 63)) & 1
