"""The default design: two radix trees with sparse counts. Touches its trees only; knows what a swap
entry's flags are, not what its payload means.

Tree 1 maps an id to its entry word. Tree 2 maps an id to its swap count, but only while that is not one:
SHARED in the entry word says so. For memory that is not shared an id is one word, found in one lookup.

Locks. `mutex` (a leaf mutex: nothing else is taken under it, nothing waits under it) protects the shape of
both trees, free ids, every word of tree 2, and SHARED. LOCKED in an entry word protects type and payload
of that word. The two are independent on purpose: LOCKED may be held for as long as a device needs, and a
fork or a put of a shared id must not wait for that. So SHARED changes while somebody else has the entry
LOCKED, takes it or gives it back, and therefore every change of a live word is an atomic
read-modify-write: CAS for LOCKED and the payload (lock, unlock), or/and for SHARED. unlock takes SHARED from
the word it replaces, never from the word that lock saw.

Order between the trees. Under one hold of the mutex:

  one becomes more:  the count is stored in tree 2, then SHARED is set.
  more becomes one:  SHARED is cleared, then the count is erased from tree 2.

So SHARED set means that tree 2 has the count, at every instant, and who reads SHARED under the mutex sees
both trees whole. Who reads it without the mutex:

- dup, add: never; they read it again under the mutex.
- put and count, and they hold a reference. SHARED clear: theirs is the only one, and only a holder of a
  reference can dup, so it stays clear and no mutex is needed. SHARED set is a hint: another holder
  may put meanwhile and leave theirs as the last. They take the mutex and look again.
- unlock: carries the bit over and does not look at it. lock, trylock: mask it off.

dup against put on one id: both under the mutex, in some order, unless put saw SHARED clear, and then the one
reference that a dup would need is the one being put. Two puts with count two: the first to get the mutex makes
it one, the second finds SHARED clear under the mutex and goes on as the last. unlock against either: its
CAS fails if SHARED changed after its load, and it tries again.

The last put locks the entry, which may wait for writeback to finish; the entry it returns is the one that
writeback left. It sets GONE in the same CAS. From then to free the word is the caller's alone: it stays LOCKED,
so a trylock by who found the storage fails, and nobody else has a reference to wait or dup with.

Lifetime: an id's leaf exists from alloc to free, and see radix.pyx for lookups without a lock. Between the
CAS of unlock and its wake-up the id may be freed and even its leaf unmapped; the wake-up then goes to
an address that nobody waits at, or wakes somebody who looks again.
"""
from libc.errno cimport ENOMEM, EOVERFLOW
from libc.limits cimport INT_MAX
from libc.stdint cimport int64_t, uint32_t, uint64_t

from userswap.native.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap
from userswap.native.us cimport (
    us_and, us_assert, us_cas, us_chaos, us_futex_wake, us_load, us_lock, us_mutex, us_or, us_pause, us_read,
    us_store, us_unlock, us_word_wait, us_write,
)
from userswap.swap.entry cimport (
    ENTRY_FLAGS, ENTRY_GONE, ENTRY_LOCKED, ENTRY_SHARED, ENTRY_WAITERS, FREE, entry_make, entry_payload,
    entry_type,
)
from userswap.swap.map cimport SwapMap, SwapMapOps
from userswap.swap.radix cimport (
    RADIX_INDEX_BITS, RADIX_MASK, RADIX_SHIFT, RADIX_SLOTS, Node, RadixTree, Slab, radix_drop, radix_first_hole,
    radix_first_room, radix_leaf, radix_make, radix_room, radix_slot, slab_delete,
)


cdef enum:
    MAP_BYTES = 4096            # what the map itself lives in
    SPINS = 64                  # most locks are held for less than a system call takes

cdef int64_t COUNT_MAX = <int64_t>1 << 62

