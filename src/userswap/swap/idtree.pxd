# A tree of words with an allocator of ids, and the lock of a word: what the designs whose ids are numbers share.
# Knows an entry's LOCKED, WAITERS, GONE and type; all other bits are the design's.
#
# Locks: `mutex` (a leaf mutex) protects the shape of the tree, free ids, and whatever the design keeps under it.
# LOCKED in a word protects type and payload of that word; it may be held for as long as a device needs. A word of
# a live id changes by atomic read-modify-write only.
#
# Lifetime: an id's leaf exists from alloc to free, and see radix.pyx for lookups without a lock. Between the
# CAS of an unlock and its wake-up the id may be freed and even its leaf unmapped; the wake-up then goes to an
# address that nobody waits at, or wakes somebody who looks again.
from libc.limits cimport INT_MAX
from libc.stdint cimport int64_t, uint32_t, uint64_t

from userswap.native.us cimport (
    us_assert, us_cas, us_chaos, us_futex_wake, us_load, us_load_ptr, us_mutex, us_pause, us_word_wait,
)
from userswap.swap.entry cimport ENTRY_GONE, ENTRY_LOCKED, ENTRY_WAITERS, FREE, entry_seen, entry_type
from userswap.swap.radix cimport RADIX_MASK, Node, RadixTree, Slab, radix_leaf_of, radix_slot

# Readers load `entries.root` all the time: it has its cache lines to itself.
cdef struct IdTree:
    RadixTree entries
    char apart[112]
    us_mutex mutex
    Node* lowest                # the lowest leaf with a free id, or NULL: not known
    Node* runs                  # the leaf that runs are taken from, or NULL
    int64_t ids                 # live
    Slab slab                   # nodes; other trees under the same mutex may use it too

cdef void idtree_init(IdTree* t) noexcept nogil                     # of zeroed memory
cdef void idtree_end(IdTree* t) noexcept nogil                      # unmaps every node that is from its slab
# An id whose word is `word`, or 0: no memory. Takes the mutex.
cdef uint64_t id_alloc(IdTree* t, uint64_t word) noexcept nogil
# n (2 .. 32) ids in a row, or none. Takes the mutex.
cdef bint id_alloc_run(IdTree* t, const uint64_t* words, int n, uint64_t* ids) noexcept nogil
# The same under the mutex, for designs that have more to do under it.
cdef uint64_t id_take(IdTree* t, uint64_t word) noexcept nogil
cdef bint id_take_run(IdTree* t, const uint64_t* words, int n, uint64_t* ids) noexcept nogil
# Gives back an id that the last put has left locked. Under the mutex.
cdef void id_free(IdTree* t, uint64_t id) noexcept nogil
# See SwapMapOps.next. Takes the mutex.
cdef uint64_t id_next(IdTree* t, int device, uint64_t after, uint64_t* entry, int64_t* busy) noexcept nogil

# A side tree: words that are not 0 for few of the ids, under the same mutex and from the same slab.
cdef bint side_set(RadixTree* tree, uint64_t id, uint64_t value) noexcept nogil    # False: no memory
cdef void side_clear(RadixTree* tree, uint64_t id) noexcept nogil                  # a word that is set
cdef uint64_t* side_at(RadixTree* tree, uint64_t id) noexcept nogil                # NULL: no such leaf

# The swap cache in a side tree: ENTRY_CACHED in the word says that the id has its folio there, and both change under
# one hold of the mutex. See SwapMapOps.cache and cached.
cdef int id_cache(IdTree* t, RadixTree* folios, uint64_t id, uint64_t folio) noexcept nogil
cdef uint64_t id_cached(IdTree* t, RadixTree* folios, uint64_t id) noexcept nogil

# A side page: words of the same ids beside a leaf's own, made for a leaf when first one is wanted, and gone with the
# leaf. So who has a live id reads it without a lock. Makes the id's leaf have one; False: no memory. Takes the mutex.
cdef bint id_aside(IdTree* t, uint64_t* word) noexcept nogil
# The id's word there; NULL: its leaf has no side page.
cdef inline uint64_t* id_beside(uint64_t* word) noexcept nogil:
    cdef Node* side = <Node*>us_load_ptr(<void**>&radix_leaf_of(word).side)
    return &side.slots[(<uint64_t>word >> 3) & RADIX_MASK] if side != NULL else NULL

cdef inline uint64_t* id_word(IdTree* t, uint64_t id) noexcept nogil:
    return radix_slot(&t.entries, id)

cdef enum:
    SPINS = 64                  # most locks are held for less than a system call takes

# Waits until the word is not locked, sets `bits` (LOCKED among them); the entry.
cdef inline uint64_t word_lock(uint64_t* word, uint64_t bits) noexcept nogil:
    cdef uint64_t seen
    cdef int spins = 0
    while True:
        seen = us_load(word)
        us_assert(entry_type(seen) != FREE, "lock: the id is free")
        us_assert((seen & ENTRY_GONE) == 0, "lock: the id has no count")
        us_chaos()
        if not seen & ENTRY_LOCKED:
            if us_cas(word, seen, seen | bits):
                us_chaos()
                return entry_seen(seen)
        elif spins < SPINS:
            spins += 1
            us_pause()
        else:
            us_word_wait(word, seen, ENTRY_WAITERS)

# Locks a word that is not locked and has `entry`; no other word will do.
cdef inline bint word_try(uint64_t* word, uint64_t entry) noexcept nogil:
    cdef uint64_t seen = us_load(word)
    us_assert(entry_type(seen) != FREE, "try_owner: the id is free")
    us_chaos()
    # A CAS can fail though nobody has the lock, when a bit of the design's changes: worth another try.
    while not seen & ENTRY_LOCKED and entry_seen(seen) == entry:
        if us_cas(word, seen, seen | ENTRY_LOCKED):
            us_chaos()
            return True
        seen = us_load(word)
    return False

# After a word was unlocked that was `seen` before: the id may be gone by now (see the top).
cdef inline void word_wake(uint64_t* word, uint64_t seen) noexcept nogil:
    us_chaos()
    if seen & ENTRY_WAITERS:
        # All of them: those who find it locked again must set WAITERS again.
        us_futex_wake(<uint32_t*>word, INT_MAX)

# Unlocks with another entry. The bits of `keep` are the design's and may change until the very CAS.
cdef inline void word_unlock(uint64_t* word, uint64_t entry, uint64_t keep) noexcept nogil:
    cdef uint64_t seen
    us_assert(entry_type(entry) != FREE, "unlock: an id keeps an entry until it is freed")
    us_assert((us_load(word) & (ENTRY_LOCKED | ENTRY_GONE)) == ENTRY_LOCKED, "unlock: not locked, or no count")
    entry = entry_seen(entry)
    while True:
        seen = us_load(word)
        us_chaos()
        if us_cas(word, seen, entry | (seen & keep)):
            break
    word_wake(word, seen)
