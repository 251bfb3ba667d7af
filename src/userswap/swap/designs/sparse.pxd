# Two radix trees with sparse counts. See sparse.pyx.
from userswap.swap.map cimport SwapMapOps

cdef const SwapMapOps* sparse_design() noexcept nogil
