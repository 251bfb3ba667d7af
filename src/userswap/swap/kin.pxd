# Kin: forked children that may still read slots of this process's swap files. While there are any, slots that
# this process frees are kept as they are; they are really freed when the last such child has ended or exec'ed.
#
# How it is known: before a fork a pipe is made; the child keeps its writing end (closed on exec, and by the kernel
# however the child ends; the child's own children inherit it), the parent its reading end. A hang-up says: nobody left.
cdef int kin_before_fork() noexcept nogil       # with the gate closed. 0 or -errno: then kin_alive is true for good
cdef void kin_after_fork(bint child) noexcept nogil
cdef bint kin_alive() noexcept nogil            # cheap: asks the kernel at most every 10 ms
