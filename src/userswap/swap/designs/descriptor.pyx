"""A tree of pointers to swap descriptors: everything about an id in one small struct.

Models: swap_desc, the proposal of the thread of March 2023 (linux-mm, LSF/MM/BPF topic "Swap Abstraction / Native
Zswap"): page tables hold an id; one xarray leads from it to a struct that has the swap entry or the zswap entry, the
folio in the swap cache, the swap count and the id itself, for the way back. The extra xarray for rotating disks (slot
-> descriptor, for readahead by cluster) is left out: nothing here reads ahead by slots.

  tree      word of a live id: pointer to its descriptor
  struct    entry (8): | - | payload (45) | - | GONE | type | - | WAITERS | LOCKED |
            folio (6), upper bits of the id (2)
            count (4), lower bits of the id (4)

That is 24 bytes as in the proposal, whose id had 32 bits; an id here has 48. 170 descriptors fit a page of the slab,
so an id is 24.5 bytes and its 8.13 in the tree. A slab page that empties goes back to the system (radix.pxd: tree and
descriptors share it). The count needs no overflow path: 32 bits, and a dup beyond them is refused.

Storage remembers the descriptor, not the id: writeback and compaction touch it without a look-up. What next() gives
is an id, as the walk must go on from there though the descriptor may be gone by then; both are owners.

Locks. The mutex (a leaf mutex, as the xarray's lock) protects the shape of the tree, free ids and the slab; alloc and
free are all that take it, and next(). LOCKED protects type and payload in `entry`, and `folio` is stored under it;
whoever has it is alone with that word but for WAITERS, so that unlock is one exchange. The count changes by CAS.
Look-ups and reads take no lock: a descriptor lives from alloc to free, as the leaf that leads to it does.

The last put finds all references to be its own and leaves the count as it is: nobody else can dup. It locks the entry
with GONE; from then to free the descriptor is the caller's alone.

Different from the kernel: no RCU (the reference, or the storage's lock, keeps descriptor and leaf), and one mutex
where SLUB has free lists for each CPU, since an id is taken under that very mutex anyway.
"""
from libc.errno cimport EOVERFLOW
from libc.stdint cimport int64_t, uint64_t

from userswap.native.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap
from userswap.native.us cimport (
    us_assert, us_cas, us_chaos, us_load, us_lock, us_or, us_pause, us_read, us_store, us_swap, us_unlock,
)
from userswap.swap.entry cimport (
    ENTRY_GONE, ENTRY_LOCKED, FREE, SLOT, entry_make, entry_payload, entry_seen, entry_type, slot_device,
)
from userswap.swap.idtree cimport (
    IdTree, id_free, id_take, id_take_run, id_word, idtree_end, idtree_init, word_lock, word_try, word_wake,
)
from userswap.swap.map cimport SwapMap, SwapMapOps, SwapMapOptions
from userswap.swap.radix cimport (
    PAGE_BYTES, RADIX_MASK, RADIX_SHIFT, Node, radix_next_leaf, radix_node, slab_alloc, slab_free,
)


cdef enum:
    MAP_BYTES = 4096            # what the map itself lives in
    POINTER = 5                 # type of a tree word that is not FREE: the payload is an address / 8
    RUN_MOST = 32
    DESCS = 170                 # to a page

cdef extern from *:
    """
    #define US_OWNER_DESC (1ull << 63)
    #define US_DESC_FOLIO 0xFFFFFFFFFFFFull
    #define US_DESC_COUNT 0xFFFFFFFFull
    """
    const uint64_t OWNER_DESC "US_OWNER_DESC"           # the owner is an address, not an id
    const uint64_t DESC_FOLIO "US_DESC_FOLIO"
    const uint64_t DESC_COUNT "US_DESC_COUNT"

cdef struct SwapDesc:           # 24 bytes
    uint64_t entry              # of a free one: where the page's chain of free ones goes on
    uint64_t folio              # and bits 32 .. 47 of the id above it
    uint64_t count              # and bits 0 .. 31 of the id above it

# A page of descriptors has the header of a node: `used`, `free`, `fresh` as in a leaf, and here its neighbours among
# the pages with a free one.
cdef enum:
    NEXT = 0
    PREV = 1

