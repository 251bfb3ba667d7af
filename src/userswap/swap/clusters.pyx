"""Slots in clusters: see clusters.pxd for what they are and who locks.

Models the allocator of Linux 6.18 (mm/swapfile.c; LWN, "Modernizing swapping: introducing the swap table", 2026): each
CPU goes on where it took its last slot; when that cluster is full it takes a cluster that is partly used, then an
unused one, then what runs have left. Single slots and runs (an order of its own there; here every length from 2 to 32
is one) begin clusters of their own. A cluster is taken from a list with trylock, so that nobody who allocates waits
for another. Slots are freed one by one, each under its cluster's lock only, as long as the cluster stays on its list.

Where user space makes it differ: a thread can move to another CPU between sched_getcpu() and the lock, so a CPU's next
slot is a hint that is read and stored without one. A table is memory in reserved address space (pages.pxd), not an
allocation; unused clusters that still have theirs are taken first. There is no discarding, no rotating disk and no
reclaim of slots whose folio is in the swap cache.
"""
from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t

from userswap.native.mman cimport munmap
from userswap.native.us cimport (
    us_add, us_assert, us_chaos, us_load, us_lock, us_pause, us_store, us_trylock, us_unlock,
)
from userswap.swap.pages cimport PAGE, page_less, page_more, page_round, pages_reserve

cdef extern from "<sched.h>" nogil:
    int sched_getcpu()

cdef extern from "<unistd.h>" nogil:
    enum:
        _SC_NPROCESSORS_CONF
    long sysconf(int name)

cdef extern from * nogil:
    """
    #define US_CHUNK_BYTES (12288ull + (3ull << 21) + (1ull << 20))
    """
    const uint64_t CHUNK_BYTES "US_CHUNK_BYTES"


cdef bint clusters_init(Clusters* k, uint64_t slots) noexcept nogil:
    us_assert(sizeof(Cluster) == 16 and sizeof(Chunk) <= CHUNK_HEADER and sizeof(Cpu) == 64, "sizes are as stated")
    k.slots = slots
    k.cpus = <uint64_t>sysconf(_SC_NPROCESSORS_CONF)
    k.cpu = <Cpu*>pages_reserve(page_round(k.cpus * sizeof(Cpu)))
    k.chunks = <uint64_t*>pages_reserve(CHUNKS_MOST * 8)
    if k.cpu == NULL or k.chunks == NULL:
        clusters_end(k)
        return False
    us_add(&k.pages.bytes, <int64_t>page_round(k.cpus * sizeof(Cpu)))
    return True


