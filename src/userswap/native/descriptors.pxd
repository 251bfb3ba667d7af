# Descriptors of ours, which close(), close_range() and closefrom() of the program pass over (memory/syscalls wraps
# them). Who opens one guards it, and lets it go before closing it.
cdef enum:
    DESCRIPTORS = 65536         # higher numbers are not guarded

# Where ours are: a program that has closed some of the first few expects the next one to have their number, and dup2()
# is not wrapped. Below 64, because growing the table of descriptors of a process with threads waits 10 ms for RCU.
cdef enum:
    FIRST_FD = 20

cdef int descriptor_up(int fd, int least) noexcept nogil        # the same at `least` or above, if there is room
cdef void descriptor_guard(int fd) noexcept nogil
cdef void descriptor_release(int fd) noexcept nogil
cdef bint descriptor_guarded(unsigned int fd) noexcept nogil
