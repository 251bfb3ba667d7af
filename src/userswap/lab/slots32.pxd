# swap_map as Linux 6.3 has it, on a machine of 4-byte words, for the lab's `slot`: a byte for each slot, which says
# whether it is free, how many references it has (with continuation pages) and whether somebody is at it; the cgroup
# and the bit for a page of zeros beside it; and the allocator. Knows neither trees nor entries.
#
# The byte:  0 free · count to 0x3e · 0x40 HAS_CACHE · 0x80 CONTINUED      (as in swap/designs/slot.pyx)
#
# Locks: none here but HAS_CACHE, which is the lock of a slot. Everything runs under the owner's mutex, that stands for
# the device's lock and the clusters'; slot_claim() takes it, and gives it up while it waits for HAS_CACHE.
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from userswap.lab.nodes32 cimport Pool
from userswap.native.us cimport us_mutex

cdef enum:
    BUCKETS = 16                # of threads that wait for HAS_CACHE
    SLOT_COUNT_MOST = 0x3e      # that a byte can have: SWAP_MAP_MAX

cdef struct Cluster:            # of 256 slots: 8 bytes
    uint32_t next               # of the unused ones: number and one
    uint32_t count              # slots that are not free

cdef struct Bucket:
    uint32_t turn               # the futex
    uint32_t waiters

cdef struct Slots:
    Pool* pool                  # continuation pages come from here
    uint64_t slots
    uint64_t clusters
    uint64_t static_bytes
    # in one mapping
    uint8_t* swap_map
    uint16_t* cgroups
    uint32_t* zeros
    Cluster* cluster
    uint32_t* digits            # pages: DIGITS for each 4096 slots
    int64_t taken
    uint32_t first              # unused clusters: number and one
    uint32_t last
    uint32_t current            # the same: where slots come from; 0: nowhere
    uint32_t position
    uint64_t scan               # where to look when no cluster is unused
    Bucket[BUCKETS] buckets

cdef bint slots_init(Slots* s, Pool* pool, uint64_t slots) noexcept nogil      # of zeroed memory; False: no memory
cdef void slots_end(Slots* s) noexcept nogil
# A slot whose byte is HAS_CACHE from now on, so that nobody has it; -1: none is free.
cdef int64_t slot_take(Slots* s) noexcept nogil
cdef void slot_begin(Slots* s, uint32_t at) noexcept nogil              # count 1, and nobody is at it
cdef void slot_give(Slots* s, uint32_t at) noexcept nogil               # its byte is HAS_CACHE and nothing else

# Takes the mutex once nobody is at the slot.
cdef void slot_claim(Slots* s, us_mutex* mutex, uint32_t at) noexcept nogil
cdef bint slot_locked(Slots* s, uint32_t at) noexcept nogil
cdef void slot_hold(Slots* s, uint32_t at) noexcept nogil               # sets HAS_CACHE
# Clears it, and gives up the mutex; who waits is woken.
cdef void slot_release(Slots* s, us_mutex* mutex, uint32_t at) noexcept nogil

cdef int64_t slot_count(Slots* s, uint32_t at) noexcept nogil
# False: there is no memory for a continuation page, and the count is what it was. 0 is always possible.
cdef bint slot_count_set(Slots* s, uint32_t at, int64_t count) noexcept nogil

cdef bint slot_zero(Slots* s, uint32_t at) noexcept nogil
cdef void slot_zero_set(Slots* s, uint32_t at, bint zero) noexcept nogil
