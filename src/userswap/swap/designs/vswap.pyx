"""Virtual swap space: a descriptor of 24 bytes for each id, in clusters; swap files know which id has a slot.

Models: Virtual Swap Space by Nhat Pham (linux-mm, v3 of February 2026 to v6 of May 2026, on 6.19; LWN, "Modernizing
swapping: virtual swap spaces"). Page tables hold a virtual slot: cluster and place in it. A cluster is 512
descriptors, allocated on demand and found through an xarray; it serves one order of folio only, and is the current
one of a CPU, or in the list of partial ones of its order, or full. v4 to v6 added a cache for each CPU of the cluster
last looked up, and batches.

  backing (8): | - | payload (45) | OFF_MAP | GONE | type | - | WAITERS | LOCKED |     a slot, a zswap handle, a value
  folio (8): of the swap cache · count (4) · cgroup (2) · flags (2)

The kernel's flags say in_swapcache (folio or shadow), the type of backing (SWAPFILE, ZERO, ZSWAP, FOLIO: here SLOT,
SAME, ZSWAP, CACHE) and it locks the folio; here type and lock are bits of `backing`, and nobody keeps shadows or
cgroups. No overflow path: 4 bytes of count, and a dup beyond them is refused.

A swap file has a reverse map, slot -> id, 8 bytes in tables of 512 that exist while one of their slots has an id, and
two bitmaps (allocated, bad), static memory from swapon on. next() walks the slots in use through the reverse map, not
all ids.

Locks, outermost first.

  LOCKED            of a descriptor, as the kernel's folio lock: type, payload and OFF_MAP; may be held during I/O
  cpu.lock          a CPU's current clusters. The kernel's is a local lock, which only keeps others from the CPU; a
                    thread may be preempted anywhere, so here it is a mutex that mostly nobody else wants
  cluster.lock      its bitmap, counts, folios
  clusters.mutex    as the xarray's lock: which clusters exist, the lists of partial ones, their memory. Whoever
                    holds it only try-locks clusters
  rmap_lock         the reverse map. The kernel has a lock for each cluster of slots; a leaf mutex is what a tree of
                    ours needs, and the I/O that comes before it is much longer

Look-up of a cluster: holders, and storage, keep an id alive, and so its cluster, hence nothing is locked (the kernel:
RCU). The cache of a CPU is one word, cluster number and address together, so that threads on the same CPU may mix. It
is stored by who has a live id of the cluster, and the last free of a cluster clears it on every CPU before the number
can be used again: a hit is never stale.

The reverse map has an id from before its entry becomes SLOT until the entry is another one, or until free: whoever
sees it there under rmap_lock sees a live id. Two entries may have the same slot for a moment: storage is freed before
its id is, and the slot given to somebody else. The second one, and one that finds no memory for its table, says
OFF_MAP; next() looks for those in the clusters, after the others and only while there are any, so that the reverse
map is never incomplete without saying so.

Owners: | slot / 32 (30) | id (34) |: where next() goes on, though the entry left its slot meanwhile.

Different from the kernel, beyond the locks: a run of 4 KiB slots is in the reverse map by its first slot, as a packed
folio starts at any of them; with folios of one slot that is the kernel's table. The bitmaps are memory only, one bit
for each of the swap file's folio-sized slots, since the swap file has its own. A run need not be a power of two; it
takes an aligned place all the same. Frees come one by one through this interface, so the batched free of v6 has
nothing to batch; runs are allocated in one. 24 bytes and the bitmap make a cluster of the kernel's 12,352 bytes and
its head; kmalloc's rounding is not modelled, here as there in their figures.
"""
from libc.errno cimport EOVERFLOW
from libc.stdint cimport int32_t, int64_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memset

from userswap.native.mman cimport (
    MADV_DONTNEED, MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, madvise, mmap, munmap,
)
from userswap.native.us cimport (
    us_add, us_assert, us_cas, us_chaos, us_debug, us_load, us_lock, us_locked, us_mutex, us_or, us_read, us_store,
    us_swap, us_trylock, us_unlock,
)
from userswap.swap.entry cimport (
    ENTRY_CACHED, ENTRY_GONE, ENTRY_LOCKED, FREE, SLOT, SLOT_DEVICES, entry_make, entry_payload, entry_seen, entry_type,
    slot_device, slot_offset,
)
from userswap.swap.idtree cimport (
    IdTree, id_free, id_take, id_word, idtree_end, idtree_init, side_clear, word_lock, word_try, word_wake,
)
from userswap.swap.map cimport SwapMap, SwapMapOps, SwapMapOptions
from userswap.swap.radix cimport (
    CHUNK_BYTES, HEADER_SHIFT, PAGE_BYTES, PAGE_SHIFT, RADIX_MASK, RADIX_SHIFT, Node, RadixTree, Slab, chunk_map,
    radix_make, radix_next_leaf, slab_delete,
)


