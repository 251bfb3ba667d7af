# A keyed sum of a folio: is it what it was? (sum.h says how.) The key, and which kind of sum this processor gets, are
# one for the process, and for a forked child.
from libc.stdint cimport uint64_t

cdef int sum_start() noexcept nogil                             # draws the key, once: 0 or -errno
# Two different contents of one length, at most 68 KiB, have the same sum with a chance of at most 2**-62.
cdef uint64_t sum_folio(const void* data, uint64_t bytes) noexcept nogil
# The same for what is bound to two words, such as where it is stored: with other words it has another sum.
cdef uint64_t sum_bound(const void* data, uint64_t bytes, uint64_t one, uint64_t other) noexcept nogil
