# A tree of pointers to swap descriptors. See descriptor.pyx.
from userswap.swap.map cimport SwapMapOps

cdef const SwapMapOps* descriptor_design() noexcept nogil
