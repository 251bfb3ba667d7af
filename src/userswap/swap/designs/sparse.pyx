"""Two radix trees with sparse counts, the design document's idea: a count is kept only where it is not one.

Models: the message of March 2023 ("2 radix trees"), with the second tree made sparse. Tree 1 maps an id to its entry
word. Tree 2 maps an id to its swap count, but only while that is not one: SHARED in the entry word says so. For
memory that is not shared an id is one word, found in one lookup. A third tree of the same kind has the swap cache of
ids that have one (CACHED says so). Touches its trees only.

Locks. `mutex` (a leaf mutex: nothing else is taken under it, nothing waits under it) protects the shape of
the trees, free ids, every word of trees 2 and 3, SHARED and CACHED. LOCKED in an entry word protects type and payload
of that word. The two are independent on purpose: LOCKED may be held for as long as a device needs, and a
fork or a put of a shared id must not wait for that. So SHARED changes while somebody else has the entry
LOCKED, takes it or gives it back, and therefore every change of a live word is an atomic
read-modify-write: CAS for LOCKED and the payload (lock, unlock), or/and for SHARED and CACHED. unlock takes both from
the word it replaces, never from the word that lock saw.

Order between the trees. Under one hold of the mutex:

  one becomes more:  the count is stored in tree 2, then SHARED is set.
  more becomes one:  SHARED is cleared, then the count is erased from tree 2.

So SHARED set means that tree 2 has the count, at every instant, and who reads SHARED under the mutex sees
both trees whole; CACHED and tree 3 alike. Who reads SHARED without the mutex:

- dup: never; it reads it again under the mutex.
- put and count, and they hold a reference. SHARED clear: theirs is the only one, and only a holder of a
  reference can dup, so it stays clear and no mutex is needed. SHARED set is a hint: another holder
  may put meanwhile and leave theirs as the last. They take the mutex and look again.
- unlock: carries the bit over and does not look at it. lock, try_owner: mask it off.

dup against put on one id: both under the mutex, in some order, unless put saw SHARED clear, and then the one
reference that a dup would need is the one being put. Two puts with count two: the first to get the mutex makes
it one, the second finds SHARED clear under the mutex and goes on as the last. unlock against either: its
CAS fails if SHARED changed after its load, and it tries again.

The last put locks the entry, which may wait for writeback to finish; the entry it returns is the one that
writeback left. It sets GONE in the same CAS. From then to free the word is the caller's alone: it stays LOCKED,
so a try_owner by who found the storage fails, and nobody else has a reference to wait or dup with.
"""
from libc.errno cimport ENOMEM, EOVERFLOW
from libc.stdint cimport int64_t, uint64_t

from userswap.native.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap
from userswap.native.us cimport us_and, us_assert, us_chaos, us_load, us_lock, us_or, us_read, us_unlock
from userswap.swap.entry cimport ENTRY_CACHED, ENTRY_GONE, ENTRY_LOCKED, ENTRY_SHARED, FREE, entry_seen, entry_type
from userswap.swap.idtree cimport (
    IdTree, id_alloc, id_alloc_run, id_cache, id_cached, id_free, id_next, id_word, idtree_end, idtree_init, side_at,
    side_clear, side_set, word_lock, word_try, word_unlock,
)
from userswap.swap.map cimport SwapMap, SwapMapOps, SwapMapOptions
from userswap.swap.radix cimport RadixTree


cdef enum:
    MAP_BYTES = 4096            # what the map itself lives in

cdef int64_t COUNT_MAX = <int64_t>1 << 62

cdef struct Sparse:
    SwapMap head
    IdTree tree                 # tree 1, the ids, and the mutex
    RadixTree counts            # tree 2
    RadixTree folios            # tree 3: the swap cache


