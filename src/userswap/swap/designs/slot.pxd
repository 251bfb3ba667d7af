# Linux 6.3: an id is a slot, with its count in swap_map. See slot.pyx.
from userswap.swap.map cimport SwapMapOps

cdef const SwapMapOps* slot_design() noexcept nogil
