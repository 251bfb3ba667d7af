"""Ids from a radix tree of words: see idtree.pxd for the interface and the locks.

Ids are dense, lowest leaf first, so that few ids need few nodes and a tree that was large becomes small again. Free
ids of a leaf are chained through their words: a FREE word's payload is the next free position and one, 0 at the end.
"""
from libc.errno cimport ENOMEM
from libc.stdint cimport uint64_t

from userswap.native.us cimport (
    us_and, us_assert, us_chaos, us_load, us_lock, us_locked, us_or, us_store, us_store_ptr, us_unlock, us_write,
)
from userswap.swap.entry cimport (
    ENTRY_CACHED, ENTRY_GONE, ENTRY_LOCKED, ENTRY_WAITERS, FREE, SLOT, entry_make, entry_payload, entry_seen,
    entry_type, slot_device,
)
from userswap.swap.radix cimport (
    RADIX_INDEX_BITS, RADIX_MASK, RADIX_SHIFT, RADIX_SLOTS, Node, RadixTree, radix_drop, radix_first_hole,
    radix_first_room, radix_leaf, radix_leaf_of, radix_make, radix_next_leaf, radix_room, slab_alloc, slab_delete,
    slab_free,
)


cdef void idtree_init(IdTree* t) noexcept nogil:
    t.entries.slab = &t.slab


cdef void idtree_end(IdTree* t) noexcept nogil:
    slab_delete(&t.slab)


# ---- under the mutex ----

cdef Node* leaf_new(IdTree* t, uint64_t index) noexcept nogil:
    cdef Node* leaf
    if index >> RADIX_INDEX_BITS:
        return NULL
    leaf = radix_make(&t.entries, index)
    if leaf != NULL:
        # Id 0 is never given: an empty page-table word must not name anything.
        leaf.fresh = 1 if index == 0 else 0
        leaf.free = -1
        radix_room(leaf, True)
    return leaf


# A leaf with a free id: the lowest that there is, or a new one at the lowest index that has none.
cdef Node* leaf_with_room(IdTree* t) noexcept nogil:
    cdef Node* leaf = radix_first_room(&t.entries)
    if leaf == NULL:
        leaf = leaf_new(t, radix_first_hole(&t.entries))
    t.lowest = leaf
    return leaf


# Whether every id of a leaf is taken. `used` is changed by the callers.
cdef inline bint leaf_full(Node* leaf) noexcept nogil:
    return leaf.free < 0 and leaf.fresh == RADIX_SLOTS


cdef inline void forget(IdTree* t, Node* leaf) noexcept nogil:
    if t.lowest == leaf:
        t.lowest = NULL
    if t.runs == leaf:
        t.runs = NULL


cdef void leaf_filled(IdTree* t, Node* leaf) noexcept nogil:
    radix_room(leaf, False)
    forget(t, leaf)


cdef void id_free(IdTree* t, uint64_t id) noexcept nogil:
    cdef Node* leaf = radix_leaf(&t.entries, id >> RADIX_SHIFT)
    cdef int i = id & RADIX_MASK
    cdef uint64_t* word
    us_assert(us_locked(&t.mutex), "free: under the mutex")
    us_assert(leaf != NULL, "free: no such id")
    word = &leaf.slots[i]
    us_assert(entry_type(word[0]) != FREE, "free: the id is free already")
    us_assert((word[0] & ENTRY_GONE) != 0, "free: the id has a count")
    us_assert((word[0] & (ENTRY_LOCKED | ENTRY_WAITERS)) == ENTRY_LOCKED,
              "free: locked by the last put, and nobody has a reference to wait with")
    us_chaos()
    us_store(word, entry_make(FREE, <uint64_t>(leaf.free + 1)))
    if leaf_full(leaf):
        radix_room(leaf, True)
    leaf.free = i
    leaf.used -= 1
    if leaf.used == 0:
        # No id of this leaf is live: nobody holds a reference or knows of storage that would lead here.
        forget(t, leaf)
        if leaf.side != NULL:
            slab_free(&t.slab, leaf.side)
        radix_drop(&t.entries, leaf)
    elif t.lowest != NULL and leaf.index < t.lowest.index:
        t.lowest = leaf
    us_write(&t.ids, t.ids - 1)


cdef bint side_set(RadixTree* tree, uint64_t id, uint64_t value) noexcept nogil:
    cdef Node* leaf = radix_make(tree, id >> RADIX_SHIFT)
    if leaf == NULL:
        return False
    if leaf.slots[id & RADIX_MASK] == 0:
        leaf.used += 1
    leaf.slots[id & RADIX_MASK] = value
    return True


cdef void side_clear(RadixTree* tree, uint64_t id) noexcept nogil:
    cdef Node* leaf = radix_leaf(tree, id >> RADIX_SHIFT)
    us_assert(leaf != NULL and leaf.slots[id & RADIX_MASK] != 0, "a word of a side tree is cleared once")
    leaf.slots[id & RADIX_MASK] = 0
    leaf.used -= 1
    if leaf.used == 0:
        radix_drop(tree, leaf)


cdef uint64_t* side_at(RadixTree* tree, uint64_t id) noexcept nogil:
    cdef Node* leaf = radix_leaf(tree, id >> RADIX_SHIFT)
    return &leaf.slots[id & RADIX_MASK] if leaf != NULL else NULL


