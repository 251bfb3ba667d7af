# A swap table on a device that does not exist, and a redirect for what went to one that does. See redirect.pyx.
from userswap.swap.map cimport SwapMapOps

cdef const SwapMapOps* redirect_design() noexcept nogil
