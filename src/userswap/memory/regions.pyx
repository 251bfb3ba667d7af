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
from userswap.memory.frames cimport frame_move_out, frame_vacate, frames_can_move, frames_free_tables, frames_open
from userswap.memory.pagetable cimport DIRTY, YOUNG
from userswap.memory.stage cimport STAGE_SLOTS, stage_keep, stage_kept, stage_open
from userswap.native.mman cimport (
    MADV_DONTDUMP, MADV_HUGEPAGE, MADV_NOHUGEPAGE, MAP_ANONYMOUS, MAP_FAILED, MAP_NORESERVE, MAP_PRIVATE,
    PROT_READ, PROT_WRITE, madvise, mmap, munmap,
)
from userswap.native.us cimport (
    us_add, us_assert, us_cas, us_load_ptr, us_lock, us_max, us_mutex, us_read, us_store, us_store_ptr, us_unlock,
    us_write,
)
from userswap.reclaim.reclaim cimport reclaim_delete, reclaim_set_limit, reclaim_uncharge
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
    KEPT_MOST = 128 << 20       # bytes of frames that freed regions keep, in all: what glibc keeps in two heaps
    KEPT_LONGEST = 64 << 20     # and one: longer ones cost more to fill than to make
    KEPT_SHARE = 8              # one part in so many of the budget
    KEPT_REGIONS = 64           # each free and each allocation may look at all
    VACATE_TRIES = 64

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
    cdef uint64_t first
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
    enter_pool(region, pool, whole)
    return region


cdef void enter_pool(Region* region, MemoryPool* pool, uint64_t whole) noexcept nogil:
    cdef uint64_t first, i
    region.bytes = whole
    region.pool = pool
    region.zeros = True
    region.shared = False
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


cdef void leave_pool(Region* region) noexcept nogil:
    cdef MemoryPool* pool = region.pool
    cdef uint64_t first = (<uint64_t>region.base - <uint64_t>arena_start) >> FOLIO_SHIFT
    cdef uint64_t i
    for i in range(region_folios(region)):
        us_store_ptr(<void**>&arena_owner[first + i], NULL)
    us_add(&pool.virtual_bytes, -<int64_t>region.bytes)
    us_add(&pool.region_count, -1)
    us_add(&pool.reclaim.overhead, -<int64_t>(sizeof(Region) + PAGE_TABLE_BYTES * region_folios(region)))


cdef void give_extent(Region* region) noexcept nogil:
    cdef uint64_t granules = region.granules
    cdef int kind = extent_class(&granules)
    region.pool = NULL
    region.bytes = 0
    us_lock(&arena_lock)
    region.next = free_extents[kind]
    free_extents[kind] = region
    us_unlock(&arena_lock)


cdef void region_release(Region* region, bint again) noexcept nogil:
    cdef MemoryPool* pool = region.pool
    cdef uint64_t i
    for i in range(region_folios(region)):
        us_assert(region.words[i] == 0, "a released region holds nothing")
    leave_pool(region)
    if again:
        give_extent(region)
    pool_put(pool)


# ---- freed regions that keep their frames ----

cdef inline int64_t kept_most(MemoryPool* pool) noexcept nogil:
    cdef int64_t most = us_read(&pool.reclaim.limit) // KEPT_SHARE
    return most if most < KEPT_MOST else KEPT_MOST


cdef bint region_may_stay(Region* region) noexcept nogil:
    cdef MemoryPool* pool = region.pool
    # A child of fork would copy what it writes to there: new frames are cheaper.
    return (FOLIO_BYTES <= region.bytes <= KEPT_LONGEST and <int64_t>region.bytes <= kept_most(pool)
            and not region.shared)


cdef int64_t in_place(const Region* region, uint64_t first, uint64_t end) noexcept nogil:
    """Bytes of the folios of a kept region that have frames."""
    cdef int64_t bytes = 0
    cdef uint64_t i
    for i in range(first, end):
        if region.words[i]:
            bytes += <int64_t>folio_bytes(region, i)
    return bytes


