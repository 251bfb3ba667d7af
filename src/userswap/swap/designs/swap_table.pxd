# Linux 6.18 and 6.19: an id is a slot, with its word in a swap table. See swap_table.pyx.
from userswap.swap.map cimport SwapMapOps

cdef const SwapMapOps* swap_table_design() noexcept nogil
