# Descriptors of ours, which close(), close_range() and closefrom() of the program pass over (memory/syscalls wraps
# them). Who opens one guards it, and lets it go before closing it.
cdef enum:
    DESCRIPTORS = 65536         # higher numbers are not guarded

cdef void descriptor_guard(int fd) noexcept nogil
cdef void descriptor_release(int fd) noexcept nogil
cdef bint descriptor_guarded(unsigned int fd) noexcept nogil
