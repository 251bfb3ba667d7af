"""Linux 6.3, what the message of March 2023 starts from: an id is a slot of the swap file, all else is keyed by it.

Models mm/swapfile.c, mm/swap_slots.c, mm/swap_state.c and mm/zswap.c of 6.3 (LWN, "Toward a swap abstraction layer",
2023, has the state of that time). Static for each slot, allocated at swapon: swap_map (1 byte), the cgroup that is
charged (2 bytes), and, as from 6.12 on, a bit for pages of zeros. Dynamic: the swap cache, a tree for each 64 MiB;
zswap, a tree for each device, whose pages keep their slots.

swap_map's byte:  0 free · count to 0x3e · 0x3f bad (there is none here) · 0x40 HAS_CACHE · 0x80 CONTINUED
HAS_CACHE doubles as the lock there: swap-in sets it before anything else, and who finds it set sleeps a tick and looks
again. It is our LOCKED. Who waits here spins and then sleeps on one of 64 futexes by hash, which is kinder than a
tick; whether there is a folio is asked of the swap cache alone. A byte that is HAS_CACHE and nothing else belongs to
nobody: the last put leaves it, and slots wait with it in the caches below.

Counts over 0x3e: CONTINUED, and the count's higher digits, 7 bits each, are in continuation pages: a page of digits
for a page of swap_map, with more pages for higher digits. The low digit counts to 63, the next is worth 63, the third
63 * 128. A digit has CONTINUED too if there are higher ones that are not zero. Pages are added on overflow, outside of
the locks, as add_swap_count_continuation does, and kept until the end, as there. Eight digits are all there may be.

Slots: clusters of 256, each CPU allocates from one of its own; when none is unused, swap_map is scanned from where the
last scan ended. A cache for each CPU holds 64 slots to give and 64 that were freed, so that the device's lock is taken
once for many; while less than 2 * 64 slots a CPU are free they are not filled, and who finds no slot drains them all.
Runs come from unused clusters only, as huge pages did (which took a whole one): one for each CPU that asks for runs.

The entry, in the order of the kernel's read path: zero bit: SAME 0. Zswap's tree: that word, ZSWAP or a value that
repeats. DIRTY in the swap cache's word: CACHE, no storage has the bytes of the folio. Else the slot itself.

Locks, outermost first. HAS_CACHE of a slot: its entry. The CPU's cache (its own words). The device's: free slots,
clusters, the caches' refill and flush. The cluster's: the bytes of its 256 slots, once they are in use. Then one of:
the continuations' (digits), a swap cache tree's, zswap's; all leaves. A byte is read without a lock where there it is.
Nobody waits for HAS_CACHE but in lock and the last put, which hold nothing then.

Order: the last put sets HAS_CACHE and takes the count away in one store, under the cluster's lock. alloc stores the
parts of an entry before the byte; free clears them before the slot goes to a cache, where the byte stays HAS_CACHE.

Where user space makes it differ: the trees are arrays in reserved address space (pages.pxd), one load to read and 8
bytes a word, so zswap's rbtree of entries of some 48 bytes and its lock for reading are not charged to this design.
Clusters' structs take 12 bytes for 256 slots, continuation heads 64 for 4096 (there struct page has them). The cgroup
is always the same.
"""
from libc.errno cimport ENOMEM, EOVERFLOW
from libc.limits cimport INT_MAX
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memchr

from userswap.native.mman cimport munmap
from userswap.native.us cimport (
    us_add, us_and, us_assert, us_chaos, us_futex_wait, us_futex_wake, us_load, us_load_byte, us_lock, us_mutex,
    us_or, us_pause, us_read, us_store, us_store_byte, us_unlock, us_write,
)
from userswap.swap.entry cimport (
    CACHE, FREE, SAME, SLOT, ZSWAP, entry_make, entry_payload, entry_seen, entry_type, slot_make,
)
from userswap.swap.map cimport SwapMap, SwapMapOps, SwapMapOptions
from userswap.swap.pages cimport PAGE, Pages, page_less, page_more, page_round, pages_populate, pages_reserve

cdef extern from "<sched.h>" nogil:
    int sched_getcpu()

cdef extern from "<unistd.h>" nogil:
    enum:
        _SC_NPROCESSORS_CONF
    long sysconf(int name)


