"""zswap: the compressed pool in RAM, and `ZswapPool`, a window into it for tests and experiments.

The pool is one mapping of address space, cut in segments of 2 MiB. A segment holds objects of one size
class, packed one after the other behind a header (which are allocated, which are young, whose, how long).
Size classes are fine (64 to a doubling), so that rounding up costs less than 1.6 %. RAM is counted by the page:
a bitmap of each segment says which of its pages were touched, another which of those only free objects
lie on, and those are what a compaction gives back first; then it moves objects.

Touches its own mappings and the memory it was handed, nothing else. Everything but the window runs
without the GIL, maybe inside a signal handler: no malloc, errors as return codes, errno left alone.

Locking: `mutex` is a leaf and guards everything but the bytes of objects and the three counters, which are
written under it and read without. It is held for a few instructions; system calls and copies of objects are
done without it, on segments that were *set aside* (no list has them, so nobody allocates there; frees go on).
`compactor` is held through a compaction and only ever tried, so nobody waits for it.
"""
from libc cimport errno as c
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset
from posix.mman cimport (
    MADV_DONTNEED, MAP_ANONYMOUS, MAP_FAILED, MAP_NORESERVE, MAP_PRIVATE, PROT_READ, PROT_WRITE, madvise, mmap, munmap,
)

from userswap.native.us cimport (
    us_add, us_and, us_assert, us_cas, us_chaos, us_load, us_lock, us_mutex, us_now, us_or, us_read, us_trylock,
    us_unlock, us_word_release, us_word_wait, us_write,
)
from userswap.swap.entry cimport ENTRY_LOCKED, ENTRY_WAITERS, ZSWAP, entry_make, entry_payload, entry_seen, entry_type


cdef extern from "<sys/mman.h>" nogil:
    enum:
        MADV_DONTDUMP
        MADV_NOHUGEPAGE

cdef extern from * nogil:
    int popcount "__builtin_popcountll"(uint64_t word) noexcept
    int lowest "__builtin_ctzll"(uint64_t word) noexcept    # undefined for 0
    int leading "__builtin_clzll"(uint64_t word) noexcept   # undefined for 0

cdef enum:
    PAGE_SHIFT = 12
    PAGE_BYTES = 4096
    SEGMENT_SHIFT = 21
    SEGMENT_BYTES = 2097152
    PAGES = 512                 # of a segment
    WORDS = 8                   # of a bitmap of pages
    HANDLE_SHIFT = 20           # handle = segment << 20 | index + 1
    SEGMENTS_MAX = 16777215     # so that a handle is below 2**44
    OBJECT_MIN = 64
    CLASSES = 449
    GROUPS = 8                  # segments of a class by fullness: used * GROUPS / capacity; full ones are in none
    FRUITLESS = 32              # a compaction gives up after so many classes where it gained nothing
    CHURN = 65536               # bytes allocated and freed before it is worth looking again
    DROP_SHARE = 4              # giving a byte back takes about this part of the time that moving it does
    BREATH = 32                 # segments a clock hand passes before the mutex is let go once
    COLD_MOST = 256             # cold objects that are remembered

# 12 bytes side by side, so that the header of few objects is one page.
cdef packed struct Record:
    uint64_t owner              # 0: not published yet
    uint32_t length

cdef struct SizeClass:
    uint32_t size
    uint32_t capacity           # objects of a segment
    uint32_t young              # offsets in a segment; the allocated-bitmap is at 0
    uint32_t records
    uint32_t objects
    uint32_t loose_from         # first page without a byte of the header on it
    uint32_t partial            # which groups have segments
    uint32_t heads[GROUPS]
    int64_t segments
    int64_t used
    int64_t pages               # populated pages of its segments
    int64_t given_up            # the compaction that gained nothing here

# An object that was cold when it was made. It may be gone since, and its place another's.
cdef struct Cold:
    uint64_t handle
    uint64_t owner

# Segments are numbered from 1: 0 ends a list.
cdef struct Segment:
    uint64_t populated[WORDS]   # pages that were touched and not given back
    uint64_t loose[WORDS]       # of these, pages on which only free objects lie
    uint32_t populated_count
    uint32_t loose_count
    uint32_t used
    uint32_t staying            # objects that are never written back
    uint32_t hint               # no free object is below
    uint32_t next               # of the same class and group; or the next free segment
    uint32_t prev
    uint32_t newer              # the clock's ring of all segments in use
    uint32_t older
    uint32_t loose_next         # queue of segments that have loose pages
    uint32_t loose_prev
    uint16_t size_class
    uint8_t group               # GROUPS: in no list
    uint8_t aside               # set aside by a compaction
    uint8_t queued              # in the queue of loose pages

cdef struct Zswap:
    us_mutex mutex
    us_mutex compactor
    char* base
    Segment* segments
    uint64_t mapped             # bytes at base
    uint64_t control            # bytes at segments
    uint32_t limit              # highest segment
    uint32_t fresh              # highest segment that was ever used
    uint32_t free               # list of free segments, nothing populated
    uint32_t spare              # one empty segment whose pages are kept, or 0
    uint32_t hand               # clock: segment, and next object of it
    uint32_t hand_index
    uint32_t loose_head         # queue of segments with loose pages, oldest first
    uint32_t loose_tail
    int64_t in_use              # segments in the ring
    int64_t pages               # populated in all segments; this and the next two are read without the mutex
    int64_t stored
    int64_t objects
    int64_t churn               # bytes allocated and freed, ever
    int64_t looked              # churn when a compaction last found nothing to gain; -1: look
    int64_t compactions
    uint32_t cold_first         # ring of cold objects, oldest first
    uint32_t cold_count
    Cold cold[COLD_MOST]
    SizeClass classes[CLASSES]


# ---- sizes ----

cdef inline int class_of(uint32_t length) noexcept nogil:
    cdef int k
    if length <= 1024:
        return 0 if length <= OBJECT_MIN else <int>((length - OBJECT_MIN + 15) >> 4)
    k = 63 - leading(length - 1)
    return 60 + (k - 10) * 64 + <int>((length - (1u << k) + (1u << (k - 6)) - 1) >> (k - 6))

cdef inline uint32_t class_size(int index) noexcept nogil:
    cdef int k
    if index <= 60:
        return OBJECT_MIN + 16 * index
    k = 10 + (index - 61) // 64
    return (1u << k) + <uint32_t>((index - 61) % 64 + 1) * (1u << (k - 6))

cdef void class_layout(SizeClass* k, uint32_t size) noexcept nogil:
    cdef uint32_t n = SEGMENT_BYTES // size
    cdef uint32_t bitmap
    k.size = size
    while True:     # the header depends on the capacity, which depends on the header
        bitmap = (n + 63) // 64 * 8
        k.young = bitmap
        k.records = 2 * bitmap
        k.objects = (k.records + <uint32_t>sizeof(Record) * n + 15) & ~15u
        if k.objects + n * size <= SEGMENT_BYTES:
            break
        n -= 1
    k.capacity = n
    k.loose_from = (k.objects + PAGE_BYTES - 1) >> PAGE_SHIFT


# ---- small helpers ----

cdef inline char* base_of(Zswap* z, uint32_t s) noexcept nogil:
    return z.base + (<uint64_t>s << SEGMENT_SHIFT)

cdef inline Record* record_of(SizeClass* k, void* base, uint32_t i) noexcept nogil:
    return <Record*>(<char*>base + k.records) + i

cdef inline uint32_t length_of(Zswap* z, uint64_t handle) noexcept nogil:
    cdef uint32_t s = <uint32_t>(handle >> HANDLE_SHIFT)
    return record_of(&z.classes[z.segments[s].size_class], base_of(z, s),
                     <uint32_t>(handle & ((1 << HANDLE_SHIFT) - 1)) - 1).length

