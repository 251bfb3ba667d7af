# A keyed sum of a folio: is it what it was? (sum.h says how.) The key, and which kind of sum this processor gets, are
# one for the process, and for a forked child.
from libc.stdint cimport uint64_t

cdef int sum_start() noexcept nogil                             # draws the key, once: 0 or -errno
# `bytes`: a multiple of 1 KiB, at most 64 KiB; `data` aligned to 8. Two different contents of one length have the same
# sum with a chance of at most 2**-62.
cdef uint64_t sum_folio(const void* data, uint64_t bytes) noexcept nogil