cdef enum:
    COUNT_MOST = 0x3e           # SWAP_MAP_MAX
    COUNT_BASE = 0x3f           # of the low digit
    COUNT_DIGIT = 0x3f          # its bits
    HAS_CACHE = 0x40
    CONTINUED = 0x80
    DIGIT_BASE = 128            # of the others
    DIGITS = 8                  # of the others
    MAP_SHIFT = 12              # slots of a page of swap_map

    CLUSTER_SHIFT = 8
    CLUSTER_SLOTS = 256         # SWAPFILE_CLUSTER
    CACHE_SLOTS = 64            # SWAP_SLOTS_CACHE_SIZE
    TREE_SHIFT = 14             # SWAP_ADDRESS_SPACE_SHIFT: 64 MiB
    WORDS_SHIFT = 9             # words of a tree's page

    FOLIO_SHIFT = 8             # in the swap cache's word
    CACHED = 1
    DIRTY = 2
    CGROUP = 1                  # whom swap is charged to
    BUCKETS = 64
    SPINS = 64
    OFFSET_BITS = 35            # of a slot on a device, in pages

cdef extern from *:
    """
    #define US_NOWHERE (~0ull)
    """
    const uint64_t NOWHERE "US_NOWHERE"

ctypedef uint8_t* Digits

cdef int64_t COUNT_MAX = (<int64_t>COUNT_BASE << (7 * DIGITS)) - 1

cdef struct Cluster:
    us_mutex lock
    uint32_t next               # unused clusters: number and one
    uint16_t count              # slots that are not free
    uint16_t current            # CPUs that allocate from it

cdef struct Cpu:
    us_mutex lock
    int have                    # slots[at .. have - 1] can be given
    int at
    int freed
    int64_t ids                 # given less freed, on this CPU
    uint64_t[CACHE_SLOTS] slots
    uint64_t[CACHE_SLOTS] back
    # Under the device's lock: where single slots and runs are taken from.
    uint64_t[2] cluster
    int[2] position

cdef struct Bucket:             # of threads that wait for HAS_CACHE
    int64_t turn                # the futex is its low half
    int64_t waiters
    int64_t[6] apart

cdef struct Slot:
    SwapMap head
    uint64_t slots
    uint64_t clusters
    int run                     # pages of a slot
    uint64_t cpus
    uint64_t static_bytes
    # in one mapping
    uint8_t* swap_map
    uint16_t* cgroups
    uint64_t* zeros
    Cluster* cluster
    Digits* digits              # DIGITS addresses for each page of swap_map
    us_mutex* tree_locks
    uint16_t* zswap_used
    uint16_t* folios_used
    Cpu* cpu
    # in reserved address space
    uint64_t* zswap
    uint64_t* folios
    uint64_t reserved
    int64_t free                # slots that are neither in use nor in a CPU's cache
    uint64_t scan               # where to look when no cluster is unused
    uint32_t first              # unused clusters: number and one
    uint32_t last
    us_mutex lock               # the device's
    us_mutex digits_lock
    us_mutex zswap_lock
    Pages pages
    Bucket[BUCKETS] buckets


cdef enum:
    MAP_BYTES = 8192            # what the map itself lives in


# Cuts the next piece out of the static mapping; with no base, only adds up.
cdef inline uint64_t cut(uint64_t base, uint64_t* length, uint64_t size) noexcept nogil:
    cdef uint64_t at = base + length[0]
    length[0] += page_round(size)
    return at


