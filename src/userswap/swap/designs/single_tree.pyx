"""One radix tree whose leaf word is all there is: entry and count together, or the page in the swap cache.

Models: the idea of April 2011 that the message of March 2023 refers to (linux-mm, 4DA25039.3020700, talked about
after LSF/MM 2011). Page tables hold an index into one radix tree; a leaf has the swap entry together with the swap
count, and once the page was swapped in and its swap space given up, the leaf has the page instead. The message's
objections: entry and count hardly fit into 8 bytes, and a leaf with a page has no place for the count. Both get the
best answer that was found within the idea, and `sides` and `counts` show what that costs.

  stored      | count - 1 (11)  | payload (45) | CACHED | GONE | type  | -      | WAITERS | LOCKED |
  cached page | MANY (1) | - (7) | folio (48)   | -      | GONE | CACHE | SHARED | WAITERS | LOCKED |

- A count up to 2047 is in the word of a stored id. Above that, the field is MANY and the count is a word of `counts`,
  the overflow path: no count is too large. It comes back to the field when it is not above FEW.
- A cached page leaves no room for its count (a kernel's pointer has no eight bits to spare either). A count of one
  needs none; more (SHARED) is the id's word in the side tree `sides`, and above 2047 (MANY) again in `counts`.
- A stored id that is in the swap cache too (CACHED: the copy is kept) has its folio in `sides`.

So leaf and side word change places: an id that goes from stored to cached puts its folio where its count was and its
count where its folio was. That needs no memory, so unlock cannot fail. The way back may need some, for a folio of an
id that had no side word; without memory the swap cache, which is a hint, forgets the folio.

Locks. The tree's mutex (a leaf mutex) protects its shape, both side trees, CACHED, SHARED, MANY, and a change between
stored and cached. LOCKED protects type and payload. The count of a stored id up to 2047 changes by CAS of the word,
without the mutex, whether or not somebody has it LOCKED; every other count changes under the mutex.

Order. Under one hold of the mutex a word says at every instant where its count is: MANY and SHARED are set after the
side word is stored and cleared before it goes, and when a count moves from one place to the other both are set for a
moment. So who sees neither of them in the word of a cached page has the only reference. A hint, to be looked at again
under the mutex, is everything else. A CAS that loses because the count of a stored id moved meanwhile tries again.

The last put finds a count of one, so nobody can dup any more, and sets GONE in the CAS that locks; from then to free
the word is the caller's alone.

Different from the kernel: 2011's swapper_space was one tree with one lock, and readers took RCU; here holders keep a
leaf alive, so a look-up takes nothing (see radix.pyx).
"""
from libc.errno cimport ENOMEM, EOVERFLOW
from libc.stdint cimport int64_t, uint64_t

from userswap.native.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap
from userswap.native.us cimport (
    us_and, us_assert, us_cas, us_chaos, us_load, us_lock, us_or, us_pause, us_read, us_swap, us_unlock,
)
from userswap.swap.cacheword cimport (
    folio_cache, folio_cached, word_folio, word_of_folio, word_shown, word_try_shown,
)
from userswap.swap.entry cimport (
    CACHE, ENTRY_CACHED, ENTRY_GONE, ENTRY_LOCKED, ENTRY_SHARED, ENTRY_TOP_SHIFT, ENTRY_WAITERS, FREE, entry_seen,
    entry_type,
)
from userswap.swap.idtree cimport (
    IdTree, id_alloc, id_alloc_run, id_free, id_next, id_word, idtree_end, idtree_init, side_at, side_clear, side_set,
    word_lock, word_wake,
)
from userswap.swap.map cimport SwapMap, SwapMapOps, SwapMapOptions
from userswap.swap.radix cimport RadixTree


cdef enum:
    MAP_BYTES = 4096            # what the map itself lives in
    MANY = 2047                 # the count is in `counts`
    FEW = 1024                  # and comes back when it is not above this

cdef extern from *:
    """
    #define US_ONE_MORE (1ull << 53)
    #define US_FIELD (2047ull << 53)
    #define US_CACHE_MANY (1ull << 63)
    """
    const uint64_t ONE_MORE "US_ONE_MORE"
    const uint64_t FIELD "US_FIELD"                     # of a stored id
    const uint64_t CACHE_MANY "US_CACHE_MANY"           # of a cached page

cdef int64_t COUNT_MAX = <int64_t>1 << 62

cdef struct SingleTree:
    SwapMap head
    char apart[120]             # the tree's root is read all the time
    IdTree tree
    RadixTree sides             # what the leaf has no room for: a stored id's folio, a cached page's count
    RadixTree counts            # above MANY


