"""The alternative to virtual swap space: a swap table on a device that is not there, and redirects to those that are.

Models what was put on the table on linux-mm against vswap's larger descriptors (2025-26, "ghost swapfile", Chris Li
and Kairui Song; LWN, "Modernizing swapping: virtual swap spaces", 2026): ids are slots of a virtual device that has no
storage and nothing static and grows as needed; each cluster of 512 in use has the swap table's 8 bytes a slot; only
what moved to a real device takes 4 bytes more, a redirect. The virtual layer is optional there: who has just a swap
file uses its slots as they are, which here is the design swap_table. It is a proposal, so some of what follows is our
completion of it.

The word:  | count - 1 (9) | payload (48) | type (3) | CACHED | GONE | WAITERS | LOCKED |   0: the id is free
  SAME, ZSWAP   the payload is the value or the handle: there is no zswap tree and no zero map
  SLOT          the lower 32 bits of the entry's payload are in the redirect, the upper 13 here: three more bits of
                offset, the length of the run, raw, device. So 4 bytes limit nothing. Without the word's help they
                would end at 16 TiB of one device, and with a run and a device in them much earlier.
  CACHE         the folio in the swap cache, whose bytes nothing else has
CACHED: the swap cache has a folio. If there is storage as well, the word can't hold both: that folio is in an array of
the cluster, 8 bytes a slot, which is there while any slot of the cluster is in this state.

Four arrays, each a page for a cluster (or a half) that is there while it is used: the table, folios, counts,
redirects. A redirect's memory comes with the first slot of two neighbouring clusters that moves and goes with the
last.

Locks. LOCKED is the entry's: it protects type, payload, CACHED, and the id's redirect and folio. The cluster's lock
(clusters.pxd) protects which words are 0, the use of the arrays, and the passing of a count into MANY and out of it. A
word of a live id changes by CAS only. A count below MANY changes without any lock: dup and put are one CAS.

Order between a word and the arrays. None for counts: who finds MANY takes the cluster's lock. A folio is stored in the
array before the word says CACHED without being CACHE, and erased after the word has stopped saying so, for which unlock
first makes the word CACHE, still LOCKED. So who reads it without a lock finds it there, or finds on a second look that
the word has changed. A redirect is read by who has LOCKED, and its memory is only there while the word says SLOT:
stored before the CAS that unlocks, given up before it too.

The last put finds the count 0 in a word that is not MANY: nobody else has a reference, so nobody can dup. It locks the
word with GONE in the same CAS; from then to free the word is the caller's alone.
"""
from libc.errno cimport EOVERFLOW
from libc.limits cimport INT_MAX
from libc.stdint cimport int64_t, uint32_t, uint64_t

from userswap.native.mman cimport munmap
from userswap.native.us cimport (
    us_add, us_assert, us_cas, us_chaos, us_futex_wake, us_load, us_lock, us_pause, us_read, us_store, us_unlock,
    us_word_wait,
)
from userswap.swap.clusters cimport (
    CHUNK_SHIFT, CHUNKS_MOST, CLUSTER_SHIFT, CLUSTER_SLOTS, TABLE, Cluster, Clusters, cluster_of, clusters_end,
    clusters_given, clusters_init, clusters_take, clusters_taken, half_clear, half_of, half_set, word_of, word_set,
)
from userswap.swap.entry cimport CACHE, FREE, SLOT, entry_make, entry_payload, entry_type
from userswap.swap.map cimport SwapMap, SwapMapOps, SwapMapOptions
from userswap.swap.pages cimport PAGE, pages_reserve


cdef enum:
    FOLIOS = 1                  # arrays of a chunk
    COUNTS = 2
    LOCKED = 1
    WAITERS = 2
    GONE = 4
    CACHED = 8
    TYPE_SHIFT = 4
    TYPE_MASK = 7
    PAYLOAD_SHIFT = 7
    COUNT_SHIFT = 55
    MANY = 511                  # in the count's field: the cluster's array has the count
    REDIRECT_BITS = 32
    DEVICE_SHIFT = 9            # of what a SLOT word keeps of the payload
    SPINS = 64

cdef extern from *:
    """
    #define US_PAYLOAD (((1ull << 48) - 1) << 7)
    #define US_TYPE (7ull << 4)
    #define US_COUNT_ONE (1ull << 55)
    #define US_COUNT_FIELD (511ull << 55)
    """
    const uint64_t PAYLOAD "US_PAYLOAD"
    const uint64_t TYPE "US_TYPE"
    const uint64_t COUNT_ONE "US_COUNT_ONE"
    const uint64_t COUNT_FIELD "US_COUNT_FIELD"