cdef uint64_t lay_out(Slot* m, uint64_t base) noexcept nogil:
    cdef uint64_t length = 0
    cdef uint64_t pages = (m.slots >> WORDS_SHIFT) + 1
    m.swap_map = <uint8_t*>cut(base, &length, m.slots)
    m.cgroups = <uint16_t*>cut(base, &length, m.slots * 2)
    m.zeros = <uint64_t*>cut(base, &length, (m.slots + 63) // 64 * 8)
    m.cluster = <Cluster*>cut(base, &length, m.clusters * sizeof(Cluster))
    m.digits = <Digits*>cut(base, &length, ((m.slots >> MAP_SHIFT) + 1) * DIGITS * sizeof(Digits))
    m.tree_locks = <us_mutex*>cut(base, &length, ((m.slots >> TREE_SHIFT) + 1) * sizeof(us_mutex))
    m.zswap_used = <uint16_t*>cut(base, &length, pages * 2)
    m.folios_used = <uint16_t*>cut(base, &length, pages * 2)
    m.cpu = <Cpu*>cut(base, &length, m.cpus * sizeof(Cpu))
    return length


cdef SwapMap* slot_new(const SwapMapOptions* options) noexcept nogil:
    cdef Slot* m = <Slot*>pages_reserve(MAP_BYTES)
    cdef void* memory
    cdef uint64_t i
    us_assert(sizeof(Slot) <= MAP_BYTES and sizeof(Cluster) == 12, "sizes are as stated")
    if m == NULL:
        return NULL
    m.head.ops = &ops
    m.run = options.slot_run
    m.slots = options.slots
    if m.slots > (<uint64_t>1 << OFFSET_BITS) // <uint64_t>m.run:
        m.slots = (<uint64_t>1 << OFFSET_BITS) // <uint64_t>m.run
    m.clusters = (m.slots + CLUSTER_SLOTS - 1) >> CLUSTER_SHIFT
    m.cpus = <uint64_t>sysconf(_SC_NPROCESSORS_CONF)
    m.static_bytes = lay_out(m, 0)
    memory = pages_populate(m.static_bytes)
    m.swap_map = NULL
    if memory == NULL:
        slot_delete(&m.head)
        return NULL
    lay_out(m, <uint64_t>memory)
    m.reserved = page_round(m.slots * 8 + 8)
    m.zswap = <uint64_t*>pages_reserve(m.reserved)
    m.folios = <uint64_t*>pages_reserve(m.reserved)
    if m.zswap == NULL or m.folios == NULL:
        slot_delete(&m.head)
        return NULL
    for i in range(m.cpus):
        m.cpu[i].cluster[0] = NOWHERE
        m.cpu[i].cluster[1] = NOWHERE
    for i in range(m.clusters):
        unused_add(m, i)
    m.free = <int64_t>m.slots
    return &m.head


cdef void slot_delete(SwapMap* map) noexcept nogil:
    cdef Slot* m = <Slot*>map
    cdef uint64_t i
    if m.zswap != NULL:
        munmap(m.zswap, m.reserved)
    if m.folios != NULL:
        munmap(m.folios, m.reserved)
    if m.swap_map != NULL:
        for i in range(((m.slots >> MAP_SHIFT) + 1) * DIGITS):
            if m.digits[i] != NULL:
                munmap(m.digits[i], PAGE)
        munmap(m.swap_map, m.static_bytes)
    munmap(m, MAP_BYTES)


# ---- free slots; under the device's lock ----

cdef void unused_add(Slot* m, uint64_t number) noexcept nogil:
    m.cluster[number].next = 0
    if m.last:
        m.cluster[m.last - 1].next = <uint32_t>number + 1
    else:
        m.first = <uint32_t>number + 1
    m.last = <uint32_t>number + 1


cdef inline int room_of(Slot* m, uint64_t number) noexcept nogil:
    cdef uint64_t left = m.slots - (number << CLUSTER_SHIFT)
    return <int>left if left < CLUSTER_SLOTS else CLUSTER_SLOTS


# This CPU's cluster for single slots (0) or runs (1) becomes an unused one; False: none is.
cdef bint cluster_begin(Slot* m, Cpu* cpu, int kind) noexcept nogil:
    cdef uint64_t number = cpu.cluster[kind]
    if number != NOWHERE:
        m.cluster[number].current -= 1
        if m.cluster[number].count == 0 and m.cluster[number].current == 0:
            unused_add(m, number)
    cpu.cluster[kind] = NOWHERE
    if m.first == 0:
        return False
    number = m.first - 1
    m.first = m.cluster[number].next
    if m.first == 0:
        m.last = 0
    m.cluster[number].current += 1
    cpu.cluster[kind] = number
    cpu.position[kind] = 0
    return True


# A slot that is not free any more, and nobody's yet.
cdef inline void slot_take(Slot* m, uint64_t at) noexcept nogil:
    us_assert(m.swap_map[at] == 0, "a slot is taken once")
    us_store_byte(&m.swap_map[at], HAS_CACHE)
    m.cluster[at >> CLUSTER_SHIFT].count += 1


# Up to n slots, for the CPU's cache or for who found none there; how many.
cdef int slots_take(Slot* m, Cpu* cpu, uint64_t* slots, int n) noexcept nogil:
    cdef int got = 0
    cdef uint64_t at, base
    cdef uint8_t* found
    while got < n:
        if cpu.cluster[0] == NOWHERE or cpu.position[0] == room_of(m, cpu.cluster[0]):
            if not cluster_begin(m, cpu, 0):
                break
        base = cpu.cluster[0] << CLUSTER_SHIFT
        while got < n and cpu.position[0] < room_of(m, cpu.cluster[0]):
            at = base + <uint64_t>cpu.position[0]
            cpu.position[0] += 1
            if us_load_byte(&m.swap_map[at]) == 0:
                slot_take(m, at)
                slots[got] = at
                got += 1
    # No cluster is unused: what is free is found by looking. A whole round, from where the last one ended.
    while got == 0 and us_read(&m.free) > 0:
        found = <uint8_t*>memchr(m.swap_map + m.scan, 0, m.slots - m.scan)
        if found == NULL:
            found = <uint8_t*>memchr(m.swap_map, 0, m.scan)
            if found == NULL:
                break
        at = <uint64_t>(found - m.swap_map)
        slot_take(m, at)
        m.scan = at + 1 if at + 1 < m.slots else 0
        slots[got] = at
        got += 1
    us_add(&m.free, -got)
    return got


cdef void slots_give(Slot* m, const uint64_t* slots, int n) noexcept nogil:
    cdef int i
    cdef uint64_t number
    for i in range(n):
        us_assert(m.swap_map[slots[i]] == HAS_CACHE, "a slot that is given back has no count")
        us_store_byte(&m.swap_map[slots[i]], 0)
        number = slots[i] >> CLUSTER_SHIFT
        m.cluster[number].count -= 1
        if m.cluster[number].count == 0 and m.cluster[number].current == 0:
            unused_add(m, number)
    us_add(&m.free, n)


# ---- the caches of slots ----

cdef inline Cpu* this_cpu(Slot* m) noexcept nogil:
    return &m.cpu[<uint64_t>sched_getcpu() % m.cpus]


# Whether slots are plenty enough to keep some in every CPU's cache.
cdef inline bint plenty(Slot* m) noexcept nogil:
    return us_read(&m.free) > <int64_t>(m.cpus * 2 * CACHE_SLOTS)


# Empties the cache of a CPU. Under its lock.
cdef void cpu_drain(Slot* m, Cpu* cpu) noexcept nogil:
    us_lock(&m.lock)
    slots_give(m, &cpu.slots[cpu.at], cpu.have - cpu.at)
    slots_give(m, cpu.back, cpu.freed)
    us_unlock(&m.lock)
    cpu.have = cpu.at
    cpu.freed = 0


# A slot, with the byte HAS_CACHE; NOWHERE: none.
cdef uint64_t slot_get(Slot* m) noexcept nogil:
    cdef Cpu* cpu = this_cpu(m)
    cdef uint64_t at = NOWHERE
    cdef uint64_t i
    cdef int n
    us_lock(&cpu.lock)
    if cpu.at == cpu.have:
        us_chaos()
        cpu.at = 0
        us_lock(&m.lock)
        n = CACHE_SLOTS if plenty(m) else 1
        cpu.have = slots_take(m, cpu, cpu.slots, n)
        us_unlock(&m.lock)
    if cpu.at < cpu.have:
        at = cpu.slots[cpu.at]
        cpu.at += 1
        us_write(&cpu.ids, cpu.ids + 1)
    us_unlock(&cpu.lock)
    if at != NOWHERE:
        return at
    for i in range(m.cpus):
        us_lock(&m.cpu[i].lock)
        us_chaos()
        cpu_drain(m, &m.cpu[i])
        us_unlock(&m.cpu[i].lock)
    us_lock(&cpu.lock)
    us_lock(&m.lock)
    if slots_take(m, cpu, &at, 1):
        us_write(&cpu.ids, cpu.ids + 1)
    else:
        at = NOWHERE
    us_unlock(&m.lock)
    us_unlock(&cpu.lock)
    return at


cdef void slot_put(Slot* m, uint64_t at) noexcept nogil:
    cdef Cpu* cpu = this_cpu(m)
    us_lock(&cpu.lock)
    us_write(&cpu.ids, cpu.ids - 1)
    cpu.back[cpu.freed] = at
    cpu.freed += 1
    if cpu.freed == CACHE_SLOTS or not plenty(m):
        us_chaos()
        us_lock(&m.lock)
        slots_give(m, cpu.back, cpu.freed)
        us_unlock(&m.lock)
        cpu.freed = 0
    us_unlock(&cpu.lock)


# n slots in a row; False: no cluster is unused.
cdef bint slots_run(Slot* m, uint64_t* at, int n) noexcept nogil:
    cdef Cpu* cpu = this_cpu(m)
    cdef bint done = False
    cdef int i = 0
    cdef uint64_t first
    us_lock(&cpu.lock)
    us_lock(&m.lock)
    while True:
        if cpu.cluster[1] != NOWHERE and cpu.position[1] + n <= room_of(m, cpu.cluster[1]):
            first = (cpu.cluster[1] << CLUSTER_SHIFT) + <uint64_t>cpu.position[1]
            i = 0
            while i < n and us_load_byte(&m.swap_map[first + <uint64_t>i]) == 0:
                i += 1
            if i == n:
                done = True
                break
            cpu.position[1] += i + 1            # a scan has been here
        elif not cluster_begin(m, cpu, 1) or room_of(m, cpu.cluster[1]) < n:
            break
    if done:
        for i in range(n):
            slot_take(m, first + <uint64_t>i)
        cpu.position[1] += n
        at[0] = first
        us_add(&m.free, -n)
        us_write(&cpu.ids, cpu.ids + n)
    us_unlock(&m.lock)
    us_unlock(&cpu.lock)
    return done


# ---- the trees ----

# A word of a tree, 0 for none; its page's use is counted under the tree's lock.
cdef void tree_set(Slot* m, uint64_t* words, uint16_t* used, us_mutex* lock, uint64_t at, uint64_t word) noexcept nogil:
    us_lock(lock)
    if words[at] == 0 and word:
        page_more(&m.pages, &used[at >> WORDS_SHIFT], 1)
    us_chaos()
    if words[at] and word == 0:
        us_store(&words[at], 0)
        page_less(&m.pages, &used[at >> WORDS_SHIFT], 1, &words[at >> WORDS_SHIFT << WORDS_SHIFT])
    else:
        us_store(&words[at], word)
    us_unlock(lock)


cdef inline void zswap_set(Slot* m, uint64_t at, uint64_t word) noexcept nogil:
    if us_load(&m.zswap[at]) != word:
        tree_set(m, m.zswap, m.zswap_used, &m.zswap_lock, at, word)


cdef inline void folio_set(Slot* m, uint64_t at, uint64_t word) noexcept nogil:
    if us_load(&m.folios[at]) != word:
        tree_set(m, m.folios, m.folios_used, &m.tree_locks[at >> TREE_SHIFT], at, word)


cdef inline void zero_set(Slot* m, uint64_t at, bint zero) noexcept nogil:
    cdef uint64_t bit = <uint64_t>1 << (at & 63)
    if zero:
        us_or(&m.zeros[at >> 6], bit)
    elif us_load(&m.zeros[at >> 6]) & bit:
        us_and(&m.zeros[at >> 6], ~bit)


# ---- the parts of an entry; for who has the slot to itself, or HAS_CACHE ----

cdef inline uint64_t home_of(Slot* m, uint64_t at) noexcept nogil:
    return slot_make(0, at * <uint64_t>m.run, m.run, True)


cdef inline uint64_t entry_at(Slot* m, uint64_t at) noexcept nogil:
    cdef uint64_t word
    if (us_load(&m.zeros[at >> 6]) >> (at & 63)) & 1:
        return entry_make(SAME, 0)
    word = us_load(&m.zswap[at])
    if word:
        return word
    if us_load(&m.folios[at]) & DIRTY:
        return entry_make(CACHE, 0)
    return home_of(m, at)


cdef inline void entry_set(Slot* m, uint64_t at, uint64_t entry) noexcept nogil:
    cdef int type = entry_type(entry)
    cdef bint zero = type == SAME and entry_payload(entry) == 0
    cdef uint64_t folio = us_load(&m.folios[at])
    us_assert(type != FREE, "an id keeps an entry until it is freed")
    zero_set(m, at, zero)
    us_chaos()
    zswap_set(m, at, entry_seen(entry) if type == ZSWAP or (type == SAME and not zero) else 0)
    if folio:
        folio_set(m, at, folio | DIRTY if type == CACHE else folio & ~<uint64_t>DIRTY)


# ---- ids ----

cdef inline void begin(Slot* m, uint64_t at, uint64_t entry) noexcept nogil:
    us_assert(entry_type(entry) != CACHE, "an id is given with storage")
    us_assert(us_load_byte(&m.swap_map[at]) == HAS_CACHE, "nobody has a slot that is given")
    m.cgroups[at] = CGROUP
    entry_set(m, at, entry)
    us_chaos()
    us_store_byte(&m.swap_map[at], 1)


cdef uint64_t slot_alloc(SwapMap* map, uint64_t entry, uint64_t holder) noexcept nogil:
    cdef Slot* m = <Slot*>map
    cdef uint64_t at = slot_get(m)
    if at == NOWHERE:
        return 0
    begin(m, at, entry)
    return at + 1


cdef bint slot_alloc_run(SwapMap* map, const uint64_t* entries, uint64_t holder, int n, uint64_t* ids) noexcept nogil:
    cdef Slot* m = <Slot*>map
    cdef uint64_t at = 0
    cdef int i
    if not slots_run(m, &at, n):
        return False
    for i in range(n):
        begin(m, at + <uint64_t>i, entries[i])
        ids[i] = at + <uint64_t>i + 1
    return True


cdef void slot_free(SwapMap* map, uint64_t id) noexcept nogil:
    cdef Slot* m = <Slot*>map
    cdef uint64_t at = id - 1
    us_assert(us_load_byte(&m.swap_map[at]) == HAS_CACHE, "free: the id has a count, or is free")
    m.cgroups[at] = 0
    zero_set(m, at, False)
    zswap_set(m, at, 0)
    folio_set(m, at, 0)
    us_chaos()
    slot_put(m, at)


cdef uint64_t slot_home(SwapMap* map, uint64_t id) noexcept nogil:
    return home_of(<Slot*>map, id - 1)


# ---- the entry ----

cdef inline us_mutex* cluster_lock(Slot* m, uint64_t at) noexcept nogil:
    return &m.cluster[at >> CLUSTER_SHIFT].lock


cdef inline Bucket* bucket_of(Slot* m, uint64_t at) noexcept nogil:
    return &m.buckets[(at * 0x9E3779B97F4A7C15u) >> 58]


# Waits for HAS_CACHE to go. With the cluster's lock, which is given up: who clears it comes after us, and sees that
# we wait.
cdef void wait_at(Slot* m, uint64_t at) noexcept nogil:
    cdef Bucket* bucket = bucket_of(m, at)
    cdef int64_t turn
    us_add(&bucket.waiters, 1)
    turn = us_read(&bucket.turn)
    us_unlock(cluster_lock(m, at))
    us_chaos()
    us_futex_wait(<uint32_t*>&bucket.turn, <uint32_t>turn)
    us_add(&bucket.waiters, -1)


# The cluster's lock, when the slot is not locked. Then nobody changes the entry but the caller.
cdef void slot_wait(Slot* m, uint64_t at) noexcept nogil:
    cdef int spins = 0
    while True:
        us_assert(us_load_byte(&m.swap_map[at]) != 0, "lock: the id is free")
        while spins < SPINS and us_load_byte(&m.swap_map[at]) & HAS_CACHE:
            spins += 1
            us_pause()
        us_chaos()
        us_lock(cluster_lock(m, at))
        if not us_load_byte(&m.swap_map[at]) & HAS_CACHE:
            return
        wait_at(m, at)


cdef uint64_t slot_lock(SwapMap* map, uint64_t id) noexcept nogil:
    cdef Slot* m = <Slot*>map
    cdef uint64_t at = id - 1
    slot_wait(m, at)
    us_store_byte(&m.swap_map[at], us_load_byte(&m.swap_map[at]) | HAS_CACHE)
    us_chaos()
    us_unlock(cluster_lock(m, at))
    return entry_at(m, at)


cdef uint64_t slot_unlock(SwapMap* map, uint64_t id, uint64_t entry) noexcept nogil:
    cdef Slot* m = <Slot*>map
    cdef uint64_t at = id - 1
    cdef Bucket* bucket = bucket_of(m, at)
    cdef uint8_t byte
    cdef bint wake
    us_assert(entry_type(entry) != CACHE or us_load(&m.folios[at]) != 0, "an entry CACHE needs a folio")
    entry_set(m, at, entry)
    us_lock(cluster_lock(m, at))
    byte = us_load_byte(&m.swap_map[at])
    us_assert(byte & HAS_CACHE != 0 and byte != HAS_CACHE, "unlock: not locked, or no count")
    us_chaos()
    us_store_byte(&m.swap_map[at], byte & ~HAS_CACHE)
    wake = us_read(&bucket.waiters) != 0
    us_unlock(cluster_lock(m, at))
    if wake:
        us_add(&bucket.turn, 1)
        us_chaos()
        us_futex_wake(<uint32_t*>&bucket.turn, INT_MAX)
    return id


cdef uint64_t slot_owner(SwapMap* map, uint64_t id, uint64_t holder) noexcept nogil:
    return id


cdef bint slot_try_owner(SwapMap* map, uint64_t owner, uint64_t entry) noexcept nogil:
    cdef Slot* m = <Slot*>map
    cdef uint64_t at = owner - 1
    cdef uint8_t byte = us_load_byte(&m.swap_map[at])
    us_assert(byte != 0, "try_owner: the id is free")
    if byte & HAS_CACHE:
        return False
    us_chaos()
    us_lock(cluster_lock(m, at))
    byte = us_load_byte(&m.swap_map[at])
    if byte & HAS_CACHE or entry_at(m, at) != entry:
        us_unlock(cluster_lock(m, at))
        return False
    us_store_byte(&m.swap_map[at], byte | HAS_CACHE)
    us_unlock(cluster_lock(m, at))
    us_chaos()
    return True


cdef void slot_unlock_owner(SwapMap* map, uint64_t owner, uint64_t entry) noexcept nogil:
    slot_unlock(map, owner, entry)


cdef uint64_t slot_next(SwapMap* map, int device, uint64_t after, uint64_t* entry, int64_t* busy) noexcept nogil:
    cdef Slot* m = <Slot*>map
    cdef uint64_t at = after
    cdef uint8_t byte
    while at < m.slots and device == 0:
        byte = us_load_byte(&m.swap_map[at])
        if byte and byte != HAS_CACHE and entry_type(entry_at(m, at)) == SLOT:
            entry[0] = home_of(m, at)
            return at + 1
        at += 1
    return 0


# ---- the count; under the cluster's lock ----

cdef inline Digits* digits_of(Slot* m, uint64_t at) noexcept nogil:
    return &m.digits[(at >> MAP_SHIFT) * DIGITS]


# The number that the digits say. Takes the lock of the continuations if there are any.
cdef int64_t count_at(Slot* m, uint64_t at) noexcept nogil:
    cdef uint8_t digit = us_load_byte(&m.swap_map[at])
    cdef int64_t count = digit & COUNT_DIGIT
    cdef int64_t worth = COUNT_BASE
    cdef int i = 0
    if digit & CONTINUED:
        us_lock(&m.digits_lock)
        while digit & CONTINUED:
            us_assert(i < DIGITS and digits_of(m, at)[i] != NULL, "a digit has its page")
            digit = digits_of(m, at)[i][at & (PAGE - 1)]
            count += worth * (digit & (DIGIT_BASE - 1))
            worth *= DIGIT_BASE
            i += 1
        us_unlock(&m.digits_lock)
    return count


# Writes a number as digits, each page's CONTINUED saying whether a higher digit is not zero. The first digit whose page
# is missing, and then nothing was changed; DIGITS: it is done.
cdef int count_set(Slot* m, uint64_t at, int64_t count) noexcept nogil:
    cdef Digits* digits = digits_of(m, at)
    cdef int64_t rest = count // COUNT_BASE
    cdef uint8_t low = <uint8_t>(count % COUNT_BASE)
    cdef int i = 0
    if rest:
        us_lock(&m.digits_lock)
        while rest:
            if digits[i] == NULL:
                us_unlock(&m.digits_lock)
                return i
            rest //= DIGIT_BASE
            i += 1
        rest = count // COUNT_BASE
        i = 0
        while rest:
            digits[i][at & (PAGE - 1)] = <uint8_t>((rest % DIGIT_BASE) | (CONTINUED if rest >= DIGIT_BASE else 0))
            rest //= DIGIT_BASE
            i += 1
            us_chaos()
        us_unlock(&m.digits_lock)
        low |= CONTINUED
    us_store_byte(&m.swap_map[at], low | (us_load_byte(&m.swap_map[at]) & HAS_CACHE))
    return DIGITS


# A page for a digit of a page of swap_map, unless another thread has been faster. False: no memory.
cdef bint digits_add(Slot* m, uint64_t at, int digit) noexcept nogil:
    cdef void* page = pages_reserve(PAGE)
    if page == NULL:
        return False
    us_chaos()
    us_lock(&m.digits_lock)
    if digits_of(m, at)[digit] == NULL:
        digits_of(m, at)[digit] = <Digits>page
        us_add(&m.pages.bytes, PAGE)
        page = NULL
    us_unlock(&m.digits_lock)
    if page != NULL:
        munmap(page, PAGE)
    return True


cdef int slot_dup(SwapMap* map, uint64_t* id, int64_t n, uint64_t* moved) noexcept nogil:
    cdef Slot* m = <Slot*>map
    cdef uint64_t at = id[0] - 1
    cdef uint8_t byte
    cdef int64_t count
    cdef int digit
    us_assert(n > 0, "dup: more references, not less")
    while True:
        us_lock(cluster_lock(m, at))
        byte = us_load_byte(&m.swap_map[at])
        us_assert(byte & ~HAS_CACHE != 0, "dup: the id has no count")
        us_chaos()
        if n <= COUNT_MOST - (byte & COUNT_DIGIT):
            # No digit but the lowest changes.
            us_store_byte(&m.swap_map[at], byte + <uint8_t>n)
            us_unlock(cluster_lock(m, at))
            return 0
        count = count_at(m, at)
        if n > COUNT_MAX - count:
            us_unlock(cluster_lock(m, at))
            return -EOVERFLOW
        digit = count_set(m, at, count + n)
        us_unlock(cluster_lock(m, at))
        if digit == DIGITS:
            return 0
        # One page after another, and the count may be another one when we come back.
        if not digits_add(m, at, digit):
            return -ENOMEM


cdef int64_t slot_put_count(SwapMap* map, uint64_t id, int64_t n, uint64_t* entry) noexcept nogil:
    cdef Slot* m = <Slot*>map
    cdef uint64_t at = id - 1
    cdef int64_t left
    us_assert(n > 0, "put: fewer references, not more")
    us_lock(cluster_lock(m, at))
    us_assert(us_load_byte(&m.swap_map[at]) & ~HAS_CACHE != 0, "put: the id has no count")
    left = count_at(m, at) - n
    us_assert(left >= 0, "put: no more references than there are")
    us_chaos()
    if left:
        count_set(m, at, left)
        us_unlock(cluster_lock(m, at))
        entry[0] = 0            # the reference is gone: the slot may not be touched any more
        return left
    us_unlock(cluster_lock(m, at))
    # Ours are all there are, so nobody can dup, and it stays so.
    slot_wait(m, at)
    us_assert(count_at(m, at) == n, "put: nobody but the last holder could dup")
    us_store_byte(&m.swap_map[at], HAS_CACHE)
    us_unlock(cluster_lock(m, at))
    us_chaos()
    entry[0] = entry_at(m, at)
    return 0


cdef int64_t slot_count(SwapMap* map, uint64_t id) noexcept nogil:
    cdef Slot* m = <Slot*>map
    cdef uint64_t at = id - 1
    cdef int64_t count = us_load_byte(&m.swap_map[at])
    us_assert(count & ~HAS_CACHE != 0, "count: the id is free")
    if not count & CONTINUED:
        return count & COUNT_DIGIT
    us_chaos()
    us_lock(cluster_lock(m, at))
    count = count_at(m, at)
    us_unlock(cluster_lock(m, at))
    return count


# ---- the swap cache ----

cdef int slot_cache(SwapMap* map, uint64_t id, uint64_t folio) noexcept nogil:
    cdef Slot* m = <Slot*>map
    cdef uint64_t at = id - 1
    us_assert(us_load_byte(&m.swap_map[at]) & HAS_CACHE != 0, "cache: under the entry's lock")
    folio_set(m, at, (folio << FOLIO_SHIFT) | CACHED | (us_load(&m.folios[at]) & DIRTY) if folio else 0)
    return 0


cdef uint64_t slot_cached(SwapMap* map, uint64_t id) noexcept nogil:
    return us_load(&(<Slot*>map).folios[id - 1]) >> FOLIO_SHIFT


# ---- figures ----

cdef int64_t slot_ids(SwapMap* map) noexcept nogil:
    cdef Slot* m = <Slot*>map
    cdef int64_t ids = 0
    cdef uint64_t i
    for i in range(m.cpus):
        ids += us_read(&m.cpu[i].ids)
    return ids


cdef int64_t slot_metadata(SwapMap* map) noexcept nogil:
    cdef Slot* m = <Slot*>map
    return MAP_BYTES + <int64_t>m.static_bytes + us_read(&m.pages.bytes)


cdef SwapMapOps ops
ops.name = b"slot"
ops.bound = True
ops.count_max = COUNT_MAX
ops.new = slot_new
ops.delete = slot_delete
ops.alloc = slot_alloc
ops.alloc_run = slot_alloc_run
ops.free = slot_free
ops.home = slot_home
ops.lock = slot_lock
ops.unlock = slot_unlock
ops.owner = slot_owner
ops.try_owner = slot_try_owner
ops.unlock_owner = slot_unlock_owner
ops.next = slot_next
ops.dup = slot_dup
ops.put = slot_put_count
ops.count = slot_count
ops.cache = slot_cache
ops.cached = slot_cached
ops.ids = slot_ids
ops.metadata = slot_metadata


cdef const SwapMapOps* slot_design() noexcept nogil:
    return &ops