cdef SwapMap* single_tree_new(const SwapMapOptions* options) noexcept nogil:
    cdef void* memory = mmap(NULL, MAP_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    cdef SingleTree* m
    if memory == MAP_FAILED:
        return NULL
    m = <SingleTree*>memory
    m.head.ops = &ops
    idtree_init(&m.tree)
    m.sides.slab = &m.tree.slab
    m.counts.slab = &m.tree.slab
    return &m.head


cdef void single_tree_delete(SwapMap* map) noexcept nogil:
    idtree_end(&(<SingleTree*>map).tree)
    munmap(map, MAP_BYTES)


# ---- ids ----

cdef uint64_t single_tree_alloc(SwapMap* map, uint64_t entry, uint64_t holder) noexcept nogil:
    us_assert(entry_type(entry) != CACHE, "a new id is stored somewhere")
    return id_alloc(&(<SingleTree*>map).tree, entry_seen(entry))


cdef bint single_tree_alloc_run(SwapMap* map, const uint64_t* entries, uint64_t holder, int n,
                                uint64_t* ids) noexcept nogil:
    return id_alloc_run(&(<SingleTree*>map).tree, entries, n, ids)


cdef void single_tree_free(SwapMap* map, uint64_t id) noexcept nogil:
    cdef SingleTree* m = <SingleTree*>map
    cdef uint64_t seen
    us_lock(&m.tree.mutex)
    seen = us_load(id_word(&m.tree, id))
    if entry_type(seen) != CACHE and seen & ENTRY_CACHED:
        side_clear(&m.sides, id)
    id_free(&m.tree, id)
    us_unlock(&m.tree.mutex)


# ---- the entry ----

# stored <-> cached page, or either way of staying a cached page. The word before it.
cdef uint64_t change_places(SingleTree* m, uint64_t id, uint64_t* word, uint64_t entry) noexcept nogil:
    cdef uint64_t seen, field
    cdef uint64_t* side
    us_lock(&m.tree.mutex)
    while True:
        seen = us_load(word)
        us_chaos()
        if entry_type(seen) != CACHE:
            us_assert((seen & ENTRY_CACHED) != 0, "an entry CACHE needs a folio in the swap cache")
            side = side_at(&m.sides, id)
            field = seen >> ENTRY_TOP_SHIFT
            if us_cas(word, seen, word_of_folio(side[0])
                      | (CACHE_MANY if field == MANY else ENTRY_SHARED if field else 0)):
                if field == 0 or field == MANY:
                    side_clear(&m.sides, id)
                else:
                    side[0] = field + 1
                break
        elif entry_type(entry) == CACHE:
            us_assert(word_folio(seen) != 0, "an entry CACHE needs a folio in the swap cache")
            us_and(word, ~<uint64_t>(ENTRY_LOCKED | ENTRY_WAITERS))
            break
        else:
            # Who has both LOCKED and the mutex is alone with the word of a cached page, but for WAITERS.
            if seen & CACHE_MANY:
                entry |= FIELD
            elif seen & ENTRY_SHARED:
                side = side_at(&m.sides, id)
                entry |= (side[0] - 1) << ENTRY_TOP_SHIFT
                if word_folio(seen) == 0:
                    side_clear(&m.sides, id)
            if word_folio(seen) and side_set(&m.sides, id, word_folio(seen)):
                entry |= ENTRY_CACHED
            seen |= us_swap(word, entry)
            break
    us_unlock(&m.tree.mutex)
    return seen


cdef void set_entry(SingleTree* m, uint64_t id, uint64_t entry) noexcept nogil:
    cdef uint64_t* word = id_word(&m.tree, id)
    cdef uint64_t seen
    us_assert(entry_type(entry) != FREE, "unlock: an id keeps an entry until it is freed")
    us_assert((us_load(word) & (ENTRY_LOCKED | ENTRY_GONE)) == ENTRY_LOCKED, "unlock: not locked, or no count")
    entry = entry_seen(entry)
    while True:
        seen = us_load(word)
        us_chaos()
        if entry_type(seen) == CACHE or entry_type(entry) == CACHE:
            seen = change_places(m, id, word, entry)
            break
        if us_cas(word, seen, entry | (seen & (FIELD | ENTRY_CACHED))):
            break
    word_wake(word, seen)


cdef uint64_t single_tree_lock(SwapMap* map, uint64_t id) noexcept nogil:
    return word_shown(word_lock(id_word(&(<SingleTree*>map).tree, id), ENTRY_LOCKED))


cdef uint64_t single_tree_unlock(SwapMap* map, uint64_t id, uint64_t entry) noexcept nogil:
    set_entry(<SingleTree*>map, id, entry)
    return id


cdef uint64_t single_tree_owner(SwapMap* map, uint64_t id, uint64_t holder) noexcept nogil:
    return id


cdef bint single_tree_try_owner(SwapMap* map, uint64_t owner, uint64_t entry) noexcept nogil:
    return word_try_shown(id_word(&(<SingleTree*>map).tree, owner), entry)


cdef void single_tree_unlock_owner(SwapMap* map, uint64_t owner, uint64_t entry) noexcept nogil:
    set_entry(<SingleTree*>map, owner, entry)


cdef uint64_t single_tree_next(SwapMap* map, int device, uint64_t after, uint64_t* entry,
                               int64_t* busy) noexcept nogil:
    return id_next(&(<SingleTree*>map).tree, device, after, entry, busy)


# ---- the count ----

# n references more (or less) for a cached page. Under the mutex. The count after it, or -ENOMEM, -EOVERFLOW.
cdef int64_t count_of_page(SingleTree* m, uint64_t id, uint64_t* word, uint64_t seen, int64_t n) noexcept nogil:
    cdef bint many = seen & CACHE_MANY != 0
    cdef bint shared = seen & ENTRY_SHARED != 0
    cdef int64_t count = 1
    cdef int64_t result
    if many:
        count = <int64_t>side_at(&m.counts, id)[0]
    elif shared:
        count = <int64_t>side_at(&m.sides, id)[0]
    if n > COUNT_MAX - count:
        return -EOVERFLOW
    result = count + n
    us_assert(result >= 0, "put: no more references than there are")
    if result > (FEW if many else MANY):
        if not side_set(&m.counts, id, <uint64_t>result):
            return -ENOMEM              # and it was not there before
        us_chaos()
        if not many:
            us_or(word, CACHE_MANY)
            us_and(word, ~<uint64_t>ENTRY_SHARED)
            if shared:
                side_clear(&m.sides, id)
    elif result > 1:
        if side_set(&m.sides, id, <uint64_t>result):
            us_chaos()
            us_or(word, ENTRY_SHARED)
            if many:
                us_and(word, ~CACHE_MANY)
                side_clear(&m.counts, id)
        elif many:
            side_set(&m.counts, id, <uint64_t>result)   # stays where it has memory
        else:
            return -ENOMEM
    else:
        # With none left it is the last put that goes on, in a word that says one.
        us_and(word, ~(CACHE_MANY | ENTRY_SHARED))
        us_chaos()
        if many:
            side_clear(&m.counts, id)
        if shared:
            side_clear(&m.sides, id)
    return result


# The same for any id, and the only way for counts that are not in the field of the word. Takes the mutex.
cdef int64_t count_slowly(SingleTree* m, uint64_t id, uint64_t* word, int64_t n) noexcept nogil:
    cdef uint64_t seen
    cdef uint64_t* number
    cdef int64_t count, result
    cdef bint many
    us_lock(&m.tree.mutex)
    while True:
        us_chaos()
        seen = us_load(word)
        if entry_type(seen) == CACHE:
            result = count_of_page(m, id, word, seen, n)
            break
        count = <int64_t>(seen >> ENTRY_TOP_SHIFT) + 1
        many = seen >> ENTRY_TOP_SHIFT == MANY
        if many:
            number = side_at(&m.counts, id)
            count = <int64_t>number[0]
        if n > COUNT_MAX - count:
            result = -EOVERFLOW
            break
        result = count + n
        us_assert(result >= 0, "put: no more references than there are")
        if many and result > FEW:
            number[0] = <uint64_t>result
            break
        if not many and result > MANY:
            if not side_set(&m.counts, id, <uint64_t>result):
                result = -ENOMEM
                break
            us_chaos()
            if us_cas(word, seen, seen | FIELD):
                break
            side_clear(&m.counts, id)
            continue
        # The field can't be less than one's: with none left it is the last put that goes on.
        count = (result if result else 1) - 1
        if us_cas(word, seen, (seen & ~FIELD) | (<uint64_t>count << ENTRY_TOP_SHIFT)):
            us_chaos()
            if many:
                side_clear(&m.counts, id)
            break
    us_unlock(&m.tree.mutex)
    return result


cdef int single_tree_dup(SwapMap* map, uint64_t* id, int64_t n, uint64_t* moved) noexcept nogil:
    cdef SingleTree* m = <SingleTree*>map
    cdef uint64_t* word = id_word(&m.tree, id[0])
    cdef uint64_t seen
    cdef int64_t result
    us_assert(n > 0, "dup: more references, not less")
    while True:
        seen = us_load(word)
        us_assert(entry_type(seen) != FREE, "dup: the id is free")
        us_assert((seen & ENTRY_GONE) == 0, "dup: the id has no count")
        if entry_type(seen) == CACHE or n > <int64_t>MANY or <int64_t>(seen >> ENTRY_TOP_SHIFT) + n >= MANY:
            result = count_slowly(m, id[0], word, n)
            return <int>result if result < 0 else 0
        us_chaos()
        if us_cas(word, seen, seen + <uint64_t>n * ONE_MORE):
            return 0
        us_pause()


cdef int64_t single_tree_put(SwapMap* map, uint64_t id, int64_t n, uint64_t* entry) noexcept nogil:
    cdef SingleTree* m = <SingleTree*>map
    cdef uint64_t* word = id_word(&m.tree, id)
    cdef uint64_t seen
    cdef int64_t left
    us_assert(n > 0, "put: fewer references, not more")
    entry[0] = 0
    while True:
        seen = us_load(word)
        us_assert(entry_type(seen) != FREE, "put: the id is free")
        us_assert((seen & ENTRY_GONE) == 0, "put: the id has no count")
        us_chaos()
        if entry_type(seen) == CACHE:
            left = count_slowly(m, id, word, -n) if seen & (CACHE_MANY | ENTRY_SHARED) else 0
        elif seen >> ENTRY_TOP_SHIFT == MANY:
            left = count_slowly(m, id, word, -n)
        else:
            left = <int64_t>(seen >> ENTRY_TOP_SHIFT) + 1 - n
            us_assert(left >= 0, "put: no more references than there are")
            if left and not us_cas(word, seen, seen - <uint64_t>n * ONE_MORE):
                us_pause()
                continue
        break
    if left:
        return left             # the reference is gone: `word` may not be touched any more
    # Ours are all there are: nobody can dup, so it stays so until the word is locked.
    entry[0] = word_shown(word_lock(word, ENTRY_LOCKED | ENTRY_GONE))
    us_assert(entry_type(us_load(word)) != CACHE or (us_load(word) & (CACHE_MANY | ENTRY_SHARED)) == 0,
              "put: nobody but the last holder could dup")
    return 0


cdef int64_t single_tree_count(SwapMap* map, uint64_t id) noexcept nogil:
    cdef SingleTree* m = <SingleTree*>map
    cdef uint64_t* word = id_word(&m.tree, id)
    cdef uint64_t seen = us_load(word)
    cdef int64_t count
    us_assert(entry_type(seen) != FREE, "count: the id is free")
    if entry_type(seen) == CACHE:
        if not seen & (CACHE_MANY | ENTRY_SHARED):
            return 1
    elif seen >> ENTRY_TOP_SHIFT != MANY:
        return <int64_t>(seen >> ENTRY_TOP_SHIFT) + 1
    us_chaos()
    us_lock(&m.tree.mutex)
    seen = us_load(word)
    if entry_type(seen) == CACHE:
        if seen & CACHE_MANY:
            count = <int64_t>side_at(&m.counts, id)[0]
        else:
            count = <int64_t>side_at(&m.sides, id)[0] if seen & ENTRY_SHARED else 1
    elif seen >> ENTRY_TOP_SHIFT == MANY:
        count = <int64_t>side_at(&m.counts, id)[0]
    else:
        count = <int64_t>(seen >> ENTRY_TOP_SHIFT) + 1
    us_unlock(&m.tree.mutex)
    return count


# ---- the swap cache ----

cdef int single_tree_cache(SwapMap* map, uint64_t id, uint64_t folio) noexcept nogil:
    cdef SingleTree* m = <SingleTree*>map
    return folio_cache(&m.tree, &m.sides, id, folio)


cdef uint64_t single_tree_cached(SwapMap* map, uint64_t id) noexcept nogil:
    cdef SingleTree* m = <SingleTree*>map
    return folio_cached(&m.tree, &m.sides, id)


# ---- figures ----

cdef int64_t single_tree_ids(SwapMap* map) noexcept nogil:
    return us_read(&(<SingleTree*>map).tree.ids)


cdef int64_t single_tree_metadata(SwapMap* map) noexcept nogil:
    return MAP_BYTES + us_read(&(<SingleTree*>map).tree.slab.bytes)


cdef SwapMapOps ops
ops.name = b"single_tree"
ops.bound = False
ops.count_max = COUNT_MAX
ops.new = single_tree_new
ops.delete = single_tree_delete
ops.alloc = single_tree_alloc
ops.alloc_run = single_tree_alloc_run
ops.free = single_tree_free
ops.home = NULL
ops.lock = single_tree_lock
ops.unlock = single_tree_unlock
ops.owner = single_tree_owner
ops.try_owner = single_tree_try_owner
ops.unlock_owner = single_tree_unlock_owner
ops.next = single_tree_next
ops.dup = single_tree_dup
ops.put = single_tree_put
ops.count = single_tree_count
ops.cache = single_tree_cache
ops.cached = single_tree_cached
ops.ids = single_tree_ids
ops.metadata = single_tree_metadata


cdef const SwapMapOps* single_tree_design() noexcept nogil:
    return &ops
