"""Regions: the arena, the regions cut from it, their page tables (see regions.pxd for the interface).

The arena is reserved once and registered with userfaultfd as a whole, so that an allocation or a free costs no
system call beside giving pages back. Extents are handed out in classes four to a doubling and kept for reuse by
class: address space is plentiful, and a freed extent never has to be cut or merged.
"""
from libc.errno cimport ENOMEM
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from userswap.backends.codec cimport FOLIO_BYTES, FOLIO_SHIFT, PARTS
from userswap.memory.frames cimport frames_free_tables, frames_open
from userswap.memory.stage cimport STAGE_SLOTS, stage_keep, stage_kept, stage_open
from userswap.native.mman cimport (
    MADV_DONTDUMP, MADV_HUGEPAGE, MADV_NOHUGEPAGE, MAP_ANONYMOUS, MAP_FAILED, MAP_NORESERVE, MAP_PRIVATE,
    PROT_READ, PROT_WRITE, madvise, mmap, munmap,
)
from userswap.native.us cimport (
    us_add, us_assert, us_cas, us_load_ptr, us_lock, us_max, us_mutex, us_read, us_store, us_store_ptr, us_unlock,
    us_write,
)
from userswap.reclaim.reclaim cimport reclaim_delete, reclaim_set_limit
from userswap.reclaim.watch cimport watch_delete
from userswap.swap.space cimport ALL_TIERS, space_delete

cdef enum:
    WINDOW_FOLIOS = STAGE_SLOTS
    WINDOW_BYTES = WINDOW_FOLIOS << FOLIO_SHIFT
    EXTENT_CLASSES = 160
    PAGE_TABLE_BYTES = 8 * (3 + PARTS) + 4  # of a folio: word, owner, sum, its parts' sums, when it left
    MOST_REGIONS = 1 << 22
    MOST_SHIFT = 43             # 8 TiB of address space, less where the process may not have that
    LEAST_SHIFT = 30
    WINDOWS_FROM = 32 << 20     # bytes of budget: with less, a window and the next one would be too much of it
    SMALL = 128 << 20           # with less, few windows are under way at once

arena_start = NULL
arena_end = NULL
arena_owner = NULL

cdef us_mutex arena_lock
cdef uint64_t* arena_words      # the page table of the whole arena, touched where regions are
cdef uint64_t* arena_sums       # as large
cdef uint64_t* arena_part_sums  # PARTS times as large
cdef uint32_t* arena_left       # half as large
cdef uint8_t* arena_broken      # by window
cdef uint8_t* arena_stayed
cdef Region* region_table       # regions live here, never freed, reused with their extents
cdef uint64_t regions_made = 0
cdef uint64_t granules_used = 0
ctypedef Region* RegionPointer
cdef RegionPointer[EXTENT_CLASSES] free_extents
cdef MemoryPool* pools = NULL


cdef void* reserve(uint64_t length) noexcept nogil:
    cdef void* memory = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    return NULL if memory == MAP_FAILED else memory


