# Arrays that are mostly empty: address space is reserved at once, memory comes page by page where something is
# stored, and goes back when a page holds nothing any more. The hardware's page table is the tree. Designs whose ids
# are positions keep what is optional in such arrays: a store can't fail, so unlock can't either.
#
# Locks: none here. `used` of a page and the words in it change under one lock of the owner's, the same each time; the
# totals are atomic. Readers need no lock: a page without memory reads as zeros, and no address goes away.
from libc.stdint cimport int64_t, uint16_t, uint64_t

from userswap.native.us cimport us_add, us_chaos

cdef enum:
    PAGE = 4096
    IDLE_PAGES = 4              # empty pages that keep their memory: an id that comes and goes costs no system call

cdef struct Pages:              # totals, of all arrays of a map
    int64_t bytes               # memory there is
    int64_t idle                # pages with memory that hold nothing

# Address space of zeros, or NULL.
cdef void* pages_reserve(uint64_t length) noexcept nogil
# The same with all of its memory at once, as for what swapon allocates.
cdef void* pages_populate(uint64_t length) noexcept nogil
# n words of the page hold nothing any more, and are 0 again.
cdef void page_less(Pages* total, uint16_t* used, int n, void* page) noexcept nogil

# n words of the page that are 0 are about to be stored. `used`: 0 without memory, else words in use and one.
cdef inline void page_more(Pages* total, uint16_t* used, int n) noexcept nogil:
    cdef int now = used[0]
    if now == 0:
        us_add(&total.bytes, PAGE)
        now = 1
    elif now == 1:
        us_add(&total.idle, -1)
    us_chaos()
    used[0] = <uint16_t>(now + n)

cdef inline uint64_t page_round(uint64_t length) noexcept nogil:
    return (length + PAGE - 1) & ~<uint64_t>(PAGE - 1)