cdef inline uint64_t page_mask(uint32_t word, uint32_t first, uint32_t last) noexcept nogil:
    # The bits of pages first .. last that are in this word of a bitmap; the word has at least one of them.
    cdef uint32_t low = first - 64 * word if first > 64 * word else 0
    cdef uint32_t high = last - 64 * word if last < 64 * word + 63 else 63
    return (~<uint64_t>0 << low) & (~<uint64_t>0 >> (63 - high))

cdef void* reserve(uint64_t n) noexcept nogil:
    cdef int kept = c.errno
    cdef void* p = mmap(NULL, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    if p == MAP_FAILED:
        c.errno = kept
        return NULL
    # Huge pages would make more resident than was touched. Neither call has to succeed.
    madvise(p, n, MADV_NOHUGEPAGE)
    madvise(p, n, MADV_DONTDUMP)
    c.errno = kept
    return p

cdef bint give_back(char* start, uint64_t n) noexcept nogil:
    cdef int kept = c.errno
    cdef bint given = madvise(start, n, MADV_DONTNEED) == 0     # fails when memory was locked with mlockall
    c.errno = kept
    return given


# ---- lists; all with the mutex held ----

cdef inline void group_unlink(Zswap* z, uint32_t s) noexcept nogil:
    cdef Segment* seg = &z.segments[s]
    cdef SizeClass* k = &z.classes[seg.size_class]
    if seg.group == GROUPS:
        return
    if seg.next:
        z.segments[seg.next].prev = seg.prev
    if seg.prev:
        z.segments[seg.prev].next = seg.next
    else:
        k.heads[seg.group] = seg.next
        if not seg.next:
            k.partial &= ~(1u << seg.group)
    seg.group = GROUPS

cdef inline void group_link(Zswap* z, uint32_t s) noexcept nogil:
    # Where its fullness says; a full segment is in no list.
    cdef Segment* seg = &z.segments[s]
    cdef SizeClass* k = &z.classes[seg.size_class]
    cdef uint32_t group = seg.used * GROUPS // k.capacity
    if group == seg.group:
        return
    group_unlink(z, s)
    if group == GROUPS:
        return
    seg.group = <uint8_t>group
    seg.prev = 0
    seg.next = k.heads[group]
    if seg.next:
        z.segments[seg.next].prev = s
    k.heads[group] = s
    k.partial |= 1u << group

cdef inline void loose_link(Zswap* z, uint32_t s) noexcept nogil:
    cdef Segment* seg = &z.segments[s]
    if seg.queued or seg.aside or not seg.loose_count:
        return
    seg.queued = 1
    seg.loose_next = 0
    seg.loose_prev = z.loose_tail
    if z.loose_tail:
        z.segments[z.loose_tail].loose_next = s
    else:
        z.loose_head = s
    z.loose_tail = s

cdef inline void loose_unlink(Zswap* z, uint32_t s) noexcept nogil:
    cdef Segment* seg = &z.segments[s]
    if not seg.queued:
        return
    seg.queued = 0
    if seg.loose_next:
        z.segments[seg.loose_next].loose_prev = seg.loose_prev
    else:
        z.loose_tail = seg.loose_prev
    if seg.loose_prev:
        z.segments[seg.loose_prev].loose_next = seg.loose_next
    else:
        z.loose_head = seg.loose_next

cdef inline void ring_insert(Zswap* z, uint32_t s) noexcept nogil:
    # Just behind the hand: the segment that the hand comes to last.
    cdef Segment* seg = &z.segments[s]
    cdef Segment* hand
    z.in_use += 1
    if not z.hand:
        seg.newer = s
        seg.older = s
        z.hand = s
        z.hand_index = 0
        return
    hand = &z.segments[z.hand]
    seg.newer = z.hand
    seg.older = hand.older
    z.segments[hand.older].newer = s
    hand.older = s

cdef inline void ring_remove(Zswap* z, uint32_t s) noexcept nogil:
    cdef Segment* seg = &z.segments[s]
    z.in_use -= 1
    if z.hand == s:
        z.hand = seg.newer if seg.newer != s else 0
        z.hand_index = 0
    z.segments[seg.older].newer = seg.newer
    z.segments[seg.newer].older = seg.older


# ---- pages; all with the mutex held ----

cdef inline void pages_add(Zswap* z, SizeClass* k, int64_t n) noexcept nogil:
    k.pages += n
    us_write(&z.pages, z.pages + n)

cdef inline void populate(Zswap* z, Segment* seg, SizeClass* k, uint32_t first, uint32_t last) noexcept nogil:
    # Pages first .. last are about to be touched.
    cdef uint32_t w
    cdef uint64_t new
    cdef int n = 0
    for w in range(first >> 6, (last >> 6) + 1):
        new = page_mask(w, first, last) & ~seg.populated[w]
        if new:
            seg.populated[w] |= new
            n += popcount(new)
    if n:
        seg.populated_count += n
        pages_add(z, k, n)

cdef inline bint any_used(uint64_t* bits, uint32_t first, uint32_t last) noexcept nogil:
    cdef uint32_t w
    for w in range(first >> 6, (last >> 6) + 1):
        if bits[w] & page_mask(w, first, last):
            return True
    return False

cdef inline bint page_is_loose(SizeClass* k, uint64_t* bits, uint32_t page) noexcept nogil:
    cdef uint32_t first = ((page << PAGE_SHIFT) - k.objects) // k.size
    cdef uint32_t last = ((page << PAGE_SHIFT) + PAGE_BYTES - 1 - k.objects) // k.size
    if last >= k.capacity:
        last = k.capacity - 1
    return page >= k.loose_from and not any_used(bits, first, last)

cdef inline void loosen(Segment* seg, uint32_t first, uint32_t last) noexcept nogil:
    cdef uint32_t w
    cdef uint64_t new
    for w in range(first >> 6, (last >> 6) + 1):
        new = page_mask(w, first, last) & seg.populated[w] & ~seg.loose[w]
        if new:
            seg.loose[w] |= new
            seg.loose_count += popcount(new)

cdef inline void fasten(Zswap* z, uint32_t s, uint32_t first, uint32_t last) noexcept nogil:
    cdef Segment* seg = &z.segments[s]
    cdef uint32_t w
    cdef uint64_t old
    if not seg.loose_count:
        return
    for w in range(first >> 6, (last >> 6) + 1):
        old = page_mask(w, first, last) & seg.loose[w]
        if old:
            seg.loose[w] &= ~old
            seg.loose_count -= popcount(old)
    if not seg.loose_count:
        loose_unlink(z, s)


# ---- segments; all with the mutex held ----

cdef uint32_t segment_open(Zswap* z, int size_class) noexcept nogil:
    # An empty segment for this class, or 0. The spare first: its pages are there already.
    cdef uint32_t s = z.spare
    cdef Segment* seg
    cdef SizeClass* k = &z.classes[size_class]
    if s:
        z.spare = 0
    elif z.free:
        s = z.free
        z.free = z.segments[s].next
    elif z.fresh < z.limit:
        s = z.fresh + 1
        z.fresh = s
    else:
        return 0
    seg = &z.segments[s]
    seg.size_class = <uint16_t>size_class
    seg.used = 0
    seg.hint = 0
    seg.group = GROUPS
    k.segments += 1
    k.pages += seg.populated_count
    populate(z, seg, k, 0, (k.records - 1) >> PAGE_SHIFT)
    memset(base_of(z, s), 0, k.records)     # both bitmaps; records are read of allocated objects only
    loosen(seg, k.loose_from, PAGES - 1)
    loose_link(z, s)
    group_link(z, s)
    ring_insert(z, s)
    return s

cdef void segment_close(Zswap* z, uint32_t s) noexcept nogil:
    # It is empty: out of its class, with what is populated. It is no list's until segment_release or `spare`.
    cdef Segment* seg = &z.segments[s]
    cdef SizeClass* k = &z.classes[seg.size_class]
    us_assert(seg.used == 0, b"a segment that is closed is empty")
    group_unlink(z, s)
    loose_unlink(z, s)
    ring_remove(z, s)
    memset(seg.loose, 0, sizeof(seg.loose))
    seg.loose_count = 0
    k.segments -= 1
    k.pages -= seg.populated_count

cdef int64_t segment_release(Zswap* z, uint32_t s) noexcept nogil:
    # A closed segment goes back to the system; the mutex is let go meanwhile. Bytes given back.
    cdef Segment* seg = &z.segments[s]
    cdef int64_t n = seg.populated_count
    us_unlock(&z.mutex)
    us_chaos()
    cdef bint given = give_back(base_of(z, s), SEGMENT_BYTES)
    us_lock(&z.mutex)
    if given:
        memset(seg.populated, 0, sizeof(seg.populated))
        seg.populated_count = 0
        us_write(&z.pages, z.pages - n)
    seg.next = z.free
    z.free = s
    return n * PAGE_BYTES if given else 0

cdef inline uint32_t emptiest(SizeClass* k) noexcept nogil:
    return k.heads[lowest(k.partial)] if k.partial else 0

cdef inline uint32_t fullest(SizeClass* k) noexcept nogil:
    return k.heads[63 - leading(k.partial)] if k.partial else 0

cdef inline uint32_t lowest_free(Segment* seg, uint64_t* bits) noexcept nogil:
    # The segment is not full, so there is one.
    cdef uint32_t w = seg.hint >> 6
    while bits[w] == ~<uint64_t>0:
        w += 1
    return 64 * w + <uint32_t>lowest(~bits[w])

cdef inline uint32_t top_of(SizeClass* k, uint64_t* bits) noexcept nogil:
    # One above the highest object that is allocated.
    cdef uint32_t w = (k.capacity + 63) // 64
    while w and not bits[w - 1]:
        w -= 1
    return 64 * w - <uint32_t>leading(bits[w - 1]) if w else 0


# ---- objects; all with the mutex held ----

cdef inline bint stays(uint64_t owner) noexcept nogil:
    return owner & ZSWAP_STAYS == ZSWAP_STAYS

cdef inline void own(Zswap* z, uint32_t s, uint32_t i, uint64_t owner) noexcept nogil:
    cdef Record* record = record_of(&z.classes[z.segments[s].size_class], base_of(z, s), i)
    z.segments[s].staying += <uint32_t>stays(owner) - <uint32_t>stays(record.owner)
    record.owner = owner

cdef uint64_t object_place(Zswap* z, uint32_t s, uint32_t length, uint64_t owner, bint young) noexcept nogil:
    cdef Segment* seg = &z.segments[s]
    cdef SizeClass* k = &z.classes[seg.size_class]
    cdef char* base = base_of(z, s)
    cdef uint64_t* bits = <uint64_t*>base
    cdef uint32_t i = lowest_free(seg, bits)
    cdef uint32_t at = k.objects + i * k.size
    cdef uint32_t record = k.records + i * <uint32_t>sizeof(Record)
    us_assert(i < k.capacity, b"a segment in a list has a free object")
    bits[i >> 6] |= <uint64_t>1 << (i & 63)
    # Atomic because zswap_memory() sets bits of this bitmap without the mutex.
    if young:
        us_or(<uint64_t*>(base + k.young) + (i >> 6), <uint64_t>1 << (i & 63))
    else:
        us_and(<uint64_t*>(base + k.young) + (i >> 6), ~(<uint64_t>1 << (i & 63)))
    seg.hint = i + 1
    seg.used += 1
    k.used += 1
    populate(z, seg, k, record >> PAGE_SHIFT, (record + <uint32_t>sizeof(Record) - 1) >> PAGE_SHIFT)
    populate(z, seg, k, at >> PAGE_SHIFT, (at + length - 1) >> PAGE_SHIFT)
    fasten(z, s, at >> PAGE_SHIFT, (at + k.size - 1) >> PAGE_SHIFT)
    record_of(k, base, i).owner = 0
    own(z, s, i, owner)
    record_of(k, base, i).length = length
    if not seg.aside:
        group_link(z, s)
    return (<uint64_t>s << HANDLE_SHIFT) | (i + 1)

cdef void object_remove(Zswap* z, uint32_t s, uint32_t i) noexcept nogil:
    cdef Segment* seg = &z.segments[s]
    cdef SizeClass* k = &z.classes[seg.size_class]
    cdef uint64_t* bits = <uint64_t*>base_of(z, s)
    cdef uint32_t first = (k.objects + i * k.size) >> PAGE_SHIFT
    cdef uint32_t last = (k.objects + (i + 1) * k.size - 1) >> PAGE_SHIFT
    us_assert((bits[i >> 6] >> (i & 63)) & 1, b"an object is freed once")
    own(z, s, i, 0)
    bits[i >> 6] &= ~(<uint64_t>1 << (i & 63))
    if i < seg.hint:
        seg.hint = i
    seg.used -= 1
    k.used -= 1
    # Pages in the middle of it are nobody else's; those at its ends may be its neighbours' too.
    if not page_is_loose(k, bits, first):
        first += 1
    if last >= first and not page_is_loose(k, bits, last):
        if last == first:
            first += 1
        else:
            last -= 1
    if first <= last:
        loosen(seg, first, last)
        loose_link(z, s)
    if not seg.aside:
        group_link(z, s)


# ---- the interface ----

cdef Zswap* zswap_new(uint64_t address_space) noexcept nogil:
    cdef uint64_t limit = address_space >> SEGMENT_SHIFT
    cdef uint64_t control
    cdef Zswap* z
    cdef int i
    if limit < 1:
        limit = 1
    if limit > SEGMENTS_MAX:
        limit = SEGMENTS_MAX
    # Number 0 is no segment: its address space is never touched.
    z = <Zswap*>reserve(sizeof(Zswap))
    if z == NULL:
        return NULL
    control = (limit + 1) * sizeof(Segment)
    z.limit = <uint32_t>limit
    z.mapped = (limit + 1) << SEGMENT_SHIFT
    z.control = control
    z.base = <char*>reserve(z.mapped)
    z.segments = <Segment*>reserve(control)
    if z.base == NULL or z.segments == NULL:
        zswap_delete(z)
        return NULL
    z.looked = -1
    for i in range(CLASSES):
        class_layout(&z.classes[i], class_size(i))
    return z

cdef void zswap_delete(Zswap* z) noexcept nogil:
    if z.base != NULL:
        munmap(z.base, z.mapped)
    if z.segments != NULL:
        munmap(z.segments, z.control)
    munmap(z, sizeof(Zswap))

cdef uint64_t zswap_alloc(Zswap* z, uint32_t length, uint64_t owner) noexcept nogil:
    cdef uint64_t handle = 0
    cdef uint32_t s
    cdef int size_class
    if length == 0 or length > OBJECT_MAX:
        return 0
    size_class = class_of(length)
    us_lock(&z.mutex)
    s = fullest(&z.classes[size_class])
    if not s:
        s = segment_open(z, size_class)
    if s:
        handle = object_place(z, s, length, owner, True)
        z.churn += length
        us_write(&z.stored, z.stored + length)
        us_write(&z.objects, z.objects + 1)
    us_unlock(&z.mutex)
    return handle

cdef uint32_t zswap_room(uint32_t length) noexcept nogil:
    return class_size(class_of(length))

cdef bint zswap_resize(Zswap* z, uint64_t handle, uint32_t length) noexcept nogil:
    cdef uint32_t s = <uint32_t>(handle >> HANDLE_SHIFT)
    cdef uint32_t i = <uint32_t>(handle & ((1 << HANDLE_SHIFT) - 1)) - 1
    cdef SizeClass* k = &z.classes[z.segments[s].size_class]
    cdef Record* record = record_of(k, base_of(z, s), i)
    cdef uint32_t at = k.objects + i * k.size
    if length == 0 or length > OBJECT_MAX or class_of(length) != z.segments[s].size_class:
        return False
    us_lock(&z.mutex)
    # Pages that it does not reach any more stay: a neighbour may be on them.
    populate(z, &z.segments[s], k, at >> PAGE_SHIFT, (at + length - 1) >> PAGE_SHIFT)
    us_write(&z.stored, z.stored + length - record.length)
    record.length = length
    us_unlock(&z.mutex)
    return True

cdef void zswap_set_owner(Zswap* z, uint64_t handle, uint64_t owner) noexcept nogil:
    us_lock(&z.mutex)
    own(z, <uint32_t>(handle >> HANDLE_SHIFT), <uint32_t>(handle & ((1 << HANDLE_SHIFT) - 1)) - 1, owner)
    us_unlock(&z.mutex)

cdef uint64_t zswap_owner(Zswap* z, uint64_t handle) noexcept nogil:
    cdef uint32_t s = <uint32_t>(handle >> HANDLE_SHIFT)
    return record_of(&z.classes[z.segments[s].size_class], base_of(z, s),
                     <uint32_t>(handle & ((1 << HANDLE_SHIFT) - 1)) - 1).owner

cdef void zswap_set_owner_cold(Zswap* z, uint64_t handle, uint64_t owner) noexcept nogil:
    cdef uint32_t s = <uint32_t>(handle >> HANDLE_SHIFT)
    cdef uint32_t i = <uint32_t>(handle & ((1 << HANDLE_SHIFT) - 1)) - 1
    cdef SizeClass* k = &z.classes[z.segments[s].size_class]
    us_lock(&z.mutex)
    us_assert(i < k.capacity and (<uint64_t*>base_of(z, s))[i >> 6] >> (i & 63) & 1
              and (record_of(k, base_of(z, s), i).owner == 0 or record_of(k, base_of(z, s), i).owner == owner),
              b"what is cold is nobody's yet, or still its owner's")
    own(z, s, i, owner)
    us_and(<uint64_t*>(base_of(z, s) + k.young) + (i >> 6), ~(<uint64_t>1 << (i & 63)))
    cold_push(z, handle, owner)
    us_unlock(&z.mutex)

cdef void zswap_free(Zswap* z, uint64_t handle) noexcept nogil:
    cdef uint32_t s = <uint32_t>(handle >> HANDLE_SHIFT)
    cdef uint32_t i = <uint32_t>(handle & ((1 << HANDLE_SHIFT) - 1)) - 1
    cdef Segment* seg = &z.segments[s]
    cdef uint32_t length
    us_lock(&z.mutex)
    length = record_of(&z.classes[seg.size_class], base_of(z, s), i).length
    object_remove(z, s, i)
    z.churn += length
    us_write(&z.stored, z.stored - length)
    us_write(&z.objects, z.objects - 1)
    # A segment that a compaction has set aside is the compaction's to close.
    if not seg.used and not seg.aside:
        segment_close(z, s)
        if z.spare:
            segment_release(z, s)
        else:
            z.spare = s
    us_unlock(&z.mutex)

cdef char* zswap_peek(Zswap* z, uint64_t handle, uint32_t* length) noexcept nogil:
    cdef uint32_t s = <uint32_t>(handle >> HANDLE_SHIFT)
    cdef uint32_t i = <uint32_t>(handle & ((1 << HANDLE_SHIFT) - 1)) - 1
    cdef SizeClass* k = &z.classes[z.segments[s].size_class]
    cdef char* base = base_of(z, s)
    length[0] = record_of(k, base, i).length
    return base + k.objects + i * k.size

cdef char* zswap_memory(Zswap* z, uint64_t handle, uint32_t* length) noexcept nogil:
    cdef uint32_t s = <uint32_t>(handle >> HANDLE_SHIFT)
    cdef uint32_t i = <uint32_t>(handle & ((1 << HANDLE_SHIFT) - 1)) - 1
    cdef uint64_t* young = <uint64_t*>(base_of(z, s) + z.classes[z.segments[s].size_class].young) + (i >> 6)
    cdef uint64_t bit = <uint64_t>1 << (i & 63)
    if not us_load(young) & bit:
        us_or(young, bit)
    return zswap_peek(z, handle, length)

cdef char* zswap_mapping(Zswap* z, uint64_t* length) noexcept nogil:
    length[0] = (<uint64_t>z.fresh + 1) << SEGMENT_SHIFT
    return z.base

cdef int64_t zswap_bytes(Zswap* z) noexcept nogil:
    return us_read(&z.pages) * PAGE_BYTES

cdef int64_t zswap_stored(Zswap* z) noexcept nogil:
    return us_read(&z.stored)

cdef int64_t zswap_objects(Zswap* z) noexcept nogil:
    return us_read(&z.objects)

cdef int64_t zswap_churn(Zswap* z) noexcept nogil:
    return us_read(&z.churn)

cdef int zswap_cold(Zswap* z) noexcept nogil:
    return <int>z.cold_count

cdef int64_t zswap_metadata(Zswap* z) noexcept nogil:
    # Control words of segments were touched up to the highest that was ever used.
    cdef int64_t n = (<int64_t>z.fresh + 1) * <int64_t>sizeof(Segment) + PAGE_BYTES - 1
    return (n & ~<int64_t>(PAGE_BYTES - 1)) + ((sizeof(Zswap) + PAGE_BYTES - 1) & ~<int64_t>(PAGE_BYTES - 1))


# ---- compaction; the mutex is held between the calls, and let go inside them ----

cdef inline bint wasteful(Zswap* z, int percent) noexcept nogil:
    cdef int64_t stored = us_read(&z.stored)
    return us_read(&z.pages) * PAGE_BYTES - stored > stored // 100 * percent + COMPACT_SLACK

cdef inline void set_aside(Zswap* z, uint32_t s) noexcept nogil:
    group_unlink(z, s)
    loose_unlink(z, s)
    z.segments[s].aside = 1

cdef inline int64_t set_back(Zswap* z, uint32_t s) noexcept nogil:
    # Bytes given back: it may have become empty.
    cdef Segment* seg = &z.segments[s]
    seg.aside = 0
    if not seg.used:
        segment_close(z, s)
        return segment_release(z, s)
    loose_link(z, s)
    group_link(z, s)
    return 0

cdef int64_t drop_loose(Zswap* z, uint32_t s) noexcept nogil:
    # Gives back the loose pages of a segment that was set aside, and the part of its header that is above the
    # highest object. Nobody allocates in it meanwhile, so the pages stay loose without the mutex. -1: the
    # system refused (memory is locked), which would not change by trying again.
    cdef Segment* seg = &z.segments[s]
    cdef SizeClass* k = &z.classes[seg.size_class]
    cdef char* base = base_of(z, s)
    cdef uint64_t drop[WORDS]
    cdef uint32_t top = top_of(k, <uint64_t*>base)
    cdef uint32_t first, last, page, start, w
    cdef int n = 0
    cdef bint given = True
    memcpy(drop, seg.loose, sizeof(drop))
    memset(seg.loose, 0, sizeof(seg.loose))
    seg.loose_count = 0
    first = (k.records + <uint32_t>sizeof(Record) * top + PAGE_BYTES - 1) >> PAGE_SHIFT
    last = k.objects >> PAGE_SHIFT      # one past the pages that have records only
    for page in range(first, last):
        drop[page >> 6] |= (<uint64_t>1 << (page & 63)) & seg.populated[page >> 6]
    for w in range(WORDS):
        n += popcount(drop[w])
    if not n:
        return 0
    us_unlock(&z.mutex)
    us_chaos()
    page = 0
    while page < PAGES:
        if not drop[page >> 6] >> (page & 63):
            page = (page | 63) + 1      # nothing more in this word
            continue
        page += lowest(drop[page >> 6] >> (page & 63))
        start = page
        while page < PAGES and (drop[page >> 6] >> (page & 63)) & 1:
            page += 1
        if not give_back(base + (start << PAGE_SHIFT), <uint64_t>(page - start) << PAGE_SHIFT):
            given = False
            break
    us_lock(&z.mutex)
    if not given:
        return -1
    for w in range(WORDS):
        seg.populated[w] &= ~drop[w]
    seg.populated_count -= n
    pages_add(z, k, -n)
    return <int64_t>n * PAGE_BYTES

cdef inline int64_t surplus(SizeClass* k) noexcept nogil:
    # Pages that the class has beyond what its objects would need, side by side.
    cdef int64_t full, rest, need
    if not k.segments:
        return 0
    full = k.used // k.capacity
    rest = k.used % k.capacity
    need = full * ((k.objects + k.capacity * k.size + PAGE_BYTES - 1) >> PAGE_SHIFT)
    if rest:
        need += (k.records + rest * (k.size + <int64_t>sizeof(Record)) + PAGE_BYTES - 1) >> PAGE_SHIFT
        if k.objects > PAGE_BYTES:
            need += 1       # the objects start on another page than the records end
    return k.pages - need

cdef bint squeeze(Zswap* z, SizeClass* k, int64_t* effort, bint* blocked,
                  zswap_try locked, zswap_done moved, void* ctx) noexcept nogil:
    # Moves objects of the emptiest segment into holes of the others, or to its own lower end when it is the
    # only one with holes; then gives its pages back. Says whether anything was moved or given back.
    cdef uint32_t s = emptiest(k)
    cdef Segment* seg = &z.segments[s]
    cdef char* base = base_of(z, s)
    cdef uint64_t* bits = <uint64_t*>base
    cdef uint32_t i, d, length
    cdef uint64_t owner, fresh, handle
    cdef bint young, any = False
    cdef int64_t n
    cdef int tries = 0
    if not s:
        return False
    set_aside(z, s)
    i = top_of(k, bits)
    while i and effort[0] > 0:
        i -= 1
        if not (bits[i >> 6] >> (i & 63)) & 1:
            if not bits[i >> 6]:
                i &= ~63u
            continue
        d = fullest(k)
        if not d:
            d = s
            if lowest_free(seg, bits) > i:
                break
        tries += 1
        if tries % 256 == 0:    # many small objects: let others in
            us_unlock(&z.mutex)
            us_lock(&z.mutex)
            i += 1
            continue
        owner = record_of(k, base, i).owner
        handle = (<uint64_t>s << HANDLE_SHIFT) | (i + 1)
        if not owner or not locked(ctx, owner, handle):
            effort[0] -= OBJECT_MIN
            blocked[0] = True
            continue
        # The owner's lock keeps the object where it is; no owner yet keeps its copy from everybody.
        length = record_of(k, base, i).length
        young = (us_load(<uint64_t*>(base + k.young) + (i >> 6)) >> (i & 63)) & 1
        fresh = object_place(z, d, length, 0, young)
        us_unlock(&z.mutex)
        us_chaos()
        memcpy(base_of(z, d) + k.objects + ((fresh & ((1 << HANDLE_SHIFT) - 1)) - 1) * k.size,
               base + k.objects + i * k.size, length)
        us_lock(&z.mutex)
        own(z, d, <uint32_t>(fresh & ((1 << HANDLE_SHIFT) - 1)) - 1, owner)
        if not young:
            cold_moved(z, handle, fresh)
        moved(ctx, owner, handle, fresh)
        object_remove(z, s, i)
        effort[0] -= length
        any = True
    n = drop_loose(z, s) if seg.used else 0
    if n < 0:
        effort[0] = 0
        any = True
    else:
        effort[0] -= n // DROP_SHARE
    if n > 0:
        any = True
    n = set_back(z, s)
    effort[0] -= n // DROP_SHARE
    return any or n > 0

cdef int64_t zswap_compact(Zswap* z, int percent, int64_t effort,
                           zswap_try locked, zswap_done moved, void* ctx) noexcept nogil:
    cdef int64_t before, n, best, here
    cdef uint32_t s
    cdef int i, chosen
    cdef int fruitless = 0
    cdef bint blocked = False
    if effort <= 0 or not wasteful(z, percent):
        return 0
    if not us_trylock(&z.compactor):
        return 0
    us_lock(&z.mutex)
    before = z.pages
    z.compactions += 1
    if z.spare:
        s = z.spare
        z.spare = 0
        effort -= segment_release(z, s) // DROP_SHARE
    # Pages that nothing is on cost a system call and no copy: these first, the oldest holes before others.
    while z.loose_head and effort > 0 and wasteful(z, percent):
        s = z.loose_head
        set_aside(z, s)
        n = drop_loose(z, s)
        effort = effort - n // DROP_SHARE if n >= 0 else 0
        effort -= set_back(z, s) // DROP_SHARE
    # Then moves, in the class that has most to gain. It is not worth the look when little has changed
    # since a look that found nothing.
    if z.looked < 0 or z.churn - z.looked >= CHURN:
        z.looked = -1
        while effort > 0 and fruitless < FRUITLESS and wasteful(z, percent):
            best = 0
            chosen = -1
            for i in range(CLASSES):
                if z.classes[i].segments and z.classes[i].given_up != z.compactions:
                    here = surplus(&z.classes[i])
                    if here > best:
                        best = here
                        chosen = i
            if chosen < 0:
                if not blocked:
                    z.looked = z.churn
                break
            n = z.classes[chosen].pages
            if not squeeze(z, &z.classes[chosen], &effort, &blocked, locked, moved, ctx):
                fruitless += 1
                z.classes[chosen].given_up = z.compactions
            elif z.classes[chosen].pages >= n:
                z.classes[chosen].given_up = z.compactions
    n = (before - z.pages) * PAGE_BYTES
    us_unlock(&z.mutex)
    us_unlock(&z.compactor)
    return n if n > 0 else 0


# ---- cold from the start; all with the mutex held ----

cdef inline void cold_push(Zswap* z, uint64_t handle, uint64_t owner) noexcept nogil:
    cdef Cold* cold = &z.cold[(z.cold_first + z.cold_count) % COLD_MOST]
    cold.handle = handle
    cold.owner = owner
    if z.cold_count < COLD_MOST:
        z.cold_count += 1
    else:
        z.cold_first = (z.cold_first + 1) % COLD_MOST       # the oldest is left to the clock

cdef inline void cold_moved(Zswap* z, uint64_t handle, uint64_t fresh) noexcept nogil:
    cdef uint32_t i
    for i in range(z.cold_count):
        if z.cold[(z.cold_first + i) % COLD_MOST].handle == handle:
            z.cold[(z.cold_first + i) % COLD_MOST].handle = fresh

cdef inline bint still_cold(Zswap* z, Cold* cold) noexcept nogil:
    # Allocated, the same owner's, and not asked for since.
    cdef uint32_t s = <uint32_t>(cold.handle >> HANDLE_SHIFT)
    cdef uint32_t i = <uint32_t>(cold.handle & ((1 << HANDLE_SHIFT) - 1)) - 1
    cdef SizeClass* k = &z.classes[z.segments[s].size_class]
    cdef uint64_t* bits = <uint64_t*>base_of(z, s)
    # The memory of a segment without objects may not even be there.
    return (z.segments[s].used != 0 and i < k.capacity and (bits[i >> 6] >> (i & 63)) & 1
            and record_of(k, bits, i).owner == cold.owner
            and not (us_load(<uint64_t*>(<char*>bits + k.young) + (i >> 6)) >> (i & 63)) & 1)

cdef int take_cold(Zswap* z, int n, int64_t bytes, uint64_t* handles, uint64_t* owners,
                   zswap_try locked, void* ctx) noexcept nogil:
    cdef int taken = 0
    cdef int64_t size
    cdef uint32_t left = z.cold_count
    cdef uint32_t length
    cdef Cold cold
    while left and taken < n:
        left -= 1
        cold = z.cold[z.cold_first]
        length = 0
        if still_cold(z, &cold):
            length = length_of(z, cold.handle)
            size = (length + PAGE_BYTES - 1) & ~(PAGE_BYTES - 1)
            if size > bytes and taken:
                break
        z.cold_first = (z.cold_first + 1) % COLD_MOST
        z.cold_count -= 1
        if not length or size > bytes:
            continue
        if stays(cold.owner):
            continue
        if locked(ctx, cold.owner, cold.handle):
            handles[taken] = cold.handle
            owners[taken] = cold.owner
            taken += 1
            bytes -= size
        else:
            cold_push(z, cold.handle, cold.owner)       # somebody is at it, as who has just stored it is
    return taken


# ---- the clock ----

cdef int zswap_coldest(Zswap* z, int n, int64_t bytes, uint64_t* handles, uint64_t* owners,
                       zswap_try locked, void* ctx) noexcept nogil:
    cdef int taken = 0
    cdef int64_t visits, size
    cdef int64_t left = bytes
    cdef uint32_t w, i, s
    cdef uint64_t word, owner, handle
    cdef uint64_t* bits
    cdef uint64_t* young
    cdef SizeClass* k
    us_lock(&z.mutex)
    taken = take_cold(z, n, bytes, handles, owners, locked, ctx)
    if taken:
        us_unlock(&z.mutex)
        return taken
    # Twice around: once to make everything old, once to take; one more for the segment begun in its middle.
    visits = 2 * z.in_use + 1
    while visits > 0 and z.hand and taken < n:
        s = z.hand
        k = &z.classes[z.segments[s].size_class]
        bits = <uint64_t*>base_of(z, s)
        young = <uint64_t*>(base_of(z, s) + k.young)
        if z.segments[s].staying == z.segments[s].used:
            z.hand_index = k.capacity   # nothing for us: not worth a look at each
        while z.hand_index < k.capacity and taken < n:
            w = z.hand_index >> 6
            word = bits[w] & (~<uint64_t>0 << (z.hand_index & 63))
            if not word & ~us_load(&young[w]):
                if word:
                    us_and(&young[w], ~word)
                z.hand_index = 64 * (w + 1)
                continue
            i = 64 * w + <uint32_t>lowest(word)
            if us_and(&young[w], ~(<uint64_t>1 << (i & 63))) & (<uint64_t>1 << (i & 63)):
                z.hand_index = i + 1
                continue
            owner = record_of(k, bits, i).owner
            size = (record_of(k, bits, i).length + PAGE_BYTES - 1) & ~(PAGE_BYTES - 1)
            if size > left and taken:
                us_unlock(&z.mutex)     # the hand stays at it
                return taken
            z.hand_index = i + 1
            handle = (<uint64_t>s << HANDLE_SHIFT) | (i + 1)
            # What does not fit even alone is passed by.
            if size <= left and owner and not stays(owner) and locked(ctx, owner, handle):
                handles[taken] = handle
                owners[taken] = owner
                taken += 1
                left -= size
        if z.hand_index >= k.capacity:
            z.hand = z.segments[s].newer
            z.hand_index = 0
            visits -= 1
            if visits % BREATH == 0:
                us_unlock(&z.mutex)
                us_chaos()
                us_lock(&z.mutex)
    us_unlock(&z.mutex)
    return taken


# ---- a window for tests and experiments; the owners here are entries with a lock bit, as in a swap map ----

cdef struct Owners:
    uint64_t* entries
    uint64_t n
    int64_t nobodys             # how often the pool asked for owner 0, which it must not

cdef uint64_t entry_lock(uint64_t* entry) noexcept nogil:
    cdef uint64_t word
    while True:
        word = us_load(entry)
        if word & ENTRY_LOCKED:
            us_word_wait(entry, word, ENTRY_WAITERS)
        elif us_cas(entry, word, word | ENTRY_LOCKED):
            return entry_seen(word)

cdef bint owner_locked(void* ctx, uint64_t owner, uint64_t handle) noexcept nogil:
    cdef uint64_t* entry = &(<Owners*>ctx).entries[owner & ~ZSWAP_STAYS]
    cdef uint64_t word = us_load(entry)
    if not owner:
        us_add(&(<Owners*>ctx).nobodys, 1)
    return word == entry_make(ZSWAP, handle) and us_cas(entry, word, word | ENTRY_LOCKED)

cdef void owner_moved(void* ctx, uint64_t owner, uint64_t handle, uint64_t fresh) noexcept nogil:
    us_word_release(&(<Owners*>ctx).entries[owner & ~ZSWAP_STAYS], entry_make(ZSWAP, fresh), ENTRY_WAITERS)

cdef inline uint64_t mix(uint64_t x) noexcept nogil:
    x ^= x >> 30
    x *= 0xBF58476D1CE4E5B9u
    x ^= x >> 27
    x *= 0x94D049BB133111EBu
    return x ^ (x >> 31)

cdef void stamp(char* memory, uint32_t length, uint64_t owner, uint64_t turn) noexcept nogil:
    # Every byte follows from owner, turn and length, and the turn and the length are in the object.
    cdef uint64_t* words = <uint64_t*>memory
    cdef uint64_t seed = mix(owner * 0x9E3779B97F4A7C15u + turn + (<uint64_t>length << 32))
    cdef uint32_t i
    words[0] = turn
    words[1] = length
    for i in range(2, length // 8):
        words[i] = seed + i * <uint64_t>0x9E3779B97F4A7C15u
    for i in range(length & ~7u, length):
        memory[i] = <char>(seed + i)

cdef bint stamped(const char* memory, uint32_t length, uint64_t owner) noexcept nogil:
    cdef const uint64_t* words = <const uint64_t*>memory
    cdef uint64_t seed = mix(owner * 0x9E3779B97F4A7C15u + words[0] + (<uint64_t>length << 32))
    cdef uint32_t i
    if words[1] != length:
        return False
    for i in range(2, length // 8):
        if words[i] != seed + i * <uint64_t>0x9E3779B97F4A7C15u:
            return False
    for i in range(length & ~7u, length):
        if memory[i] != <char>(seed + i):
            return False
    return True


cdef class ZswapPool:
    """A pool with a table of owners 1 .. `owners`, each of which has one object or none.

    What an owner holds is read and replaced under its lock, and compactions move it, as in the real system.
    """

    cdef Zswap* z
    cdef Owners table

    def __cinit__(self, address_space, owners):
        if owners < 1 or address_space < 0:
            raise ValueError("a pool needs at least one owner, and an address space that is not negative")
        self.table.n = owners
        self.table.entries = <uint64_t*>calloc(owners + 1, 8)
        self.z = zswap_new(address_space)
        if self.z == NULL or self.table.entries == NULL:
            raise MemoryError("no address space for the pool")

    def __dealloc__(self):
        if self.z != NULL:
            zswap_delete(self.z)
        free(self.table.entries)

    cdef uint64_t* entry(self, uint64_t owner) except NULL:
        if not 1 <= owner <= self.table.n:
            raise IndexError(f"there is no owner {owner}: they are 1 to {self.table.n}")
        return &self.table.entries[owner]

    def store(self, uint64_t owner, const unsigned char[::1] data not None):
        """Give the owner a new object with this content, in place of what it had."""
        cdef uint64_t* entry = self.entry(owner)
        cdef uint64_t word, handle
        cdef uint32_t length = <uint32_t>data.shape[0]
        if not 1 <= data.shape[0] <= OBJECT_MAX:
            raise ValueError(f"an object has 1 to {OBJECT_MAX} bytes, not {data.shape[0]}")
        with nogil:
            word = entry_lock(entry)
            if entry_type(word) == ZSWAP:
                zswap_free(self.z, entry_payload(word))
            # Owner 0 until the content is there: nobody moves or takes it before.
            handle = zswap_alloc(self.z, length, 0)
            if handle:
                memcpy(zswap_memory(self.z, handle, &length), &data[0], length)
                zswap_set_owner(self.z, handle, owner)
            us_word_release(entry, entry_make(ZSWAP, handle) if handle else 0, ENTRY_WAITERS)
        if not handle:
            raise MemoryError("the pool has no address space left")
        return handle

    def rewrite(self, uint64_t owner, const unsigned char[::1] data not None):
        """Give the owner's object this content where it is; False, and nothing changed, if its room is another."""
        cdef uint64_t* entry = self.entry(owner)
        cdef uint64_t word
        cdef uint32_t length = <uint32_t>data.shape[0]
        cdef bint done
        with nogil:
            word = entry_lock(entry)
            done = entry_type(word) == ZSWAP and zswap_resize(self.z, entry_payload(word), length)
            if done:
                memcpy(zswap_memory(self.z, entry_payload(word), &length), &data[0], length)
            us_word_release(entry, entry_seen(word), ENTRY_WAITERS)
        return done

    def load(self, uint64_t owner):
        """The content of the owner's object."""
        cdef uint64_t* entry = self.entry(owner)
        cdef uint64_t word
        cdef uint32_t length
        cdef const char* memory
        with nogil:
            word = entry_lock(entry)
        try:
            if entry_type(word) != ZSWAP:
                raise KeyError(f"owner {owner} has no object")
            memory = zswap_memory(self.z, entry_payload(word), &length)
            return memory[:length]
        finally:
            us_word_release(entry, word, ENTRY_WAITERS)

    def discard(self, uint64_t owner):
        """Free the owner's object."""
        cdef uint64_t* entry = self.entry(owner)
        cdef uint64_t word
        with nogil:
            word = entry_lock(entry)
            if entry_type(word) == ZSWAP:
                zswap_free(self.z, entry_payload(word))
            us_word_release(entry, 0, ENTRY_WAITERS)

    def handle(self, uint64_t owner):
        """The handle of the owner's object now, or 0."""
        return entry_payload(us_load(self.entry(owner)))

    def hold(self, uint64_t owner):
        """Lock the owner, so that its object stays where it is."""
        cdef uint64_t* entry = self.entry(owner)
        with nogil:
            entry_lock(entry)

    def release(self, uint64_t owner):
        """Unlock an owner that `hold` or `coldest` locked."""
        cdef uint64_t* entry = self.entry(owner)
        cdef uint64_t word = us_load(entry)
        if not word & ENTRY_LOCKED:
            raise ValueError(f"owner {owner} is not locked")
        us_word_release(entry, entry_seen(word), ENTRY_WAITERS)

    def set_owner(self, uint64_t handle, uint64_t owner):
        """Say whose an object is; 0 takes it out of what compaction and the clock look at."""
        zswap_set_owner(self.z, handle, owner)

    def stay(self, uint64_t owner):
        """Say that the owner's object is never written back."""
        cdef uint64_t handle = entry_payload(us_load(self.entry(owner)))
        if not handle:
            raise KeyError(f"owner {owner} has no object")
        zswap_set_owner(self.z, handle, owner | ZSWAP_STAYS)

    def cool(self, uint64_t owner):
        """Say that the owner's object is cold."""
        cdef uint64_t handle = entry_payload(us_load(self.entry(owner)))
        if not handle:
            raise KeyError(f"owner {owner} has no object")
        zswap_set_owner_cold(self.z, handle, owner)

    @property
    def cold(self):
        """How many objects the pool remembers as cold, some of which may be gone or asked for since."""
        return zswap_cold(self.z)

    @property
    def bytes(self):
        """Bytes of RAM in the pool's segments."""
        return zswap_bytes(self.z)

    @property
    def stored(self):
        """Bytes that live objects asked for."""
        return zswap_stored(self.z)

    @property
    def objects(self):
        """Live objects."""
        return zswap_objects(self.z)

    @property
    def metadata(self):
        """Bytes of RAM outside the segments."""
        return zswap_metadata(self.z)

    @property
    def mapping(self):
        """Address and length of the mapping, as far as it was ever used."""
        cdef uint64_t length = 0
        cdef char* start = zswap_mapping(self.z, &length)
        return <size_t>start, length

    def compact(self, int percent, int64_t effort=1 << 62):
        """Give memory back until waste is below `percent` of what is stored. Returns the bytes given back."""
        cdef int64_t given
        with nogil:
            given = zswap_compact(self.z, percent, effort, owner_locked, owner_moved, &self.table)
        return given

    def coldest(self, int n, int64_t bytes=1 << 62):
        """Up to `n` of the coldest objects as (handle, owner); their owners are locked, see `release`."""
        cdef uint64_t handles[256]
        cdef uint64_t owners[256]
        cdef int taken
        if not 0 <= n <= 256:
            raise ValueError("ask for 0 to 256 objects")
        with nogil:
            taken = zswap_coldest(self.z, n, bytes, handles, owners, owner_locked, &self.table)
        return [(handles[i], owners[i]) for i in range(taken)]

    def stress(self, uint64_t seed, int64_t turns, uint32_t low, uint32_t high, int64_t live=0):
        """Do a thread's share of random work: store, check, free, write back, compact. Returns errors found.

        Objects have `low` (at least 16) to `high` bytes; about `live` of the owners have one, half of them by default.
        """
        cdef int64_t errors = 0
        cdef int64_t turn
        cdef uint64_t owner, word, handle, random = seed
        cdef uint64_t share
        cdef uint32_t length
        cdef int i, n
        cdef uint64_t handles[16]
        cdef uint64_t owners[16]
        cdef char* memory
        cdef uint64_t* entry
        if not 16 <= low <= high <= OBJECT_MAX:
            raise ValueError(f"sizes must be 16 to {OBJECT_MAX} bytes")
        share = <uint64_t>((live if live else <int64_t>self.table.n // 2) * 1024) // self.table.n
        with nogil:
            for turn in range(turns):
                random = mix(random + 0x9E3779B97F4A7C15u)
                owner = 1 + (random >> 20) % self.table.n
                entry = &self.table.entries[owner]
                word = entry_lock(entry)
                if entry_type(word) == ZSWAP:
                    memory = zswap_memory(self.z, entry_payload(word), &length)
                    errors += not stamped(memory, length, owner)
                if (random & 1023) < share:
                    if entry_type(word) != ZSWAP:
                        length = low + <uint32_t>((random >> 40) % (high - low + 1))
                        handle = zswap_alloc(self.z, length, 0)
                        word = 0
                        if handle:
                            stamp(zswap_memory(self.z, handle, &length), length, owner, (seed << 40) + turn)
                            if turn & 7:
                                zswap_set_owner(self.z, handle, owner)
                            else:
                                zswap_set_owner_cold(self.z, handle, owner)
                            word = entry_make(ZSWAP, handle)
                elif entry_type(word) == ZSWAP:
                    zswap_free(self.z, entry_payload(word))
                    word = 0
                us_word_release(entry, word, ENTRY_WAITERS)
                if turn % 64 == 0:
                    n = zswap_coldest(self.z, 16, 1 << 18, handles, owners, owner_locked, &self.table)
                    for i in range(n):
                        memory = zswap_memory(self.z, handles[i], &length)
                        errors += not stamped(memory, length, owners[i])
                        if i % 2:
                            zswap_free(self.z, handles[i])
                        us_word_release(&self.table.entries[owners[i]],
                                        0 if i % 2 else entry_make(ZSWAP, handles[i]), ENTRY_WAITERS)
                if turn % 128 == 1:
                    zswap_compact(self.z, 2, 1 << 20, owner_locked, owner_moved, &self.table)
        return errors

    def fill(self, uint64_t owner, uint32_t length, uint64_t turn=0):
        """Like `store`, with content that `intact` can check."""
        cdef uint64_t* entry = self.entry(owner)
        cdef uint64_t word, handle
        if not 16 <= length <= OBJECT_MAX:
            raise ValueError(f"such an object has 16 to {OBJECT_MAX} bytes")
        with nogil:
            word = entry_lock(entry)
            if entry_type(word) == ZSWAP:
                zswap_free(self.z, entry_payload(word))
            handle = zswap_alloc(self.z, length, 0)
            if handle:
                stamp(zswap_memory(self.z, handle, &length), length, owner, turn)
                zswap_set_owner(self.z, handle, owner)
            us_word_release(entry, entry_make(ZSWAP, handle) if handle else 0, ENTRY_WAITERS)
        if not handle:
            raise MemoryError("the pool has no address space left")

    def intact(self):
        """How many owners have an object, with the content that `fill` or `stress` gave it; -1: one has not."""
        cdef int64_t n = 0
        cdef uint64_t owner, word
        cdef uint32_t length
        cdef char* memory
        with nogil:
            for owner in range(1, self.table.n + 1):
                word = entry_lock(&self.table.entries[owner])
                if entry_type(word) == ZSWAP and n >= 0:
                    memory = zswap_memory(self.z, entry_payload(word), &length)
                    n = n + 1 if stamped(memory, length, owner) else -1
                us_word_release(&self.table.entries[owner], word, ENTRY_WAITERS)
        return n

    def time_alloc_free(self, uint32_t length, int live, int64_t turns):
        """Nanoseconds for one alloc and one free, with `live` other objects of the length around."""
        cdef int64_t _turn, start, spent
        cdef uint64_t random = 1
        cdef int i
        cdef uint64_t* handles = <uint64_t*>calloc(live, 8)
        if handles == NULL:
            raise MemoryError()
        with nogil:
            for i in range(live):
                handles[i] = zswap_alloc(self.z, length, 0)
            start = us_now()
            for _turn in range(turns):
                random = mix(random + 0x9E3779B97F4A7C15u)
                i = <int>(random % <uint64_t>live)
                zswap_free(self.z, handles[i])
                handles[i] = zswap_alloc(self.z, length, 0)
            spent = us_now() - start
            for i in range(live):
                zswap_free(self.z, handles[i])
        free(handles)
        return spent / turns

    def check(self):
        """Walk everything and raise AssertionError where the books are wrong.

        Nobody may use the pool meanwhile.
        """
        cdef Zswap* z = self.z
        cdef Segment* seg
        cdef SizeClass* k
        cdef uint64_t* bits
        cdef uint32_t s, i, page, used, loose, populated, staying, first, last, length, visited = 0
        cdef int64_t pages = 0, stored = 0, objects = 0
        cdef bint want
        assert not us_read(&self.table.nobodys), "an object without an owner was asked for"
        segments = {}
        per_class = {}
        s = z.hand
        while z.hand and visited < z.in_use:
            seg = &z.segments[s]
            k = &z.classes[seg.size_class]
            bits = <uint64_t*>base_of(z, s)
            used = loose = populated = staying = 0
            assert s not in segments and not seg.aside, f"segment {s}: twice in the ring, or set aside"
            for i in range(k.capacity):
                if not (bits[i >> 6] >> (i & 63)) & 1:
                    assert i >= seg.hint, f"segment {s}: object {i} is free, below the hint {seg.hint}"
                    continue
                used += 1
                length = record_of(k, bits, i).length
                staying += stays(record_of(k, bits, i).owner)
                stored += length
                assert class_of(length) == seg.size_class and length <= k.size, f"{length} bytes in class {k.size}"
                for page in range((k.objects + i * k.size) >> 12, ((k.objects + i * k.size + length - 1) >> 12) + 1):
                    assert (seg.populated[page >> 6] >> (page & 63)) & 1, f"page {page} of {s} is used, not counted"
            for page in range(PAGES):
                populated += (seg.populated[page >> 6] >> (page & 63)) & 1
                loose += (seg.loose[page >> 6] >> (page & 63)) & 1
                want = page >= k.loose_from and (seg.populated[page >> 6] >> (page & 63)) & 1
                if want:
                    first = ((page << 12) - k.objects) // k.size
                    last = min(((page << 12) + 4095 - k.objects) // k.size, k.capacity - 1)
                    want = first >= k.capacity or not any_used(bits, first, last)
                assert want == (seg.loose[page >> 6] >> (page & 63)) & 1, f"page {page} of {s}: loose should be {want}"
            assert (used, populated, loose) == (seg.used, seg.populated_count, seg.loose_count), f"counts of {s}"
            assert staying == seg.staying, f"segment {s}: {staying} objects stay, not {seg.staying}"
            assert 0 < used <= k.capacity, f"segment {s} has {used} objects"
            assert seg.queued == (loose > 0), f"segment {s}: {loose} loose pages, queued {seg.queued}"
            assert seg.group == used * GROUPS // k.capacity, f"segment {s}: group {seg.group} with {used} objects"
            segments[s] = seg.size_class
            row = per_class.setdefault(seg.size_class, [0, 0, 0])
            row[0] += 1
            row[1] += used
            row[2] += populated
            pages += populated
            objects += used
            visited += 1
            s = seg.newer
        assert s == z.hand and visited == z.in_use, "the ring is not whole"
        queued = set()
        s = z.loose_head
        while s:
            queued.add(s)
            assert z.segments[s].loose_next or s == z.loose_tail, "the queue's tail"
            s = z.segments[s].loose_next
        assert queued == {s for s in segments if z.segments[s].loose_count}, "the queue of loose pages is not whole"
        for i in range(CLASSES):
            k = &z.classes[i]
            assert [k.segments, k.used, k.pages] == per_class.get(i, [0, 0, 0]), f"counts of class {k.size}"
            listed = set()
            for group in range(GROUPS):
                assert (k.partial >> group) & 1 == (k.heads[group] != 0), f"partial of class {k.size}"
                s = k.heads[group]
                while s:
                    listed.add(s)
                    assert z.segments[s].group == group, f"segment {s} is in a wrong list"
                    s = z.segments[s].next
            assert listed == {s for s in segments if segments[s] == i and z.segments[s].used < k.capacity}, "lists"
        free_ones = 0
        s = z.free
        while s:
            assert s not in segments and not z.segments[s].populated_count, f"free segment {s} is in use"
            free_ones += 1
            s = z.segments[s].next
        if z.spare:
            pages += z.segments[z.spare].populated_count
        assert free_ones + len(segments) + (z.spare != 0) == z.fresh, "a segment is lost"
        assert (pages, stored, objects) == (z.pages, z.stored, z.objects), "counts of the pool"


def size_classes():
    """The sizes of objects there are, smallest first."""
    return [class_size(i) for i in range(CLASSES)]


def class_for(uint32_t length):
    """The size of object that `length` bytes get."""
    if not 1 <= length <= OBJECT_MAX:
        raise ValueError(f"an object has 1 to {OBJECT_MAX} bytes, not {length}")
    return class_size(class_of(length))
