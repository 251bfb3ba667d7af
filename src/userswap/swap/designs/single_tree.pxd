# One radix tree, entry and count in its word. See single_tree.pyx.
from userswap.swap.map cimport SwapMapOps

cdef const SwapMapOps* single_tree_design() noexcept nogil
