"""Two radix trees: one leads to the entry or to the page in the swap cache, the other to the swap count, always.

Models: the message of March 2023 to the letter ("one radix tree contains swap_entry/zswap_entry/swapcache, and the
other radix tree contains the swap count"; linux-mm, LSF/MM/BPF topic "Swap Abstraction / Native Zswap"). Its open
questions are the lookup for every count, how the trees synchronize, and what their nodes take. Here a node is a page
with 64 bytes of header (radix.pxd), and both trees share the ids, a slab and a mutex, so an id is 16.25 bytes where
leaves are full.

  tree 1, stored      |    -    | payload (45) | CACHED | GONE | type  | - | WAITERS | LOCKED |
  tree 1, cached page |  - (8)  |  folio (48)  |   -    | GONE | CACHE | - | WAITERS | LOCKED |
  tree 2              | count (64), one included |

A stored id that is in the swap cache too (CACHED: the copy is kept) has its folio in a side tree; the message does
not say where both would be. It goes into the word when the copy is given up, which needs no memory; the way back may,
and without any the swap cache, a hint, forgets the folio.

Locks, and how the trees synchronize. They need not: an id has its words in both from alloc to free, put there and
taken out under one hold of the mutex (a leaf mutex, for the shape of the trees, the side tree and CACHED). In
between, a count changes by CAS of the word of tree 2, a look-up without a lock, since the leaf of a live id is there;
LOCKED protects tree 1's word, and whoever has it is alone with that word but for WAITERS, so that unlock is one
exchange. They meet in one place: a put that finds all references to be its own leaves tree 2 alone and locks tree 1's
word with GONE. Nobody else can dup, so the count stays what it was until free.

Different from the kernel: look-ups would run under RCU; here the reference keeps the leaves.
"""
from libc.errno cimport EOVERFLOW
from libc.stdint cimport int64_t, uint64_t

from userswap.native.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap
from userswap.native.us cimport (
    us_assert, us_cas, us_chaos, us_load, us_lock, us_or, us_pause, us_read, us_swap, us_unlock,
)
from userswap.swap.cacheword cimport folio_cache, folio_cached, word_folio, word_of_folio, word_shown, word_try_shown
from userswap.swap.entry cimport CACHE, ENTRY_CACHED, ENTRY_GONE, ENTRY_LOCKED, FREE, entry_seen, entry_type
from userswap.swap.idtree cimport (
    IdTree, id_free, id_next, id_take, id_take_run, id_word, idtree_end, idtree_init, side_at, side_clear, side_set,
    word_lock, word_wake,
)
from userswap.swap.map cimport SwapMap, SwapMapOps, SwapMapOptions
from userswap.swap.radix cimport RadixTree, radix_slot


cdef enum:
    MAP_BYTES = 4096            # what the map itself lives in

cdef int64_t COUNT_MAX = <int64_t>1 << 62

cdef struct TwoTrees:
    SwapMap head
    RadixTree counts            # tree 2: its root is read all the time, as tree 1's is
    char apart[104]
    IdTree tree                 # tree 1, the ids, and the mutex
    RadixTree folios            # of stored ids that are in the swap cache