cdef void take_off(MemoryPool* pool, Region* region) noexcept nogil:
    """A kept region off the list, whose lock the caller has."""
    if region.previous != NULL:
        region.previous.next = region.next
    else:
        pool.kept = region.next
    if region.next != NULL:
        region.next.previous = region.previous
    else:
        pool.kept_last = region.previous
    pool.kept_count -= 1


cdef void region_keep(Region* region) noexcept nogil:
    cdef MemoryPool* pool = region.pool
    cdef int64_t bytes = in_place(region, 0, region_folios(region))
    cdef int64_t over
    cdef uint64_t i
    if bytes == 0:
        region_release(region, True)
        return
    leave_pool(region)
    # Its frames are counted as what is in place all the time. It holds no reference: the last one ends it, too.
    for i in range(region_folios(region)):
        if region.words[i]:
            us_store(&region.words[i], DIRTY | YOUNG)
    us_add(&pool.reclaim.kept, bytes)
    us_lock(&pool.list_lock)
    region.previous = NULL
    region.next = pool.kept
    if pool.kept != NULL:
        pool.kept.previous = region
    else:
        pool.kept_last = region
    pool.kept = region
    pool.kept_count += 1
    us_unlock(&pool.list_lock)
    # Of too much the oldest goes, not this one, which is what the program works with.
    over = us_read(&pool.reclaim.kept) - kept_most(pool)
    if over > 0:
        region_give_up(pool, over)
    while us_read(&pool.kept_count) > KEPT_REGIONS and region_give_up(pool, 1) > 0:
        pass
    pool_put(pool)


cdef int drop_frames(MemoryPool* pool, Region* region, uint64_t first) noexcept nogil:
    """Of a kept region that is off the list: no frames from folio `first` on. 0 or -errno: they are there still."""
    cdef uint64_t end = region_folios(region)
    cdef int64_t bytes
    cdef int error = -ENOMEM, tries = 0
    if first >= end:
        return 0
    bytes = in_place(region, first, end)
    while bytes and error == -ENOMEM and tries < VACATE_TRIES:
        error = frame_vacate(region.base + (first << FOLIO_SHIFT), region.bytes - (first << FOLIO_SHIFT))
        if error == -ENOMEM:
            tries += 1                          # mappings are short: what leaves gives some back
            pool.reclaim.evict(pool, FOLIO_BYTES, False)
    if bytes and error:
        return error
    memset(&region.words[first], 0, (end - first) * 8)
    region.bytes = first << FOLIO_SHIFT
    us_add(&pool.reclaim.kept, -bytes)
    reclaim_uncharge(&pool.reclaim, bytes)
    return 0


cdef void lose(MemoryPool* pool, Region* region) noexcept nogil:
    """The same where they can't be had back: nobody gets the region any more."""
    cdef int64_t bytes = in_place(region, 0, region_folios(region))
    memset(region.words, 0, region_folios(region) * 8)
    us_add(&pool.reclaim.kept, -bytes)
    reclaim_uncharge(&pool.reclaim, bytes)


cdef Region* region_reuse(MemoryPool* pool, uint64_t bytes) noexcept nogil:
    cdef uint64_t whole = (bytes + PAGE_BYTES - 1) & ~<uint64_t>(PAGE_BYTES - 1)
    cdef uint64_t folios = (whole + FOLIO_BYTES - 1) >> FOLIO_SHIFT
    cdef uint64_t have, apart, least = folios
    cdef Region* region
    cdef Region* best = NULL
    if whole < bytes or whole < FOLIO_BYTES or us_read(&pool.reclaim.kept) == 0:
        return NULL
    us_lock(&pool.list_lock)
    region = pool.kept
    while region != NULL and least:
        have = region_folios(region)
        apart = have - folios if have > folios else folios - have
        # Of windows only where it can be one, and not much more address space than is asked for.
        if (folios <= region.granules <= 2 * folios and apart < least
                and (folios < WINDOW_FOLIOS or region.granules >= WINDOW_FOLIOS)):
            best = region
            least = apart if region.bytes != whole else 0
        region = region.next
    if best != NULL:
        take_off(pool, best)
    us_unlock(&pool.list_lock)
    if best == NULL:
        return NULL
    # A folio that is shorter, or longer, than it was has frames that it should not have, or lacks some.
    if best.bytes != whole and drop_frames(pool, best, min(whole, best.bytes) >> FOLIO_SHIFT):
        lose(pool, best)
        return NULL
    us_add(&pool.reclaim.kept, -in_place(best, 0, region_folios(best)))
    enter_pool(best, pool, whole)
    return best