cdef int arena_open() noexcept nogil:
    global arena_start, arena_end, arena_owner, arena_words, arena_sums, arena_part_sums, arena_left, arena_broken
    global arena_stayed, region_table
    cdef int shift = MOST_SHIFT
    cdef uint64_t length, table
    cdef char* start = NULL
    cdef int error
    if arena_start != NULL:
        return 0
    while shift >= LEAST_SHIFT:
        length = <uint64_t>1 << shift
        table = (length >> FOLIO_SHIFT) * 8
        start = <char*>reserve(length + WINDOW_BYTES)
        if start != NULL:
            arena_owner = <Region**>reserve(table)
            arena_words = <uint64_t*>reserve(table)
            arena_sums = <uint64_t*>reserve(table)
            arena_part_sums = <uint64_t*>reserve(PARTS * table)
            arena_left = <uint32_t*>reserve(table // 2)
            # both in one
            arena_broken = <uint8_t*>reserve(2 * (table // 8 // WINDOW_FOLIOS))
            arena_stayed = arena_broken + table // 8 // WINDOW_FOLIOS
            region_table = <Region*>reserve(<uint64_t>MOST_REGIONS * sizeof(Region))
            if (arena_owner != NULL and arena_words != NULL and arena_sums != NULL and arena_part_sums != NULL
                    and arena_left != NULL and arena_broken != NULL and region_table != NULL):
                break
            munmap(start, length + WINDOW_BYTES)
            if arena_owner != NULL:
                munmap(arena_owner, table)
            if arena_words != NULL:
                munmap(arena_words, table)
            if arena_sums != NULL:
                munmap(arena_sums, table)
            if arena_part_sums != NULL:
                munmap(arena_part_sums, PARTS * table)
            if arena_left != NULL:
                munmap(arena_left, table // 2)
            if arena_broken != NULL:
                munmap(arena_broken, 2 * (table // 8 // WINDOW_FOLIOS))
            start = NULL
        shift -= 1
    if start == NULL:
        return -ENOMEM
    madvise(start, length + WINDOW_BYTES, MADV_DONTDUMP)
    # Nobody but us fills it. Where a huge page could come by itself, the kernel makes one and clears it before it hears
    # that userfaultfd wants the fault, and throws it away: 2 MiB of work for nothing, at each first fault of a window
    # that writes. But it leaves no page table behind, which would keep a window that is moved there from staying a huge
    # page: so it is the better choice where such a table can't be freed.
    madvise(start, length + WINDOW_BYTES, MADV_NOHUGEPAGE if frames_free_tables() else MADV_HUGEPAGE)
    start = <char*>((<uint64_t>start + WINDOW_BYTES - 1) & ~<uint64_t>(WINDOW_BYTES - 1))
    error = frames_open(start, length)
    if error == 0:
        error = stage_open()
    if error:
        munmap(start, length)
        return error
    arena_end = start + length
    arena_start = start
    return 0


cdef uint64_t arena_bytes() noexcept nogil:
    return arena_end - arena_start


cdef Region* region_at(const void* address) noexcept nogil:
    cdef Region* region
    if <char*>address < arena_start or <char*>address >= arena_end:
        return NULL
    region = <Region*>us_load_ptr(<void**>&arena_owner[(<uint64_t>address - <uint64_t>arena_start) >> FOLIO_SHIFT])
    if region == NULL or <uint64_t>address - <uint64_t>region.base >= region.bytes:
        return NULL
    return region


cdef Region* region_of_word(const uint64_t* word) noexcept nogil:
    return <Region*>us_load_ptr(<void**>&arena_owner[word - arena_words])


cdef uint64_t* arena_first_word() noexcept nogil:
    return arena_words


cdef uint64_t* arena_end_word() noexcept nogil:
    cdef uint64_t used
    us_lock(&arena_lock)
    used = granules_used
    us_unlock(&arena_lock)
    return &arena_words[used]


cdef uint64_t region_folios(const Region* region) noexcept nogil:
    return (region.bytes + FOLIO_BYTES - 1) >> FOLIO_SHIFT


cdef uint64_t folio_bytes(const Region* region, uint64_t index) noexcept nogil:
    cdef uint64_t rest = region.bytes - (index << FOLIO_SHIFT)
    return rest if rest < FOLIO_BYTES else FOLIO_BYTES


cdef int extent_class(uint64_t* granules) noexcept nogil:
    """Rounds up to a class: 1..4, then 5, 6, 7, 8 times a power of two. At most a quarter of address space is spare."""
    cdef uint64_t rest = granules[0]
    cdef int shift = 0
    while rest > 8:
        rest = (rest + 1) >> 1
        shift += 1
    granules[0] = rest << shift
    return <int>rest - 1 + 4 * shift


cdef Region* region_new(MemoryPool* pool, uint64_t bytes) noexcept nogil:
    global regions_made, granules_used
    cdef uint64_t whole = (bytes + PAGE_BYTES - 1) & ~<uint64_t>(PAGE_BYTES - 1)
    cdef uint64_t granules = (whole + FOLIO_BYTES - 1) >> FOLIO_SHIFT
    cdef uint64_t first, i
    cdef Region* region
    cdef int kind
    if whole < bytes or whole == 0 or whole > arena_bytes():
        return NULL
    kind = extent_class(&granules)
    us_lock(&arena_lock)
    region = free_extents[kind]
    if region != NULL:
        free_extents[kind] = region.next
    else:
        first = granules_used
        if granules >= WINDOW_FOLIOS:
            # so that whole windows of it can be huge pages
            first = (first + WINDOW_FOLIOS - 1) & ~<uint64_t>(WINDOW_FOLIOS - 1)
        if regions_made < MOST_REGIONS and first + granules <= arena_bytes() >> FOLIO_SHIFT:
            region = &region_table[regions_made]
            regions_made += 1
            region.base = arena_start + (first << FOLIO_SHIFT)
            region.words = &arena_words[first]
            region.sums = &arena_sums[first]
            region.part_sums = &arena_part_sums[PARTS * first]
            region.left = &arena_left[first]
            region.broken = &arena_broken[first // WINDOW_FOLIOS]
            region.stayed = &arena_stayed[first // WINDOW_FOLIOS]
            region.granules = granules
            granules_used = first + granules
    us_unlock(&arena_lock)
    if region == NULL:
        return NULL
    region.bytes = whole
    region.pool = pool
    region.hint.recipe = -1
    region.hint.expected = 0
    region.hint.left = 0
    region.hint.tiers = pool.tiers
    memset(region.streams, 0, sizeof(region.streams))
    region.scattered = 0
    us_write(&region.leaving, 0)
    region.previous = NULL
    us_add(&pool.references, 1)
    us_add(&pool.region_count, 1)
    us_max(&pool.peak_virtual, us_add(&pool.virtual_bytes, <int64_t>whole))
    us_add(&pool.reclaim.overhead, <int64_t>(sizeof(Region) + PAGE_TABLE_BYTES * region_folios(region)))
    us_lock(&pool.list_lock)
    region.next = pool.regions
    if pool.regions != NULL:
        pool.regions.previous = region
    pool.regions = region
    us_unlock(&pool.list_lock)
    first = (<uint64_t>region.base - <uint64_t>arena_start) >> FOLIO_SHIFT
    for i in range(region_folios(region)):
        us_store_ptr(<void**>&arena_owner[first + i], region)
    return region


cdef bint region_grow(Region* region, uint64_t bytes) noexcept nogil:
    cdef MemoryPool* pool = region.pool
    cdef uint64_t folios = (bytes + FOLIO_BYTES - 1) >> FOLIO_SHIFT
    cdef uint64_t before = region_folios(region)
    cdef uint64_t first = (<uint64_t>region.base - <uint64_t>arena_start) >> FOLIO_SHIFT
    cdef uint64_t i
    cdef int64_t more
    if region.bytes & (FOLIO_BYTES - 1) or bytes > arena_bytes() or folios > region.granules:
        return False
    if folios <= before:
        return True
    more = <int64_t>(folios - before)
    us_max(&pool.peak_virtual, us_add(&pool.virtual_bytes, more << FOLIO_SHIFT))
    us_add(&pool.reclaim.overhead, PAGE_TABLE_BYTES * more)
    for i in range(before, folios):
        us_store_ptr(<void**>&arena_owner[first + i], region)
    # Last: whoever reads it goes over words that are there, and EMPTY.
    us_store(&region.bytes, folios << FOLIO_SHIFT)
    return True


cdef void region_unlink(Region* region) noexcept nogil:
    cdef MemoryPool* pool = region.pool
    cdef int i
    us_lock(&pool.list_lock)
    if pool.hand == region:
        pool.hand = region.next
        pool.hand_index = 0
    if pool.copy_hand == region:
        pool.copy_hand = region.next
        pool.copy_index = 0
    for i in range(PASSING_MOST):
        if pool.passing[i].region == region:
            pool.passing[i].region = NULL
    if region.previous != NULL:
        region.previous.next = region.next
    else:
        pool.regions = region.next
    if region.next != NULL:
        region.next.previous = region.previous
    us_unlock(&pool.list_lock)


cdef void region_release(Region* region, bint again) noexcept nogil:
    cdef MemoryPool* pool = region.pool
    cdef uint64_t granules = region.granules
    cdef uint64_t i
    cdef uint64_t first = (<uint64_t>region.base - <uint64_t>arena_start) >> FOLIO_SHIFT
    cdef int kind
    for i in range(region_folios(region)):
        us_assert(region.words[i] == 0, "a released region holds nothing")
        us_store_ptr(<void**>&arena_owner[first + i], NULL)
    us_add(&pool.virtual_bytes, -<int64_t>region.bytes)
    us_add(&pool.region_count, -1)
    us_add(&pool.reclaim.overhead, -<int64_t>(sizeof(Region) + PAGE_TABLE_BYTES * region_folios(region)))
    region.pool = NULL
    region.bytes = 0
    if again:
        kind = extent_class(&granules)
        us_lock(&arena_lock)
        region.next = free_extents[kind]
        free_extents[kind] = region
        us_unlock(&arena_lock)
    pool_put(pool)


cdef MemoryPool* pool_new(int64_t limit) noexcept nogil:
    global pools
    cdef MemoryPool* pool = <MemoryPool*>calloc(1, sizeof(MemoryPool))
    if pool == NULL:
        return NULL
    pool.references = 1
    pool.tiers = ALL_TIERS
    pool.reclaim.aside = stage_kept()
    us_lock(&arena_lock)
    pool.next = pools
    pools = pool
    us_unlock(&arena_lock)
    pool_fit(pool, limit)
    return pool


cdef void pool_fit(MemoryPool* pool, int64_t limit) noexcept nogil:
    cdef int64_t most = STAGE_SLOTS if limit >= WINDOWS_FROM else limit // 64 // FOLIO_BYTES
    cdef int64_t least = limit
    cdef MemoryPool* other
    pool.run_most = <int>most if most > 1 else 1
    pool.small = limit < SMALL
    reclaim_set_limit(&pool.reclaim, limit, pool.run_most * FOLIO_BYTES)
    # One stage for all: what the most modest pool has room for counts.
    us_lock(&arena_lock)
    other = pools
    while other != NULL:
        least = other.reclaim.limit if 0 < other.reclaim.limit < least else least
        other = other.next
    us_unlock(&arena_lock)
    stage_keep(least // 32)


cdef MemoryPool* pool_next_watched(MemoryPool* pool) noexcept nogil:
    cdef MemoryPool* next
    cdef int64_t seen
    us_lock(&arena_lock)
    next = pool.next if pool != NULL else pools
    while next != NULL:
        # Whose last reference has gone waits for the lock to be taken off the list.
        seen = us_read(&next.references)
        if (seen > 0 and us_read(&next.watched)
                and us_cas(<uint64_t*>&next.references, <uint64_t>seen, <uint64_t>seen + 1)):
            break
        next = next.next
    us_unlock(&arena_lock)
    return next


cdef void pool_get(MemoryPool* pool) noexcept nogil:
    us_add(&pool.references, 1)


cdef void pool_put(MemoryPool* pool) noexcept nogil:
    global pools
    cdef MemoryPool** link
    if us_add(&pool.references, -1) != 0:
        return
    us_lock(&arena_lock)
    link = &pools
    while link[0] != pool:
        link = &link[0].next
    link[0] = pool.next
    us_unlock(&arena_lock)
    reclaim_delete(&pool.reclaim)
    if pool.swap != NULL:
        space_delete(pool.swap)
    watch_delete(pool.watch)
    free(pool)


cdef MemoryPool* pool_first() noexcept nogil:
    return pools