cdef struct Descriptor:
    SwapMap head
    char apart[120]             # the tree's root is read all the time
    IdTree tree                 # and the mutex
    Node* pages                 # with a free descriptor; under the mutex


cdef SwapMap* descriptor_new(const SwapMapOptions* options) noexcept nogil:
    cdef void* memory = mmap(NULL, MAP_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    cdef Descriptor* m
    if memory == MAP_FAILED:
        return NULL
    m = <Descriptor*>memory
    m.head.ops = &ops
    idtree_init(&m.tree)
    return &m.head


cdef void descriptor_delete(SwapMap* map) noexcept nogil:
    idtree_end(&(<Descriptor*>map).tree)
    munmap(map, MAP_BYTES)


# ---- descriptors; under the mutex ----

cdef void page_list(Descriptor* m, Node* page) noexcept nogil:
    page.reserved[PREV] = 0
    page.reserved[NEXT] = <uint64_t>m.pages
    if m.pages != NULL:
        m.pages.reserved[PREV] = <uint64_t>page
    m.pages = page


cdef void page_unlist(Descriptor* m, Node* page) noexcept nogil:
    cdef Node* after = <Node*>page.reserved[NEXT]
    cdef Node* before = <Node*>page.reserved[PREV]
    if before != NULL:
        before.reserved[NEXT] = <uint64_t>after
    else:
        m.pages = after
    if after != NULL:
        after.reserved[PREV] = <uint64_t>before


cdef SwapDesc* desc_new(Descriptor* m) noexcept nogil:
    cdef Node* page = m.pages
    cdef SwapDesc* desc
    us_assert(sizeof(SwapDesc) == 24 and PAGE_BYTES // sizeof(SwapDesc) == DESCS, "a descriptor is 24 bytes")
    if page == NULL:
        page = slab_alloc(&m.tree.slab)
        if page == NULL:
            return NULL
        page.free = -1
        page_list(m, page)
    if page.free >= 0:
        desc = &(<SwapDesc*>page.slots)[page.free]
        us_assert(entry_type(desc.entry) == FREE, "a free descriptor has a FREE entry")
        page.free = <int>entry_payload(desc.entry) - 1
    else:
        desc = &(<SwapDesc*>page.slots)[page.fresh]
        page.fresh += 1
    page.used += 1
    if page.used == DESCS:
        page_unlist(m, page)
    return desc


cdef void desc_free(Descriptor* m, SwapDesc* desc) noexcept nogil:
    cdef Node* page = radix_node(<uint64_t>desc)
    us_chaos()
    us_store(&desc.entry, entry_make(FREE, <uint64_t>(page.free + 1)))
    page.free = <int>((<uint64_t>desc - <uint64_t>page.slots) // sizeof(SwapDesc))
    if page.used == DESCS:
        page_list(m, page)
    page.used -= 1
    if page.used == 0:
        page_unlist(m, page)
        slab_free(&m.tree.slab, page)


cdef inline SwapDesc* desc_in(uint64_t word) noexcept nogil:
    return <SwapDesc*>(entry_payload(word) << 3)


# ---- ids ----

cdef inline SwapDesc* desc_of(Descriptor* m, uint64_t id) noexcept nogil:
    us_assert(entry_type(us_load(id_word(&m.tree, id))) == POINTER, "the id is free")
    return desc_in(us_load(id_word(&m.tree, id)))


cdef inline uint64_t desc_id(SwapDesc* desc) noexcept nogil:
    return (desc.count >> 32) | (desc.folio >> 48 << 32)


cdef bint descriptor_alloc_run(SwapMap* map, const uint64_t* entries, uint64_t holder, int n,
                               uint64_t* ids) noexcept nogil:
    cdef Descriptor* m = <Descriptor*>map
    cdef SwapDesc* descs[RUN_MOST]
    cdef uint64_t words[RUN_MOST]
    cdef bint done = False
    cdef int have = 0
    us_lock(&m.tree.mutex)
    while have < n:
        descs[have] = desc_new(m)
        if descs[have] == NULL:
            break
        words[have] = entry_make(POINTER, <uint64_t>descs[have] >> 3)
        us_store(&descs[have].entry, entry_seen(entries[have]))
        have += 1
    if have == n:
        if n == 1:
            ids[0] = id_take(&m.tree, words[0])
            done = ids[0] != 0
        else:
            done = id_take_run(&m.tree, words, n, ids)
    if done:
        for have in range(n):
            descs[have].folio = ids[have] >> 32 << 48
            us_store(&descs[have].count, ids[have] << 32 | 1)
    else:
        while have:
            have -= 1
            desc_free(m, descs[have])
    us_unlock(&m.tree.mutex)
    return done


cdef uint64_t descriptor_alloc(SwapMap* map, uint64_t entry, uint64_t holder) noexcept nogil:
    cdef uint64_t id = 0
    return id if descriptor_alloc_run(map, &entry, holder, 1, &id) else 0


cdef void descriptor_free(SwapMap* map, uint64_t id) noexcept nogil:
    cdef Descriptor* m = <Descriptor*>map
    cdef SwapDesc* desc = desc_of(m, id)
    us_assert((us_load(&desc.entry) & (ENTRY_LOCKED | ENTRY_GONE)) == (ENTRY_LOCKED | ENTRY_GONE),
              "free: the id has a count")
    us_lock(&m.tree.mutex)
    us_or(id_word(&m.tree, id), ENTRY_LOCKED | ENTRY_GONE)      # as idtree knows an id that may go
    id_free(&m.tree, id)
    desc_free(m, desc)
    us_unlock(&m.tree.mutex)


# ---- the entry ----

cdef void set_entry(SwapDesc* desc, uint64_t entry) noexcept nogil:
    us_assert(entry_type(entry) != FREE, "unlock: an id keeps an entry until it is freed")
    us_assert((us_load(&desc.entry) & (ENTRY_LOCKED | ENTRY_GONE)) == ENTRY_LOCKED,
              "unlock: not locked, or no count")
    us_chaos()
    word_wake(&desc.entry, us_swap(&desc.entry, entry_seen(entry)))


cdef uint64_t descriptor_lock(SwapMap* map, uint64_t id) noexcept nogil:
    return word_lock(&desc_of(<Descriptor*>map, id).entry, ENTRY_LOCKED)


cdef uint64_t descriptor_unlock(SwapMap* map, uint64_t id, uint64_t entry) noexcept nogil:
    set_entry(desc_of(<Descriptor*>map, id), entry)
    return id


cdef inline SwapDesc* owners_desc(Descriptor* m, uint64_t owner) noexcept nogil:
    return <SwapDesc*>(owner & ~OWNER_DESC) if owner & OWNER_DESC else desc_of(m, owner)


cdef uint64_t descriptor_owner(SwapMap* map, uint64_t id, uint64_t holder) noexcept nogil:
    return <uint64_t>desc_of(<Descriptor*>map, id) | OWNER_DESC


cdef bint descriptor_try_owner(SwapMap* map, uint64_t owner, uint64_t entry) noexcept nogil:
    return word_try(&owners_desc(<Descriptor*>map, owner).entry, entry)


cdef void descriptor_unlock_owner(SwapMap* map, uint64_t owner, uint64_t entry) noexcept nogil:
    set_entry(owners_desc(<Descriptor*>map, owner), entry)


cdef uint64_t descriptor_next(SwapMap* map, int device, uint64_t after, uint64_t* entry, int64_t* busy) noexcept nogil:
    cdef Descriptor* m = <Descriptor*>map
    cdef uint64_t id, seen
    cdef SwapDesc* desc
    cdef Node* leaf
    cdef int i
    # An owner that storage has: its descriptor lives, as the storage does.
    id = 1 + (desc_id(owners_desc(m, after)) if after & OWNER_DESC else after)
    while True:
        # A leaf at a time, so that nobody waits for long. What is seen under the mutex is not freed.
        us_lock(&m.tree.mutex)
        leaf = radix_next_leaf(&m.tree.entries, id >> RADIX_SHIFT)
        if leaf == NULL:
            us_unlock(&m.tree.mutex)
            return 0
        if leaf.index > id >> RADIX_SHIFT:
            id = leaf.index << RADIX_SHIFT
        for i in range(<int>(id & RADIX_MASK), leaf.fresh):
            if entry_type(leaf.slots[i]) == FREE:
                continue
            desc = desc_in(leaf.slots[i])
            seen = us_load(&desc.entry)
            if entry_type(seen) == SLOT and slot_device(seen) == device:
                if word_try(&desc.entry, entry_seen(seen)):
                    us_unlock(&m.tree.mutex)
                    entry[0] = entry_seen(seen)
                    return desc_id(desc)
                busy[0] += 1
        id = (leaf.index + 1) << RADIX_SHIFT
        us_unlock(&m.tree.mutex)


# ---- the count ----

cdef int descriptor_dup(SwapMap* map, uint64_t* id, int64_t n, uint64_t* moved) noexcept nogil:
    cdef SwapDesc* desc = desc_of(<Descriptor*>map, id[0])
    cdef uint64_t seen
    us_assert(n > 0, "dup: more references, not less")
    us_assert((us_load(&desc.entry) & ENTRY_GONE) == 0, "dup: the id has no count")
    while True:
        seen = us_load(&desc.count)
        us_chaos()
        if <uint64_t>n > DESC_COUNT - (seen & DESC_COUNT):
            return -EOVERFLOW
        if us_cas(&desc.count, seen, seen + <uint64_t>n):
            return 0
        us_pause()


cdef int64_t descriptor_put(SwapMap* map, uint64_t id, int64_t n, uint64_t* entry) noexcept nogil:
    cdef SwapDesc* desc = desc_of(<Descriptor*>map, id)
    cdef uint64_t seen
    us_assert(n > 0, "put: fewer references, not more")
    us_assert((us_load(&desc.entry) & ENTRY_GONE) == 0, "put: the id has no count")
    entry[0] = 0
    while True:
        seen = us_load(&desc.count)
        us_assert((seen & DESC_COUNT) >= <uint64_t>n, "put: no more references than there are")
        us_chaos()
        if seen & DESC_COUNT == <uint64_t>n:
            break
        if us_cas(&desc.count, seen, seen - <uint64_t>n):
            return <int64_t>(seen & DESC_COUNT) - n     # the reference is gone: `desc` may not be touched any more
        us_pause()
    entry[0] = word_lock(&desc.entry, ENTRY_LOCKED | ENTRY_GONE)
    us_assert(us_load(&desc.count) == seen, "put: nobody but the last holder could dup")
    return 0


cdef int64_t descriptor_count(SwapMap* map, uint64_t id) noexcept nogil:
    return <int64_t>(us_load(&desc_of(<Descriptor*>map, id).count) & DESC_COUNT)


# ---- the swap cache ----

cdef int descriptor_cache(SwapMap* map, uint64_t id, uint64_t folio) noexcept nogil:
    cdef SwapDesc* desc = desc_of(<Descriptor*>map, id)
    us_assert((us_load(&desc.entry) & ENTRY_LOCKED) != 0, "cache: under the entry's lock")
    us_store(&desc.folio, (desc.folio & ~DESC_FOLIO) | folio)
    return 0


cdef uint64_t descriptor_cached(SwapMap* map, uint64_t id) noexcept nogil:
    return us_load(&desc_of(<Descriptor*>map, id).folio) & DESC_FOLIO


# ---- figures ----

cdef int64_t descriptor_ids(SwapMap* map) noexcept nogil:
    return us_read(&(<Descriptor*>map).tree.ids)


cdef int64_t descriptor_metadata(SwapMap* map) noexcept nogil:
    return MAP_BYTES + us_read(&(<Descriptor*>map).tree.slab.bytes)


cdef SwapMapOps ops
ops.name = b"descriptor"
ops.bound = False
ops.count_max = <int64_t>0xFFFFFFFF
ops.new = descriptor_new
ops.delete = descriptor_delete
ops.alloc = descriptor_alloc
ops.alloc_run = descriptor_alloc_run
ops.free = descriptor_free
ops.home = NULL
ops.lock = descriptor_lock
ops.unlock = descriptor_unlock
ops.owner = descriptor_owner
ops.try_owner = descriptor_try_owner
ops.unlock_owner = descriptor_unlock_owner
ops.next = descriptor_next
ops.dup = descriptor_dup
ops.put = descriptor_put
ops.count = descriptor_count
ops.cache = descriptor_cache
ops.cached = descriptor_cached
ops.ids = descriptor_ids
ops.metadata = descriptor_metadata


cdef const SwapMapOps* descriptor_design() noexcept nogil:
    return &ops