# Readers load `entries.root` all the time: it has its cache lines to itself.
cdef struct Sparse:
    SwapMap head
    RadixTree entries           # tree 1
    char apart[104]
    us_mutex mutex
    RadixTree counts            # tree 2
    Node* lowest                # the lowest leaf with a free id, or NULL: not known
    int64_t ids
    Slab slab                   # nodes of both trees


cdef SwapMap* sparse_new() noexcept nogil:
    cdef void* memory = mmap(NULL, MAP_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    cdef Sparse* m
    if memory == MAP_FAILED:
        return NULL
    m = <Sparse*>memory
    m.head.ops = &ops
    m.entries.slab = &m.slab
    m.counts.slab = &m.slab
    return &m.head


cdef void sparse_delete(SwapMap* map) noexcept nogil:
    cdef Sparse* m = <Sparse*>map
    slab_delete(&m.slab)
    munmap(m, MAP_BYTES)


# ---- ids ----

# A leaf with a free id: the lowest that there is, or a new one at the lowest index that has none.
# Under the mutex.
cdef Node* leaf_with_room(Sparse* m) noexcept nogil:
    cdef Node* leaf = radix_first_room(&m.entries)
    cdef uint64_t index
    if leaf == NULL:
        index = radix_first_hole(&m.entries)
        if index >> RADIX_INDEX_BITS:
            return NULL
        leaf = radix_make(&m.entries, index)
        if leaf == NULL:
            return NULL
        # Id 0 is never given: an empty page-table word must not name anything.
        leaf.fresh = 1 if index == 0 else 0
        leaf.free = -1
        radix_room(leaf, True)
    m.lowest = leaf
    return leaf


# Whether every id of a leaf is taken. `used` is changed by the callers.
cdef inline bint leaf_full(Node* leaf) noexcept nogil:
    return leaf.free < 0 and leaf.fresh == RADIX_SLOTS


cdef uint64_t sparse_alloc(SwapMap* map, uint64_t entry) noexcept nogil:
    cdef Sparse* m = <Sparse*>map
    cdef Node* leaf
    cdef int i
    cdef uint64_t id
    us_assert(entry_type(entry) != FREE, "an id is given with an entry")
    us_lock(&m.mutex)
    leaf = m.lowest
    if leaf == NULL:
        leaf = leaf_with_room(m)
        if leaf == NULL:
            us_unlock(&m.mutex)
            return 0
    i = leaf.free
    if i >= 0:
        # Payload of a FREE word: the next free position and one, 0 at the end.
        us_assert(entry_type(leaf.slots[i]) == FREE, "a free id has a FREE word")
        leaf.free = <int>entry_payload(leaf.slots[i]) - 1
    else:
        i = leaf.fresh
        leaf.fresh += 1
    leaf.used += 1
    us_store(&leaf.slots[i], entry & ~<uint64_t>ENTRY_FLAGS)
    if leaf_full(leaf):
        radix_room(leaf, False)
        m.lowest = NULL
    id = (leaf.index << RADIX_SHIFT) | <uint64_t>i
    us_chaos()
    us_write(&m.ids, m.ids + 1)
    us_unlock(&m.mutex)
    return id


cdef void sparse_free(SwapMap* map, uint64_t id) noexcept nogil:
    cdef Sparse* m = <Sparse*>map
    cdef Node* leaf
    cdef uint64_t* word
    cdef int i = id & RADIX_MASK
    us_lock(&m.mutex)
    leaf = radix_leaf(&m.entries, id >> RADIX_SHIFT)
    us_assert(leaf != NULL, "free: no such id")
    word = &leaf.slots[i]
    us_assert(entry_type(word[0]) != FREE, "free: the id is free already")
    us_assert((word[0] & ENTRY_GONE) != 0, "free: the id has a count")
    us_assert((word[0] & (ENTRY_LOCKED | ENTRY_SHARED | ENTRY_WAITERS)) == ENTRY_LOCKED,
              "free: locked by the last put, not shared, and nobody has a reference to wait with")
    us_chaos()
    us_store(word, entry_make(FREE, <uint64_t>(leaf.free + 1)))
    if leaf_full(leaf):
        radix_room(leaf, True)
    leaf.free = i
    leaf.used -= 1
    if leaf.used == 0:
        # No id of this leaf is live: nobody holds a reference or knows of storage that would lead here.
        if m.lowest == leaf:
            m.lowest = NULL
        radix_drop(&m.entries, leaf)
    elif m.lowest != NULL and leaf.index < m.lowest.index:
        m.lowest = leaf
    us_write(&m.ids, m.ids - 1)
    us_unlock(&m.mutex)


# ---- the lock of an entry; no mutex ----

# Waits until the entry is not locked, locks it with `bits`, returns it without flags.
cdef uint64_t lock_word(uint64_t* word, uint64_t bits) noexcept nogil:
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
                return seen & ~<uint64_t>ENTRY_FLAGS
        elif spins < SPINS:
            spins += 1
            us_pause()
        else:
            us_word_wait(word, seen, ENTRY_WAITERS)


cdef uint64_t sparse_lock(SwapMap* map, uint64_t id) noexcept nogil:
    return lock_word(radix_slot(&(<Sparse*>map).entries, id), ENTRY_LOCKED)


cdef uint64_t sparse_trylock(SwapMap* map, uint64_t id) noexcept nogil:
    cdef uint64_t* word = radix_slot(&(<Sparse*>map).entries, id)
    cdef uint64_t seen = us_load(word)
    us_assert(entry_type(seen) != FREE, "trylock: the id is free")
    us_chaos()
    # A CAS can fail though nobody has the lock, when SHARED changes: that is worth another try.
    while not seen & ENTRY_LOCKED:
        if us_cas(word, seen, seen | ENTRY_LOCKED):
            us_chaos()
            return seen & ~<uint64_t>ENTRY_FLAGS
        seen = us_load(word)
    return 0


cdef void sparse_unlock(SwapMap* map, uint64_t id, uint64_t entry) noexcept nogil:
    cdef uint64_t* word = radix_slot(&(<Sparse*>map).entries, id)
    cdef uint64_t seen
    us_assert(entry_type(entry) != FREE, "unlock: an id keeps an entry until it is freed")
    us_assert((us_load(word) & (ENTRY_LOCKED | ENTRY_GONE)) == ENTRY_LOCKED, "unlock: not locked, or no count")
    entry &= ~<uint64_t>ENTRY_FLAGS
    while True:
        # SHARED and WAITERS may be set until the very CAS.
        seen = us_load(word)
        us_chaos()
        if us_cas(word, seen, entry | (seen & ENTRY_SHARED)):
            break
    us_chaos()
    if seen & ENTRY_WAITERS:
        # All of them: those who find it locked again must set WAITERS again.
        us_futex_wake(<uint32_t*>word, INT_MAX)


# ---- counts ----

cdef inline uint64_t* count_word(Sparse* m, uint64_t id) noexcept nogil:
    cdef Node* leaf = radix_leaf(&m.counts, id >> RADIX_SHIFT)
    us_assert(leaf != NULL, "a shared id has a count")
    us_assert(leaf.slots[id & RADIX_MASK] > 1, "a shared id has a count above one")
    return &leaf.slots[id & RADIX_MASK]


# More becomes one. Under the mutex.
cdef void unshare(Sparse* m, uint64_t id, uint64_t* word) noexcept nogil:
    cdef Node* leaf = radix_leaf(&m.counts, id >> RADIX_SHIFT)
    us_and(word, ~<uint64_t>ENTRY_SHARED)
    us_chaos()
    leaf.slots[id & RADIX_MASK] = 0
    leaf.used -= 1
    if leaf.used == 0:
        radix_drop(&m.counts, leaf)     # tree 2 is read under the mutex only


cdef int sparse_add(SwapMap* map, uint64_t id, int64_t n) noexcept nogil:
    cdef Sparse* m = <Sparse*>map
    cdef uint64_t* word = radix_slot(&m.entries, id)
    cdef uint64_t* number
    cdef int64_t count = 1
    cdef Node* leaf
    cdef int result = 0
    us_lock(&m.mutex)
    us_assert(entry_type(us_load(word)) != FREE, "dup: the id is free")
    us_assert((us_load(word) & ENTRY_GONE) == 0, "dup: the id has no count")
    us_chaos()
    if us_load(word) & ENTRY_SHARED:
        number = count_word(m, id)
        count = <int64_t>number[0]
        if n > COUNT_MAX - count or n < 1 - count:
            result = -EOVERFLOW
        elif count + n == 1:
            unshare(m, id, word)
        else:
            number[0] = <uint64_t>(count + n)
    elif n > COUNT_MAX - 1 or n < 0:
        result = -EOVERFLOW
    elif n:
        leaf = radix_make(&m.counts, id >> RADIX_SHIFT)
        if leaf == NULL:
            result = -ENOMEM
        else:
            leaf.slots[id & RADIX_MASK] = <uint64_t>(1 + n)
            leaf.used += 1
            us_chaos()
            us_or(word, ENTRY_SHARED)
    us_unlock(&m.mutex)
    return result


cdef int sparse_dup(SwapMap* map, uint64_t id) noexcept nogil:
    return sparse_add(map, id, 1)


cdef int64_t sparse_put(SwapMap* map, uint64_t id, uint64_t* entry) noexcept nogil:
    cdef Sparse* m = <Sparse*>map
    cdef uint64_t* word = radix_slot(&m.entries, id)
    cdef uint64_t* number
    cdef int64_t left
    us_assert(entry_type(us_load(word)) != FREE, "put: the id is free")
    us_assert((us_load(word) & ENTRY_GONE) == 0, "put: the id has no count")
    if us_load(word) & ENTRY_SHARED:
        us_chaos()
        us_lock(&m.mutex)
        if us_load(word) & ENTRY_SHARED:
            number = count_word(m, id)
            left = <int64_t>number[0] - 1
            if left == 1:
                unshare(m, id, word)
            else:
                number[0] = <uint64_t>left
            us_unlock(&m.mutex)
            entry[0] = 0        # the reference is gone: `word` may not be touched any more
            return left
        us_unlock(&m.mutex)
    us_chaos()
    entry[0] = lock_word(word, ENTRY_LOCKED | ENTRY_GONE)
    us_assert((us_load(word) & ENTRY_SHARED) == 0, "put: nobody but the last holder could dup")
    return 0


cdef int64_t sparse_count(SwapMap* map, uint64_t id) noexcept nogil:
    cdef Sparse* m = <Sparse*>map
    cdef uint64_t* word = radix_slot(&m.entries, id)
    cdef uint64_t seen = us_load(word)
    cdef int64_t count = 1
    us_assert(entry_type(seen) != FREE, "count: the id is free")
    if seen & ENTRY_GONE:
        return 0
    if seen & ENTRY_SHARED:
        us_chaos()
        us_lock(&m.mutex)
        if us_load(word) & ENTRY_SHARED:
            count = <int64_t>count_word(m, id)[0]
        us_unlock(&m.mutex)
    return count


cdef int64_t sparse_ids(SwapMap* map) noexcept nogil:
    return us_read(&(<Sparse*>map).ids)


cdef int64_t sparse_metadata(SwapMap* map) noexcept nogil:
    return MAP_BYTES + us_read(&(<Sparse*>map).slab.bytes)


cdef SwapMapOps ops
ops.name = b"sparse"
ops.new = sparse_new
ops.delete = sparse_delete
ops.alloc = sparse_alloc
ops.free = sparse_free
ops.lock = sparse_lock
ops.trylock = sparse_trylock
ops.unlock = sparse_unlock
ops.dup = sparse_dup
ops.put = sparse_put
ops.add = sparse_add
ops.count = sparse_count
ops.ids = sparse_ids
ops.metadata = sparse_metadata


cdef const SwapMapOps* sparse_design() noexcept nogil:
    return &ops
