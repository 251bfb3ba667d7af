"""The default: indirection on demand. An id that one page-table word holds *is* its entry; the map has nothing of it.

Answers the message of March 2023 ("I can't currently think of a way to eliminate overhead for people only using
swapfiles"). Two kinds of ids:

  direct     1 | type (2) | payload (45): the entry itself, written into the one page-table word that holds it. No
             memory in the map, no lookup, no lock but the word's own BUSY. Storage remembers the *holder*, the
             address of that word; who moves the data locks the word (swap/holder.pxd) and writes another id into it.
  numbered   0 | number (47): a word in a radix tree, made by the first dup. Storage remembers the number, and moves
             touch that word only, however many holders there are.

So the indirection exists for what is shared, and for nothing else. What it costs: writeback touches a page-table word
(one that it finds through a pointer, not by a walk), and a swapoff finds direct ids by asking every holder once,
since a slot does not know who has it. In the kernel a swapped anonymous page has no such pointer (its rmap ends at
unmapping); here the page-table word lives as long as its region, so its address will do.

The word of a numbered id:  | count - 1 (11) | payload (45) | CACHED | GONE | type | - | WAITERS | LOCKED |
The count is part of the word: dup and put are one CAS, whether or not somebody has the entry locked, and carry
LOCKED and the entry over; lock and unlock carry the count over. MANY in the count field says that the count has
its own word in a side tree, for counts above 2047: no count is too large, and nothing needs continuation.

Locks. BUSY of the holder protects a direct id: every call with an id comes from its holder, so lock and unlock of a
direct id have nothing to do. LOCKED protects type and payload of a numbered one, and its swap cache: the folio is in
the side page of the id's leaf, stored before CACHED is set, and read without a lock as the hint that it is. The
mutex of the tree protects its shape, the side tree of counts, and the passing of a count into and out of MANY; a count
below that changes without it. A magazine's lock (only ever tried; before the mutex) protects the free numbers
that it holds.

Order between the word and the side tree of counts, under one hold of the mutex: the count is stored there, then
the CAS that sets MANY; the CAS that sets a small count, then the side word is cleared. So MANY means, at every
instant, that the side tree has the count. A CAS that loses because the count moved meanwhile tries again.

The last put finds the count field 0 in a word that is not MANY: nobody else has a reference, so nobody can dup. It
locks the entry with GONE in the same CAS; from then to free the word is the caller's alone.

dup of a direct id takes a number from a magazine, which a thread fills with a few at a time so that a fork or a
snapshot does not take the mutex for each, writes the entry with the count it needs, and gives both to the caller, who
has the one holder BUSY: so nobody at the storage can be on the way (try_owner fails at BUSY) until the caller has told
the storage its new owner and let the word go. A number stays one when its count is one again, until it is freed.
"""
from libc.errno cimport ENOMEM, EOVERFLOW
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t

from userswap.native.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap
from userswap.native.us cimport (
    us_add, us_and, us_assert, us_cas, us_chaos, us_load, us_lock, us_or, us_pause, us_read, us_store, us_stripe,
    us_try, us_unlock, us_untry, us_write,
)
from userswap.swap.entry cimport (
    CACHE, ENTRY_CACHED, ENTRY_GONE, ENTRY_LOCKED, ENTRY_PAYLOAD_BITS, ENTRY_TOP_SHIFT, FREE, SLOT,
    entry_make, entry_payload, entry_type, slot_device,
)
from userswap.swap.holder cimport holder_release, holder_try
from userswap.swap.idtree cimport (
    IdTree, id_alloc, id_aside, id_beside, id_free, id_next, id_take, id_word, idtree_end, idtree_init, side_at,
    side_clear, side_set, word_lock, word_try, word_unlock,
)
from userswap.swap.map cimport HolderOps, SwapMap, SwapMapOps, SwapMapOptions
from userswap.swap.radix cimport RadixTree


cdef enum:
    MAP_BYTES = 4096            # what the map itself lives in
    STRIPES = 16                # counters of ids, a cache line each
    MAGAZINES = 4
    ROUNDS = 30                 # numbers in a magazine
    RESERVED_TYPE = 5           # of the word of a number in a magazine: no entry that anybody asks for
    MANY = 2047                 # the count is in the side tree
    FEW = 1024                  # and comes back when it is not above this