cdef extern from "<sched.h>" nogil:
    int sched_getcpu()          # a load from the thread's rseq area

cdef extern from * nogil:
    int ctz "__builtin_ctzll"(uint64_t)

cdef enum:
    MAP_BYTES = 8192            # what the map itself lives in; the second page has the CPUs
    CPUS = 64                   # more share
    ORDERS = 6                  # runs of up to 32
    IDS = 512                   # of a cluster
    IDS_SHIFT = 9
    WORDS = 8                   # of its bitmap
    DESC_BYTES = 12288          # their descriptors: three pages
    DESC_PAGES = 3
    CHUNK_CLUSTERS = 21         # a chunk: a page of headers, and 63 pages of descriptors
    IDLE_CLUSTERS = 2           # free, but with memory
    TABLE = 5                   # type of a word in the tree of clusters that is not FREE
    OFF_MAP = ENTRY_CACHED      # the reverse map has not got this entry
    POISON = 0xC0
    GROUP_SHIFT = 5             # slots of a group
    GROUP_SLOTS = 32
    ID_BITS = 34

cdef extern from *:
    """
    #define US_VSWAP_ID ((1ull << 34) - 1)
    #define US_NO_GROUP ((1ull << 30) - 1)
    #define US_COUNT_MOST 0xFFFFFFFFull
    #define US_LOOKED_ADDRESS ((1ull << 36) - 1)
    #define US_ALL_CLUSTERS ((1ull << 21) - 1)
    """
    const uint64_t ID_MASK "US_VSWAP_ID"
    const uint64_t NO_GROUP "US_NO_GROUP"               # owners that next() finds in the clusters
    const uint64_t COUNT_MOST "US_COUNT_MOST"
    const uint64_t LOOKED_ADDRESS "US_LOOKED_ADDRESS"   # cluster number above it
    const uint64_t ALL_CLUSTERS "US_ALL_CLUSTERS"

cdef enum:
    LOOKED_SHIFT = 36

cdef struct SwapDesc:           # 24 bytes
    uint64_t backing
    uint64_t folio
    uint32_t count
    uint16_t cgroup             # the kernel's: a process has none
    uint16_t flags              # the kernel's: here they are in `backing`

# Header i of a chunk, 64 bytes each, belongs to page i, and a cluster has three pages: so it has three headers.
cdef struct Cluster:            # 192 bytes at most
    us_mutex lock
    int32_t used
    uint64_t number
    SwapDesc* descs
    Cluster* next               # in the list of partial ones
    Cluster* prev
    int32_t order
    int32_t first               # no word of the bitmap before this one has room
    bint current                # of some CPU
    bint full                   # was found full, and is in no list
    bint listed
    uint64_t bitmap[WORDS]

cdef struct ClusterChunk:       # header 0; bit i of the masks is cluster i
    ClusterChunk* next          # among chunks with a free cluster
    ClusterChunk* prev
    ClusterChunk* next_all
    ClusterChunk* prev_all
    uint64_t free
    uint64_t touched            # has memory

cdef struct Cpu:                # 64 bytes
    uint64_t looked_up          # cluster number | page of its descriptors
    us_mutex lock
    Cluster* current[ORDERS]

cdef struct Vswap:
    SwapMap head
    Cpu* cpus
    char apart[112]             # the tree's root is read all the time
    IdTree clusters             # number -> page of its descriptors; and their mutex
    Cluster* partial[ORDERS]    # lists, oldest first, and their ends
    Cluster* partial_end[ORDERS]
    ClusterChunk* chunks        # with a free cluster
    ClusterChunk* all_chunks
    int64_t idle                # free clusters with memory
    int64_t bytes               # of chunks
    us_mutex rmap_lock
    RadixTree rmap[SLOT_DEVICES]
    Slab rmap_slab
    int64_t off_map             # ids that the reverse map has not got
    void* bitmaps
    int64_t bitmaps_bytes
    char apart_too[64]
    int64_t ids


