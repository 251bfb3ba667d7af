# Virtual swap space: descriptors in clusters, reverse map of slots. See vswap.pyx.
from userswap.swap.map cimport SwapMapOps

cdef const SwapMapOps* vswap_design() noexcept nogil
