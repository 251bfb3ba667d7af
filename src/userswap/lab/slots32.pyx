"""A swap_map of bytes: see slots32.pxd for the interface and the rules.

Models what swap/designs/slot.pyx does, whose head says from what. Not modelled here, as in none of the designs of
32 bits: what each CPU has for itself (caches of slots, clusters of its own). A cluster's struct has 8 bytes, as the
kernel's had there; heads of continuation, which are in struct page there, 16 bytes for 4096 slots.
"""
from libc.limits cimport INT_MAX
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memchr

from userswap.lab.nodes32 cimport Pool, page_words, pool_room, pool_take
from userswap.native.mman cimport munmap
from userswap.native.us cimport (
    us_assert, us_chaos, us_futex_wait, us_futex_wake, us_load32, us_load_byte, us_lock, us_mutex, us_pause, us_read,
    us_store32, us_store_byte, us_unlock, us_write,
)
from userswap.swap.pages cimport page_round, pages_populate


cdef enum:
    COUNT_BASE = 0x3f           # of the low digit
    COUNT_DIGIT = 0x3f          # its bits
    HAS_CACHE = 0x40
    CONTINUED = 0x80
    DIGIT_BASE = 128            # of the others, in continuation pages
    DIGITS = 4                  # of the others: 63 * 128**4 references are more than 2**32
    MAP_SHIFT = 12              # slots of a page of swap_map
    CLUSTER_SHIFT = 8
    CLUSTER_SLOTS = 256
    CGROUP = 1                  # whom swap is charged to
    SPINS = 64


# Cuts the next piece out of the static mapping; with no base, only adds up.
cdef inline uint64_t cut(uint64_t base, uint64_t* length, uint64_t size) noexcept nogil:
    cdef uint64_t at = base + length[0]
    length[0] += page_round(size)
    return at