cdef int64_t COUNT_MAX = <int64_t>1 << 62

cdef struct Redirect:
    SwapMap head
    char[64] apart
    int64_t ids
    char[56] apart_too
    Clusters k


cdef SwapMap* redirect_new(const SwapMapOptions* options) noexcept nogil:
    cdef Redirect* m = <Redirect*>pages_reserve(PAGE)
    us_assert(sizeof(Redirect) <= PAGE, "a map fits its page")
    if m == NULL:
        return NULL
    m.head.ops = &ops
    if not clusters_init(&m.k, <uint64_t>CHUNKS_MOST << CHUNK_SHIFT):
        munmap(m, PAGE)
        return NULL
    return &m.head


cdef void redirect_delete(SwapMap* map) noexcept nogil:
    clusters_end(&(<Redirect*>map).k)
    munmap(map, PAGE)


# ---- words ----

cdef inline int type_of(uint64_t word) noexcept nogil:
    return <int>((word >> TYPE_SHIFT) & TYPE_MASK)


cdef inline uint64_t payload_of(uint64_t word) noexcept nogil:
    return (word & PAYLOAD) >> PAYLOAD_SHIFT


# Type and payload as the word has them.
cdef inline uint64_t word_make(uint64_t entry) noexcept nogil:
    cdef uint64_t payload = entry_payload(entry)
    if entry_type(entry) == SLOT:
        payload >>= REDIRECT_BITS
    return (payload << PAYLOAD_SHIFT) | (<uint64_t>entry_type(entry) << TYPE_SHIFT)


# The entry that a word stands for, for who has it locked.
cdef inline uint64_t entry_at(Redirect* m, uint64_t at, uint64_t word) noexcept nogil:
    cdef uint64_t payload = payload_of(word)
    if type_of(word) == CACHE:
        return entry_make(CACHE, 0)
    if type_of(word) == SLOT:
        payload = (payload << REDIRECT_BITS) | half_of(&m.k, at)[0]
    return entry_make(type_of(word), payload)


# Stores the word of a slot that was just taken. Under the cluster's lock.
cdef inline void begin(Redirect* m, uint64_t at, uint64_t entry) noexcept nogil:
    us_assert(entry_type(entry) != FREE and entry_type(entry) != CACHE, "an id is given with an entry")
    if entry_type(entry) == SLOT:
        half_set(&m.k, at, <uint32_t>entry_payload(entry))
    us_chaos()
    us_store(word_of(&m.k, TABLE, at), word_make(entry))


# ---- ids ----

cdef uint64_t redirect_alloc(SwapMap* map, uint64_t entry, uint64_t holder) noexcept nogil:
    cdef Redirect* m = <Redirect*>map
    cdef uint64_t at = 0
    cdef Cluster* c = clusters_take(&m.k, 1, &at)
    if c == NULL:
        return 0
    begin(m, at, entry)
    clusters_taken(&m.k, c, 1, at)
    us_add(&m.ids, 1)
    return at + 1


cdef bint redirect_alloc_run(SwapMap* map, const uint64_t* entries, uint64_t holder, int n,
                             uint64_t* ids) noexcept nogil:
    cdef Redirect* m = <Redirect*>map
    cdef uint64_t at = 0
    cdef Cluster* c = clusters_take(&m.k, n, &at)
    cdef int i
    if c == NULL:
        return False
    for i in range(n):
        begin(m, at + <uint64_t>i, entries[i])
        ids[i] = at + <uint64_t>i + 1
    clusters_taken(&m.k, c, n, at)
    us_add(&m.ids, n)
    return True


cdef void redirect_free(SwapMap* map, uint64_t id) noexcept nogil:
    cdef Redirect* m = <Redirect*>map
    cdef uint64_t at = id - 1
    cdef uint64_t* word = word_of(&m.k, TABLE, at)
    cdef Cluster* c = cluster_of(&m.k, at)
    cdef uint64_t seen
    us_lock(&c.lock)
    seen = us_load(word)
    us_assert(seen & GONE != 0, "free: the id has a count")
    us_assert((seen & (LOCKED | WAITERS)) == LOCKED,
              "free: locked by the last put, and nobody has a reference to wait with")
    us_assert(seen & COUNT_FIELD == 0, "free: the last put leaves one")
    if type_of(seen) == SLOT:
        half_clear(&m.k, at)
    if seen & CACHED and type_of(seen) != CACHE:
        word_set(&m.k, FOLIOS, at, 0)
    us_chaos()
    us_store(word, 0)
    us_add(&m.ids, -1)
    clusters_given(&m.k, c, at)


