# The word of an id in the designs whose tree leads either to an entry or to the page in the swap cache: while an id's
# entry is CACHE, the word has the cached folio where other entries have their payload. Helpers only.
#
#   63     56 55                8    7     6   5   3   2       1        0
#   +--------+-------------------+------+----+-----+------+---------+------+
#   | map (8)|    folio (48)     |  -   |GONE|CACHE|  map | WAITERS |LOCKED|
#   +--------+-------------------+------+----+-----+------+---------+------+
from libc.stdint cimport uint64_t

from userswap.native.us cimport us_assert, us_cas, us_chaos, us_load, us_lock, us_unlock
from userswap.swap.entry cimport (
    CACHE, ENTRY_CACHED, ENTRY_LOCKED, ENTRY_PAYLOAD_SHIFT, FREE, entry_make, entry_seen, entry_type,
)
from userswap.swap.idtree cimport IdTree, id_cache, id_word, side_at
from userswap.swap.radix cimport RadixTree

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

# The swap cache of such ids: in the word of a CACHE entry, else in a side tree. See SwapMapOps.cache and cached.
cdef inline int folio_cache(IdTree* t, RadixTree* folios, uint64_t id, uint64_t folio) noexcept nogil:
    cdef uint64_t* word = id_word(t, id)
    cdef uint64_t seen = us_load(word)
    if entry_type(seen) != CACHE:
        return id_cache(t, folios, id, folio)
    us_assert((seen & ENTRY_LOCKED) != 0, "cache: under the entry's lock")
    while not us_cas(word, seen, (seen & ~WORD_FOLIO) | (word_of_folio(folio) & WORD_FOLIO)):
        seen = us_load(word)
    return 0

cdef inline uint64_t folio_cached(IdTree* t, RadixTree* folios, uint64_t id) noexcept nogil:
    cdef uint64_t* word = id_word(t, id)
    cdef uint64_t seen = us_load(word)
    cdef uint64_t folio = 0
    if entry_type(seen) == CACHE:
        return word_folio(seen)
    if seen & ENTRY_CACHED:
        us_chaos()
        us_lock(&t.mutex)
        seen = us_load(word)
        if entry_type(seen) == CACHE:
            folio = word_folio(seen)
        elif seen & ENTRY_CACHED:
            folio = side_at(folios, id)[0]
        us_unlock(&t.mutex)
    return folio
