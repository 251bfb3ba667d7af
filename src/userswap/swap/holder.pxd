# A holder: a word with a swap id in it, as a page-table word is. What the swap room knows of such a word, and all it
# knows: where the id is, how it is locked, how it is given another id. The other bits are the memory room's
# (memory/pagetable.pxd) and pass through.
#
#   63               16 15          4    3       2    1 0
#   +------------------+-------------+---------+------+---+
#   | swap id (48)     | the room's  | WAITERS | BUSY | … |
#   +------------------+-------------+---------+------+---+
#
# Who sets BUSY is the only one to change the word until it is released, but for WAITERS.
from libc.stdint cimport uint64_t

from userswap.native.us cimport us_assert, us_cas, us_chaos, us_load, us_word_release

cdef enum:
    HOLDER_BUSY = 4
    HOLDER_WAITERS = 8
    HOLDER_ID_SHIFT = 16

cdef inline uint64_t holder_id(uint64_t word) noexcept nogil:
    return word >> HOLDER_ID_SHIFT

# Locks a word that has this id, unless somebody is at it. Only where the holder is known to live: its storage does.
cdef inline bint holder_try(uint64_t* at, uint64_t id) noexcept nogil:
    cdef uint64_t seen = us_load(at)
    us_chaos()
    return seen & HOLDER_BUSY == 0 and holder_id(seen) == id and us_cas(at, seen, seen | HOLDER_BUSY)

# Unlocks it, with `id` in it from now on.
cdef inline void holder_release(uint64_t* at, uint64_t id) noexcept nogil:
    cdef uint64_t rest = us_load(at) & ((<uint64_t>1 << HOLDER_ID_SHIFT) - 1)
    us_assert(rest & HOLDER_BUSY and holder_id(us_load(at)) != 0, "who unlocks a holder has it locked")
    us_chaos()
    us_word_release(at, (id << HOLDER_ID_SHIFT) | (rest & ~<uint64_t>(HOLDER_BUSY | HOLDER_WAITERS)), HOLDER_WAITERS)