# ---- the entry ----

# Waits until the word is not locked, and locks it; bits: LOCKED, and GONE for the last put. The word before.
cdef uint64_t word_lock(uint64_t* word, uint64_t bits) noexcept nogil:
    cdef uint64_t seen
    cdef int spins = 0
    while True:
        seen = us_load(word)
        us_assert(type_of(seen) != FREE, "lock: the id is free")
        us_assert((seen & GONE) == 0, "lock: the id has no count")
        us_chaos()
        if not seen & LOCKED:
            if us_cas(word, seen, seen | bits):
                us_chaos()
                return seen
        elif spins < SPINS:
            spins += 1
            us_pause()
        else:
            us_word_wait(word, seen, WAITERS)


# Clears and sets bits of a word that the caller has locked; the word before.
cdef uint64_t word_change(uint64_t* word, uint64_t clear, uint64_t bits) noexcept nogil:
    cdef uint64_t seen
    while True:
        seen = us_load(word)
        us_chaos()
        if us_cas(word, seen, (seen & ~clear) | bits):
            us_chaos()
            return seen


# A folio in the cluster's array; 0: none.
cdef inline void folio_set(Redirect* m, uint64_t at, uint64_t folio) noexcept nogil:
    us_lock(&cluster_of(&m.k, at).lock)
    word_set(&m.k, FOLIOS, at, folio)
    us_unlock(&cluster_of(&m.k, at).lock)


cdef uint64_t redirect_lock(SwapMap* map, uint64_t id) noexcept nogil:
    cdef Redirect* m = <Redirect*>map
    return entry_at(m, id - 1, word_lock(word_of(&m.k, TABLE, id - 1), LOCKED))


cdef uint64_t redirect_unlock(SwapMap* map, uint64_t id, uint64_t entry) noexcept nogil:
    cdef Redirect* m = <Redirect*>map
    cdef uint64_t at = id - 1
    cdef uint64_t* word = word_of(&m.k, TABLE, at)
    cdef uint64_t seen = us_load(word)
    cdef uint64_t made = word_make(entry)
    cdef int was = type_of(seen)
    us_assert(entry_type(entry) != FREE, "unlock: an id keeps an entry until it is freed")
    us_assert((seen & (LOCKED | GONE)) == LOCKED, "unlock: not locked, or no count")
    us_assert(entry_type(entry) != CACHE or seen & CACHED, "an entry CACHE needs a folio in the swap cache")
    if entry_type(entry) == SLOT:
        if was == SLOT:
            half_of(&m.k, at)[0] = <uint32_t>entry_payload(entry)
        else:
            half_set(&m.k, at, <uint32_t>entry_payload(entry))
    elif was == SLOT:
        half_clear(&m.k, at)
    if entry_type(entry) == CACHE:
        # The folio moves into the word, or is there already.
        made |= (us_load(word_of(&m.k, FOLIOS, at)) << PAYLOAD_SHIFT) if was != CACHE else (seen & PAYLOAD)
        if was != CACHE and seen & CACHED:
            word_change(word, TYPE | PAYLOAD, made)
            folio_set(m, at, 0)
    elif was == CACHE and seen & CACHED:
        us_assert(payload_of(seen) != 0, "CACHED says that there is a folio")
        folio_set(m, at, payload_of(seen))
    us_chaos()
    seen = word_change(word, TYPE | PAYLOAD | LOCKED | WAITERS, made)
    if seen & WAITERS:
        # All of them: those who find it locked again must set WAITERS again.
        us_futex_wake(<uint32_t*>word, INT_MAX)
    return id


cdef uint64_t redirect_owner(SwapMap* map, uint64_t id, uint64_t holder) noexcept nogil:
    return id


cdef bint redirect_try_owner(SwapMap* map, uint64_t owner, uint64_t entry) noexcept nogil:
    cdef Redirect* m = <Redirect*>map
    cdef uint64_t* word = word_of(&m.k, TABLE, owner - 1)
    cdef uint64_t seen = us_load(word)
    us_assert(type_of(seen) != FREE, "try_owner: the id is free")
    us_chaos()
    # A CAS can fail though nobody has the lock, when the count changes: worth another try.
    while not seen & LOCKED and entry_at(m, owner - 1, seen) == entry:
        us_chaos()
        if us_cas(word, seen, seen | LOCKED):
            us_chaos()
            if entry_at(m, owner - 1, seen) == entry:
                return True
            # The redirect was another one by the time we had the lock: it stays as it is.
            redirect_unlock(&m.head, owner, entry_at(m, owner - 1, seen))
            return False
        seen = us_load(word)
    return False


