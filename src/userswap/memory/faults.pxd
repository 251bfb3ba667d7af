# Faults: every transition of a page-table word happens here: fault, evict, pin, free. Also the handler of faults,
# the gate that lets fork wait until no transition is under way, and fork itself.
from libc.stdint cimport int64_t, uint32_t, uint64_t

from userswap.backends.swapfile cimport SwapFile
from userswap.memory.regions cimport MemoryPool, Region
from userswap.swap.map cimport HolderOps
from userswap.swap.space cimport Moved, SwapSpace

# Handler or `threads` that serve faults, wrappers and fork handlers; the arena must be open. Again: makes sure of the
# first place. 0 or -errno.
cdef int faults_install(int threads) noexcept nogil
cdef int memory_background() noexcept nogil                     # readahead's thread: 0 or -errno
# Ties a pool to its swap space and its reclaim to the evict function; before the pool's first region.
cdef void pool_bind(MemoryPool* pool, SwapSpace* swap) noexcept nogil
# The pool's page-table words as the swap space needs them: to be made with these, and the pool as `ctx`.
cdef const HolderOps* memory_holders() noexcept nogil
# Memory for the program, page-aligned, or NULL: zeros, or what was in memory that was freed. Called from ordinary code,
# not from the handler.
cdef void* memory_new(MemoryPool* pool, uint64_t bytes, bint zeros) noexcept nogil
cdef void memory_free(void* start) noexcept nogil
# realloc: the same bytes in a region of another length, at a place of its own if need be. What is swapped out stays so.
# NULL: no address space, and the region is as it was.
cdef void* memory_resize(void* start, uint64_t bytes) noexcept nogil
# What madvise(MADV_DONTNEED) does: the range reads as zeros from here on, and whole folios in it take nothing.
cdef void memory_discard(void* start, size_t length) noexcept nogil
cdef bint memory_inside() noexcept nogil        # this thread is in the middle of a transition
# What was said on standard error when data was lost last: for an exception.
cdef void memory_loss(char* text, int n) noexcept nogil
# Fills a region, whatever is in it, with the content of another of the same size, sharing swap ids: 0 or -errno (then
# part of it).
cdef int memory_snapshot(MemoryPool* pool, void* start, void* copy) noexcept nogil
# For tests and tools: evicts, writes back, gives unused pool memory back. Bytes, or -errno.
cdef int64_t memory_evict(MemoryPool* pool, int64_t want) noexcept nogil
cdef int64_t memory_writeback(MemoryPool* pool, int64_t want) noexcept nogil
cdef int64_t memory_compact(MemoryPool* pool) noexcept nogil
# Counts the folios in each state (EMPTY, DIRTY, CLEAN, SWAPPED), and then the ids; checks that the count of every id
# equals the words that hold it: how many do not, or -ENOMEM. Holds the process still as fork does.
cdef int64_t memory_check(MemoryPool* pool, int64_t* states) noexcept nogil
# Makes a prefix of the range resident and keeps it there (see PinOps in syscalls.pxd).
cdef int64_t memory_pin(void* start, size_t length, bint writing) noexcept nogil
cdef void memory_unpin(void* start, size_t length) noexcept nogil
# Another budget while the program runs (pool_fit); memory_shrink then reclaims about `most` bytes: whether there is
# more to do, and some was done.
cdef void memory_fit(MemoryPool* pool, int64_t limit) noexcept nogil
cdef bint memory_shrink(MemoryPool* pool, int64_t most) noexcept nogil
# What this process and those that share its budget use of it.
cdef int64_t memory_family(MemoryPool* pool) noexcept nogil
# pool_next_watched, and the reference to `pool` is dropped.
cdef MemoryPool* memory_next_watched(MemoryPool* pool) noexcept nogil
cdef void memory_pool_close(MemoryPool* pool) noexcept nogil    # drops the Python object's reference
# Nobody closes the gate between these two: no swap file comes or goes, no fork. From ordinary code.
cdef void memory_hold() noexcept nogil
cdef void memory_let_go() noexcept nogil
# What space.pxd says of these, with the gate closed; memory_drain_some inside it. `to_zswap`: what finds no room in
# other files goes there, while the budget has room; without other files it does anyway.
cdef int memory_swapon(MemoryPool* pool, SwapFile* device, uint64_t limit, int priority, uint32_t tier,
                       const char* directory) noexcept nogil
cdef int memory_drain(MemoryPool* pool, int place, bint on) noexcept nogil
cdef bint memory_drain_some(MemoryPool* pool, int place, uint32_t* cluster, uint32_t* at, bint to_zswap,
                            Moved* moved) noexcept nogil
cdef int memory_swapoff(MemoryPool* pool, int place) noexcept nogil
