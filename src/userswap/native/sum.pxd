# The interface of sum.h: a keyed sum of a folio. One module uses it (memory/faults), since the key is its own copy.
from libc.stdint cimport uint64_t

cdef extern from "sum.h" nogil:
    int us_sum_start() noexcept                                 # draws the key, once: 0 or -errno
    # `bytes`: a multiple of 1 KiB, at most 64 KiB. Two different contents have the same sum with a chance below 2**-62.
    uint64_t us_sum(const void* data, uint64_t bytes) noexcept