cdef void redirect_unlock_owner(SwapMap* map, uint64_t owner, uint64_t entry) noexcept nogil:
    redirect_unlock(map, owner, entry)


cdef uint64_t redirect_next(SwapMap* map, int device, uint64_t after, uint64_t* entry, int64_t* busy) noexcept nogil:
    cdef Redirect* m = <Redirect*>map
    cdef uint64_t at = after
    cdef uint64_t stop, seen
    cdef uint64_t* word
    cdef Cluster* c
    while at >> CLUSTER_SHIFT < us_load(&m.k.clusters):
        c = cluster_of(&m.k, at)
        stop = (at | (CLUSTER_SLOTS - 1)) + 1
        # A cluster at a time; what is seen under its lock is not freed.
        us_lock(&c.lock)
        if c.count == 0:
            at = stop
        while at < stop:
            word = word_of(&m.k, TABLE, at)
            seen = us_load(word)
            while type_of(seen) == SLOT and payload_of(seen) >> DEVICE_SHIFT == <uint64_t>device:
                if seen & LOCKED:
                    busy[0] += 1
                    break
                us_chaos()
                if us_cas(word, seen, seen | LOCKED):
                    us_unlock(&c.lock)
                    entry[0] = entry_at(m, at, seen)
                    return at + 1
                seen = us_load(word)
            at += 1
        us_unlock(&c.lock)
    return 0


# ---- the count ----

# Into MANY, out of it, or a change of what is there; n may be negative. Takes the cluster's lock. The count then, or
# -EOVERFLOW.
cdef int64_t count_slowly(Redirect* m, uint64_t at, int64_t n) noexcept nogil:
    cdef uint64_t* word = word_of(&m.k, TABLE, at)
    cdef Cluster* c = cluster_of(&m.k, at)
    cdef uint64_t seen, few
    cdef int64_t count, result
    cdef bint many
    us_lock(&c.lock)
    while True:
        us_chaos()
        seen = us_load(word)
        many = seen >> COUNT_SHIFT == MANY
        count = <int64_t>us_load(word_of(&m.k, COUNTS, at)) if many else <int64_t>(seen >> COUNT_SHIFT) + 1
        if n > COUNT_MAX - count:
            result = -EOVERFLOW
            break
        result = count + n
        us_assert(result >= 0, "put: no more references than there are")
        if result > MANY:
            if not many and not us_cas(word, seen, seen | COUNT_FIELD):
                continue
            us_chaos()
            word_set(&m.k, COUNTS, at, <uint64_t>result)
            break
        # With none left it is the last put that goes on, in a word whose count is one.
        few = <uint64_t>(result - 1 if result else 0)
        if us_cas(word, seen, (seen & ~COUNT_FIELD) | few * COUNT_ONE):
            us_chaos()
            if many:
                word_set(&m.k, COUNTS, at, 0)
            break
    us_unlock(&c.lock)
    return result


cdef int redirect_dup(SwapMap* map, uint64_t* id, int64_t n, uint64_t* moved) noexcept nogil:
    cdef Redirect* m = <Redirect*>map
    cdef uint64_t* word = word_of(&m.k, TABLE, id[0] - 1)
    cdef uint64_t seen
    cdef int64_t result
    us_assert(n > 0, "dup: more references, not less")
    while True:
        seen = us_load(word)
        us_assert(type_of(seen) != FREE, "dup: the id is free")
        us_assert((seen & GONE) == 0, "dup: the id has no count")
        if n >= MANY or <int64_t>(seen >> COUNT_SHIFT) + n >= MANY:
            result = count_slowly(m, id[0] - 1, n)
            return <int>result if result < 0 else 0
        us_chaos()
        if us_cas(word, seen, seen + <uint64_t>n * COUNT_ONE):
            return 0
        us_pause()


