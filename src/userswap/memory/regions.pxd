# Regions: the arena (one reserved range of address space a process), the regions cut from it, their page
# tables, and the pools that they belong to. What is ours, and which region, is known in O(1) from an address.
#
# Locks: `arena_lock` (extents, free lists) and a pool's `list_lock` (its regions, the clock hand) are leaf
# mutexes. A region that a lookup found stays while the program may touch it: freeing memory that another thread
# still uses is the program's error, as with malloc.
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t

from userswap.native.us cimport us_mutex
from userswap.reclaim.reclaim cimport Reclaim
from userswap.reclaim.watch cimport Watch
from userswap.swap.space cimport CodecHint, SwapSpace

cdef enum:
    PAGE_BYTES = 4096
    STREAMS = 4
    SCATTERED = 16
    PASSING_MOST = 16
    BUCKETS = 320               # fault times: 8 to an octave of nanoseconds

# Faults in a row, for instance of a thread that scans. Plain fields: a lost update costs a few faults.
cdef struct Stream:
    uint64_t next               # the folio that goes on with it, upwards
    uint64_t back               # and downwards; what a stream is not is far away (NOWHERE)
    int32_t run                 # how many came together last, or would have

cdef struct Region:
    char* base
    uint64_t bytes              # of memory in use: whole pages
    uint64_t granules           # of address space held, in folios
    uint64_t* words             # the page table, one word a folio
    uint64_t* sums              # of folios that are CLEAN and not GUARDED: what their bytes were when they came
    # Of a folio that is PARTIAL `sums` says which parts are in place, a bit each, and a bit more whether its copy
    # was in the swap file before it was written to; here are the parts' own sums.
    uint64_t* part_sums
    uint32_t* left              # what the pool's `left` was when it left last
    # By window of 32 folios: single folios came or left since it was one piece, so that it is in small pages now and
    # the kernel has a page table for it.
    uint8_t* broken
    uint8_t* stayed             # by window: it came back soon, and was to stay then (goes_round)
    MemoryPool* pool
    Region* next                # in the pool's list; in a free list, the next free extent
    Region* previous
    CodecHint hint
    Stream[STREAMS] streams
    int turn                    # the stream that is forgotten next
    int scattered               # how much faults here go anywhere: SCATTERED is enough to bring parts only
    int64_t leaving             # being freed: no fault that is still on its way is served any more

# A window that shall leave before others do.
cdef struct Passing:
    Region* region              # NULL: it is gone
    uint64_t first

cdef struct MemoryPool:
    Reclaim reclaim
    SwapSpace* swap
    uint32_t tiers              # where the data of its regions may be, unless they are told otherwise
    int run_most                # folios that one fault may bring in
    bint small                  # the budget has no room for what several threads have under way at once
    us_mutex small_lock         # held by who evicts then: packed copies of one batch at a time. Not a leaf
    us_mutex list_lock
    Region* regions
    Region* hand                # the clock hand: the next folio that reclaim looks at
    uint64_t hand_index
    Passing[PASSING_MOST] passing       # a ring, the oldest first; with the next four, under list_lock
    uint32_t passing_first
    uint32_t passing_count
    Region* copy_hand           # the next folio that is asked whether it needs its copy
    uint64_t copy_index
    MemoryPool* next            # all pools of the process, under arena_lock
    Watch* watch                # NULL: its budget was given
    int64_t watch_least         # bytes of budget, whatever the machine leaves
    int64_t watched             # its budget shall follow that
    int64_t given               # else: the budget that somebody gave it while it ran
    int64_t references          # one for each region, one for the Python object
    int64_t region_count
    int64_t virtual_bytes
    int64_t peak_virtual
    int64_t left                # folios that left, whole or in parts, ever: the clock of Region.left
    int64_t swapped_bytes       # of folios that are SWAPPED
    int64_t pinned              # bytes that a program keeps in place (userswap.pin); not those of system calls
    int64_t parts               # in place, of folios that are PARTIAL
    # Of the folios whose parts are wanted, how many had left so lately that with twice the parts in place they would
    # not have: of 65536, the last ones counting most. A lost update matters little.
    int64_t soon
    int64_t readahead           # windows that were READY before they were wanted
    int64_t readahead_hits      # and that somebody came for
    int64_t faults
    int64_t fault_ns
    int64_t[BUCKETS] fault_times

cdef char* arena_start
cdef char* arena_end
cdef Region** arena_owner       # by granule; NULL where there is no region

cdef int arena_open() noexcept nogil                            # 0 or -errno; once a process
cdef uint64_t arena_bytes() noexcept nogil
# The region that a page-table word belongs to, NULL if none: words live as long as the arena, regions come and go.
cdef Region* region_of_word(const uint64_t* word) noexcept nogil
cdef uint64_t* arena_first_word() noexcept nogil
cdef uint64_t* arena_end_word() noexcept nogil                  # past the last that was ever used
cdef Region* region_at(const void* address) noexcept nogil      # NULL: not in use (also beyond a region's bytes)
# A region of at least `bytes` of zeros. NULL: no address space.
cdef Region* region_new(MemoryPool* pool, uint64_t bytes) noexcept nogil
# Lengthens a region, by whole folios, within the address space that it holds; the caller alone may. False: that is too
# short, or the region ends inside a folio, whose stored copy would then be too short.
cdef bint region_grow(Region* region, uint64_t bytes) noexcept nogil
# Takes the region off its pool's list, so that reclaim does not find its folios any more.
cdef void region_unlink(Region* region) noexcept nogil
# Gives back the address space of an unlinked region whose words are all EMPTY; not `again`: nobody gets it any more.
cdef void region_release(Region* region, bint again) noexcept nogil
cdef uint64_t folio_bytes(const Region* region, uint64_t index) noexcept nogil
cdef uint64_t region_folios(const Region* region) noexcept nogil

cdef MemoryPool* pool_new(int64_t limit) noexcept nogil          # without a swap space yet (pool_bind)
# A budget, at first and while the program runs: sets it and what depends on it. Nothing is reclaimed here. What stays
# as it was made for the first: the index of identical folios, and the buffer of writeback.
cdef void pool_fit(MemoryPool* pool, int64_t limit) noexcept nogil
# The next pool after `pool` (NULL: the first) that is watched; the caller has a reference then. NULL: there is none.
cdef MemoryPool* pool_next_watched(MemoryPool* pool) noexcept nogil
cdef void pool_get(MemoryPool* pool) noexcept nogil
cdef void pool_put(MemoryPool* pool) noexcept nogil             # the last reference frees everything
cdef MemoryPool* pool_first() noexcept nogil                    # for fork: every pool of the process
