# Two radix trees, the second always with the count. See two_trees.pyx.
from userswap.swap.map cimport SwapMapOps

cdef const SwapMapOps* two_trees_design() noexcept nogil