cdef int64_t redirect_put(SwapMap* map, uint64_t id, int64_t n, uint64_t* entry) noexcept nogil:
    cdef Redirect* m = <Redirect*>map
    cdef uint64_t* word = word_of(&m.k, TABLE, id - 1)
    cdef uint64_t seen
    cdef int64_t left
    us_assert(n > 0, "put: fewer references, not more")
    while True:
        seen = us_load(word)
        us_assert(type_of(seen) != FREE, "put: the id is free")
        us_assert((seen & GONE) == 0, "put: the id has no count")
        us_chaos()
        left = <int64_t>(seen >> COUNT_SHIFT) + 1 - n
        if left == 0 and n == 1:
            break                       # nobody else has a reference, so it stays so until the word is locked
        if left <= 0 or seen >> COUNT_SHIFT == MANY:
            left = count_slowly(m, id - 1, -n)
            if left == 0:
                break
            entry[0] = 0
            return left
        if us_cas(word, seen, seen - <uint64_t>n * COUNT_ONE):
            entry[0] = 0                # the reference is gone: `word` may not be touched any more
            return left
        us_pause()
    entry[0] = entry_at(m, id - 1, word_lock(word, LOCKED | GONE))
    us_assert(us_load(word) >> COUNT_SHIFT == 0, "put: nobody but the last holder could dup")
    return 0


cdef int64_t redirect_count(SwapMap* map, uint64_t id) noexcept nogil:
    cdef Redirect* m = <Redirect*>map
    cdef uint64_t* word = word_of(&m.k, TABLE, id - 1)
    cdef int64_t count = <int64_t>(us_load(word) >> COUNT_SHIFT)
    us_assert(type_of(us_load(word)) != FREE, "count: the id is free")
    if count < MANY:
        return count + 1
    us_chaos()
    us_lock(&cluster_of(&m.k, id - 1).lock)
    count = <int64_t>(us_load(word) >> COUNT_SHIFT)
    count = <int64_t>us_load(word_of(&m.k, COUNTS, id - 1)) if count == MANY else count + 1
    us_unlock(&cluster_of(&m.k, id - 1).lock)
    return count


# ---- the swap cache ----

cdef int redirect_cache(SwapMap* map, uint64_t id, uint64_t folio) noexcept nogil:
    cdef Redirect* m = <Redirect*>map
    cdef uint64_t at = id - 1
    cdef uint64_t* word = word_of(&m.k, TABLE, at)
    cdef uint64_t seen = us_load(word)
    us_assert(seen & LOCKED != 0, "cache: under the entry's lock")
    if type_of(seen) == CACHE:
        word_change(word, PAYLOAD | CACHED, (folio << PAYLOAD_SHIFT) | (CACHED if folio else 0))
    elif folio:
        folio_set(m, at, folio)
        us_chaos()
        if not seen & CACHED:
            word_change(word, 0, CACHED)
    elif seen & CACHED:
        word_change(word, CACHED, 0)
        folio_set(m, at, 0)
    return 0


cdef uint64_t redirect_cached(SwapMap* map, uint64_t id) noexcept nogil:
    cdef Redirect* m = <Redirect*>map
    cdef uint64_t* word = word_of(&m.k, TABLE, id - 1)
    cdef uint64_t seen, folio
    while True:
        seen = us_load(word)
        if not seen & CACHED:
            return 0
        if type_of(seen) == CACHE:
            return payload_of(seen)
        us_chaos()
        folio = us_load(word_of(&m.k, FOLIOS, id - 1))
        if folio:
            return folio
        us_pause()              # it was erased after the word changed: look again


cdef int64_t redirect_ids(SwapMap* map) noexcept nogil:
    return us_read(&(<Redirect*>map).ids)


cdef int64_t redirect_metadata(SwapMap* map) noexcept nogil:
    return PAGE + us_read(&(<Redirect*>map).k.pages.bytes)


cdef SwapMapOps ops
ops.name = b"redirect"
ops.bound = False
ops.count_max = COUNT_MAX
ops.new = redirect_new
ops.delete = redirect_delete
ops.alloc = redirect_alloc
ops.alloc_run = redirect_alloc_run
ops.free = redirect_free
ops.home = NULL
ops.lock = redirect_lock
ops.unlock = redirect_unlock
ops.owner = redirect_owner
ops.try_owner = redirect_try_owner
ops.unlock_owner = redirect_unlock_owner
ops.next = redirect_next
ops.dup = redirect_dup
ops.put = redirect_put
ops.count = redirect_count
ops.cache = redirect_cache
ops.cached = redirect_cached
ops.ids = redirect_ids
ops.metadata = redirect_metadata


cdef const SwapMapOps* redirect_design() noexcept nogil:
    return &ops
