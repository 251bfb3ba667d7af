# File descriptors that are ours. A program that closes every descriptor (daemons do) would close them too:
# swapped memory would read as zeros, and what is opened next would get the number that we write to. The wrappers
# of close() in memory/syscalls ask here and pass over them; for the program they are not there.
cdef enum:
    DESCRIPTORS = 65536         # higher ones are not guarded
    GUARD_WORDS = 1024

cdef void descriptor_guard(int fd, bint on) noexcept nogil
cdef bint descriptor_guarded(unsigned int fd) noexcept nogil