cdef extern from *:
    """
    #define US_DIRECT (1ull << 47)
    #define US_DIRECT_TYPES 45
    #define US_OWNER_HOLDER (1ull << 63)
    #define US_COUNT_ONE (1ull << 53)
    #define US_COUNT_FIELD (2047ull << 53)
    """
    const uint64_t DIRECT "US_DIRECT"
    const int DIRECT_TYPE "US_DIRECT_TYPES"
    const uint64_t OWNER_HOLDER "US_OWNER_HOLDER"       # storage's owner is a holder, not a number
    const uint64_t COUNT_ONE "US_COUNT_ONE"
    const uint64_t COUNT_FIELD "US_COUNT_FIELD"

cdef int64_t COUNT_MAX = <int64_t>1 << 62

cdef struct Magazine:           # numbers that are reserved for the next dups, four cache lines
    uint32_t locked
    int32_t left
    uint64_t[ROUNDS] numbers
    uint64_t apart

cdef struct OnDemand:
    SwapMap head
    const HolderOps* holders
    void* ctx
    char apart[104]             # the tree's root is read all the time
    IdTree tree                 # numbered ids, and the mutex
    RadixTree counts            # above MANY
    int64_t gone                # numbered ids that were freed; under the mutex
    int64_t[STRIPES * 8] given  # ids given, less direct ones that were freed: their sum
    Magazine[MAGAZINES] magazines


