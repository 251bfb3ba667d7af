"""Linux 6.18 and 6.19: an id is a slot of the swap file, and each cluster of 512 slots has a table of words.

Models mm/swapfile.c and mm/swap_table.h of 6.19 (LWN, "Modernizing swapping: introducing the swap table" and "the end
of the swap map", 2026; Kairui Song's swap table series on linux-mm, 2025). Static for each slot, allocated at swapon:
swap_map (1 byte, the count), the cgroup that is charged (2 bytes), a zero bit: 25 MiB for 8,388,608 slots. For each
slot in use: a table word (8 bytes), and a word of zswap's tree (8 bytes) if the data is there, though the slot on the
device stays taken.

The word, tags as there:  | folio (48) | .. | DIRTY | GONE | WAITERS | LOCKED | tag (4) |
  0         the slot is free
  ...1      shadow: in use, no folio in the swap cache (there a reclaim distance, which we have none of)
  ..10      the folio in the swap cache; DIRTY: no storage has these bytes, the entry is CACHE
100 and 1000, pointers and bad slots, have no use here. What the entry is follows from the parts, in the order of the
kernel's read path: zero bit: SAME 0. Zswap's word: that, ZSWAP or, as zswap had it before the zero bits, another value
that repeats. DIRTY: CACHE. Else the slot itself. So the only SLOT entry is home, and data leaves it by a fault only.

Locks, "the cluster lock and the folio lock are all there are". The cluster's (clusters.pxd) protects swap_map of its
slots, the use of table and tree pages. LOCKED in a word is the folio lock, which swap-in there has from when it puts a
folio into the table: it protects the folio, DIRTY, the zero bit and zswap's word of the slot. A word of a live slot
changes by CAS, so that it keeps WAITERS; a table word and a count of one are read without a lock. dup and put are
under the cluster's lock, as in 6.19, and never wait for the folio's.

Counts: swap_map goes to 0x3e. When one is larger the cluster gets an array of 8 bytes a slot for its counts, and
CONTINUED says that the count is there; the array goes when no count needs it. That is 7.1's way, whose counts are top
bits of the word; 6.19 still had the continuation pages that slot.pyx models.

Order: the last put leaves the count 1 under the cluster's lock, gives that up, and locks the word with GONE: nobody
else has a reference to dup, so it stays the last. free clears the parts first and then the word, all under the
cluster's lock.

Where user space makes it differ: see clusters.pyx for slots, and pages.pxd: zswap's tree (an xarray for each 64 MiB,
nodes of 64 words) is an array in reserved address space, 8 bytes a word in use and one load to read, so it is better
here than there. The cgroup is always the same. A cluster's struct takes 16 bytes for each 2 MiB, as static.
"""
from libc.errno cimport EOVERFLOW
from libc.limits cimport INT_MAX
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from userswap.native.mman cimport munmap
from userswap.native.us cimport (
    us_add, us_and, us_assert, us_cas, us_chaos, us_futex_wake, us_load, us_load_byte, us_lock, us_or, us_pause,
    us_read, us_store, us_store_byte, us_unlock, us_word_wait,
)
from userswap.swap.clusters cimport (
    CLUSTER_SHIFT, CLUSTER_SLOTS, TABLE, Cluster, Clusters, cluster_of, clusters_end, clusters_given, clusters_grow,
    clusters_init, clusters_take, clusters_taken, word_of, word_set,
)
from userswap.swap.entry cimport (
    CACHE, FREE, SAME, SLOT, ZSWAP, entry_make, entry_payload, entry_seen, entry_type, slot_make,
)
from userswap.swap.map cimport SwapMap, SwapMapOps, SwapMapOptions
from userswap.swap.pages cimport PAGE, page_round, pages_populate, pages_reserve


cdef enum:
    ZSWAP_TREE = 1              # arrays of a chunk
    COUNTS = 2
    SHADOW = 1
    FOLIO = 2
    TAG = 15
    LOCKED = 16
    WAITERS = 32
    GONE = 64
    DIRTY = 128
    FOLIO_SHIFT = 16
    COUNT_MOST = 0x3e           # SWAP_MAP_MAX
    CONTINUED = 0x80            # the count is in the cluster's array
    CGROUP = 1                  # whom swap is charged to
    SPINS = 64
    OFFSET_BITS = 35            # of a slot on a device, in pages