cdef uint64_t lay_out(Slots* s, uint64_t base) noexcept nogil:
    cdef uint64_t length = 0
    s.swap_map = <uint8_t*>cut(base, &length, s.slots)
    s.cgroups = <uint16_t*>cut(base, &length, s.slots * 2)
    s.zeros = <uint32_t*>cut(base, &length, (s.slots + 31) // 32 * 4)
    s.cluster = <Cluster*>cut(base, &length, s.clusters * sizeof(Cluster))
    s.digits = <uint32_t*>cut(base, &length, ((s.slots >> MAP_SHIFT) + 1) * DIGITS * 4)
    return length


cdef bint slots_init(Slots* s, Pool* pool, uint64_t slots) noexcept nogil:
    cdef void* memory
    cdef uint32_t i
    s.pool = pool
    s.slots = slots
    s.clusters = (slots + CLUSTER_SLOTS - 1) >> CLUSTER_SHIFT
    s.static_bytes = lay_out(s, 0)
    memory = pages_populate(s.static_bytes)
    s.swap_map = NULL
    if memory == NULL:
        return False
    lay_out(s, <uint64_t>memory)
    for i in range(<uint32_t>s.clusters):
        unused_add(s, i)
    return True


cdef void slots_end(Slots* s) noexcept nogil:
    if s.swap_map != NULL:
        munmap(s.swap_map, s.static_bytes)


# ---- free slots ----

cdef void unused_add(Slots* s, uint32_t number) noexcept nogil:
    s.cluster[number].next = 0
    if s.last:
        s.cluster[s.last - 1].next = number + 1
    else:
        s.first = number + 1
    s.last = number + 1


cdef inline uint32_t room_of(Slots* s, uint32_t number) noexcept nogil:
    cdef uint64_t left = s.slots - (<uint64_t>number << CLUSTER_SHIFT)
    return <uint32_t>left if left < CLUSTER_SLOTS else CLUSTER_SLOTS


# An unused cluster becomes the current one; False: none is.
cdef bint cluster_begin(Slots* s) noexcept nogil:
    if s.current and s.cluster[s.current - 1].count == 0:
        unused_add(s, s.current - 1)
    s.current = s.first
    s.position = 0
    if s.first == 0:
        return False
    s.first = s.cluster[s.current - 1].next
    if s.first == 0:
        s.last = 0
    return True


cdef int64_t slot_take(Slots* s) noexcept nogil:
    cdef uint64_t at = s.slots
    cdef uint8_t* found
    while at == s.slots:
        if s.current == 0 or s.position == room_of(s, s.current - 1):
            if not cluster_begin(s):
                break
        at = (<uint64_t>(s.current - 1) << CLUSTER_SHIFT) + s.position
        s.position += 1
        if s.swap_map[at]:
            at = s.slots
    if at == s.slots:
        # No cluster is unused: what is free is found by looking, from where the last look ended.
        if us_read(&s.taken) == <int64_t>s.slots:
            return -1
        found = <uint8_t*>memchr(s.swap_map + s.scan, 0, s.slots - s.scan)
        if found == NULL:
            found = <uint8_t*>memchr(s.swap_map, 0, s.scan)
        us_assert(found != NULL, "a slot is free if not all are taken")
        at = <uint64_t>(found - s.swap_map)
        s.scan = at + 1 if at + 1 < s.slots else 0
    us_chaos()
    us_store_byte(&s.swap_map[at], HAS_CACHE)
    s.cluster[at >> CLUSTER_SHIFT].count += 1
    s.cgroups[at] = CGROUP
    us_write(&s.taken, s.taken + 1)
    return <int64_t>at


cdef void slot_begin(Slots* s, uint32_t at) noexcept nogil:
    us_assert(s.swap_map[at] == HAS_CACHE, "nobody has a slot that is given")
    us_store_byte(&s.swap_map[at], 1)


cdef void slot_give(Slots* s, uint32_t at) noexcept nogil:
    cdef uint32_t number = at >> CLUSTER_SHIFT
    us_assert(s.swap_map[at] == HAS_CACHE, "a slot that is given back has no count")
    s.cgroups[at] = 0
    slot_zero_set(s, at, False)
    us_chaos()
    us_store_byte(&s.swap_map[at], 0)
    s.cluster[number].count -= 1
    if s.cluster[number].count == 0 and s.current != number + 1:
        unused_add(s, number)
    us_write(&s.taken, s.taken - 1)


# ---- HAS_CACHE ----

cdef inline Bucket* bucket_of(Slots* s, uint32_t at) noexcept nogil:
    return &s.buckets[(at * <uint32_t>0x9E3779B1) >> 28]


cdef void slot_claim(Slots* s, us_mutex* mutex, uint32_t at) noexcept nogil:
    cdef Bucket* bucket = bucket_of(s, at)
    cdef uint32_t turn
    cdef int spins = 0
    while spins < SPINS and us_load_byte(&s.swap_map[at]) & HAS_CACHE:
        spins += 1
        us_pause()
    us_lock(mutex)
    while s.swap_map[at] & HAS_CACHE:
        # Who clears it comes after us, and sees that we wait.
        bucket.waiters += 1
        turn = us_load32(&bucket.turn)
        us_unlock(mutex)
        us_chaos()
        us_futex_wait(&bucket.turn, turn)
        us_lock(mutex)
        bucket.waiters -= 1
    us_assert(s.swap_map[at] != 0, "lock: the id is free")


cdef bint slot_locked(Slots* s, uint32_t at) noexcept nogil:
    return s.swap_map[at] & HAS_CACHE != 0


cdef void slot_hold(Slots* s, uint32_t at) noexcept nogil:
    us_assert(s.swap_map[at] & HAS_CACHE == 0, "one at a time has a slot")
    us_store_byte(&s.swap_map[at], s.swap_map[at] | HAS_CACHE)


cdef void slot_release(Slots* s, us_mutex* mutex, uint32_t at) noexcept nogil:
    cdef Bucket* bucket = bucket_of(s, at)
    cdef bint wake = bucket.waiters != 0
    us_assert(s.swap_map[at] & HAS_CACHE != 0, "unlock: not locked")
    us_assert(s.swap_map[at] != HAS_CACHE, "unlock: the id has no count")
    us_store_byte(&s.swap_map[at], s.swap_map[at] & ~<uint8_t>HAS_CACHE)
    if wake:
        us_store32(&bucket.turn, bucket.turn + 1)
    us_unlock(mutex)
    us_chaos()
    if wake:
        us_futex_wake(&bucket.turn, INT_MAX)


# ---- the count ----

cdef inline uint8_t* digit_at(Slots* s, uint32_t at, int digit) noexcept nogil:
    cdef uint32_t page = s.digits[(at >> MAP_SHIFT) * DIGITS + <uint32_t>digit]
    us_assert(page != 0, "a digit has its page")
    return <uint8_t*>page_words(s.pool, page) + (at & ((1 << MAP_SHIFT) - 1))


cdef int64_t slot_count(Slots* s, uint32_t at) noexcept nogil:
    cdef uint8_t digit = s.swap_map[at]
    cdef int64_t count = digit & COUNT_DIGIT
    cdef int64_t worth = COUNT_BASE
    cdef int i = 0
    while digit & CONTINUED:
        digit = digit_at(s, at, i)[0]
        count += worth * (digit & (DIGIT_BASE - 1))
        worth *= DIGIT_BASE
        i += 1
    return count


cdef bint slot_count_set(Slots* s, uint32_t at, int64_t count) noexcept nogil:
    cdef uint32_t* pages = &s.digits[(at >> MAP_SHIFT) * DIGITS]
    cdef int64_t rest = count // COUNT_BASE
    cdef uint8_t low = <uint8_t>(count % COUNT_BASE)
    cdef int i = 0
    # Pages first, which are kept until the end, as there.
    while rest:
        if pages[i] == 0:
            if not pool_room(s.pool, 1, False):
                return False
            pages[i] = pool_take(s.pool)
        rest //= DIGIT_BASE
        i += 1
    rest = count // COUNT_BASE
    i = 0
    if rest:
        low |= CONTINUED
    while rest:
        digit_at(s, at, i)[0] = <uint8_t>((rest % DIGIT_BASE) | (CONTINUED if rest >= DIGIT_BASE else 0))
        rest //= DIGIT_BASE
        i += 1
    us_store_byte(&s.swap_map[at], low | (s.swap_map[at] & HAS_CACHE))
    return True


# ---- pages of zeros ----

cdef bint slot_zero(Slots* s, uint32_t at) noexcept nogil:
    return s.zeros[at >> 5] >> (at & 31) & 1


cdef void slot_zero_set(Slots* s, uint32_t at, bint zero) noexcept nogil:
    if zero:
        s.zeros[at >> 5] |= <uint32_t>1 << (at & 31)
    else:
        s.zeros[at >> 5] &= ~(<uint32_t>1 << (at & 31))