cdef void clusters_end(Clusters* k) noexcept nogil:
    cdef uint64_t i
    if k.chunks != NULL:
        for i in range(k.clusters // CHUNK_CLUSTERS):
            munmap(<void*>k.chunks[i], CHUNK_BYTES)
        munmap(k.chunks, CHUNKS_MOST * 8)
    if k.cpu != NULL:
        munmap(k.cpu, page_round(k.cpus * sizeof(Cpu)))


# ---- lists; under the device's lock ----

cdef inline Cluster* numbered(Clusters* k, uint64_t number) noexcept nogil:
    return cluster_of(k, number << CLUSTER_SHIFT)


cdef void list_add(Clusters* k, int list, uint64_t number, bint first) noexcept nogil:
    cdef Cluster* c = numbered(k, number)
    cdef uint32_t me = <uint32_t>number + 1
    c.list = <uint8_t>list
    c.next = k.first[list] if first else 0
    c.prev = 0 if first else k.last[list]
    if c.next:
        numbered(k, c.next - 1).prev = me
    else:
        k.last[list] = me
    if c.prev:
        numbered(k, c.prev - 1).next = me
    else:
        k.first[list] = me


cdef void list_remove(Clusters* k, Cluster* c) noexcept nogil:
    if c.next:
        numbered(k, c.next - 1).prev = c.prev
    else:
        k.last[c.list] = c.prev
    if c.prev:
        numbered(k, c.prev - 1).next = c.next
    else:
        k.first[c.list] = c.next
    c.list = FULL


cdef bint grow(Clusters* k) noexcept nogil:
    cdef uint64_t number = k.clusters
    cdef uint64_t chunk = number // CHUNK_CLUSTERS
    cdef void* memory
    if number << CLUSTER_SHIFT >= k.slots or chunk == CHUNKS_MOST:
        return False
    memory = pages_reserve(CHUNK_BYTES)
    if memory == NULL:
        return False
    us_add(&k.pages.bytes, CHUNK_HEADER + (PAGE if chunk % (PAGE // 8) == 0 else 0))
    us_chaos()
    us_store(&k.chunks[chunk], <uint64_t>memory)
    while number < (chunk + 1) * CHUNK_CLUSTERS and number << CLUSTER_SHIFT < k.slots:
        list_add(k, UNUSED, number, False)
        number += 1
    # Who walks over all clusters may begin with these now.
    us_store(&k.clusters, (chunk + 1) * CHUNK_CLUSTERS)
    return True


cdef bint clusters_grow(Clusters* k) noexcept nogil:
    cdef bint grown
    us_lock(&k.lock)
    grown = grow(k)
    us_unlock(&k.lock)
    return grown


# ---- taking ----

# Slots of a cluster: 512, but for the last one of a device.
cdef inline int room_of(Clusters* k, uint64_t number) noexcept nogil:
    cdef uint64_t left = k.slots - (number << CLUSTER_SHIFT)
    return <int>left if left < CLUSTER_SLOTS else CLUSTER_SLOTS


# n words of 0 in a row, from position `start` of the cluster on; -1: none. With its lock.
cdef int find(Clusters* k, uint64_t number, int start, int n) noexcept nogil:
    cdef uint64_t* table = word_of(k, TABLE, number << CLUSTER_SHIFT)
    cdef int room = room_of(k, number)
    cdef int i = start
    cdef int length = 0
    while i < room:
        length = 0 if us_load(&table[i]) else length + 1
        i += 1
        if length == n:
            return i - n
    return -1


# The first cluster of these lists that nobody is at, locked; NULL: none. `busy`: there are others. All lists under
# one hold of the device's lock: else a cluster could pass from one that comes to one that is done.
cdef Cluster* isolate(Clusters* k, const int* order, int lists, uint64_t* number, bint* busy) noexcept nogil:
    cdef uint32_t at
    cdef Cluster* c
    cdef int i
    us_lock(&k.lock)
    for i in range(lists):
        if order[i] == UNUSED and k.first[UNUSED] == 0:
            grow(k)
        at = k.first[order[i]]
        while at:
            c = numbered(k, at - 1)
            if us_trylock(&c.lock):
                us_unlock(&k.lock)
                number[0] = at - 1
                return c
            busy[0] = True
            at = c.next
    us_unlock(&k.lock)
    return NULL


# Puts a cluster on the list that its count wants; it is locked.
cdef void relocate(Clusters* k, Cluster* c, uint64_t number, int list) noexcept nogil:
    us_lock(&k.lock)
    if c.list != FULL:
        list_remove(k, c)
    if list != FULL:
        list_add(k, list, number, list == UNUSED and chunk_of(k, number << CLUSTER_SHIFT).used[TABLE][
            number & (CHUNK_CLUSTERS - 1)] != 0)
    us_unlock(&k.lock)


cdef Cluster* clusters_take(Clusters* k, int n, uint64_t* at) noexcept nogil:
    cdef bint runs = n > 1
    cdef uint64_t hint = us_load(&k.cpu[<uint64_t>sched_getcpu() % k.cpus].next[runs])
    cdef uint64_t number = 0
    cdef int[4] order
    cdef int lists, found
    cdef bint busy
    cdef Cluster* c
    if hint:
        number = (hint - 1) >> CLUSTER_SHIFT
        c = numbered(k, number)
        us_lock(&c.lock)
        # Single slots stay where they are: they may have come to a cluster of runs when there was no other.
        if c.count + n <= room_of(k, number) and (not runs or c.runs or c.count == 0):
            found = find(k, number, <int>((hint - 1) & (CLUSTER_SLOTS - 1)), n)
            if found >= 0:
                at[0] = (number << CLUSTER_SHIFT) + <uint64_t>found
                return c
        us_unlock(&c.lock)
    order[0] = RUNS if runs else SINGLES
    order[1] = UNUSED
    order[2] = FRAGMENTED
    order[3] = RUNS
    lists = 2 if runs else 4
    while True:
        us_chaos()
        busy = False
        c = isolate(k, order, lists, &number, &busy)
        if c != NULL:
            found = find(k, number, 0, n)
            if found >= 0:
                at[0] = (number << CLUSTER_SHIFT) + <uint64_t>found
                return c
            us_assert(runs, "a cluster on a list has a free slot")
            if c.count == 0:
                us_unlock(&c.lock)      # the last one of the device, and short
                return NULL
            # No run fits: until a slot of it is freed no other will try.
            relocate(k, c, number, FRAGMENTED)
            us_unlock(&c.lock)
        elif not busy:
            return NULL
        else:
            # Somebody has a cluster that may have room.
            us_pause()


cdef void clusters_taken(Clusters* k, Cluster* c, int n, uint64_t at) noexcept nogil:
    cdef uint64_t number = at >> CLUSTER_SHIFT
    cdef uint64_t next = at + <uint64_t>n + 1
    us_assert(c.count + n <= room_of(k, number), "a cluster has no more slots than it has")
    if c.count == 0:
        c.runs = n > 1
    c.count += <uint16_t>n
    page_more(&k.pages, &chunk_of(k, at).used[TABLE][number & (CHUNK_CLUSTERS - 1)], n)
    if c.count == room_of(k, number):
        relocate(k, c, number, FULL)
        next = 0
    elif c.list == UNUSED:
        relocate(k, c, number, RUNS if c.runs else SINGLES)
    if next and (next - 1) >> CLUSTER_SHIFT != number:
        next = (number << CLUSTER_SHIFT) + 1
    us_chaos()
    us_unlock(&c.lock)
    us_store(&k.cpu[<uint64_t>sched_getcpu() % k.cpus].next[n > 1], next)


cdef void clusters_given(Clusters* k, Cluster* c, uint64_t at) noexcept nogil:
    cdef uint64_t number = at >> CLUSTER_SHIFT
    cdef Chunk* chunk = chunk_of(k, at)
    us_assert(c.count > 0, "a slot is freed once")
    c.count -= 1
    page_less(&k.pages, &chunk.used[TABLE][number & (CHUNK_CLUSTERS - 1)], 1,
              word_of(k, TABLE, number << CLUSTER_SHIFT))
    if c.count == 0:
        relocate(k, c, number, UNUSED)
    elif c.list == FULL or c.list == FRAGMENTED:
        relocate(k, c, number, RUNS if c.runs else SINGLES)
    us_chaos()
    us_unlock(&c.lock)


# ---- words beside the table ----

cdef void word_set(Clusters* k, int array, uint64_t at, uint64_t value) noexcept nogil:
    cdef uint64_t* word = word_of(k, array, at)
    cdef uint16_t* used = &chunk_of(k, at).used[array][(at >> CLUSTER_SHIFT) & (CHUNK_CLUSTERS - 1)]
    cdef uint64_t before = us_load(word)
    if before == value:
        return                          # a store would bring a page back that was given back to the system
    if before == 0:
        page_more(&k.pages, used, 1)
    us_chaos()
    us_store(word, value)
    if before and value == 0:
        page_less(&k.pages, used, 1, word_of(k, array, at & ~<uint64_t>(CLUSTER_SLOTS - 1)))


cdef void half_set(Clusters* k, uint64_t at, uint32_t value) noexcept nogil:
    cdef Chunk* chunk = chunk_of(k, at)
    us_lock(&chunk.lock)
    page_more(&k.pages, &chunk.half[(at >> (CLUSTER_SHIFT + 1)) & (CHUNK_PAIRS - 1)], 1)
    half_of(k, at)[0] = value
    us_chaos()
    us_unlock(&chunk.lock)


cdef void half_clear(Clusters* k, uint64_t at) noexcept nogil:
    cdef Chunk* chunk = chunk_of(k, at)
    us_lock(&chunk.lock)
    half_of(k, at)[0] = 0
    page_less(&k.pages, &chunk.half[(at >> (CLUSTER_SHIFT + 1)) & (CHUNK_PAIRS - 1)], 1,
              half_of(k, at & ~<uint64_t>(2 * CLUSTER_SLOTS - 1)))
    us_chaos()
    us_unlock(&chunk.lock)