cdef SwapMap* on_demand_new(const SwapMapOptions* options) noexcept nogil:
    cdef void* memory = mmap(NULL, MAP_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    cdef OnDemand* m
    us_assert(sizeof(OnDemand) <= MAP_BYTES, "a map fits its page")
    if memory == MAP_FAILED:
        return NULL
    m = <OnDemand*>memory
    m.head.ops = &ops
    m.holders = options.holders
    m.ctx = options.ctx
    idtree_init(&m.tree)
    m.counts.slab = &m.tree.slab
    return &m.head


cdef void on_demand_delete(SwapMap* map) noexcept nogil:
    idtree_end(&(<OnDemand*>map).tree)
    munmap(map, MAP_BYTES)


# ---- direct ids ----

cdef inline uint64_t direct_id(uint64_t entry) noexcept nogil:
    us_assert(entry_type(entry) != FREE and entry_type(entry) != CACHE, "a direct id says where its storage is")
    return DIRECT | (<uint64_t>entry_type(entry) << DIRECT_TYPE) | entry_payload(entry)


cdef inline uint64_t direct_entry(uint64_t id) noexcept nogil:
    return entry_make(<int>((id >> DIRECT_TYPE) & 3), id & ((<uint64_t>1 << ENTRY_PAYLOAD_BITS) - 1))


cdef inline void more_ids(OnDemand* m, int64_t n) noexcept nogil:
    us_add(&m.given[(us_stripe() & (STRIPES - 1)) << 3], n)


# ---- numbers ----

# A number with this word, its count included. 0: no memory.
cdef uint64_t number_new(OnDemand* m, uint64_t word) noexcept nogil:
    cdef Magazine* magazine = &m.magazines[us_stripe() & (MAGAZINES - 1)]
    cdef uint64_t number
    if not us_try(&magazine.locked):
        return id_alloc(&m.tree, word)          # another thread of this stripe is at it
    if magazine.left == 0:
        us_lock(&m.tree.mutex)
        while magazine.left < ROUNDS:
            number = id_take(&m.tree, entry_make(RESERVED_TYPE, 0))
            if number == 0:
                break
            # the lowest on top
            magazine.numbers[ROUNDS - 1 - magazine.left] = number
            magazine.left += 1
        us_unlock(&m.tree.mutex)
        for number in range(<uint64_t>magazine.left if magazine.left < ROUNDS else 0):
            magazine.numbers[number] = magazine.numbers[ROUNDS - <uint64_t>magazine.left + number]
    number = 0
    if magazine.left:
        magazine.left -= 1
        number = magazine.numbers[magazine.left]
        us_chaos()
        us_store(id_word(&m.tree, number), word)
    us_untry(&magazine.locked)
    return number


# ---- ids ----

cdef uint64_t on_demand_alloc(SwapMap* map, uint64_t entry, uint64_t holder) noexcept nogil:
    us_assert(holder != 0 and holder >> 48 == 0, "a holder is an address")
    more_ids(<OnDemand*>map, 1)
    return direct_id(entry)


cdef bint on_demand_alloc_run(SwapMap* map, const uint64_t* entries, uint64_t holder, int n,
                              uint64_t* ids) noexcept nogil:
    cdef int i
    for i in range(n):
        ids[i] = direct_id(entries[i])
    more_ids(<OnDemand*>map, n)
    return True


cdef void on_demand_free(SwapMap* map, uint64_t id) noexcept nogil:
    cdef OnDemand* m = <OnDemand*>map
    if id & DIRECT:
        more_ids(m, -1)
        return
    us_lock(&m.tree.mutex)
    id_free(&m.tree, id)
    us_write(&m.gone, m.gone + 1)
    us_unlock(&m.tree.mutex)


# ---- the entry ----

cdef uint64_t on_demand_lock(SwapMap* map, uint64_t id) noexcept nogil:
    if id & DIRECT:
        return direct_entry(id)
    return word_lock(id_word(&(<OnDemand*>map).tree, id), ENTRY_LOCKED)


cdef uint64_t on_demand_unlock(SwapMap* map, uint64_t id, uint64_t entry) noexcept nogil:
    if id & DIRECT:
        return direct_id(entry)
    word_unlock(id_word(&(<OnDemand*>map).tree, id), entry, COUNT_FIELD | ENTRY_CACHED)
    return id


cdef uint64_t on_demand_owner(SwapMap* map, uint64_t id, uint64_t holder) noexcept nogil:
    return OWNER_HOLDER | holder if id & DIRECT else id


cdef bint on_demand_try_owner(SwapMap* map, uint64_t owner, uint64_t entry) noexcept nogil:
    cdef OnDemand* m = <OnDemand*>map
    if owner & OWNER_HOLDER:
        return holder_try(<uint64_t*>(owner & ~OWNER_HOLDER), direct_id(entry))
    return word_try(id_word(&m.tree, owner), entry)


cdef void on_demand_unlock_owner(SwapMap* map, uint64_t owner, uint64_t entry) noexcept nogil:
    cdef OnDemand* m = <OnDemand*>map
    if owner & OWNER_HOLDER:
        holder_release(<uint64_t*>(owner & ~OWNER_HOLDER), direct_id(entry))
    else:
        word_unlock(id_word(&m.tree, owner), entry, COUNT_FIELD | ENTRY_CACHED)


cdef uint64_t on_demand_next(SwapMap* map, int device, uint64_t after, uint64_t* entry, int64_t* busy) noexcept nogil:
    cdef OnDemand* m = <OnDemand*>map
    cdef uint64_t found = after & ~OWNER_HOLDER
    cdef uint64_t id = 0
    # Holders first: a dup meanwhile makes a number of a direct id, never the other way, so none is missed.
    if after == 0 or after & OWNER_HOLDER:
        while True:
            found = m.holders.next(m.ctx, found, &id)
            if found == 0:
                after = 0
                break
            if not id & DIRECT:
                continue
            entry[0] = direct_entry(id)
            if entry_type(entry[0]) != SLOT or slot_device(entry[0]) != device:
                continue
            if m.holders.trylock(m.ctx, found, id):
                return OWNER_HOLDER | found
            busy[0] += 1
    return id_next(&m.tree, device, after, entry, busy)


# ---- the count ----

# Into MANY, or a change of what is there; n may be negative. Takes the mutex. The count after it, or -errno.
cdef int64_t count_slowly(OnDemand* m, uint64_t id, uint64_t* word, int64_t n) noexcept nogil:
    cdef uint64_t seen
    cdef int64_t count
    cdef int64_t result
    us_lock(&m.tree.mutex)
    while True:
        us_chaos()
        seen = us_load(word)
        count = <int64_t>(seen >> ENTRY_TOP_SHIFT)
        if count == MANY:
            count = <int64_t>side_at(&m.counts, id)[0]
            if n > COUNT_MAX - count:
                result = -EOVERFLOW
                break
            result = count + n
            us_assert(result >= 0, "put: no more references than there are")
            if result > FEW:
                side_at(&m.counts, id)[0] = <uint64_t>result
                break
            # The field can't be less than one's: with none left it is the last put that goes on, in the word.
            count = (result if result else 1) - 1
            if us_cas(word, seen, (seen & ~COUNT_FIELD) | (<uint64_t>count << ENTRY_TOP_SHIFT)):
                us_chaos()
                side_clear(&m.counts, id)
                break
        else:
            result = count + 1 + n
            if n > COUNT_MAX - 1 - count:
                result = -EOVERFLOW
                break
            us_assert(result >= 0, "put: no more references than there are")
            if result > MANY:
                if not side_set(&m.counts, id, <uint64_t>result):
                    result = -ENOMEM
                    break
                us_chaos()
                if us_cas(word, seen, seen | COUNT_FIELD):
                    break
                side_clear(&m.counts, id)
            else:
                count = (result if result else 1) - 1
                if us_cas(word, seen, (seen & ~COUNT_FIELD) | (<uint64_t>count << ENTRY_TOP_SHIFT)):
                    break
    us_unlock(&m.tree.mutex)
    return result


cdef int on_demand_dup(SwapMap* map, uint64_t* id, int64_t n, uint64_t* moved) noexcept nogil:
    cdef OnDemand* m = <OnDemand*>map
    cdef uint64_t* word
    cdef uint64_t seen, number, entry
    cdef int64_t result
    cdef bint fits
    us_assert(n > 0, "dup: more references, not less")
    if id[0] & DIRECT:
        if n > COUNT_MAX - 1:
            return -EOVERFLOW
        entry = direct_entry(id[0])
        # No entry for next() to find before nothing can fail any more.
        number = number_new(m, entry_make(RESERVED_TYPE, 0))
        if number == 0:
            return -ENOMEM
        if n >= MANY:
            us_lock(&m.tree.mutex)
            fits = side_set(&m.counts, number, <uint64_t>n + 1)
            if not fits:
                us_or(id_word(&m.tree, number), ENTRY_LOCKED | ENTRY_GONE)
                id_free(&m.tree, number)
            us_unlock(&m.tree.mutex)
            if not fits:
                return -ENOMEM
        us_chaos()
        us_store(id_word(&m.tree, number), entry | (<uint64_t>n * COUNT_ONE if n < MANY else COUNT_FIELD))
        moved[0] = entry
        id[0] = number
        return 0
    word = id_word(&m.tree, id[0])
    while True:
        seen = us_load(word)
        us_assert(entry_type(seen) != FREE, "dup: the id is free")
        us_assert((seen & ENTRY_GONE) == 0, "dup: the id has no count")
        if n > <int64_t>MANY or <int64_t>(seen >> ENTRY_TOP_SHIFT) + n >= MANY:
            result = count_slowly(m, id[0], word, n)
            return <int>result if result < 0 else 0
        us_chaos()
        if us_cas(word, seen, seen + <uint64_t>n * COUNT_ONE):
            return 0
        us_pause()


cdef int64_t on_demand_put(SwapMap* map, uint64_t id, int64_t n, uint64_t* entry) noexcept nogil:
    cdef OnDemand* m = <OnDemand*>map
    cdef uint64_t* word
    cdef uint64_t seen
    cdef int64_t count, left
    us_assert(n > 0, "put: fewer references, not more")
    if id & DIRECT:
        us_assert(n == 1, "put: no more references than there are")
        entry[0] = direct_entry(id)
        return 0
    word = id_word(&m.tree, id)
    while True:
        seen = us_load(word)
        us_assert(entry_type(seen) != FREE, "put: the id is free")
        us_assert((seen & ENTRY_GONE) == 0, "put: the id has no count")
        us_chaos()
        count = <int64_t>(seen >> ENTRY_TOP_SHIFT)
        if count == MANY:
            left = count_slowly(m, id, word, -n)
            if left == 0:
                break
            entry[0] = 0
            return left
        left = count + 1 - n
        us_assert(left >= 0, "put: no more references than there are")
        if left == 0:
            # Ours are all there are: nobody can dup, so it stays so until the word is locked.
            break
        if us_cas(word, seen, seen - <uint64_t>n * COUNT_ONE):
            entry[0] = 0        # the reference is gone: `word` may not be touched any more
            return left
        us_pause()
    entry[0] = word_lock(word, ENTRY_LOCKED | ENTRY_GONE)
    us_assert(us_load(word) >> ENTRY_TOP_SHIFT < MANY, "put: nobody but the last holder could dup")
    return 0


cdef int64_t on_demand_count(SwapMap* map, uint64_t id) noexcept nogil:
    cdef OnDemand* m = <OnDemand*>map
    cdef uint64_t* word
    cdef int64_t count
    if id & DIRECT:
        return 1
    word = id_word(&m.tree, id)
    us_assert(entry_type(us_load(word)) != FREE, "count: the id is free")
    count = <int64_t>(us_load(word) >> ENTRY_TOP_SHIFT)
    if count < MANY:
        return count + 1
    us_chaos()
    us_lock(&m.tree.mutex)
    count = <int64_t>(us_load(word) >> ENTRY_TOP_SHIFT)
    count = <int64_t>side_at(&m.counts, id)[0] if count == MANY else count + 1
    us_unlock(&m.tree.mutex)
    return count


# ---- the swap cache ----

cdef int on_demand_cache(SwapMap* map, uint64_t id, uint64_t folio) noexcept nogil:
    cdef OnDemand* m = <OnDemand*>map
    cdef uint64_t* word
    if id & DIRECT:
        return 0                # the only holder knows whether its folio is in place
    word = id_word(&m.tree, id)
    us_assert((us_load(word) & ENTRY_LOCKED) != 0, "cache: under the entry's lock")
    if folio == 0:
        if us_load(word) & ENTRY_CACHED:
            us_and(word, ~<uint64_t>ENTRY_CACHED)
        return 0
    if id_beside(word) == NULL and not id_aside(&m.tree, word):
        return -ENOMEM
    us_store(id_beside(word), folio)
    us_chaos()
    if not us_load(word) & ENTRY_CACHED:
        us_or(word, ENTRY_CACHED)
    return 0


cdef uint64_t on_demand_cached(SwapMap* map, uint64_t id) noexcept nogil:
    cdef uint64_t* word
    if id & DIRECT:
        return 0
    word = id_word(&(<OnDemand*>map).tree, id)
    # Taken out meanwhile: the folio that it was is as good a hint as none.
    return us_load(id_beside(word)) if us_load(word) & ENTRY_CACHED else 0


# ---- figures ----

cdef int64_t on_demand_ids(SwapMap* map) noexcept nogil:
    cdef OnDemand* m = <OnDemand*>map
    cdef int64_t ids = -us_read(&m.gone)
    cdef int i
    for i in range(STRIPES):
        ids += us_read(&m.given[i << 3])
    return ids


cdef int64_t on_demand_metadata(SwapMap* map) noexcept nogil:
    return MAP_BYTES + us_read(&(<OnDemand*>map).tree.slab.bytes)


cdef SwapMapOps ops
ops.name = b"on_demand"
ops.bound = False
ops.count_max = COUNT_MAX
ops.new = on_demand_new
ops.delete = on_demand_delete
ops.alloc = on_demand_alloc
ops.alloc_run = on_demand_alloc_run
ops.free = on_demand_free
ops.home = NULL
ops.lock = on_demand_lock
ops.unlock = on_demand_unlock
ops.owner = on_demand_owner
ops.try_owner = on_demand_try_owner
ops.unlock_owner = on_demand_unlock_owner
ops.next = on_demand_next
ops.dup = on_demand_dup
ops.put = on_demand_put
ops.count = on_demand_count
ops.cache = on_demand_cache
ops.cached = on_demand_cached
ops.ids = on_demand_ids
ops.metadata = on_demand_metadata


cdef const SwapMapOps* on_demand_design() noexcept nogil:
    return &ops