cdef void put_back(MemoryPool* pool, Region* region) noexcept nogil:
    """What is left of a kept region that was taken off the list: as the oldest."""
    if region.bytes == 0:
        give_extent(region)
        return
    us_lock(&pool.list_lock)
    region.next = NULL
    region.previous = pool.kept_last
    if pool.kept_last != NULL:
        pool.kept_last.next = region
    else:
        pool.kept = region
    pool.kept_last = region
    pool.kept_count += 1
    us_unlock(&pool.list_lock)


cdef bint region_move_window(Region* target, uint64_t first) noexcept nogil:
    cdef MemoryPool* pool = target.pool
    cdef Region* region
    cdef uint64_t start
    cdef char* there = target.base + (first << FOLIO_SHIFT)
    cdef bint moved = False
    if target.zeros or us_read(&pool.reclaim.kept) < WINDOW_BYTES or not frames_can_move():
        return False
    us_lock(&pool.list_lock)
    region = pool.kept_last
    while region != NULL and (region.bytes < WINDOW_BYTES or region.granules < WINDOW_FOLIOS):
        region = region.previous
    if region != NULL:
        take_off(pool, region)
    us_unlock(&pool.list_lock)
    if region == NULL:
        return False
    # Its last whole window; what is behind that goes.
    start = (region.bytes // WINDOW_BYTES - 1) * WINDOW_FOLIOS
    if drop_frames(pool, region, start + WINDOW_FOLIOS):
        lose(pool, region)
        return False
    if in_place(region, start, start + WINDOW_FOLIOS) == WINDOW_BYTES:
        if target.broken[first // WINDOW_FOLIOS] or frames_free_tables():
            frame_vacate(there, WINDOW_BYTES)           # a page table, as in window_in_place
        moved = frame_move_out(region.base + (start << FOLIO_SHIFT), there, WINDOW_BYTES) == 0
    if moved:
        memset(&region.words[start], 0, WINDOW_FOLIOS * 8)
        region.bytes = start << FOLIO_SHIFT
        us_add(&pool.reclaim.kept, -<int64_t>WINDOW_BYTES)
        target.broken[first // WINDOW_FOLIOS] = region.broken[start // WINDOW_FOLIOS]
    elif drop_frames(pool, region, start):
        lose(pool, region)
        return False
    put_back(pool, region)
    return moved


cdef int64_t region_give_up(void* ctx, int64_t want) noexcept nogil:
    cdef MemoryPool* pool = <MemoryPool*>ctx
    cdef Region* region
    cdef uint64_t first, rest
    cdef int64_t given = 0, before
    while given < want:
        us_lock(&pool.list_lock)
        region = pool.kept_last
        if region != NULL:
            take_off(pool, region)
        us_unlock(&pool.list_lock)
        if region == NULL:
            break
        # From its end, and whole windows: the rest is a shorter one.
        rest = <uint64_t>(want - given + WINDOW_BYTES - 1) & ~<uint64_t>(WINDOW_BYTES - 1)
        first = (region.bytes - rest) >> FOLIO_SHIFT if rest < region.bytes else 0
        first -= first % WINDOW_FOLIOS
        before = in_place(region, first, region_folios(region))
        if drop_frames(pool, region, first):
            lose(pool, region)
        else:
            put_back(pool, region)
        given += before
    return given


cdef MemoryPool* pool_new(int64_t limit) noexcept nogil:
    global pools
    cdef MemoryPool* pool = <MemoryPool*>calloc(1, sizeof(MemoryPool))
    if pool == NULL:
        return NULL
    pool.references = 1
    pool.tiers = ALL_TIERS
    pool.reclaim.aside = stage_kept()
    pool.reclaim.give_up = region_give_up
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
    region_give_up(pool, <int64_t>1 << 62)
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