cdef SwapMap* sparse_new(const SwapMapOptions* options) noexcept nogil:
    cdef void* memory = mmap(NULL, MAP_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    cdef Sparse* m
    if memory == MAP_FAILED:
        return NULL
    m = <Sparse*>memory
    m.head.ops = &ops
    idtree_init(&m.tree)
    m.counts.slab = &m.tree.slab
    m.folios.slab = &m.tree.slab
    return &m.head


cdef void sparse_delete(SwapMap* map) noexcept nogil:
    idtree_end(&(<Sparse*>map).tree)
    munmap(map, MAP_BYTES)


# ---- ids and entries ----

cdef uint64_t sparse_alloc(SwapMap* map, uint64_t entry, uint64_t holder) noexcept nogil:
    return id_alloc(&(<Sparse*>map).tree, entry_seen(entry))


cdef bint sparse_alloc_run(SwapMap* map, const uint64_t* entries, uint64_t holder, int n,
                           uint64_t* ids) noexcept nogil:
    return id_alloc_run(&(<Sparse*>map).tree, entries, n, ids)


cdef void sparse_free(SwapMap* map, uint64_t id) noexcept nogil:
    cdef Sparse* m = <Sparse*>map
    us_lock(&m.tree.mutex)
    if us_load(id_word(&m.tree, id)) & ENTRY_CACHED:
        side_clear(&m.folios, id)
    id_free(&m.tree, id)
    us_unlock(&m.tree.mutex)


cdef uint64_t sparse_lock(SwapMap* map, uint64_t id) noexcept nogil:
    return word_lock(id_word(&(<Sparse*>map).tree, id), ENTRY_LOCKED)


cdef uint64_t sparse_unlock(SwapMap* map, uint64_t id, uint64_t entry) noexcept nogil:
    word_unlock(id_word(&(<Sparse*>map).tree, id), entry, ENTRY_SHARED | ENTRY_CACHED)
    return id


cdef uint64_t sparse_owner(SwapMap* map, uint64_t id, uint64_t holder) noexcept nogil:
    return id


cdef bint sparse_try_owner(SwapMap* map, uint64_t owner, uint64_t entry) noexcept nogil:
    return word_try(id_word(&(<Sparse*>map).tree, owner), entry)


cdef void sparse_unlock_owner(SwapMap* map, uint64_t owner, uint64_t entry) noexcept nogil:
    word_unlock(id_word(&(<Sparse*>map).tree, owner), entry, ENTRY_SHARED | ENTRY_CACHED)


cdef uint64_t sparse_next(SwapMap* map, int device, uint64_t after, uint64_t* entry, int64_t* busy) noexcept nogil:
    return id_next(&(<Sparse*>map).tree, device, after, entry, busy)


# ---- counts ----

# More becomes one. Under the mutex.
cdef void unshare(Sparse* m, uint64_t id, uint64_t* word) noexcept nogil:
    us_and(word, ~<uint64_t>ENTRY_SHARED)
    us_chaos()
    side_clear(&m.counts, id)


cdef int sparse_dup(SwapMap* map, uint64_t* id, int64_t n, uint64_t* moved) noexcept nogil:
    cdef Sparse* m = <Sparse*>map
    cdef uint64_t* word = id_word(&m.tree, id[0])
    cdef uint64_t* number
    cdef int result = 0
    us_assert(n > 0, "dup: more references, not less")
    us_lock(&m.tree.mutex)
    us_assert(entry_type(us_load(word)) != FREE, "dup: the id is free")
    us_assert((us_load(word) & ENTRY_GONE) == 0, "dup: the id has no count")
    us_chaos()
    if us_load(word) & ENTRY_SHARED:
        number = side_at(&m.counts, id[0])
        us_assert(number != NULL and number[0] > 1, "a shared id has a count above one")
        if n > COUNT_MAX - <int64_t>number[0]:
            result = -EOVERFLOW
        else:
            number[0] += <uint64_t>n
    elif n > COUNT_MAX - 1:
        result = -EOVERFLOW
    elif not side_set(&m.counts, id[0], <uint64_t>(1 + n)):
        result = -ENOMEM
    else:
        us_chaos()
        us_or(word, ENTRY_SHARED)
    us_unlock(&m.tree.mutex)
    return result


cdef int64_t sparse_put(SwapMap* map, uint64_t id, int64_t n, uint64_t* entry) noexcept nogil:
    cdef Sparse* m = <Sparse*>map
    cdef uint64_t* word = id_word(&m.tree, id)
    cdef uint64_t* number
    cdef int64_t left
    us_assert(n > 0, "put: fewer references, not more")
    us_assert(entry_type(us_load(word)) != FREE, "put: the id is free")
    us_assert((us_load(word) & ENTRY_GONE) == 0, "put: the id has no count")
    if us_load(word) & ENTRY_SHARED:
        us_chaos()
        us_lock(&m.tree.mutex)
        if us_load(word) & ENTRY_SHARED:
            number = side_at(&m.counts, id)
            left = <int64_t>number[0] - n
            us_assert(left >= 0, "put: no more references than there are")
            if left > 1:
                number[0] = <uint64_t>left
            else:
                unshare(m, id, word)
            if left > 0:
                us_unlock(&m.tree.mutex)
                entry[0] = 0        # the reference is gone: `word` may not be touched any more
                return left
        us_unlock(&m.tree.mutex)
    us_chaos()
    entry[0] = word_lock(word, ENTRY_LOCKED | ENTRY_GONE)
    us_assert((us_load(word) & ENTRY_SHARED) == 0, "put: nobody but the last holder could dup")
    return 0


cdef int64_t sparse_count(SwapMap* map, uint64_t id) noexcept nogil:
    cdef Sparse* m = <Sparse*>map
    cdef uint64_t* word = id_word(&m.tree, id)
    cdef uint64_t seen = us_load(word)
    cdef int64_t count = 1
    us_assert(entry_type(seen) != FREE, "count: the id is free")
    if seen & ENTRY_SHARED:
        us_chaos()
        us_lock(&m.tree.mutex)
        if us_load(word) & ENTRY_SHARED:
            count = <int64_t>side_at(&m.counts, id)[0]
        us_unlock(&m.tree.mutex)
    return count


# ---- the swap cache ----

cdef int sparse_cache(SwapMap* map, uint64_t id, uint64_t folio) noexcept nogil:
    cdef Sparse* m = <Sparse*>map
    return id_cache(&m.tree, &m.folios, id, folio)


cdef uint64_t sparse_cached(SwapMap* map, uint64_t id) noexcept nogil:
    cdef Sparse* m = <Sparse*>map
    return id_cached(&m.tree, &m.folios, id)


cdef int64_t sparse_ids(SwapMap* map) noexcept nogil:
    return us_read(&(<Sparse*>map).tree.ids)


cdef int64_t sparse_metadata(SwapMap* map) noexcept nogil:
    return MAP_BYTES + us_read(&(<Sparse*>map).tree.slab.bytes)


cdef SwapMapOps ops
ops.name = b"sparse"
ops.bound = False
ops.count_max = COUNT_MAX
ops.new = sparse_new
ops.delete = sparse_delete
ops.alloc = sparse_alloc
ops.alloc_run = sparse_alloc_run
ops.free = sparse_free
ops.home = NULL
ops.lock = sparse_lock
ops.unlock = sparse_unlock
ops.owner = sparse_owner
ops.try_owner = sparse_try_owner
ops.unlock_owner = sparse_unlock_owner
ops.next = sparse_next
ops.dup = sparse_dup
ops.put = sparse_put
ops.count = sparse_count
ops.cache = sparse_cache
ops.cached = sparse_cached
ops.ids = sparse_ids
ops.metadata = sparse_metadata


cdef const SwapMapOps* sparse_design() noexcept nogil:
    return &ops
