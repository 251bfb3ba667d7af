# The owner of a pool, for the front ends (numpy_hook).
from userswap.memory.regions cimport MemoryPool

cdef class Core:
    cdef MemoryPool* pool
    cdef MemoryPool* alive(self) except NULL