cdef uint64_t id_take(IdTree* t, uint64_t word) noexcept nogil:
    cdef Node* leaf = t.lowest
    cdef int i
    us_assert(us_locked(&t.mutex), "alloc: under the mutex")
    us_assert(entry_type(word) != FREE, "an id is given with an entry")
    if leaf == NULL:
        leaf = leaf_with_room(t)
        if leaf == NULL:
            return 0
    i = leaf.free
    if i >= 0:
        us_assert(entry_type(leaf.slots[i]) == FREE, "a free id has a FREE word")
        leaf.free = <int>entry_payload(leaf.slots[i]) - 1
    else:
        i = leaf.fresh
        leaf.fresh += 1
    leaf.used += 1
    us_store(&leaf.slots[i], word)
    if leaf_full(leaf):
        leaf_filled(t, leaf)
    us_chaos()
    us_write(&t.ids, t.ids + 1)
    return (leaf.index << RADIX_SHIFT) | <uint64_t>i


cdef bint id_take_run(IdTree* t, const uint64_t* words, int n, uint64_t* ids) noexcept nogil:
    cdef Node* leaf = t.runs
    cdef int i
    us_assert(us_locked(&t.mutex), "alloc: under the mutex")
    if leaf == NULL or leaf.fresh + n > RADIX_SLOTS:
        leaf = leaf_with_room(t)
        if leaf != NULL and leaf.fresh + n > RADIX_SLOTS:
            # Runs get a leaf of their own; what they leave of it goes to single ids, lowest leaf first.
            leaf = leaf_new(t, radix_first_hole(&t.entries))
        if leaf == NULL:
            return False
        t.runs = leaf
    for i in range(n):
        us_assert(entry_type(words[i]) != FREE, "an id is given with an entry")
        us_store(&leaf.slots[leaf.fresh], words[i])
        ids[i] = (leaf.index << RADIX_SHIFT) | <uint64_t>leaf.fresh
        leaf.fresh += 1
    leaf.used += n
    if leaf_full(leaf):
        leaf_filled(t, leaf)
    us_chaos()
    us_write(&t.ids, t.ids + n)
    return True


# ---- these take the mutex ----

cdef uint64_t id_alloc(IdTree* t, uint64_t word) noexcept nogil:
    cdef uint64_t id
    us_lock(&t.mutex)
    id = id_take(t, word)
    us_unlock(&t.mutex)
    return id


cdef bint id_alloc_run(IdTree* t, const uint64_t* words, int n, uint64_t* ids) noexcept nogil:
    cdef bint done
    us_lock(&t.mutex)
    done = id_take_run(t, words, n, ids)
    us_unlock(&t.mutex)
    return done


cdef int id_cache(IdTree* t, RadixTree* folios, uint64_t id, uint64_t folio) noexcept nogil:
    cdef uint64_t* word = id_word(t, id)
    cdef int result = 0
    us_assert((us_load(word) & ENTRY_LOCKED) != 0, "cache: under the entry's lock")
    us_lock(&t.mutex)
    if folio == 0:
        if us_load(word) & ENTRY_CACHED:
            us_and(word, ~<uint64_t>ENTRY_CACHED)
            us_chaos()
            side_clear(folios, id)
    elif side_set(folios, id, folio):
        us_chaos()
        us_or(word, ENTRY_CACHED)
    else:
        result = -ENOMEM
    us_unlock(&t.mutex)
    return result


cdef uint64_t id_cached(IdTree* t, RadixTree* folios, uint64_t id) noexcept nogil:
    cdef uint64_t* word = id_word(t, id)
    cdef uint64_t folio = 0
    if us_load(word) & ENTRY_CACHED:
        us_chaos()
        us_lock(&t.mutex)
        if us_load(word) & ENTRY_CACHED:
            folio = side_at(folios, id)[0]
        us_unlock(&t.mutex)
    return folio


cdef bint id_aside(IdTree* t, uint64_t* word) noexcept nogil:
    cdef Node* leaf = radix_leaf_of(word)
    cdef Node* side
    us_lock(&t.mutex)
    if leaf.side == NULL:
        side = slab_alloc(&t.slab)
        us_chaos()
        us_store_ptr(<void**>&leaf.side, side)
    us_unlock(&t.mutex)
    return leaf.side != NULL


cdef uint64_t id_next(IdTree* t, int device, uint64_t after, uint64_t* entry, int64_t* busy) noexcept nogil:
    cdef uint64_t id = after + 1
    cdef uint64_t seen
    cdef Node* leaf
    cdef int i
    while True:
        # A leaf at a time, so that nobody waits for long. What is seen under the mutex is not freed.
        us_lock(&t.mutex)
        leaf = radix_next_leaf(&t.entries, id >> RADIX_SHIFT)
        if leaf == NULL:
            us_unlock(&t.mutex)
            return 0
        if leaf.index > id >> RADIX_SHIFT:
            id = leaf.index << RADIX_SHIFT
        for i in range(<int>(id & RADIX_MASK), leaf.fresh):
            seen = us_load(&leaf.slots[i])
            if entry_type(seen) == SLOT and slot_device(seen) == device:
                if word_try(&leaf.slots[i], entry_seen(seen)):
                    us_unlock(&t.mutex)
                    entry[0] = entry_seen(seen)
                    return (leaf.index << RADIX_SHIFT) | <uint64_t>i
                busy[0] += 1
        id = (leaf.index + 1) << RADIX_SHIFT
        us_unlock(&t.mutex)