cdef int64_t COUNT_MAX = <int64_t>1 << 62

cdef struct SwapTable:
    SwapMap head
    uint64_t slots
    int run                     # pages of a slot
    uint8_t* swap_map
    uint16_t* cgroups
    uint64_t* zeros
    uint64_t static_bytes
    char[64] apart
    int64_t ids
    char[56] apart_too
    Clusters k


cdef SwapMap* swap_table_new(const SwapMapOptions* options) noexcept nogil:
    cdef SwapTable* m = <SwapTable*>pages_reserve(PAGE)
    cdef uint64_t slots = options.slots
    us_assert(sizeof(SwapTable) <= PAGE, "a map fits its page")
    if m == NULL:
        return NULL
    m.head.ops = &ops
    m.run = options.slot_run
    if slots > (<uint64_t>1 << OFFSET_BITS) // <uint64_t>m.run:
        slots = (<uint64_t>1 << OFFSET_BITS) // <uint64_t>m.run
    m.slots = slots
    if not clusters_init(&m.k, slots):
        munmap(m, PAGE)
        return NULL
    if slots:
        m.static_bytes = page_round(slots) + page_round(slots * 2) + page_round((slots + 63) // 64 * 8)
        m.swap_map = <uint8_t*>pages_populate(m.static_bytes)
        if m.swap_map == NULL:
            swap_table_delete(&m.head)
            return NULL
        m.cgroups = <uint16_t*>(m.swap_map + page_round(slots))
        m.zeros = <uint64_t*>(<char*>m.cgroups + page_round(slots * 2))
    while m.k.clusters << CLUSTER_SHIFT < slots:
        if not clusters_grow(&m.k):
            swap_table_delete(&m.head)
            return NULL
    return &m.head


cdef void swap_table_delete(SwapMap* map) noexcept nogil:
    cdef SwapTable* m = <SwapTable*>map
    clusters_end(&m.k)
    if m.swap_map != NULL:
        munmap(m.swap_map, m.static_bytes)
    munmap(m, PAGE)


# ---- the parts of an entry ----

cdef inline uint64_t home_of(SwapTable* m, uint64_t at) noexcept nogil:
    return slot_make(0, at * <uint64_t>m.run, m.run, True)


# Zswap's word for an entry; 0: none. It is the entry itself.
cdef inline uint64_t tree_word(uint64_t entry) noexcept nogil:
    if entry_type(entry) == ZSWAP or (entry_type(entry) == SAME and entry_payload(entry)):
        return entry_seen(entry)
    return 0


# What the parts say, for who has the word locked; a guess for others.
cdef inline uint64_t entry_at(SwapTable* m, uint64_t at) noexcept nogil:
    cdef uint64_t tree
    if (us_load(&m.zeros[at >> 6]) >> (at & 63)) & 1:
        return entry_make(SAME, 0)
    tree = us_load(word_of(&m.k, ZSWAP_TREE, at))
    if tree:
        return tree
    if us_load(word_of(&m.k, TABLE, at)) & DIRTY:
        return entry_make(CACHE, 0)
    return home_of(m, at)


cdef inline void zero_set(SwapTable* m, uint64_t at, bint zero) noexcept nogil:
    cdef uint64_t bit = <uint64_t>1 << (at & 63)
    if zero:
        us_or(&m.zeros[at >> 6], bit)
    elif us_load(&m.zeros[at >> 6]) & bit:
        us_and(&m.zeros[at >> 6], ~bit)


# Stores a slot that was just taken. Under the cluster's lock.
cdef inline void begin(SwapTable* m, uint64_t at, uint64_t entry) noexcept nogil:
    us_assert(entry_type(entry) != FREE and entry_type(entry) != CACHE, "an id is given with an entry")
    us_assert(us_load_byte(&m.swap_map[at]) == 0, "a slot that is taken had no count")
    m.cgroups[at] = CGROUP
    if entry_type(entry) == SAME and entry_payload(entry) == 0:
        zero_set(m, at, True)
    if tree_word(entry):
        word_set(&m.k, ZSWAP_TREE, at, tree_word(entry))
    us_store_byte(&m.swap_map[at], 1)
    us_chaos()
    us_store(word_of(&m.k, TABLE, at), SHADOW)


# ---- ids ----

cdef uint64_t swap_table_alloc(SwapMap* map, uint64_t entry, uint64_t holder) noexcept nogil:
    cdef SwapTable* m = <SwapTable*>map
    cdef uint64_t at = 0
    cdef Cluster* c = clusters_take(&m.k, 1, &at)
    if c == NULL:
        return 0
    begin(m, at, entry)
    clusters_taken(&m.k, c, 1, at)
    us_add(&m.ids, 1)
    return at + 1


cdef bint swap_table_alloc_run(SwapMap* map, const uint64_t* entries, uint64_t holder, int n,
                               uint64_t* ids) noexcept nogil:
    cdef SwapTable* m = <SwapTable*>map
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


cdef void swap_table_free(SwapMap* map, uint64_t id) noexcept nogil:
    cdef SwapTable* m = <SwapTable*>map
    cdef uint64_t at = id - 1
    cdef Cluster* c = cluster_of(&m.k, at)
    us_lock(&c.lock)
    us_assert(us_load(word_of(&m.k, TABLE, at)) & GONE != 0, "free: the id has a count")
    us_assert((us_load(word_of(&m.k, TABLE, at)) & (LOCKED | WAITERS)) == LOCKED,
              "free: locked by the last put, and nobody has a reference to wait with")
    us_assert(us_load_byte(&m.swap_map[at]) == 1, "free: the last put leaves one")
    us_store_byte(&m.swap_map[at], 0)
    zero_set(m, at, False)
    m.cgroups[at] = 0
    word_set(&m.k, ZSWAP_TREE, at, 0)
    us_chaos()
    us_store(word_of(&m.k, TABLE, at), 0)
    us_add(&m.ids, -1)
    clusters_given(&m.k, c, at)


cdef uint64_t swap_table_home(SwapMap* map, uint64_t id) noexcept nogil:
    return home_of(<SwapTable*>map, id - 1)


# ---- the entry ----

# Waits until the word is not locked, and locks it; bits: LOCKED, and GONE for the last put.
cdef void word_lock(uint64_t* word, uint64_t bits) noexcept nogil:
    cdef uint64_t seen
    cdef int spins = 0
    while True:
        seen = us_load(word)
        us_assert(seen & TAG != 0, "lock: the id is free")
        us_assert((seen & GONE) == 0, "lock: the id has no count")
        us_chaos()
        if not seen & LOCKED:
            if us_cas(word, seen, seen | bits):
                us_chaos()
                return
        elif spins < SPINS:
            spins += 1
            us_pause()
        else:
            us_word_wait(word, seen, WAITERS)


cdef void word_unlock(uint64_t* word) noexcept nogil:
    cdef uint64_t seen = us_and(word, ~<uint64_t>(LOCKED | WAITERS))
    us_assert((seen & (LOCKED | GONE)) == LOCKED, "unlock: not locked, or no count")
    us_chaos()
    if seen & WAITERS:
        # All of them: those who find it locked again must set WAITERS again.
        us_futex_wake(<uint32_t*>word, INT_MAX)


# Another folio or DIRTY in a word that the caller has locked.
cdef void word_change(uint64_t* word, uint64_t mask, uint64_t value) noexcept nogil:
    cdef uint64_t seen
    while True:
        seen = us_load(word)
        us_chaos()
        if us_cas(word, seen, (seen & ~mask) | value):
            return


cdef uint64_t swap_table_lock(SwapMap* map, uint64_t id) noexcept nogil:
    cdef SwapTable* m = <SwapTable*>map
    word_lock(word_of(&m.k, TABLE, id - 1), LOCKED)
    return entry_at(m, id - 1)


cdef uint64_t swap_table_unlock(SwapMap* map, uint64_t id, uint64_t entry) noexcept nogil:
    cdef SwapTable* m = <SwapTable*>map
    cdef uint64_t at = id - 1
    cdef uint64_t* word = word_of(&m.k, TABLE, at)
    cdef uint64_t tree = tree_word(entry)
    cdef uint64_t had = us_load(word_of(&m.k, ZSWAP_TREE, at))
    cdef bint dirty = entry_type(entry) == CACHE
    us_assert(entry_type(entry) != FREE, "unlock: an id keeps an entry until it is freed")
    us_assert((us_load(word) & (LOCKED | GONE)) == LOCKED, "unlock: not locked, or no count")
    us_assert(not dirty or us_load(word) & FOLIO, "an entry CACHE needs a folio in the swap cache")
    zero_set(m, at, entry_type(entry) == SAME and entry_payload(entry) == 0)
    us_chaos()
    if tree and had:
        us_store(word_of(&m.k, ZSWAP_TREE, at), tree)
    elif tree or had:
        us_lock(&cluster_of(&m.k, at).lock)
        word_set(&m.k, ZSWAP_TREE, at, tree)
        us_unlock(&cluster_of(&m.k, at).lock)
    if dirty != (us_load(word) & DIRTY != 0):
        word_change(word, DIRTY, DIRTY if dirty else 0)
    word_unlock(word)
    return id


cdef uint64_t swap_table_owner(SwapMap* map, uint64_t id, uint64_t holder) noexcept nogil:
    return id


cdef bint swap_table_try_owner(SwapMap* map, uint64_t owner, uint64_t entry) noexcept nogil:
    cdef SwapTable* m = <SwapTable*>map
    cdef uint64_t* word = word_of(&m.k, TABLE, owner - 1)
    cdef uint64_t seen = us_load(word)
    us_assert(seen & TAG != 0, "try_owner: the id is free")
    us_chaos()
    # A CAS can fail though nobody has the lock, when the word has been locked and unlocked: worth another try.
    while not seen & LOCKED and entry_at(m, owner - 1) == entry:
        us_chaos()
        if us_cas(word, seen, seen | LOCKED):
            if entry_at(m, owner - 1) == entry:
                return True
            word_unlock(word)       # it was changed before we had it
            return False
        seen = us_load(word)
    return False


cdef void swap_table_unlock_owner(SwapMap* map, uint64_t owner, uint64_t entry) noexcept nogil:
    swap_table_unlock(map, owner, entry)


cdef uint64_t swap_table_next(SwapMap* map, int device, uint64_t after, uint64_t* entry, int64_t* busy) noexcept nogil:
    cdef SwapTable* m = <SwapTable*>map
    cdef uint64_t at = after
    cdef uint64_t stop, found
    cdef Cluster* c
    while at < m.slots and device == 0:
        c = cluster_of(&m.k, at)
        stop = (at | (CLUSTER_SLOTS - 1)) + 1
        stop = m.slots if stop > m.slots else stop
        us_lock(&c.lock)
        if c.count == 0:
            at = stop
        while at < stop:
            found = us_load(word_of(&m.k, TABLE, at))
            if found and not found & GONE and entry_type(entry_at(m, at)) == SLOT:
                us_unlock(&c.lock)
                entry[0] = home_of(m, at)
                return at + 1
            at += 1
        us_unlock(&c.lock)
    return 0


# ---- the count; under the cluster's lock ----

cdef inline int64_t count_at(SwapTable* m, uint64_t at) noexcept nogil:
    cdef uint8_t count = us_load_byte(&m.swap_map[at])
    if count == CONTINUED:
        return <int64_t>us_load(word_of(&m.k, COUNTS, at))
    return count


cdef inline void count_set(SwapTable* m, uint64_t at, int64_t count) noexcept nogil:
    cdef bint had = us_load_byte(&m.swap_map[at]) == CONTINUED
    if count > COUNT_MOST:
        word_set(&m.k, COUNTS, at, <uint64_t>count)
        us_chaos()
        us_store_byte(&m.swap_map[at], CONTINUED)
        return
    us_store_byte(&m.swap_map[at], <uint8_t>count)
    us_chaos()
    if had:
        word_set(&m.k, COUNTS, at, 0)


cdef int swap_table_dup(SwapMap* map, uint64_t* id, int64_t n, uint64_t* moved) noexcept nogil:
    cdef SwapTable* m = <SwapTable*>map
    cdef uint64_t at = id[0] - 1
    cdef Cluster* c = cluster_of(&m.k, at)
    cdef int64_t count
    cdef int result = 0
    us_assert(n > 0, "dup: more references, not less")
    us_lock(&c.lock)
    count = count_at(m, at)
    us_assert(count > 0 and (us_load(word_of(&m.k, TABLE, at)) & GONE) == 0, "dup: the id has no count")
    us_chaos()
    if n > COUNT_MAX - count:
        result = -EOVERFLOW
    else:
        count_set(m, at, count + n)
    us_unlock(&c.lock)
    return result


cdef int64_t swap_table_put(SwapMap* map, uint64_t id, int64_t n, uint64_t* entry) noexcept nogil:
    cdef SwapTable* m = <SwapTable*>map
    cdef uint64_t at = id - 1
    cdef Cluster* c = cluster_of(&m.k, at)
    cdef int64_t left
    us_assert(n > 0, "put: fewer references, not more")
    us_lock(&c.lock)
    left = count_at(m, at) - n
    us_assert(left >= 0, "put: no more references than there are")
    us_chaos()
    count_set(m, at, left if left else 1)
    us_unlock(&c.lock)
    if left:
        entry[0] = 0            # the reference is gone: the slot may not be touched any more
        return left
    us_chaos()
    word_lock(word_of(&m.k, TABLE, at), LOCKED | GONE)
    entry[0] = entry_at(m, at)
    return 0


cdef int64_t swap_table_count(SwapMap* map, uint64_t id) noexcept nogil:
    cdef SwapTable* m = <SwapTable*>map
    cdef uint64_t at = id - 1
    cdef int64_t count = us_load_byte(&m.swap_map[at])
    us_assert(count != 0, "count: the id is free")
    if count == CONTINUED:
        us_chaos()
        us_lock(&cluster_of(&m.k, at).lock)
        count = count_at(m, at)
        us_unlock(&cluster_of(&m.k, at).lock)
    return count


# ---- the swap cache ----

cdef int swap_table_cache(SwapMap* map, uint64_t id, uint64_t folio) noexcept nogil:
    cdef SwapTable* m = <SwapTable*>map
    cdef uint64_t* word = word_of(&m.k, TABLE, id - 1)
    us_assert(us_load(word) & LOCKED != 0, "cache: under the entry's lock")
    if folio:
        word_change(word, (~<uint64_t>0 << FOLIO_SHIFT) | TAG, (folio << FOLIO_SHIFT) | FOLIO)
    elif us_load(word) & FOLIO:
        word_change(word, (~<uint64_t>0 << FOLIO_SHIFT) | TAG | DIRTY, SHADOW)
    return 0


cdef uint64_t swap_table_cached(SwapMap* map, uint64_t id) noexcept nogil:
    return us_load(word_of(&(<SwapTable*>map).k, TABLE, id - 1)) >> FOLIO_SHIFT


cdef int64_t swap_table_ids(SwapMap* map) noexcept nogil:
    return us_read(&(<SwapTable*>map).ids)


cdef int64_t swap_table_metadata(SwapMap* map) noexcept nogil:
    cdef SwapTable* m = <SwapTable*>map
    return PAGE + <int64_t>m.static_bytes + us_read(&m.k.pages.bytes)


cdef SwapMapOps ops
ops.name = b"swap_table"
ops.bound = True
ops.count_max = COUNT_MAX
ops.new = swap_table_new
ops.delete = swap_table_delete
ops.alloc = swap_table_alloc
ops.alloc_run = swap_table_alloc_run
ops.free = swap_table_free
ops.home = swap_table_home
ops.lock = swap_table_lock
ops.unlock = swap_table_unlock
ops.owner = swap_table_owner
ops.try_owner = swap_table_try_owner
ops.unlock_owner = swap_table_unlock_owner
ops.next = swap_table_next
ops.dup = swap_table_dup
ops.put = swap_table_put
ops.count = swap_table_count
ops.cache = swap_table_cache
ops.cached = swap_table_cached
ops.ids = swap_table_ids
ops.metadata = swap_table_metadata


cdef const SwapMapOps* swap_table_design() noexcept nogil:
    return &ops
