# The word of an id in the designs whose tree leads either to an entry or to the page in the swap cache: while an id's
# entry is CACHE, the word has the cached folio where other entries have their payload. Helpers only.
#
#   63     56 55                8    7     6   5   3   2       1        0
#   +--------+-------------------+------+----+-----+------+---------+------+
#   | map (8)|    folio (48)     |  -   |GONE|CACHE|  map | WAITERS |LOCKED|
#   +--------+-------------------+------+----+-----+------+---------+------+
from libc.limits cimport INT_MAX
from libc.stdint cimport uint32_t, uint64_t

from userswap.native.us cimport us_assert, us_cas, us_chaos, us_futex_wake, us_load
from userswap.swap.entry cimport (
    CACHE, ENTRY_LOCKED, ENTRY_PAYLOAD_SHIFT, ENTRY_WAITERS, FREE, entry_make, entry_seen, entry_type,
)

cdef extern from *:
    """
    #define US_WORD_FOLIO (0xFFFFFFFFFFFFull << 8)
    """
    const uint64_t WORD_FOLIO "US_WORD_FOLIO"

cdef inline uint64_t word_of_folio(uint64_t folio) noexcept nogil:
    return entry_make(CACHE, 0) | (folio << ENTRY_PAYLOAD_SHIFT)

cdef inline uint64_t word_folio(uint64_t word) noexcept nogil:
    return (word & WORD_FOLIO) >> ENTRY_PAYLOAD_SHIFT

# The entry that callers see; of a word, or of what word_lock() gives.
cdef inline uint64_t word_shown(uint64_t word) noexcept nogil:
    return entry_make(CACHE, 0) if entry_type(word) == CACHE else entry_seen(word)

# word_try() of idtree.pxd for such words.
cdef inline bint word_try_shown(uint64_t* word, uint64_t entry) noexcept nogil:
    cdef uint64_t seen = us_load(word)
    us_assert(entry_type(seen) != FREE, "try_owner: the id is free")
    us_chaos()
    while not seen & ENTRY_LOCKED and word_shown(seen) == entry:
        if us_cas(word, seen, seen | ENTRY_LOCKED):
            us_chaos()
            return True
        seen = us_load(word)
    return False

# After a word was unlocked that was `seen` before: the id may be gone by now, see idtree.pxd.
cdef inline void word_wake(uint64_t* word, uint64_t seen) noexcept nogil:
    us_chaos()
    if seen & ENTRY_WAITERS:
        us_futex_wake(<uint32_t*>word, INT_MAX)
