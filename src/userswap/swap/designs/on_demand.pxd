# The default design: no indirection where nobody shares. See on_demand.pyx.
from userswap.swap.map cimport SwapMapOps

cdef const SwapMapOps* on_demand_design() noexcept nogil