cdef SwapMap* vswap_new(const SwapMapOptions* options) noexcept nogil:
    cdef void* memory = mmap(NULL, MAP_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    cdef Vswap* m
    cdef int i
    us_assert(sizeof(SwapDesc) == 24 and sizeof(SwapDesc) * IDS == DESC_BYTES, "a descriptor is 24 bytes")
    us_assert(sizeof(Cluster) <= 192 and sizeof(ClusterChunk) <= 64, "headers fit")
    us_assert(sizeof(Vswap) <= PAGE_BYTES and sizeof(Cpu) * CPUS <= PAGE_BYTES, "a map fits its pages")
    if memory == MAP_FAILED:
        return NULL
    m = <Vswap*>memory
    m.head.ops = &ops
    idtree_init(&m.clusters)
    m.cpus = <Cpu*>(<char*>memory + PAGE_BYTES)
    for i in range(CPUS):
        m.cpus[i].looked_up = ~<uint64_t>0
    for i in range(SLOT_DEVICES):
        m.rmap[i].slab = &m.rmap_slab
    if options.slots:
        # As at swapon: all of it at once.
        m.bitmaps_bytes = 2 * <int64_t>((options.slots + 8 * PAGE_BYTES - 1) // (8 * PAGE_BYTES)) * PAGE_BYTES
        m.bitmaps = mmap(NULL, m.bitmaps_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
        if m.bitmaps == MAP_FAILED:
            munmap(memory, MAP_BYTES)
            return NULL
        memset(m.bitmaps, 0, m.bitmaps_bytes)
    return &m.head


cdef void vswap_delete(SwapMap* map) noexcept nogil:
    cdef Vswap* m = <Vswap*>map
    cdef ClusterChunk* chunk = m.all_chunks
    cdef ClusterChunk* after
    us_assert(us_read(&m.ids) != 0 or us_read(&m.off_map) == 0, "an id that is gone is off no map")
    while chunk != NULL:
        after = chunk.next_all
        munmap(chunk, CHUNK_BYTES)
        chunk = after
    if m.bitmaps != NULL:
        munmap(m.bitmaps, m.bitmaps_bytes)
    slab_delete(&m.rmap_slab)
    idtree_end(&m.clusters)
    munmap(map, MAP_BYTES)


# ---- memory of clusters; under the mutex of clusters ----

cdef inline Cluster* cluster_at(SwapDesc* descs) noexcept nogil:
    cdef uint64_t page = <uint64_t>descs >> PAGE_SHIFT
    return <Cluster*>((<uint64_t>descs & ~<uint64_t>(CHUNK_BYTES - 1))
                      | ((page & (CHUNK_BYTES // PAGE_BYTES - 1)) << HEADER_SHIFT))


cdef void chunk_list(Vswap* m, ClusterChunk* chunk) noexcept nogil:
    chunk.prev = NULL
    chunk.next = m.chunks
    if chunk.next != NULL:
        chunk.next.prev = chunk
    m.chunks = chunk


cdef void chunk_unlist(Vswap* m, ClusterChunk* chunk) noexcept nogil:
    if chunk.prev != NULL:
        chunk.prev.next = chunk.next
    else:
        m.chunks = chunk.next
    if chunk.next != NULL:
        chunk.next.prev = chunk.prev
    chunk.next = NULL
    chunk.prev = NULL


# A cluster with zeros for descriptors; NULL: no memory.
cdef Cluster* memory_new(Vswap* m) noexcept nogil:
    cdef ClusterChunk* chunk = m.chunks
    cdef Cluster* cluster
    cdef SwapDesc* descs
    cdef uint64_t idle, bit
    cdef int i
    if chunk == NULL:
        chunk = <ClusterChunk*>chunk_map()
        if chunk == NULL:
            return NULL
        chunk.free = ALL_CLUSTERS
        chunk.next_all = m.all_chunks
        if chunk.next_all != NULL:
            chunk.next_all.prev_all = chunk
        m.all_chunks = chunk
        us_add(&m.bytes, PAGE_BYTES)
        chunk_list(m, chunk)
    idle = chunk.free & chunk.touched
    i = ctz(idle if idle else chunk.free)
    bit = <uint64_t>1 << i
    descs = <SwapDesc*>(<char*>chunk + (1 + DESC_PAGES * i) * PAGE_BYTES)
    cluster = cluster_at(descs)
    if idle:
        m.idle -= 1
    else:
        us_add(&m.bytes, DESC_BYTES)
    # Zeroed as a whole, whether it has memory or gets it now: as the kernel's is.
    memset(descs, 0, DESC_BYTES)
    memset(cluster, 0, sizeof(Cluster))
    cluster.descs = descs
    chunk.touched |= bit
    chunk.free &= ~bit
    if chunk.free == 0:
        chunk_unlist(m, chunk)
    return cluster


cdef void memory_free(Vswap* m, Cluster* cluster) noexcept nogil:
    cdef ClusterChunk* chunk = <ClusterChunk*>(<uint64_t>cluster & ~<uint64_t>(CHUNK_BYTES - 1))
    cdef uint64_t page = (<uint64_t>cluster - <uint64_t>chunk) >> HEADER_SHIFT
    cdef uint64_t bit = <uint64_t>1 << ((page - 1) // DESC_PAGES)
    cdef SwapDesc* descs = cluster.descs
    cdef uint64_t memory
    us_assert((chunk.free & bit) == 0, "a cluster is freed once")
    if us_debug():
        memset(descs, POISON, DESC_BYTES)
        memset(cluster, POISON, sizeof(Cluster))
    if m.idle < IDLE_CLUSTERS or madvise(descs, DESC_BYTES, MADV_DONTNEED) != 0:
        m.idle += 1
    else:
        chunk.touched &= ~bit
        us_add(&m.bytes, -DESC_BYTES)
    if chunk.free == 0:
        chunk_list(m, chunk)
    chunk.free |= bit
    if chunk.free == ALL_CLUSTERS and (chunk.next != NULL or chunk.prev != NULL):
        # Another chunk has free clusters. So at most one is ever kept that is wholly free.
        chunk_unlist(m, chunk)
        if chunk.prev_all != NULL:
            chunk.prev_all.next_all = chunk.next_all
        else:
            m.all_chunks = chunk.next_all
        if chunk.next_all != NULL:
            chunk.next_all.prev_all = chunk.prev_all
        memory = chunk.touched
        us_add(&m.bytes, -PAGE_BYTES)
        while memory:
            memory &= memory - 1
            m.idle -= 1
            us_add(&m.bytes, -DESC_BYTES)
        us_chaos()
        munmap(chunk, CHUNK_BYTES)


# ---- which clusters there are; under their mutex ----

cdef void partial_list(Vswap* m, Cluster* cluster) noexcept nogil:
    us_assert(us_locked(&m.clusters.mutex), "lists change under the mutex")
    cluster.next = NULL
    cluster.prev = m.partial_end[cluster.order]
    if cluster.prev != NULL:
        cluster.prev.next = cluster
    else:
        m.partial[cluster.order] = cluster
    m.partial_end[cluster.order] = cluster
    cluster.listed = True


cdef void partial_unlist(Vswap* m, Cluster* cluster) noexcept nogil:
    us_assert(us_locked(&m.clusters.mutex), "lists change under the mutex")
    if cluster.prev != NULL:
        cluster.prev.next = cluster.next
    else:
        m.partial[cluster.order] = cluster.next
    if cluster.next != NULL:
        cluster.next.prev = cluster.prev
    else:
        m.partial_end[cluster.order] = cluster.prev
    cluster.listed = False


# The new cluster is locked by the caller, as nobody knows it yet.
cdef Cluster* cluster_new(Vswap* m, int order) noexcept nogil:
    cdef Cluster* cluster = memory_new(m)
    if cluster == NULL:
        return NULL
    cluster.number = id_take(&m.clusters, entry_make(TABLE, <uint64_t>cluster.descs >> PAGE_SHIFT))
    if cluster.number == 0 or cluster.number >> (ID_BITS - IDS_SHIFT):
        if cluster.number:
            us_or(id_word(&m.clusters, cluster.number), ENTRY_LOCKED | ENTRY_GONE)
            id_free(&m.clusters, cluster.number)
        memory_free(m, cluster)
        return NULL
    cluster.order = order
    us_trylock(&cluster.lock)
    return cluster


# Its last id was freed by the caller, who has the cluster locked.
cdef void cluster_drop(Vswap* m, Cluster* cluster) noexcept nogil:
    cdef uint64_t looked_up = (cluster.number << LOOKED_SHIFT) | (<uint64_t>cluster.descs >> PAGE_SHIFT)
    cdef int i
    if cluster.listed:
        partial_unlist(m, cluster)
    # Nobody has an id of it, so nobody stores it again.
    for i in range(CPUS):
        us_cas(&m.cpus[i].looked_up, looked_up, ~<uint64_t>0)
    us_chaos()
    us_or(id_word(&m.clusters, cluster.number), ENTRY_LOCKED | ENTRY_GONE)
    id_free(&m.clusters, cluster.number)
    us_unlock(&cluster.lock)    # nobody waits for it: those who have no id of it try-lock, under the mutex
    memory_free(m, cluster)


# ---- look-up ----

cdef inline SwapDesc* descs_of(Vswap* m, uint64_t id) noexcept nogil:
    us_assert(entry_type(us_load(id_word(&m.clusters, id >> IDS_SHIFT))) == TABLE, "the id's cluster exists")
    return <SwapDesc*>(entry_payload(us_load(id_word(&m.clusters, id >> IDS_SHIFT))) << PAGE_SHIFT)


# By who keeps the id alive until this returns.
cdef inline SwapDesc* look_up(Vswap* m, uint64_t id) noexcept nogil:
    cdef uint64_t* looked_up = &m.cpus[sched_getcpu() & (CPUS - 1)].looked_up
    cdef uint64_t seen = us_load(looked_up)
    cdef SwapDesc* descs
    if seen >> LOOKED_SHIFT == id >> IDS_SHIFT:
        descs = <SwapDesc*>((seen & LOOKED_ADDRESS) << PAGE_SHIFT)
        us_assert(descs == descs_of(m, id), "the cluster looked up last is not stale")
        return descs
    descs = descs_of(m, id)
    us_chaos()
    us_store(looked_up, ((id >> IDS_SHIFT) << LOOKED_SHIFT) | (<uint64_t>descs >> PAGE_SHIFT))
    return descs


cdef inline SwapDesc* desc_of(Vswap* m, uint64_t id) noexcept nogil:
    cdef SwapDesc* desc = &look_up(m, id)[id & (IDS - 1)]
    us_assert(entry_type(us_load(&desc.backing)) != FREE, "the id is free")
    return desc


# ---- the reverse map ----

cdef void slot_enter(Vswap* m, uint64_t id, uint64_t* entry) noexcept nogil:
    cdef uint64_t offset = slot_offset(entry[0])
    cdef Node* leaf
    cdef bint entered = False
    if offset >> GROUP_SHIFT != NO_GROUP:
        us_lock(&m.rmap_lock)
        leaf = radix_make(&m.rmap[slot_device(entry[0])], offset >> RADIX_SHIFT)
        if leaf != NULL and leaf.slots[offset & RADIX_MASK] == 0:
            leaf.slots[offset & RADIX_MASK] = id
            leaf.used += 1
            entered = True
        us_unlock(&m.rmap_lock)
    if not entered:
        us_add(&m.off_map, 1)
        entry[0] |= OFF_MAP
    us_chaos()


cdef void slot_leave(Vswap* m, uint64_t word) noexcept nogil:
    us_chaos()
    if word & OFF_MAP:
        us_add(&m.off_map, -1)
        return
    us_lock(&m.rmap_lock)
    side_clear(&m.rmap[slot_device(word)], slot_offset(word))
    us_unlock(&m.rmap_lock)


# Unlocks a descriptor with another entry. Its caller is alone with `backing` but for WAITERS.
cdef void set_backing(Vswap* m, uint64_t id, SwapDesc* desc, uint64_t entry) noexcept nogil:
    cdef uint64_t seen = us_load(&desc.backing)
    us_assert(entry_type(entry) != FREE, "unlock: an id keeps an entry until it is freed")
    us_assert((seen & (ENTRY_LOCKED | ENTRY_GONE)) == ENTRY_LOCKED, "unlock: not locked, or no count")
    entry = entry_seen(entry)
    if entry == entry_seen(seen):
        entry |= seen & OFF_MAP
    else:
        if entry_type(seen) == SLOT:
            slot_leave(m, seen)
        if entry_type(entry) == SLOT:
            slot_enter(m, id, &entry)
    us_chaos()
    word_wake(&desc.backing, us_swap(&desc.backing, entry))


# ---- ids ----

# Takes the first aligned place for n ids; -1: there is none. Under the cluster's lock.
cdef int cluster_take(Cluster* cluster, int n) noexcept nogil:
    cdef uint64_t mask = ((<uint64_t>1 << n) - 1)
    cdef uint64_t bits
    cdef int word, at
    for word in range(cluster.first, WORDS):
        bits = cluster.bitmap[word]
        if bits == ~<uint64_t>0:
            continue
        if cluster.order == 0:
            at = ctz(~bits)
        else:
            at = 0
            while at < 64 and bits & (mask << at):
                at += 1 << cluster.order
            if at == 64:
                continue
        cluster.bitmap[word] = bits | (mask << at)
        cluster.used += n
        cluster.first = word
        return (word << 6) + at
    return -1


# A cluster with room, from the list or new: locked, the CPU's current one from now on. Under the CPU's lock.
cdef Cluster* cluster_other(Vswap* m, Cpu* cpu, int order, int n, int* at) noexcept nogil:
    cdef Cluster* cluster
    cdef Cluster* after
    us_lock(&m.clusters.mutex)
    cluster = m.partial[order]
    while cluster != NULL:
        after = cluster.next
        if us_trylock(&cluster.lock):
            partial_unlist(m, cluster)
            at[0] = cluster_take(cluster, n)
            if at[0] >= 0:
                break
            cluster.full = True
            us_unlock(&cluster.lock)
        cluster = after
    if cluster == NULL:
        cluster = cluster_new(m, order)
        if cluster != NULL:
            at[0] = cluster_take(cluster, n)
    us_unlock(&m.clusters.mutex)
    if cluster != NULL:
        cluster.current = True
        cpu.current[order] = cluster
    return cluster


cdef bint vswap_alloc_run(SwapMap* map, const uint64_t* entries, uint64_t holder, int n, uint64_t* ids) noexcept nogil:
    cdef Vswap* m = <Vswap*>map
    cdef Cpu* cpu = &m.cpus[sched_getcpu() & (CPUS - 1)]
    cdef Cluster* cluster
    cdef SwapDesc* desc
    cdef int order = 0
    cdef int at = -1
    cdef int i
    while 1 << order < n:
        order += 1
    us_lock(&cpu.lock)
    cluster = cpu.current[order]
    if cluster != NULL:
        us_lock(&cluster.lock)
        at = cluster_take(cluster, n)
        if at < 0:
            cpu.current[order] = NULL
            cluster.current = False
            cluster.full = True
            us_unlock(&cluster.lock)
    us_chaos()
    if at < 0:
        cluster = cluster_other(m, cpu, order, n, &at)
        if cluster == NULL:
            us_unlock(&cpu.lock)
            return False
    for i in range(n):
        us_assert(entry_type(entries[i]) != FREE, "an id is given with an entry")
        ids[i] = (cluster.number << IDS_SHIFT) + <uint64_t>(at + i)
        desc = &cluster.descs[at + i]
        desc.folio = 0
        desc.count = 1
        # A slot's is locked until the reverse map knows.
        us_store(&desc.backing, entry_seen(entries[i]) | (ENTRY_LOCKED if entry_type(entries[i]) == SLOT else 0))
    desc = &cluster.descs[at]
    us_unlock(&cluster.lock)
    us_unlock(&cpu.lock)
    for i in range(n):
        if entry_type(entries[i]) == SLOT:
            enter_new(m, ids[i], &desc[i])
    us_add(&m.ids, n)
    return True


cdef void enter_new(Vswap* m, uint64_t id, SwapDesc* desc) noexcept nogil:
    cdef uint64_t entry = entry_seen(us_load(&desc.backing))
    slot_enter(m, id, &entry)
    us_swap(&desc.backing, entry)       # nobody has the id yet, and so nobody waits


cdef uint64_t vswap_alloc(SwapMap* map, uint64_t entry, uint64_t holder) noexcept nogil:
    cdef uint64_t id = 0
    return id if vswap_alloc_run(map, &entry, holder, 1, &id) else 0


cdef void vswap_free(SwapMap* map, uint64_t id) noexcept nogil:
    cdef Vswap* m = <Vswap*>map
    cdef SwapDesc* desc = desc_of(m, id)
    cdef Cluster* cluster = cluster_at(desc - (id & (IDS - 1)))
    cdef uint64_t seen = us_load(&desc.backing)
    cdef int place = id & (IDS - 1)
    us_assert((seen & (ENTRY_LOCKED | ENTRY_GONE)) == (ENTRY_LOCKED | ENTRY_GONE), "free: the id has a count")
    if entry_type(seen) == SLOT:
        slot_leave(m, seen)
    us_add(&m.ids, -1)
    us_lock(&cluster.lock)
    us_assert((cluster.bitmap[place >> 6] & (<uint64_t>1 << (place & 63))) != 0, "free: the id is free already")
    us_store(&desc.backing, entry_make(FREE, 0))
    cluster.bitmap[place >> 6] &= ~(<uint64_t>1 << (place & 63))
    if place >> 6 < cluster.first:
        cluster.first = place >> 6
    cluster.used -= 1
    us_chaos()
    if cluster.used == 0 and not cluster.current:
        us_lock(&m.clusters.mutex)
        cluster_drop(m, cluster)
        us_unlock(&m.clusters.mutex)
        return
    if cluster.full:
        cluster.full = False
        us_lock(&m.clusters.mutex)
        partial_list(m, cluster)
        us_unlock(&m.clusters.mutex)
    us_unlock(&cluster.lock)


# ---- the entry ----

cdef uint64_t vswap_lock(SwapMap* map, uint64_t id) noexcept nogil:
    return word_lock(&desc_of(<Vswap*>map, id).backing, ENTRY_LOCKED)


cdef uint64_t vswap_unlock(SwapMap* map, uint64_t id, uint64_t entry) noexcept nogil:
    set_backing(<Vswap*>map, id, desc_of(<Vswap*>map, id), entry)
    return id


cdef uint64_t vswap_owner(SwapMap* map, uint64_t id, uint64_t holder) noexcept nogil:
    cdef uint64_t seen = us_load(&desc_of(<Vswap*>map, id).backing)
    if entry_type(seen) != SLOT:
        return id
    return id | (NO_GROUP if seen & OFF_MAP else slot_offset(seen) >> GROUP_SHIFT) << ID_BITS


cdef bint vswap_try_owner(SwapMap* map, uint64_t owner, uint64_t entry) noexcept nogil:
    return word_try(&desc_of(<Vswap*>map, owner & ID_MASK).backing, entry)


cdef void vswap_unlock_owner(SwapMap* map, uint64_t owner, uint64_t entry) noexcept nogil:
    cdef uint64_t id = owner & ID_MASK
    set_backing(<Vswap*>map, id, desc_of(<Vswap*>map, id), entry)


# Locks a descriptor with a slot of the device, or counts it as busy if somebody is at it.
cdef inline bint slot_try(SwapDesc* desc, uint64_t* entry, int64_t* busy) noexcept nogil:
    cdef uint64_t seen = us_load(&desc.backing)
    us_chaos()
    if seen & ENTRY_LOCKED or not us_cas(&desc.backing, seen, seen | ENTRY_LOCKED):
        busy[0] += 1
        return False
    entry[0] = entry_seen(seen)
    return True


# The ids of a device that the reverse map has not got, after this one.
cdef uint64_t next_off_map(Vswap* m, int device, uint64_t after, uint64_t* entry, int64_t* busy) noexcept nogil:
    cdef uint64_t id = after + 1
    cdef uint64_t seen
    cdef Node* leaf
    cdef SwapDesc* descs
    cdef uint64_t i
    while us_read(&m.off_map):
        # A cluster at a time; under the mutex it stays.
        us_lock(&m.clusters.mutex)
        leaf = radix_next_leaf(&m.clusters.entries, id >> IDS_SHIFT >> RADIX_SHIFT)
        if leaf == NULL:
            us_unlock(&m.clusters.mutex)
            return 0
        if leaf.index > id >> IDS_SHIFT >> RADIX_SHIFT:
            id = leaf.index << RADIX_SHIFT << IDS_SHIFT
        if entry_type(leaf.slots[(id >> IDS_SHIFT) & RADIX_MASK]) == TABLE:
            descs = descs_of(m, id)
            for i in range(id & (IDS - 1), IDS):
                seen = us_load(&descs[i].backing)
                if (entry_type(seen) == SLOT and slot_device(seen) == device and seen & OFF_MAP
                        and slot_try(&descs[i], entry, busy)):
                    us_unlock(&m.clusters.mutex)
                    return (id & ~<uint64_t>(IDS - 1)) + i
        id = ((id >> IDS_SHIFT) + 1) << IDS_SHIFT
        us_unlock(&m.clusters.mutex)
    return 0


cdef uint64_t vswap_next(SwapMap* map, int device, uint64_t after, uint64_t* entry, int64_t* busy) noexcept nogil:
    cdef Vswap* m = <Vswap*>map
    cdef RadixTree* tree = &m.rmap[device]
    cdef uint64_t last = after & ID_MASK
    cdef uint64_t at = after >> ID_BITS << GROUP_SHIFT
    cdef uint64_t id = 0
    cdef Node* leaf
    cdef int i
    if after >> ID_BITS != NO_GROUP:
        while True:
            # A table at a time. Who is in the reverse map under its lock is alive, and its cluster with it.
            us_lock(&m.rmap_lock)
            leaf = radix_next_leaf(tree, at >> RADIX_SHIFT)
            if leaf == NULL:
                us_unlock(&m.rmap_lock)
                break
            if leaf.index > at >> RADIX_SHIFT:
                at = leaf.index << RADIX_SHIFT
                last = 0
            while at >> RADIX_SHIFT == leaf.index:
                # In the order of ids among the slots of a group, as that is what an owner remembers.
                id = ID_MASK
                for i in range(GROUP_SLOTS):
                    if last < leaf.slots[(at & RADIX_MASK) + <uint64_t>i] < id:
                        id = leaf.slots[(at & RADIX_MASK) + <uint64_t>i]
                if id == ID_MASK:
                    at += GROUP_SLOTS
                    last = 0
                    continue
                last = id
                if slot_try(&descs_of(m, id)[id & (IDS - 1)], entry, busy):
                    us_unlock(&m.rmap_lock)
                    return id | at >> GROUP_SHIFT << ID_BITS
            us_unlock(&m.rmap_lock)
        last = 0
    id = next_off_map(m, device, last, entry, busy)
    return id | NO_GROUP << ID_BITS if id else 0


# ---- the count ----

cdef int vswap_dup(SwapMap* map, uint64_t* id, int64_t n, uint64_t* moved) noexcept nogil:
    cdef SwapDesc* desc = desc_of(<Vswap*>map, id[0])
    cdef Cluster* cluster = cluster_at(desc - (id[0] & (IDS - 1)))
    cdef int result = 0
    us_assert(n > 0, "dup: more references, not less")
    us_lock(&cluster.lock)
    us_assert((us_load(&desc.backing) & ENTRY_GONE) == 0 and desc.count > 0, "dup: the id has no count")
    us_chaos()
    if <uint64_t>n > COUNT_MOST - desc.count:
        result = -EOVERFLOW
    else:
        desc.count += <uint32_t>n
    us_unlock(&cluster.lock)
    return result


cdef int64_t vswap_put(SwapMap* map, uint64_t id, int64_t n, uint64_t* entry) noexcept nogil:
    cdef SwapDesc* desc = desc_of(<Vswap*>map, id)
    cdef Cluster* cluster = cluster_at(desc - (id & (IDS - 1)))
    cdef int64_t left
    us_assert(n > 0, "put: fewer references, not more")
    entry[0] = 0
    us_lock(&cluster.lock)
    us_assert((us_load(&desc.backing) & ENTRY_GONE) == 0, "put: the id has no count")
    left = <int64_t>desc.count - n
    us_assert(left >= 0, "put: no more references than there are")
    if left:
        desc.count = <uint32_t>left
    us_chaos()
    us_unlock(&cluster.lock)
    if left:
        return left             # the reference is gone: `desc` may not be touched any more
    # Ours are all there are: nobody can dup, so it stays so until the descriptor is locked.
    entry[0] = word_lock(&desc.backing, ENTRY_LOCKED | ENTRY_GONE)
    us_assert(desc.count == n, "put: nobody but the last holder could dup")
    return 0


cdef int64_t vswap_count(SwapMap* map, uint64_t id) noexcept nogil:
    cdef SwapDesc* desc = desc_of(<Vswap*>map, id)
    cdef Cluster* cluster = cluster_at(desc - (id & (IDS - 1)))
    cdef int64_t count
    us_lock(&cluster.lock)
    count = desc.count
    us_unlock(&cluster.lock)
    return count


# ---- the swap cache ----

cdef int vswap_cache(SwapMap* map, uint64_t id, uint64_t folio) noexcept nogil:
    cdef SwapDesc* desc = desc_of(<Vswap*>map, id)
    cdef Cluster* cluster = cluster_at(desc - (id & (IDS - 1)))
    us_assert((us_load(&desc.backing) & ENTRY_LOCKED) != 0, "cache: under the entry's lock")
    us_lock(&cluster.lock)
    desc.folio = folio
    us_unlock(&cluster.lock)
    return 0


cdef uint64_t vswap_cached(SwapMap* map, uint64_t id) noexcept nogil:
    cdef SwapDesc* desc = desc_of(<Vswap*>map, id)
    cdef Cluster* cluster = cluster_at(desc - (id & (IDS - 1)))
    cdef uint64_t folio
    us_lock(&cluster.lock)
    folio = desc.folio
    us_unlock(&cluster.lock)
    return folio


# ---- figures ----

cdef int64_t vswap_ids(SwapMap* map) noexcept nogil:
    return us_read(&(<Vswap*>map).ids)


cdef int64_t vswap_metadata(SwapMap* map) noexcept nogil:
    cdef Vswap* m = <Vswap*>map
    return (MAP_BYTES + m.bitmaps_bytes + us_read(&m.bytes) + us_read(&m.clusters.slab.bytes)
            + us_read(&m.rmap_slab.bytes))


cdef SwapMapOps ops
ops.name = b"vswap"
ops.bound = False
ops.count_max = <int64_t>0xFFFFFFFF
ops.new = vswap_new
ops.delete = vswap_delete
ops.alloc = vswap_alloc
ops.alloc_run = vswap_alloc_run
ops.free = vswap_free
ops.home = NULL
ops.lock = vswap_lock
ops.unlock = vswap_unlock
ops.owner = vswap_owner
ops.try_owner = vswap_try_owner
ops.unlock_owner = vswap_unlock_owner
ops.next = vswap_next
ops.dup = vswap_dup
ops.put = vswap_put
ops.count = vswap_count
ops.cache = vswap_cache
ops.cached = vswap_cached
ops.ids = vswap_ids
ops.metadata = vswap_metadata


cdef const SwapMapOps* vswap_design() noexcept nogil:
    return &ops
