# Slots in clusters of 512, as Linux 6.18 gives them: what the designs share whose ids are positions in a swap table.
# Knows which words of the table are 0, and nothing of what others mean.
#
# A cluster is 2 MiB of a device with 4 KiB pages. Each cluster in use has a table, one page of 512 words, and up to
# three more pages that the design asks for. 512 clusters are a chunk, one mapping; chunks are never unmapped, so that
# the word of a live slot is found by two loads without any lock.
#
# Locks. A cluster's lock protects its count, which words of its table are 0, and its optional pages (but for HALF); it
# may be taken by who has an entry LOCKED, and nothing waits under it but the next two. The device's lock protects the
# lists and growth; a cluster's `list` changes under both. A chunk's lock protects the use of HALF pages, which two
# clusters share. Who has a cluster's lock may take the device's; who has the device's only tries a cluster's.
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from userswap.native.us cimport us_load, us_mutex
from userswap.swap.pages cimport Pages, page_less, page_more

cdef enum:
    CLUSTER_SHIFT = 9
    CLUSTER_SLOTS = 512
    CHUNK_CLUSTERS = 512
    CHUNK_PAIRS = 256
    CHUNK_SHIFT = 18
    CHUNK_MASK = 262143
    CHUNK_HEADER = 12288
    CHUNK_ARRAYS = 4
    ARRAY_SHIFT = 21            # 8 bytes for each slot of a chunk
    CHUNKS_MOST = 131072        # 2**35 slots

    TABLE = 0                   # the arrays; 1 and 2 are the design's
    HALF = 3                    # 4 bytes a slot

    LISTS = 5                   # the lists; a cluster that is full is on none
    FULL = 0
    UNUSED = 1                  # no slot in use: no table
    SINGLES = 2
    RUNS = 3                    # begun by a run; single slots come here last
    FRAGMENTED = 4              # the same, and a run found no room since a slot was last freed

cdef struct Cluster:            # 16 bytes
    us_mutex lock
    uint32_t next               # numbers of clusters, and one, in the list
    uint32_t prev
    uint16_t count              # slots in use
    uint8_t list
    uint8_t runs

cdef struct Chunk:
    Cluster[CHUNK_CLUSTERS] clusters
    uint16_t[3][CHUNK_CLUSTERS] used
    uint16_t[CHUNK_PAIRS] half
    us_mutex lock

cdef struct Cpu:                # a cache line
    uint64_t[2] next            # where single slots and runs are looked for first: a slot and one, 0: nowhere
    uint64_t[6] apart

cdef struct Clusters:
    uint64_t* chunks            # of CHUNKS_MOST addresses; reserved, memory as it fills
    uint64_t slots              # how many there may be: the size of the device
    uint64_t clusters           # that exist
    Cpu* cpu
    uint64_t cpus
    uint32_t[LISTS] first
    uint32_t[LISTS] last
    us_mutex lock               # the device's
    Pages pages

cdef bint clusters_init(Clusters* k, uint64_t slots) noexcept nogil        # of zeroed memory; False: no memory
cdef void clusters_end(Clusters* k) noexcept nogil
# Makes a chunk of clusters. False: the device ends here, or no memory.
cdef bint clusters_grow(Clusters* k) noexcept nogil
# n slots in a row from `at` on, their table words still 0, and the lock of their cluster; NULL: there are none.
# With that lock the caller stores their words, none of them 0, and calls clusters_taken.
cdef Cluster* clusters_take(Clusters* k, int n, uint64_t* at) noexcept nogil
cdef void clusters_taken(Clusters* k, Cluster* cluster, int n, uint64_t at) noexcept nogil     # unlocks
# A slot whose word was made 0 under its cluster's lock, which this gives back.
cdef void clusters_given(Clusters* k, Cluster* cluster, uint64_t at) noexcept nogil

cdef inline Chunk* chunk_of(Clusters* k, uint64_t at) noexcept nogil:
    return <Chunk*>us_load(&k.chunks[at >> CHUNK_SHIFT])

cdef inline Cluster* cluster_of(Clusters* k, uint64_t at) noexcept nogil:
    return &chunk_of(k, at).clusters[(at >> CLUSTER_SHIFT) & (CHUNK_CLUSTERS - 1)]

cdef inline uint64_t* word_of(Clusters* k, int array, uint64_t at) noexcept nogil:
    return <uint64_t*>(<uint64_t>chunk_of(k, at) + CHUNK_HEADER + (<uint64_t>array << ARRAY_SHIFT)) + (at & CHUNK_MASK)

cdef inline uint32_t* half_of(Clusters* k, uint64_t at) noexcept nogil:
    return <uint32_t*>(<uint64_t>chunk_of(k, at) + CHUNK_HEADER + (<uint64_t>HALF << ARRAY_SHIFT)) + (at & CHUNK_MASK)

# A word of array 1 or 2 that is stored with its page's use counted. Under the cluster's lock.
cdef void word_set(Clusters* k, int array, uint64_t at, uint64_t value) noexcept nogil
# 4 bytes in HALF, which are in use from `half_set` to `half_clear` whatever their value is. Takes the chunk's lock.
cdef void half_set(Clusters* k, uint64_t at, uint32_t value) noexcept nogil
cdef void half_clear(Clusters* k, uint64_t at) noexcept nogil