cdef SwapMap* two_trees_new(const SwapMapOptions* options) noexcept nogil:
    cdef void* memory = mmap(NULL, MAP_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    cdef TwoTrees* m
    if memory == MAP_FAILED:
        return NULL
    m = <TwoTrees*>memory
    m.head.ops = &ops
    idtree_init(&m.tree)
    m.counts.slab = &m.tree.slab
    m.folios.slab = &m.tree.slab
    return &m.head


cdef void two_trees_delete(SwapMap* map) noexcept nogil:
    idtree_end(&(<TwoTrees*>map).tree)
    munmap(map, MAP_BYTES)


# ---- ids ----

# Out of both trees again, or at last. Under the mutex.
cdef void forget(TwoTrees* m, uint64_t id, bint counted) noexcept nogil:
    if counted:
        side_clear(&m.counts, id)
    us_chaos()
    id_free(&m.tree, id)


cdef bint two_trees_alloc_run(SwapMap* map, const uint64_t* entries, uint64_t holder, int n,
                              uint64_t* ids) noexcept nogil:
    cdef TwoTrees* m = <TwoTrees*>map
    cdef int i = 0
    cdef int j
    us_lock(&m.tree.mutex)
    if n == 1:
        ids[0] = id_take(&m.tree, entries[0])
        if ids[0] == 0:
            n = 0
    elif not id_take_run(&m.tree, entries, n, ids):
        n = 0
    while i < n and side_set(&m.counts, ids[i], 1):
        i += 1
    if i < n:
        for j in range(n):
            us_or(id_word(&m.tree, ids[j]), ENTRY_LOCKED | ENTRY_GONE)
            forget(m, ids[j], j < i)
    us_unlock(&m.tree.mutex)
    return n and i == n


cdef uint64_t two_trees_alloc(SwapMap* map, uint64_t entry, uint64_t holder) noexcept nogil:
    cdef uint64_t id = 0
    entry = entry_seen(entry)
    us_assert(entry_type(entry) != CACHE, "a new id is stored somewhere")
    return id if two_trees_alloc_run(map, &entry, holder, 1, &id) else 0


cdef void two_trees_free(SwapMap* map, uint64_t id) noexcept nogil:
    cdef TwoTrees* m = <TwoTrees*>map
    cdef uint64_t seen
    us_lock(&m.tree.mutex)
    seen = us_load(id_word(&m.tree, id))
    if entry_type(seen) != CACHE and seen & ENTRY_CACHED:
        side_clear(&m.folios, id)
    forget(m, id, True)
    us_unlock(&m.tree.mutex)


# ---- the entry ----

cdef void set_entry(TwoTrees* m, uint64_t id, uint64_t entry) noexcept nogil:
    cdef uint64_t* word = id_word(&m.tree, id)
    cdef uint64_t seen = us_load(word)
    cdef uint64_t folio
    us_assert(entry_type(entry) != FREE, "unlock: an id keeps an entry until it is freed")
    us_assert((seen & (ENTRY_LOCKED | ENTRY_GONE)) == ENTRY_LOCKED, "unlock: not locked, or no count")
    entry = entry_seen(entry)
    us_chaos()
    if entry_type(entry) != CACHE and entry_type(seen) != CACHE:
        seen = us_swap(word, entry | (seen & ENTRY_CACHED))
    elif entry_type(seen) != CACHE:
        us_assert((seen & ENTRY_CACHED) != 0, "an entry CACHE needs a folio in the swap cache")
        # Readers of the side tree look at the word again under the mutex, so the two change together.
        us_lock(&m.tree.mutex)
        folio = side_at(&m.folios, id)[0]
        seen = us_swap(word, word_of_folio(folio))
        us_chaos()
        side_clear(&m.folios, id)
        us_unlock(&m.tree.mutex)
    elif entry_type(entry) == CACHE:
        us_assert(word_folio(seen) != 0, "an entry CACHE needs a folio in the swap cache")
        seen = us_swap(word, word_of_folio(word_folio(seen)))
    elif word_folio(seen) == 0:
        seen = us_swap(word, entry)
    else:
        us_lock(&m.tree.mutex)
        if side_set(&m.folios, id, word_folio(seen)):
            entry |= ENTRY_CACHED
        us_chaos()
        seen = us_swap(word, entry)
        us_unlock(&m.tree.mutex)
    word_wake(word, seen)


cdef uint64_t two_trees_lock(SwapMap* map, uint64_t id) noexcept nogil:
    return word_shown(word_lock(id_word(&(<TwoTrees*>map).tree, id), ENTRY_LOCKED))


cdef uint64_t two_trees_unlock(SwapMap* map, uint64_t id, uint64_t entry) noexcept nogil:
    set_entry(<TwoTrees*>map, id, entry)
    return id


cdef uint64_t two_trees_owner(SwapMap* map, uint64_t id, uint64_t holder) noexcept nogil:
    return id


cdef bint two_trees_try_owner(SwapMap* map, uint64_t owner, uint64_t entry) noexcept nogil:
    return word_try_shown(id_word(&(<TwoTrees*>map).tree, owner), entry)


cdef void two_trees_unlock_owner(SwapMap* map, uint64_t owner, uint64_t entry) noexcept nogil:
    set_entry(<TwoTrees*>map, owner, entry)


cdef uint64_t two_trees_next(SwapMap* map, int device, uint64_t after, uint64_t* entry, int64_t* busy) noexcept nogil:
    return id_next(&(<TwoTrees*>map).tree, device, after, entry, busy)


# ---- the count: tree 2 ----

cdef int two_trees_dup(SwapMap* map, uint64_t* id, int64_t n, uint64_t* moved) noexcept nogil:
    cdef TwoTrees* m = <TwoTrees*>map
    cdef uint64_t* number = radix_slot(&m.counts, id[0])
    cdef uint64_t count
    us_assert(n > 0, "dup: more references, not less")
    us_assert((us_load(id_word(&m.tree, id[0])) & ENTRY_GONE) == 0, "dup: the id has no count")
    while True:
        count = us_load(number)
        us_assert(count != 0, "dup: the id is free")
        us_chaos()
        if n > COUNT_MAX - <int64_t>count:
            return -EOVERFLOW
        if us_cas(number, count, count + <uint64_t>n):
            return 0
        us_pause()


cdef int64_t two_trees_put(SwapMap* map, uint64_t id, int64_t n, uint64_t* entry) noexcept nogil:
    cdef TwoTrees* m = <TwoTrees*>map
    cdef uint64_t* number = radix_slot(&m.counts, id)
    cdef uint64_t count
    us_assert(n > 0, "put: fewer references, not more")
    us_assert((us_load(id_word(&m.tree, id)) & ENTRY_GONE) == 0, "put: the id has no count")
    entry[0] = 0
    while True:
        count = us_load(number)
        us_assert(count >= <uint64_t>n, "put: no more references than there are")
        us_chaos()
        if count == <uint64_t>n:
            break
        if us_cas(number, count, count - <uint64_t>n):
            return <int64_t>count - n   # the reference is gone: no word may be touched any more
        us_pause()
    entry[0] = word_shown(word_lock(id_word(&m.tree, id), ENTRY_LOCKED | ENTRY_GONE))
    us_assert(us_load(number) == count, "put: nobody but the last holder could dup")
    return 0


cdef int64_t two_trees_count(SwapMap* map, uint64_t id) noexcept nogil:
    return <int64_t>us_load(radix_slot(&(<TwoTrees*>map).counts, id))


# ---- the swap cache ----

cdef int two_trees_cache(SwapMap* map, uint64_t id, uint64_t folio) noexcept nogil:
    cdef TwoTrees* m = <TwoTrees*>map
    return folio_cache(&m.tree, &m.folios, id, folio)


cdef uint64_t two_trees_cached(SwapMap* map, uint64_t id) noexcept nogil:
    cdef TwoTrees* m = <TwoTrees*>map
    return folio_cached(&m.tree, &m.folios, id)


# ---- figures ----

cdef int64_t two_trees_ids(SwapMap* map) noexcept nogil:
    return us_read(&(<TwoTrees*>map).tree.ids)


cdef int64_t two_trees_metadata(SwapMap* map) noexcept nogil:
    return MAP_BYTES + us_read(&(<TwoTrees*>map).tree.slab.bytes)


cdef SwapMapOps ops
ops.name = b"two_trees"
ops.bound = False
ops.count_max = COUNT_MAX
ops.new = two_trees_new
ops.delete = two_trees_delete
ops.alloc = two_trees_alloc
ops.alloc_run = two_trees_alloc_run
ops.free = two_trees_free
ops.home = NULL
ops.lock = two_trees_lock
ops.unlock = two_trees_unlock
ops.owner = two_trees_owner
ops.try_owner = two_trees_try_owner
ops.unlock_owner = two_trees_unlock_owner
ops.next = two_trees_next
ops.dup = two_trees_dup
ops.put = two_trees_put
ops.count = two_trees_count
ops.cache = two_trees_cache
ops.cached = two_trees_cached
ops.ids = two_trees_ids
ops.metadata = two_trees_metadata


cdef const SwapMapOps* two_trees_design() noexcept nogil:
    return &ops
