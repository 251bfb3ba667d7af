"""The designs of the swap map on a machine whose words have 32 bits, and their window: ``Map32``.

The message of March 2023 says that two radix trees "also solve the 32-bit systems problem". Here is what that is: an
entry, its lock, its count and what else a design has to say of an id share 4 bytes, and the payload is what is left.
An entry that does not fit is refused, and so is part of the answer; `limits` computes all of it from the layouts below.
An instrument for the lab and its tests: userswap itself never uses it. Touches nothing but its own memory.

A word:  | payload | count | CACHED | SHARED | type (3) | WAITERS | LOCKED |, each design with the parts that it needs:

  on_demand    An id that one holder has is its entry, 27 bits of payload in the page-table word (DIRECT, type (2),
               BUSY and WAITERS are the rest). A shared one is a number; its word has no bit to spare if it shall hold
               the same 27, so that count and folio are looked up in side trees each time.
  sparse       SHARED: the count is in a side tree. CACHED: the folio is in another.
  two_trees    The count is always in the second tree: no bit for it. CACHED as before.
  single_tree  2011's word has entry and count: each bit of count halves the swap file. Two are given, counts above 3
               go to a side tree. Its leaf with a page instead of an entry has no room for a count at all; here the
               folio goes to the side instead, which is the same memory.
  descriptor   A tree word is a pointer to a struct of four words: entry, folio, count, and the id for the way back.
  slot         No word: slots32.pxd has its byte, that counts to 62 and has continuation pages above. Zswap's tree: a
               handle or a value that repeats, 31 bits, and a bit to tell which. The swap cache's: 31 bits of frame
               number, DIRTY. Static: 25 bits for each slot (byte, cgroup, zero bit), whatever the words have.
  swap_table   An id is a slot, and so needs no payload for it: the word has the folio (23 bits of frame number, 32 GiB)
               and the count, in the 4 bits that are left over. A zswap handle is a whole word in zswap's tree; the
               only value that repeats is 0. Static: the cgroup's 2 bytes for each slot (the count is in the word, as
               from 7.1 on, so there is no swap_map; the type says what the zero bit would).
  vswap        Descriptors of four words in clusters: backing, folio, count, cgroup (2 bytes) and flags (2); 256 in a
               page. A reverse map, a word for each slot in use, and two bits for each slot, static. Swapoff walks it.
               A slot that somebody else still has in it is OFF_MAP in the flags, and found through the ids.
  redirect     The word is single_tree's: handle, value or frame number in 24 bits, CACHED, a count to 3. A slot is in
               the redirect, which has 4 bytes as with words of 64 bits and needs none of the word: so swap files end
               where ids do, but the optional array is as large as the table. The folio of an id that has storage, too,
               is in an array of folios, a count above 3 in one of counts.

A pointer is a page number, and a folio a frame number.

Locks. `mutex` (a leaf) protects the shape of all trees, ids, side words, SHARED, CACHED and every count. LOCKED
protects type and payload, may be held for long, and no dup and no put that leaves a count waits for it: so a word of a
live id changes by CAS only, and each side keeps the other's bits. BUSY of the holder protects a direct id.

Order. A side word is stored before the word says that it is there, and cleared after the word has stopped saying so,
under one hold of the mutex. redirect's word becomes CACHE, still LOCKED, under the hold in which its folio moves. Who
sees in a word that its reference is the only one is right without the mutex: only a holder of a reference can dup.
Everything else is looked at under the mutex.

unlock can't fail, so the handles of slot and swap_table and vswap's reverse map have address space pledged from the
start, and redirect's redirects and folios from when there is a leaf of ids. The last put locks the word; until free it
is the caller's alone. In slot all of this is under the mutex but LOCKED, which is HAS_CACHE.
"""
cimport cython
from libc.errno cimport ENOMEM, EOVERFLOW
from libc.limits cimport INT_MAX
from libc.stdint cimport int64_t, uint32_t, uint64_t

from userswap.lab.nodes32 cimport (
    PAGE_SHIFT, PAGE_WORDS, PAGES_MOST, IdTree, Pool, Tree, ids_bytes, ids_end, ids_give, ids_init,
    ids_leaf_after, ids_take, ids_word, page_words, pool_bytes, pool_end, pool_init, pool_room, side_clear, side_get,
    side_set, struct_give, struct_take, tree_find, tree_leaf,
)
from userswap.lab.slots32 cimport (
    SLOT_COUNT_MOST, Slots, slot_begin, slot_claim, slot_count, slot_count_set, slot_give, slot_hold, slot_locked,
    slot_release, slot_take, slot_zero, slot_zero_set, slots_end, slots_init,
)
from userswap.native.mman cimport munmap
from userswap.native.us cimport (
    us_add, us_assert, us_cas32, us_chaos, us_futex_wake, us_load32, us_lock, us_mutex, us_now, us_pause, us_read,
    us_store32, us_unlock, us_word32_release, us_word32_wait, us_write,
)
from userswap.swap cimport entry as e
from userswap.swap.pages cimport page_round, pages_populate, pages_reserve


cdef enum:
    LOCKED = 1                  # of a word; of a holder, whose id is the rest: BUSY
    WAITERS = 2
    TYPE_SHIFT = 2
    FLAGS_SHIFT = 5             # the design's own bits begin here
    WORD_BITS = 32
    WORD_ID = 2                 # shift of a holder
    ID_BITS = 30
    DIRECT_BITS = 27            # a direct id: DIRECT, type (2), payload
    DIRECT = 1 << 29
    STRIPES = 16                # counters of direct ids, a cache line each
    SPINS = 64
    OFF_MAP = 1                 # vswap's flags: the reverse map has another id for the slot
    DIRTY = 1                   # slot's folios: nothing else has the bytes
    OBJECT_BITS = 31            # slot: a handle or a value in a word of zswap's

cdef int64_t COUNT_MAX = 0xFFFFFFFF
cdef int64_t PATIENCE = 60 * <int64_t>1000000000     # ns that a thread of run() waits for the others

cdef enum:                      # what a design has
    HAS_DIRECT = 1              # ids that are entries
    HAS_SHARED = 2              # the bit
    HAS_CACHED = 4              # the bit
    HAS_COUNTS = 8              # a count in the second tree for each id
    HAS_STRUCT = 16             # folio and count in the words after the entry's
    HAS_POINTER = 32            # and a tree word that leads to them
    HAS_REVERSE = 64            # slot -> id
    BOUND_TO_SLOTS = 128        # ids are slots; handle beside the word, folio in it
    HAS_BYTES = 256             # and there are no words: see slots32.pxd
    HAS_REDIRECT = 512          # slot beside the word

cdef struct Layout:
    const char* name
    int has
    int count_bits
    int static_bits             # for each slot, of what is not in `Slots`
    # computed:
    uint32_t shared
    uint32_t cached
    int count_shift
    uint32_t many               # the count's field: in the side tree
    int payload_shift
    int payload_bits
    uint32_t keep               # what unlock leaves alone

cdef enum:
    DESIGNS = 9

cdef Layout[DESIGNS] layouts
layouts[0] = Layout(b"on_demand", HAS_DIRECT, 0, 0, 0, 0, 0, 0, 0, 0, 0)
layouts[1] = Layout(b"sparse", HAS_SHARED | HAS_CACHED, 0, 0, 0, 0, 0, 0, 0, 0, 0)
layouts[2] = Layout(b"two_trees", HAS_CACHED | HAS_COUNTS, 0, 0, 0, 0, 0, 0, 0, 0, 0)
layouts[3] = Layout(b"single_tree", HAS_CACHED, 2, 0, 0, 0, 0, 0, 0, 0, 0)
layouts[4] = Layout(b"descriptor", HAS_STRUCT | HAS_POINTER, 0, 0, 0, 0, 0, 0, 0, 0, 0)
layouts[5] = Layout(b"slot", BOUND_TO_SLOTS | HAS_BYTES, 0, 0, 0, 0, 0, 0, 0, 0, 0)
layouts[6] = Layout(b"swap_table", BOUND_TO_SLOTS, 4, 16, 0, 0, 0, 0, 0, 0, 0)
layouts[7] = Layout(b"vswap", HAS_STRUCT | HAS_REVERSE, 0, 2, 0, 0, 0, 0, 0, 0, 0)
layouts[8] = Layout(b"redirect", HAS_CACHED | HAS_REDIRECT, 2, 0, 0, 0, 0, 0, 0, 0, 0)


cdef void lay_out(Layout* lay) noexcept nogil:
    cdef int shift = FLAGS_SHIFT
    if lay.has & HAS_SHARED:
        lay.shared = <uint32_t>1 << shift
        shift += 1
    if lay.has & HAS_CACHED:
        lay.cached = <uint32_t>1 << shift
        shift += 1
    lay.count_shift = shift
    lay.many = (<uint32_t>1 << lay.count_bits) - 1
    shift += lay.count_bits
    lay.payload_shift = shift
    lay.payload_bits = WORD_BITS - shift
    lay.keep = lay.shared | lay.cached | lay.many << lay.count_shift
    if lay.has & BOUND_TO_SLOTS:
        # what the others have as payload is the folio here, which is not the entry's
        lay.keep |= <uint32_t>(~<uint64_t>0 << shift)
    if lay.has & HAS_BYTES:
        lay.payload_bits = OBJECT_BITS


cdef void lay_out_all() noexcept nogil:
    cdef int i
    for i in range(DESIGNS):
        lay_out(&layouts[i])


lay_out_all()
DESIGN_NAMES32 = tuple([layouts[i].name.decode() for i in range(DESIGNS)])


# An entry outside of a word: payload and type, whatever the width of the payload.
cdef inline uint64_t entry32(int type, uint64_t payload) noexcept nogil:
    return payload << 3 | <uint64_t>type

cdef inline int type32(uint64_t entry) noexcept nogil:
    return <int>(entry & 7)

cdef inline int word_type(uint32_t word) noexcept nogil:
    return <int>(word >> TYPE_SHIFT & 7)


# Values that repeat: two bits say how. Low half, high half or both halves the same, with the upper bits (of the high
# half: the lower) zero, or any 16 bits four times, which bytes are. -1: does not fit.
cdef int64_t same32_make(uint64_t value, int bits) noexcept nogil:
    cdef uint64_t low = value & 0xFFFFFFFFu, high = value >> 32
    bits -= 2
    if low == high and low >> bits == 0:
        return <int64_t>low
    if high == 0 and low >> bits == 0:
        return <int64_t>(<uint64_t>1 << bits | low)
    if low == 0 and high & ((<uint64_t>1 << (32 - bits)) - 1) == 0:
        return <int64_t>(<uint64_t>2 << bits | high >> (32 - bits))
    if low == high and low >> 16 == low & 0xFFFF:
        return <int64_t>(<uint64_t>3 << bits | low >> 16)
    return -1


cdef uint64_t same32_value(uint64_t payload, int bits) noexcept nogil:
    cdef uint64_t kind, low
    bits -= 2
    kind = payload >> bits
    low = payload & ((<uint64_t>1 << bits) - 1)
    if kind == 0:
        return low << 32 | low
    if kind == 1:
        return low
    if kind == 2:
        return low << (64 - bits)
    low |= low << 16
    return low << 32 | low


# ---- the map ----

cdef struct Map:
    us_mutex mutex
    const Layout* lay
    uint32_t* table             # the holders
    uint64_t slots
    void* statics
    uint64_t static_bytes
    Pool pool
    IdTree ids
    Tree counts
    Tree folios
    Tree beside                 # swap_table: zswap's handles, and one. slot: see bytes_entry. redirect: slots, and one
    Tree reverse                # vswap: ids by slot
    int64_t off_map             # ids whose slot is another's there
    Slots bytes                 # slot
    uint32_t partial            # pages with room for structs
    int64_t[STRIPES * 8] directs


cdef void map_delete(Map* m) noexcept nogil:
    slots_end(&m.bytes)
    pool_end(&m.pool)
    ids_end(&m.ids)
    if m.statics != NULL:
        munmap(m.statics, m.static_bytes)
    munmap(m, page_round(sizeof(Map)))


cdef Map* map_new(const Layout* lay, uint32_t* table, uint64_t slots, uint32_t pages) noexcept nogil:
    cdef Map* m = <Map*>pages_populate(page_round(sizeof(Map)))
    cdef uint64_t most = <uint64_t>1 << ID_BITS
    if m == NULL:
        return NULL
    m.lay = lay
    m.table = table
    m.slots = slots
    if lay.has & BOUND_TO_SLOTS:
        most = slots + 1
    elif lay.has & HAS_DIRECT:
        most = DIRECT
    m.static_bytes = page_round((slots * <uint64_t>lay.static_bits + 7) // 8)
    if m.static_bytes:
        m.statics = pages_populate(m.static_bytes)
    m.counts.pool = m.folios.pool = m.beside.pool = m.reverse.pool = &m.pool
    if (not pool_init(&m.pool, pages) or not ids_init(&m.ids, &m.pool, words_of(lay), <uint32_t>most)
            or (m.static_bytes and m.statics == NULL)
            or (lay.has & HAS_BYTES and not slots_init(&m.bytes, &m.pool, slots))):
        map_delete(m)
        return NULL
    if lay.has & (BOUND_TO_SLOTS | HAS_REVERSE):
        # A leaf for each 1024 slots, the nodes above them, and one path more than can be needed.
        m.pool.kept = <uint32_t>((slots >> PAGE_SHIFT) + (slots >> (2 * PAGE_SHIFT)) + 10)
    pledge(m)
    return m


# redirect: a page of redirects and one of folios for each leaf of ids, and the nodes above them.
cdef inline void pledge(Map* m) noexcept nogil:
    if m.lay.has & HAS_REDIRECT:
        m.pool.kept = 2 * (m.ids.here + (m.ids.here >> PAGE_SHIFT)) + 12


# Words of an id in a leaf.
cdef inline int words_of(const Layout* lay) noexcept nogil:
    return 4 if lay.has & HAS_STRUCT and not lay.has & HAS_POINTER else 1


cdef int64_t map_metadata(Map* m) noexcept nogil:
    return (<int64_t>page_round(sizeof(Map)) + <int64_t>(m.static_bytes + m.bytes.static_bytes) + pool_bytes(&m.pool)
            + ids_bytes(&m.ids))


cdef int64_t map_ids(Map* m) noexcept nogil:
    cdef int64_t ids = us_read(&m.ids.ids) + us_read(&m.bytes.taken)
    cdef int i
    for i in range(STRIPES):
        ids += us_read(&m.directs[8 * i])
    return ids


# The word of a numbered id, with its struct behind it if the design has one.
cdef inline uint32_t* word_at(Map* m, uint32_t id) noexcept nogil:
    cdef uint32_t* word = ids_word(&m.ids, id)
    if m.lay.has & HAS_POINTER:
        word = m.pool.words + (<uint64_t>(us_load32(word) >> 1) << 2)
    return word


cdef inline bint is_direct(Map* m, uint32_t id) noexcept nogil:
    return m.lay.has & HAS_DIRECT and id & DIRECT


cdef inline uint32_t direct_id(uint64_t entry) noexcept nogil:
    return DIRECT | <uint32_t>type32(entry) << DIRECT_BITS | <uint32_t>(entry >> 3)


cdef inline uint64_t direct_entry(uint32_t id) noexcept nogil:
    return entry32(<int>(id >> DIRECT_BITS & 3), id & ((<uint32_t>1 << DIRECT_BITS) - 1))


cdef inline void direct_more(Map* m, uint32_t id, int n) noexcept nogil:
    us_add(&m.directs[8 * (id >> 6 & (STRIPES - 1))], n)


# The entry of a word whose lock the caller has. The leaf beside it is there while the word has a type that needs it: no
# mutex.
cdef inline uint64_t entry_of(Map* m, uint32_t id, uint32_t word) noexcept nogil:
    cdef int type = word_type(word)
    if type == e.CACHE:
        return entry32(type, 0)
    if type == (e.ZSWAP if m.lay.has & BOUND_TO_SLOTS else e.SLOT) and m.lay.has & (BOUND_TO_SLOTS | HAS_REDIRECT):
        return entry32(type, us_load32(&tree_leaf(&m.beside, id >> PAGE_SHIFT)[id & (PAGE_WORDS - 1)]) - 1)
    if not m.lay.has & BOUND_TO_SLOTS:
        return entry32(type, word >> m.lay.payload_shift)
    return entry32(type, id - 1 if type == e.SLOT else 0)


cdef inline uint32_t word_of(const Layout* lay, uint64_t entry) noexcept nogil:
    cdef uint32_t word = <uint32_t>type32(entry) << TYPE_SHIFT
    if lay.has & BOUND_TO_SLOTS or (lay.has & HAS_REDIRECT and type32(entry) == e.SLOT):
        return word
    return word | <uint32_t>(entry >> 3) << lay.payload_shift


# What an entry has outside of its word: stored and cleared under the mutex. Can't fail: see `kept`.
cdef void store_beside(Map* m, uint32_t id, uint64_t before, uint64_t after) noexcept nogil:
    cdef int type = e.SLOT if m.lay.has & HAS_REDIRECT else e.ZSWAP
    cdef bint done
    if m.lay.has & (BOUND_TO_SLOTS | HAS_REDIRECT):
        if type32(after) == type:
            done = side_set(&m.beside, id, <uint32_t>(after >> 3) + 1, True)
            us_assert(done, "what was pledged is there")
        elif type32(before) == type:
            side_clear(&m.beside, id)
    elif m.lay.has & HAS_REVERSE:
        if type32(before) == e.SLOT:
            slot_leave(m, id, <uint32_t>(before >> 3))
        if type32(after) == e.SLOT:
            slot_enter(m, id, <uint32_t>(after >> 3))


# Storage is freed before its id is, so that the one whose slot it was may still have it in the reverse map.
cdef void slot_enter(Map* m, uint32_t id, uint32_t slot) noexcept nogil:
    cdef uint32_t* flags = &ids_word(&m.ids, id)[3]
    cdef bint done
    if side_get(&m.reverse, slot):
        us_store32(flags, us_load32(flags) | OFF_MAP)
        m.off_map += 1
        return
    done = side_set(&m.reverse, slot, id, True)
    us_assert(done, "what was pledged is there")


cdef void slot_leave(Map* m, uint32_t id, uint32_t slot) noexcept nogil:
    cdef uint32_t* flags = &ids_word(&m.ids, id)[3]
    if us_load32(flags) & OFF_MAP:
        us_store32(flags, us_load32(flags) & ~<uint32_t>OFF_MAP)
        m.off_map -= 1
    else:
        side_clear(&m.reverse, slot)


# redirect: the folio of a word that is locked moves into it, if that becomes CACHE, and out of it if it was. Under the
# mutex, so that who asks for it finds it in one of both.
cdef void folio_move(Map* m, uint32_t id, uint64_t before, uint64_t after) noexcept nogil:
    cdef uint32_t* word = word_at(m, id)
    cdef uint32_t fields = (7 << TYPE_SHIFT) | <uint32_t>(~<uint64_t>0 << m.lay.payload_shift)
    cdef uint32_t seen = us_load32(word)
    cdef bint done
    if not seen & m.lay.cached:
        us_assert(type32(after) != e.CACHE, "an entry CACHE needs a folio")
        return
    if type32(after) == e.CACHE:
        word_change(word, fields, word_of(m.lay, after) | side_get(&m.folios, id) << m.lay.payload_shift)
        us_chaos()
        side_clear(&m.folios, id)
    else:
        done = side_set(&m.folios, id, seen >> m.lay.payload_shift, True)
        us_assert(done, "what was pledged is there")
        us_chaos()
        word_change(word, fields, word_of(m.lay, after))


# ---- slot: everything under the mutex, but that LOCKED is HAS_CACHE ----

# In the order of the kernel's read path.
cdef uint64_t bytes_entry(Map* m, uint32_t id) noexcept nogil:
    cdef uint32_t word
    if slot_zero(&m.bytes, id - 1):
        return entry32(e.SAME, 0)
    word = side_get(&m.beside, id)
    if word:
        return entry32(e.SAME if word & 1 else e.ZSWAP, (word >> 1) - 1)
    if side_get(&m.folios, id) & DIRTY:
        return entry32(e.CACHE, 0)
    return entry32(e.SLOT, id - 1)


cdef void bytes_store(Map* m, uint32_t id, uint64_t entry) noexcept nogil:
    cdef int type = type32(entry)
    cdef bint zero = type == e.SAME and entry >> 3 == 0
    cdef uint32_t folio = side_get(&m.folios, id)
    cdef bint done = True
    us_assert(type != e.FREE, "unlock: an id keeps an entry until it is freed")
    us_assert(type != e.CACHE or folio != 0, "an entry CACHE needs a folio")
    slot_zero_set(&m.bytes, id - 1, zero)
    if type == e.ZSWAP or (type == e.SAME and not zero):
        done = side_set(&m.beside, id, <uint32_t>((entry >> 3) + 1) << 1 | <uint32_t>(type == e.SAME), True)
    else:
        side_clear(&m.beside, id)
    if folio:
        done = side_set(&m.folios, id, folio | DIRTY if type == e.CACHE else folio & ~<uint32_t>DIRTY, True) and done
    us_assert(done, "what was pledged is there")


# Under the mutex. 0: no slot, or no memory for what its trees are pledged.
cdef uint32_t bytes_alloc(Map* m, uint64_t entry) noexcept nogil:
    cdef int64_t at = slot_take(&m.bytes) if pool_room(&m.pool, 1, False) else -1
    if at < 0:
        return 0
    bytes_store(m, <uint32_t>at + 1, entry)
    us_chaos()
    slot_begin(&m.bytes, <uint32_t>at)
    return <uint32_t>at + 1


cdef void bytes_free(Map* m, uint32_t id) noexcept nogil:
    us_lock(&m.mutex)
    us_assert(slot_locked(&m.bytes, id - 1), "free: locked by the last put")
    us_assert(slot_count(&m.bytes, id - 1) == 0, "free: the id has a count")
    side_clear(&m.beside, id)
    side_clear(&m.folios, id)
    us_chaos()
    slot_give(&m.bytes, id - 1)
    us_unlock(&m.mutex)


cdef uint64_t bytes_lock(Map* m, uint32_t id) noexcept nogil:
    cdef uint64_t entry
    slot_claim(&m.bytes, &m.mutex, id - 1)
    slot_hold(&m.bytes, id - 1)
    entry = bytes_entry(m, id)
    us_unlock(&m.mutex)
    us_chaos()
    return entry


cdef void bytes_unlock(Map* m, uint32_t id, uint64_t entry) noexcept nogil:
    us_lock(&m.mutex)
    us_assert(slot_locked(&m.bytes, id - 1), "unlock: not locked")
    bytes_store(m, id, entry)
    us_chaos()
    slot_release(&m.bytes, &m.mutex, id - 1)


cdef bint bytes_try(Map* m, uint32_t id, uint64_t entry) noexcept nogil:
    cdef bint done
    us_lock(&m.mutex)
    done = not slot_locked(&m.bytes, id - 1) and bytes_entry(m, id) == entry
    if done:
        slot_hold(&m.bytes, id - 1)
    us_unlock(&m.mutex)
    us_chaos()
    return done


cdef int bytes_dup(Map* m, uint32_t id, int64_t n) noexcept nogil:
    cdef int64_t count
    cdef int result = 0
    us_lock(&m.mutex)
    count = slot_count(&m.bytes, id - 1)
    us_assert(count != 0, "dup: the id has no count")
    if n > COUNT_MAX - count:
        result = -EOVERFLOW
    elif not slot_count_set(&m.bytes, id - 1, count + n):
        result = -ENOMEM
    us_unlock(&m.mutex)
    return result


cdef int64_t bytes_put(Map* m, uint32_t id, int64_t n, uint64_t* entry) noexcept nogil:
    cdef int64_t left
    cdef bint done
    us_lock(&m.mutex)
    left = slot_count(&m.bytes, id - 1) - n
    us_assert(left >= 0, "put: no more references than there are")
    if left == 0:
        us_unlock(&m.mutex)
        us_chaos()
        # Ours are all there are, so nobody can dup, and it stays so.
        slot_claim(&m.bytes, &m.mutex, id - 1)
        slot_hold(&m.bytes, id - 1)
        entry[0] = bytes_entry(m, id)
    else:
        entry[0] = 0
    done = slot_count_set(&m.bytes, id - 1, left)
    us_assert(done, "fewer references need no memory")
    us_unlock(&m.mutex)
    return left


cdef int bytes_cache(Map* m, uint32_t id, uint32_t folio) noexcept nogil:
    cdef int result = 0
    if folio >> OBJECT_BITS:
        return -EOVERFLOW
    us_lock(&m.mutex)
    us_assert(slot_locked(&m.bytes, id - 1), "cache: under the entry's lock")
    if folio == 0:
        side_clear(&m.folios, id)
    elif not side_set(&m.folios, id, folio << 1 | (side_get(&m.folios, id) & DIRTY), False):
        result = -ENOMEM
    us_unlock(&m.mutex)
    return result


# ---- ids and entries ----

# 0: no memory, or no slot.
cdef uint32_t map_alloc(Map* m, uint64_t entry) noexcept nogil:
    cdef uint32_t id
    if m.lay.has & HAS_DIRECT:
        id = direct_id(entry)
        direct_more(m, id, 1)
        return id
    us_lock(&m.mutex)
    id = alloc_locked(m, entry)
    us_unlock(&m.mutex)
    return id


cdef uint32_t alloc_locked(Map* m, uint64_t entry) noexcept nogil:
    cdef uint32_t id, reference
    cdef uint32_t* word
    if m.lay.has & HAS_BYTES:
        return bytes_alloc(m, entry)
    id = ids_take(&m.ids)
    if id == 0:
        return 0
    pledge(m)
    word = ids_word(&m.ids, id)
    if m.lay.has & HAS_POINTER:
        reference = struct_take(&m.pool, &m.partial)
        if reference == 0:
            ids_give(&m.ids, id)
            return 0
        us_store32(word, reference << 1 | 1)
        word = word_at(m, id)
        us_store32(&word[3], id)
    if m.lay.has & HAS_STRUCT:
        us_store32(&word[1], 0)
        us_store32(&word[2], 1)
    if m.lay.has & HAS_REVERSE:
        us_store32(&word[3], 0)
    if m.lay.has & HAS_COUNTS and not side_set(&m.counts, id, 1, False):
        ids_give(&m.ids, id)
        return 0
    store_beside(m, id, 0, entry)
    us_chaos()
    us_store32(word, word_of(m.lay, entry))
    return id


cdef void map_free(Map* m, uint32_t id) noexcept nogil:
    cdef uint32_t* word
    if is_direct(m, id):
        direct_more(m, id, -1)
        return
    if m.lay.has & HAS_BYTES:
        bytes_free(m, id)
        return
    word = word_at(m, id)
    us_lock(&m.mutex)
    us_assert((us_load32(word) & (LOCKED | WAITERS)) == LOCKED,
              "free: locked by the last put, and nobody has a reference to wait with")
    us_assert(count_of(m, id, word) == 1, "free: the id has a count")
    if m.lay.has & HAS_DIRECT or us_load32(word) & m.lay.cached:
        side_clear(&m.folios, id)
    if m.lay.has & HAS_COUNTS:
        side_clear(&m.counts, id)
    store_beside(m, id, entry_of(m, id, us_load32(word)), 0)
    us_chaos()
    if m.lay.has & HAS_POINTER:
        struct_give(&m.pool, &m.partial, us_load32(ids_word(&m.ids, id)) >> 1)
    ids_give(&m.ids, id)
    pledge(m)
    us_unlock(&m.mutex)


cdef uint32_t word_lock(uint32_t* word) noexcept nogil:
    """Locks a word, waiting for whoever has it; the word as it was."""
    cdef uint32_t seen
    cdef int spins = 0
    while True:
        seen = us_load32(word)
        us_assert(word_type(seen) != e.FREE, "lock: the id is free")
        us_chaos()
        if not seen & LOCKED:
            if us_cas32(word, seen, seen | LOCKED):
                us_chaos()
                return seen
        elif spins < SPINS:
            spins += 1
            us_pause()
        else:
            us_word32_wait(word, seen, WAITERS)


cdef uint64_t map_lock(Map* m, uint32_t id) noexcept nogil:
    if is_direct(m, id):
        return direct_entry(id)
    if m.lay.has & HAS_BYTES:
        return bytes_lock(m, id)
    return entry_of(m, id, word_lock(word_at(m, id)))


# Whether redirect has a part of an entry elsewhere than in the word, or of the word's folio.
cdef inline bint is_beside(uint64_t entry) noexcept nogil:
    return type32(entry) == e.SLOT or type32(entry) == e.CACHE


# The id from now on.
cdef uint32_t map_unlock(Map* m, uint32_t id, uint64_t entry) noexcept nogil:
    cdef uint32_t* word
    cdef uint32_t seen, keep = m.lay.keep
    cdef uint64_t before
    if is_direct(m, id):
        return direct_id(entry)
    if m.lay.has & HAS_BYTES:
        bytes_unlock(m, id, entry)
        return id
    word = word_at(m, id)
    seen = us_load32(word)
    us_assert((seen & LOCKED) != 0, "unlock: not locked")
    us_assert(type32(entry) != e.FREE, "unlock: an id keeps an entry until it is freed")
    if m.lay.has & (BOUND_TO_SLOTS | HAS_REVERSE | HAS_REDIRECT):
        before = entry_of(m, id, seen)
        if before != entry and (not m.lay.has & HAS_REDIRECT or is_beside(before) or is_beside(entry)):
            us_lock(&m.mutex)
            store_beside(m, id, before, entry)
            if m.lay.has & HAS_REDIRECT and (type32(before) == e.CACHE or type32(entry) == e.CACHE):
                folio_move(m, id, before, entry)
            us_unlock(&m.mutex)
    if m.lay.has & HAS_REDIRECT and type32(entry) == e.CACHE:
        keep |= <uint32_t>(~<uint64_t>0 << m.lay.payload_shift)
    while True:
        seen = us_load32(word)
        us_chaos()
        if us_cas32(word, seen, (seen & keep) | word_of(m.lay, entry)):
            break
    us_chaos()
    if seen & WAITERS:
        # All of them: those who find it locked again must set WAITERS again.
        us_futex_wake(word, INT_MAX)
    return id


# What storage remembers, 4 bytes: a number, or which holder. The lowest bit tells.
cdef inline uint32_t map_owner(Map* m, uint32_t id, uint64_t holder) noexcept nogil:
    return <uint32_t>holder << 1 | 1 if is_direct(m, id) else id << 1


cdef bint map_try_owner(Map* m, uint32_t owner, uint64_t entry) noexcept nogil:
    cdef uint32_t* word
    cdef uint32_t seen
    if owner & 1:
        word = &m.table[owner >> 1]
        seen = us_load32(word)
        us_chaos()
        if seen & LOCKED or seen >> WORD_ID != direct_id(entry):
            return False
        return us_cas32(word, seen, seen | LOCKED)
    if m.lay.has & HAS_BYTES:
        return bytes_try(m, owner >> 1, entry)
    word = word_at(m, owner >> 1)
    seen = us_load32(word)
    us_assert(word_type(seen) != e.FREE, "try_owner: the id is free")
    us_chaos()
    # A CAS can fail though nobody has the lock, when a count changes: worth another try.
    while not seen & LOCKED and word_type(seen) == type32(entry):
        if not m.lay.has & (BOUND_TO_SLOTS | HAS_REDIRECT) and entry_of(m, owner >> 1, seen) != entry:
            return False
        if us_cas32(word, seen, seen | LOCKED):
            us_chaos()
            # What is beside the word can be read under its lock only.
            if entry_of(m, owner >> 1, seen) == entry:
                return True
            map_unlock(m, owner >> 1, entry_of(m, owner >> 1, seen))
            return False
        seen = us_load32(word)
    return False


cdef void map_unlock_owner(Map* m, uint32_t owner, uint64_t entry) noexcept nogil:
    if owner & 1:
        us_chaos()
        us_word32_release(&m.table[owner >> 1], direct_id(entry) << WORD_ID, WAITERS)
    else:
        map_unlock(m, owner >> 1, entry)


# Locks a word if it says SLOT and nobody is at it.
cdef inline bint slot_try(uint32_t* word) noexcept nogil:
    cdef uint32_t seen = us_load32(word)
    while word_type(seen) == e.SLOT and not seen & LOCKED:
        us_chaos()
        if us_cas32(word, seen, seen | LOCKED):
            return True
        seen = us_load32(word)
    return False


# A numbered id that has a SLOT entry, locked; 0: there is no more. Who is at one just now is passed over. `at` is where
# to go on, 0 in the beginning. Not in bound designs. A leaf at a time, so that nobody waits for long; what is seen
# under the mutex is not freed.
cdef uint32_t map_next(Map* m, uint64_t* at) noexcept nogil:
    # The reverse map has slots, so its ids come in their order, and then those that it has not got.
    cdef uint64_t slots = m.slots if m.lay.has & HAS_REVERSE else 0
    cdef uint32_t id
    us_lock(&m.mutex)
    while at[0] < slots:
        id = next_in_reverse(m, at)
        if id:
            us_unlock(&m.mutex)
            return id
        us_unlock(&m.mutex)
        us_chaos()
        us_lock(&m.mutex)
    while not m.lay.has & HAS_REVERSE or m.off_map:
        id = next_by_id(m, slots, at)
        if id or (at[0] - slots) >> m.ids.shift >= m.ids.leaves:
            us_unlock(&m.mutex)
            return id
        us_unlock(&m.mutex)
        us_chaos()
        us_lock(&m.mutex)
    us_unlock(&m.mutex)
    return 0


# In the leaf of this slot, or none and `at` is the first of the next.
cdef uint32_t next_in_reverse(Map* m, uint64_t* at) noexcept nogil:
    cdef uint64_t index = at[0] >> PAGE_SHIFT
    cdef uint64_t end = min((index + 1) << PAGE_SHIFT, m.slots)
    cdef uint32_t page = tree_find(&m.reverse, <uint32_t>index), id
    while page and at[0] < end:
        id = page_words(&m.pool, page)[at[0] & (PAGE_WORDS - 1)]
        at[0] += 1
        if id and slot_try(ids_word(&m.ids, id)):
            return id
    at[0] = end
    return 0


# In the next leaf of ids, the same; positions of ids come after `slots`.
cdef uint32_t next_by_id(Map* m, uint64_t slots, uint64_t* at) noexcept nogil:
    cdef uint32_t id = <uint32_t>(at[0] - slots)
    cdef uint32_t leaf = ids_leaf_after(&m.ids, id >> m.ids.shift), page, i
    cdef uint32_t* word
    at[0] = slots + (<uint64_t>(leaf + 1) << m.ids.shift)
    if leaf >= m.ids.leaves:
        return 0
    page = tree_find(&m.ids.tree, leaf)
    for i in range(max(id, leaf << m.ids.shift) & <uint32_t>(m.ids.per_leaf - 1), m.pool.pages[page].fresh):
        id = leaf << m.ids.shift | i
        word = ids_word(&m.ids, id)
        if m.lay.has & HAS_POINTER:
            if not us_load32(word) & 1:
                continue
            word = word_at(m, id)
        if m.lay.has & HAS_REVERSE and not us_load32(&word[3]) & OFF_MAP:
            continue
        if slot_try(word):
            at[0] = slots + id + 1
            return id
    return 0


# ---- counts ----

cdef inline uint32_t field_of(const Layout* lay, uint32_t word) noexcept nogil:
    return word >> lay.count_shift & lay.many


# Whether the caller's reference is the only one. True stays true, False is a hint.
cdef inline bint is_single(Map* m, uint32_t id, uint32_t* word) noexcept nogil:
    if m.lay.has & HAS_STRUCT:
        return us_load32(&word[2]) == 1
    if m.lay.has & HAS_COUNTS:
        # the leaf of a live id is there
        return us_load32(&tree_leaf(&m.counts, id >> PAGE_SHIFT)[id & (PAGE_WORDS - 1)]) == 1
    if m.lay.has & HAS_SHARED:
        return not us_load32(word) & m.lay.shared
    return m.lay.count_bits and field_of(m.lay, us_load32(word)) == 0


# Under the mutex.
cdef int64_t count_of(Map* m, uint32_t id, uint32_t* word) noexcept nogil:
    cdef uint32_t seen = us_load32(word), count
    if m.lay.has & HAS_STRUCT:
        return us_load32(&word[2])
    if m.lay.has & HAS_SHARED and not seen & m.lay.shared:
        return 1
    if m.lay.count_bits and field_of(m.lay, seen) != m.lay.many:
        return <int64_t>field_of(m.lay, seen) + 1
    count = side_get(&m.counts, id)
    us_assert(count != 0 or m.lay.has & HAS_DIRECT, "the word says that the side tree has the count")
    return count if count else 1


# Changes bits of a word, whoever has it locked.
cdef void word_change(uint32_t* word, uint32_t mask, uint32_t bits) noexcept nogil:
    cdef uint32_t seen
    while True:
        seen = us_load32(word)
        us_chaos()
        if us_cas32(word, seen, (seen & ~mask) | bits):
            return


# Under the mutex. Only more references may need memory: False.
cdef bint count_set(Map* m, uint32_t id, uint32_t* word, int64_t count) noexcept nogil:
    cdef bint aside = count > 1
    if m.lay.has & HAS_STRUCT:
        us_store32(&word[2], <uint32_t>count)
        return True
    if m.lay.has & HAS_COUNTS:
        aside = True
    elif m.lay.count_bits:
        aside = count > m.lay.many
    if aside and not side_set(&m.counts, id, <uint32_t>count, False):
        return False
    us_chaos()
    if m.lay.shared:
        word_change(word, m.lay.shared, m.lay.shared if aside else 0)
    elif m.lay.count_bits:
        word_change(word, m.lay.many << m.lay.count_shift,
                    (m.lay.many if aside else <uint32_t>(count - 1)) << m.lay.count_shift)
    us_chaos()
    if not aside:
        side_clear(&m.counts, id)
    return True


cdef int map_dup(Map* m, uint32_t* id, int64_t n) noexcept nogil:
    cdef uint32_t number = id[0]
    cdef uint32_t* word
    cdef int64_t count
    cdef int result = 0
    if m.lay.has & HAS_BYTES:
        return bytes_dup(m, id[0], n)
    us_lock(&m.mutex)
    if is_direct(m, id[0]):
        number = alloc_locked(m, direct_entry(id[0]))
        if number == 0:
            us_unlock(&m.mutex)
            return -ENOMEM
    word = word_at(m, number)
    us_assert(word_type(us_load32(word)) != e.FREE, "dup: the id is free")
    count = count_of(m, number, word)
    if n > COUNT_MAX - count:
        result = -EOVERFLOW
    elif not count_set(m, number, word, count + n):
        result = -ENOMEM
    if number != id[0]:
        if result:
            ids_give(&m.ids, number)
        else:
            direct_more(m, id[0], -1)
            id[0] = number
    us_unlock(&m.mutex)
    return result


# What is left; at 0 the id is locked and `entry` is its last one.
cdef int64_t map_put(Map* m, uint32_t id, int64_t n, uint64_t* entry) noexcept nogil:
    cdef uint32_t* word
    cdef int64_t left
    if is_direct(m, id):
        us_assert(n == 1, "put: no more references than there are")
        entry[0] = direct_entry(id)
        return 0
    if m.lay.has & HAS_BYTES:
        return bytes_put(m, id, n, entry)
    word = word_at(m, id)
    us_assert(word_type(us_load32(word)) != e.FREE, "put: the id is free")
    if not is_single(m, id, word):
        us_chaos()
        us_lock(&m.mutex)
        left = count_of(m, id, word) - n
        us_assert(left >= 0, "put: no more references than there are")
        count_set(m, id, word, left if left else 1)
        us_unlock(&m.mutex)
        if left:
            entry[0] = 0        # the reference is gone: `word` may not be touched any more
            return left
    us_chaos()
    entry[0] = entry_of(m, id, word_lock(word))
    return 0


cdef int64_t map_count(Map* m, uint32_t id) noexcept nogil:
    cdef uint32_t* word
    cdef int64_t count = 1
    if is_direct(m, id):
        return count
    if m.lay.has & HAS_BYTES:
        us_lock(&m.mutex)
        count = slot_count(&m.bytes, id - 1)
        us_unlock(&m.mutex)
        return count
    word = word_at(m, id)
    if not is_single(m, id, word):
        us_chaos()
        us_lock(&m.mutex)
        count = count_of(m, id, word)
        us_unlock(&m.mutex)
    return count


# ---- the swap cache: under the entry's lock. A direct id has none, its only holder knows by itself ----

cdef int map_cache(Map* m, uint32_t id, uint32_t folio) noexcept nogil:
    cdef const Layout* lay = m.lay
    cdef uint32_t* word
    cdef int result = 0
    if is_direct(m, id):
        return 0
    if lay.has & HAS_BYTES:
        return bytes_cache(m, id, folio)
    word = word_at(m, id)
    us_assert((us_load32(word) & LOCKED) != 0, "cache: under the entry's lock")
    if lay.has & HAS_REDIRECT:
        if folio >> lay.payload_bits:
            return -EOVERFLOW
        if word_type(us_load32(word)) == e.CACHE:
            word_change(word, <uint32_t>(~<uint64_t>0 << lay.payload_shift) | lay.cached,
                        folio << lay.payload_shift | (lay.cached if folio else 0))
            return 0
    if lay.has & HAS_STRUCT:
        us_store32(&word[1], folio)
        return 0
    if lay.has & BOUND_TO_SLOTS:
        if folio >> lay.payload_bits:
            return -EOVERFLOW
        word_change(word, <uint32_t>(~<uint64_t>0 << lay.payload_shift), folio << lay.payload_shift)
        return 0
    us_lock(&m.mutex)
    if folio == 0:
        if lay.cached:
            word_change(word, lay.cached, 0)
        us_chaos()
        side_clear(&m.folios, id)
    elif side_set(&m.folios, id, folio, False):
        us_chaos()
        if lay.cached:
            word_change(word, lay.cached, lay.cached)
    else:
        result = -ENOMEM
    us_unlock(&m.mutex)
    return result


cdef uint32_t map_cached(Map* m, uint32_t id) noexcept nogil:
    cdef uint32_t* word
    cdef uint32_t folio = 0
    if is_direct(m, id):
        return 0
    if m.lay.has & HAS_BYTES:
        us_lock(&m.mutex)
        folio = side_get(&m.folios, id) >> 1
        us_unlock(&m.mutex)
        return folio
    word = word_at(m, id)
    if m.lay.has & HAS_STRUCT:
        return us_load32(&word[1])
    if m.lay.has & BOUND_TO_SLOTS:
        return us_load32(word) >> m.lay.payload_shift
    if m.lay.has & HAS_DIRECT or us_load32(word) & m.lay.cached:
        us_chaos()
        us_lock(&m.mutex)
        folio = side_get(&m.folios, id)
        if m.lay.has & HAS_REDIRECT and us_load32(word) & m.lay.cached and word_type(us_load32(word)) == e.CACHE:
            folio = us_load32(word) >> m.lay.payload_shift
        us_unlock(&m.mutex)
    return folio


# ---- what fits ----

SAMPLES = {
    "0": 0,
    "a byte 8 times": 0xFFFFFFFFFFFFFFFF,
    "int32 1": 0x0000000100000001,
    "int32 -2": 0xFFFFFFFEFFFFFFFE,
    "int64 1": 1,
    "float64 1.0": 0x3FF0000000000000,
    "float32 1.0": 0x3F8000003F800000,
    "float32 0.1": 0x3DCCCCCD3DCCCCCD,
    "int32 2**30 - 1": 0x3FFFFFFF3FFFFFFF,
}


def limits(str design):
    """What 4-byte words leave to a design, computed from its layout: a dict of figures, and what does not fit."""
    cdef const Layout* lay = layout_of(design)
    cdef bint direct = lay.has & HAS_DIRECT
    cdef bint no_word = lay.has & BOUND_TO_SLOTS and not lay.has & HAS_BYTES
    cdef uint64_t one = 1
    cdef uint64_t ids = (one << (ID_BITS - 1 if direct else ID_BITS)) - 1
    cdef uint64_t counts = max(1, lay.many), same = 1
    cdef int k = lay.payload_bits - 2
    if lay.has & HAS_STRUCT:
        counts = (one << WORD_BITS) - 1
    elif lay.has & HAS_BYTES:
        counts = SLOT_COUNT_MOST
    elif lay.has & HAS_COUNTS:
        counts = 0
    if not no_word:
        same = (one << k) + 2 * ((one << k) - 1) + (one << 16) - (one << (k - 16))
    cdef uint64_t slots = ids if lay.has & (BOUND_TO_SLOTS | HAS_REDIRECT) else one << lay.payload_bits
    return {
        "design": design,
        "payload_bits": 0 if no_word else lay.payload_bits,
        "slots": slots,
        "file_bytes_4k": slots * 4096,
        "file_bytes_64k": slots * 65536,
        "zswap_objects": objects_of(lay),
        "shared_ids" if direct else "ids": ids,
        "count_in_entry": counts,
        "count": COUNT_MAX,
        "same_filled": same,
        "does_not_fit": [name for name, value in SAMPLES.items() if same_of(lay, value) < 0],
    }


# Handles that zswap can have: a word that has nothing else keeps one value for "none".
cdef uint64_t objects_of(const Layout* lay) noexcept:
    if lay.has & BOUND_TO_SLOTS:
        return (<uint64_t>1 << (OBJECT_BITS if lay.has & HAS_BYTES else WORD_BITS)) - 1
    return <uint64_t>1 << lay.payload_bits


# The payload of a value that repeats; -1: it does not fit. swap_table has nothing but the type for it.
cdef int64_t same_of(const Layout* lay, uint64_t value) noexcept:
    if lay.has & BOUND_TO_SLOTS and not lay.has & HAS_BYTES:
        return 0 if value == 0 else -1
    return same32_make(value, lay.payload_bits)


cdef const Layout* layout_of(str design) except NULL:
    cdef bytes name = design.encode()
    cdef int i
    for i in range(DESIGNS):
        if layouts[i].name == name:
            return &layouts[i]
    raise ValueError(f"no design for words of 32 bits is called {design!r}; there are: {', '.join(DESIGN_NAMES32)}")


cdef inline uint64_t next_random(uint64_t* state) noexcept nogil:
    state[0] ^= state[0] << 13
    state[0] ^= state[0] >> 7
    state[0] ^= state[0] << 17
    return state[0] >> 11


cdef uint32_t holder_lock(uint32_t* word) noexcept nogil:
    """Locks a holder, waiting for whoever has it; the id."""
    cdef uint32_t seen
    while True:
        seen = us_load32(word)
        us_chaos()
        if seen & LOCKED:
            us_word32_wait(word, seen, WAITERS)
        elif us_cas32(word, seen, (seen | LOCKED) & ~<uint32_t>WAITERS):
            return seen >> WORD_ID


KINDS = {"alloc": 0, "run": 1, "fault": 2, "take": 3, "put": 4, "dup": 5, "count": 6, "cache": 7, "uncache": 8,
         "cached": 9, "writeback": 10, "add": 11, "sub": 12}


@cython.final
cdef class Map32:
    """A swap map of 4-byte words of the named design, with holders of 4 bytes to put its ids in.

    Like ``userswap.swap.map.Map``, and its calls mean the same. Entries are given and shown as there (``entry``,
    ``slot``); what has no place in a word of 32 bits is refused.

    Args:
        design: one of ``DESIGN_NAMES32``.
        holders: how many there are, below 2**30.
        slots: the swap file, in slots as large as a folio.
        slot_run: 4 KiB slots that one of these takes.
        pages: of 4 KiB, that nodes may take: all of a 32-bit address space if not said.

    Raises:
        ValueError: no such design, or a call that makes no sense.
        OverflowError: an entry, a count or a folio that does not fit.
        MemoryError: no memory for the map, or no slot for another id.
    """

    cdef Map* map
    cdef uint32_t* words
    cdef uint64_t most
    cdef uint64_t slot_run
    cdef int64_t arrived        # threads that came to a run() with others, ever
    cdef int64_t started        # when the last of them did
    cdef readonly str design

    def __cinit__(self, str design="on_demand", *, uint64_t holders=1 << 20, uint64_t slots=1 << 18, int slot_run=16,
                  uint64_t pages=PAGES_MOST):
        cdef const Layout* lay = layout_of(design)
        if not 1 <= slot_run <= e.SLOT_RUN:
            raise ValueError("a slot as large as a folio takes 1 to 32 slots of 4 KiB")
        if holders >> ID_BITS or not 2 <= pages <= PAGES_MOST:
            raise ValueError("holders are fewer than 2**30, pages at most 2**20")
        if slots > limits(design)["slots"]:
            raise OverflowError(f"{design} with words of 32 bits can't tell {slots:,} slots from each other")
        self.most = holders
        self.slot_run = <uint64_t>slot_run
        self.design = design
        self.words = <uint32_t*>pages_reserve(max(holders, 1) * 4)
        if self.words != NULL:
            self.map = map_new(lay, self.words, slots, <uint32_t>pages)
        if self.map == NULL:
            raise MemoryError("no memory for a swap map")

    def __dealloc__(self):
        if self.map != NULL:
            map_delete(self.map)
        if self.words != NULL:
            munmap(self.words, max(self.most, 1) * 4)

    # ---- entries: as the window of the 64-bit maps has them, and as they are here ----

    cdef uint64_t given(self, uint64_t entry, bint numbered) except 0:
        cdef const Layout* lay = self.map.lay
        cdef int type = e.entry_type(entry)
        cdef uint64_t payload = e.entry_payload(entry)
        cdef int64_t same
        if type == e.FREE or type > e.CACHE or entry != e.entry_seen(entry):
            raise ValueError("an id has an entry until it is freed; make one with entry() or slot()")
        if type == e.CACHE:
            if not numbered:
                raise ValueError("CACHE is the entry of an id that is shared")
            payload = 0
        elif type == e.SAME:
            same = same_of(lay, e.same_value(entry))
            if same < 0:
                raise OverflowError(f"{self.design}: a word of 32 bits has no room for the value that repeats")
            payload = <uint64_t>same
        elif type == e.SLOT:
            if e.slot_device(entry) or e.slot_offset(entry) % self.slot_run or (
                    <uint64_t>e.slot_count(entry) != self.slot_run):
                raise OverflowError("a slot in 32 bits is one as large as a folio, on the only device")
            payload = e.slot_offset(entry) // self.slot_run
            self.check_payload(type, payload)
        else:
            self.check_payload(type, payload)
        return entry32(type, payload)

    cdef int check_payload(self, int type, uint64_t last) except -1:
        """Refuse a payload that does not fit."""
        cdef const Layout* lay = self.map.lay
        cdef uint64_t objects = objects_of(lay)
        if type == e.ZSWAP and last >= objects:
            raise OverflowError(f"a zswap handle of {self.design} is below {objects:,}: {last:,} does not fit")
        # In bound designs a slot stands for the id's own.
        if type == e.SLOT and not lay.has & BOUND_TO_SLOTS:
            if not lay.has & HAS_REDIRECT and last >> lay.payload_bits:
                raise OverflowError(f"a payload of {self.design} has {lay.payload_bits} bits: {last:,} does not fit")
            if last >= self.map.slots:
                raise OverflowError(f"the swap file has {self.map.slots:,} slots: there is no slot {last:,}")
        return 0

    cdef uint64_t shown(self, uint64_t entry) noexcept:
        if type32(entry) == e.FREE:
            return 0
        if type32(entry) == e.SLOT:
            return e.slot_make(0, (entry >> 3) * self.slot_run, <int>self.slot_run, True)
        if type32(entry) == e.SAME:
            return e.same_make(same32_value(entry >> 3, self.map.lay.payload_bits))
        return e.entry_make(type32(entry), entry >> 3)

    # ---- holders ----

    cdef uint32_t* word(self, uint64_t holder) except NULL:
        if holder >= self.most:
            raise ValueError(f"there is no holder {holder}")
        return &self.words[holder]

    cdef uint32_t* held(self, uint64_t holder) except NULL:
        cdef uint32_t* word = self.word(holder)
        if us_load32(word) >> WORD_ID == 0:
            raise ValueError(f"holder {holder} has no id")
        return word

    cdef uint32_t* empty(self, uint64_t holder) except NULL:
        cdef uint32_t* word = self.word(holder)
        if us_load32(word) != 0:
            raise ValueError(f"holder {holder} has an id")
        return word

    def id(self, uint64_t holder):
        """The id that a holder has, 0 for none."""
        return us_load32(self.word(holder)) >> WORD_ID

    # ---- the calls of a map ----

    def alloc(self, uint64_t holder, uint64_t entry):
        """A new id with count one and this entry, into an empty holder."""
        cdef uint32_t* word = self.empty(holder)
        cdef uint64_t inside = self.given(entry, False)
        cdef uint32_t id
        with nogil:
            id = map_alloc(self.map, inside)
        if id == 0:
            raise MemoryError("no memory or no slot for another swap id")
        us_store32(word, id << WORD_ID)

    def lock(self, uint64_t holder):
        """Lock the holder and the entry of its id, waiting for whoever has them; the entry."""
        cdef uint32_t* word = self.held(holder)
        cdef uint64_t entry
        with nogil:
            entry = map_lock(self.map, holder_lock(word))
        return self.shown(entry)

    def unlock(self, uint64_t holder, uint64_t entry):
        """Unlock both, with the entry as it shall be from now on."""
        cdef uint32_t* word = self.held(holder)
        cdef uint64_t inside = self.given(entry, not is_direct(self.map, us_load32(word) >> WORD_ID))
        with nogil:
            us_word32_release(word, map_unlock(self.map, us_load32(word) >> WORD_ID, inside) << WORD_ID, WAITERS)

    def owner(self, uint64_t holder):
        """What the storage of a holder's id has to remember, 4 bytes."""
        return map_owner(self.map, us_load32(self.held(holder)) >> WORD_ID, holder)

    def try_owner(self, uint32_t owner, uint64_t entry):
        """From the side of storage: lock the entry if it still is this one and nobody is at it; whether it did."""
        cdef uint64_t inside = self.given(entry, not owner & 1)
        cdef bint locked
        with nogil:
            locked = map_try_owner(self.map, owner, inside)
        return locked

    def unlock_owner(self, uint32_t owner, uint64_t entry):
        """Unlock what `try_owner` has locked, with the entry as it shall be from now on."""
        cdef uint64_t inside = self.given(entry, not owner & 1)
        with nogil:
            map_unlock_owner(self.map, owner, inside)

    def dup(self, uint64_t holder, uint64_t into):
        """One reference more, for an empty holder."""
        cdef uint32_t* target = self.empty(into)
        self.add(holder, 1)
        us_store32(target, us_load32(self.word(holder)) & ~<uint32_t>(LOCKED | WAITERS))

    def add(self, uint64_t holder, int64_t n):
        """``n`` references more, for holders that are elsewhere."""
        cdef uint32_t* word = self.held(holder)
        cdef uint32_t id
        cdef int error
        if n < 1:
            raise ValueError("at least one reference more")
        with nogil:
            id = holder_lock(word)
            error = map_dup(self.map, &id, n)
            us_word32_release(word, id << WORD_ID, WAITERS)
        if error == -EOVERFLOW:
            raise OverflowError(f"a swap count of 4 bytes goes to {COUNT_MAX}")
        if error:
            raise MemoryError("no memory for a swap count")

    def sub(self, uint64_t holder, int64_t n):
        """``n`` references less, of those that are elsewhere; what is left."""
        cdef uint32_t* word = self.held(holder)
        cdef uint64_t entry = 0
        cdef uint32_t id
        cdef int64_t left = -1
        if n < 1:
            raise ValueError("at least one reference less")
        with nogil:
            id = holder_lock(word)
            if n < map_count(self.map, id):
                left = map_put(self.map, id, n, &entry)
            us_word32_release(word, id << WORD_ID, WAITERS)
        if left < 0:
            raise ValueError("the holder's own reference would be gone: put it")
        return left

    def put(self, uint64_t holder):
        """The holder gives up its reference: ``(what is left, entry)``. When none is left the entry is locked and the
        holder keeps the id for ``free``; else it is empty."""
        cdef uint32_t* word = self.held(holder)
        cdef uint64_t entry = 0
        cdef int64_t left
        with nogil:
            left = map_put(self.map, holder_lock(word), 1, &entry)
            if left:
                us_word32_release(word, 0, WAITERS)
        return left, self.shown(entry)

    def free(self, uint64_t holder):
        """Give back an id whose last reference was put."""
        cdef uint32_t* word = self.held(holder)
        with nogil:
            map_free(self.map, us_load32(word) >> WORD_ID)
            us_word32_release(word, 0, WAITERS)

    def count(self, uint64_t holder):
        """How many references an id has."""
        return map_count(self.map, us_load32(self.held(holder)) >> WORD_ID)

    def cache(self, uint64_t holder, uint32_t folio):
        """Say which folio (0: none) has the bytes of a holder's id, which the caller has locked."""
        cdef uint32_t* word = self.held(holder)
        cdef int error
        if not us_load32(word) & LOCKED:
            raise ValueError("the swap cache changes under the lock of the entry")
        with nogil:
            error = map_cache(self.map, us_load32(word) >> WORD_ID, folio)
        if error == -EOVERFLOW:
            raise OverflowError(f"a frame number of {self.design} has {self.map.lay.payload_bits} bits")
        if error:
            raise MemoryError("no memory for a word of the swap cache")

    def cached(self, uint64_t holder):
        """The folio that has the bytes of a holder's id, 0 for none."""
        return map_cached(self.map, us_load32(self.held(holder)) >> WORD_ID)

    def ids(self):
        """How many ids are live."""
        return map_ids(self.map)

    def metadata(self):
        """Bytes of memory that the map uses, as allocated."""
        return map_metadata(self.map)

    # ---- loops at C's speed; the caller uses its holders alone, so they are not locked ----

    def touch(self):
        """Give every holder its memory, so that the page faults of the table are not in what `run` measures."""
        cdef uint64_t i
        with nogil:
            for i in range(0, self.most, 1024):
                us_cas32(&self.words[i], 0, 0)

    def run(self, str op, uint64_t[::1] holders, uint64_t entry=0, uint64_t[::1] into=None, *,
            int64_t references=1, int together=1):
        """Do ``op`` for every holder of the array, without the GIL: nanoseconds for each. See ``Map.run``.

        ``run`` takes 16 ids under one hold of the mutex, wherever they are. A folio in the swap cache is the number of
        its holder, and one.
        """
        cdef int kind = KINDS[op]
        cdef Py_ssize_t n = holders.shape[0], i = 0, j
        cdef uint64_t inside = 0, step, seen = 0
        cdef uint32_t id, before
        cdef uint32_t* word
        cdef uint32_t* owners = NULL
        cdef uint64_t* olds = NULL
        cdef int64_t began, all_here
        cdef int failed = 0
        cdef Map* m = self.map
        if kind in (0, 1, 10):
            inside = self.given(entry, False)
            step = 0 if type32(inside) == e.SAME else entry32(0, 1)
            if n:
                self.check_payload(type32(inside), (inside + step * <uint64_t>(n - 1)) >> 3)
        if kind == 5 and (into is None or into.shape[0] != n):
            raise ValueError("dup needs as many holders to put the ids into")
        if kind == 1 and n % 16:
            raise ValueError("runs are of 16 holders in a row")
        if references < 1 or together < 1 or (references > 1 and kind < 11):
            raise ValueError("at least one thread, and one reference; more for `add` and `sub` only")
        for i in range(n):
            if holders[i] >= self.most or (kind == 5 and into[i] >= self.most):
                raise ValueError("there is no such holder")
            if (self.words[holders[i]] == 0) != (kind < 2):
                raise ValueError(f"holder {holders[i]} has {'an' if kind < 2 else 'no'} id")
            if kind == 12 and references > map_count(m, self.words[holders[i]] >> WORD_ID):
                raise ValueError(f"the id of holder {holders[i]} has fewer references")
        i = 0
        with nogil:
            if kind == 10 and n:
                # what storage knows: not part of the time
                olds = <uint64_t*>pages_reserve(<uint64_t>n * 8)
                owners = <uint32_t*>pages_reserve(<uint64_t>n * 4)
                failed = olds == NULL or owners == NULL
                for i in range(0 if failed else n):
                    id = self.words[holders[i]] >> WORD_ID
                    olds[i] = map_lock(m, id)
                    map_unlock(m, id, olds[i])
                    owners[i] = map_owner(m, id, holders[i])
                i = 0
            if together > 1:
                began = us_now()
                us_write(&self.started, began)
                all_here = (us_add(&self.arrived, 1) + together - 1) // together * together
                # Spinning: who let the processor go might come back when the others are done.
                while us_read(&self.arrived) < all_here and not failed:
                    us_pause()
                    if us_now() - began > PATIENCE:
                        failed = 3
            began = us_read(&self.started) if together > 1 else us_now()
            while i < n and not failed:
                word = &self.words[holders[i]]
                id = word[0] >> WORD_ID
                if kind == 0:
                    id = map_alloc(m, inside)
                    failed = id == 0
                    word[0] = id << WORD_ID
                    inside += step
                elif kind == 1:
                    if not m.lay.has & HAS_DIRECT:
                        us_lock(&m.mutex)
                    for j in range(16):
                        id = map_alloc(m, inside) if m.lay.has & HAS_DIRECT else alloc_locked(m, inside)
                        word[j] = id << WORD_ID
                        inside += step
                        if id == 0:
                            failed = 1
                            break
                    if not m.lay.has & HAS_DIRECT:
                        us_unlock(&m.mutex)
                    i += 15
                elif kind == 2:
                    word[0] = map_unlock(m, id, map_lock(m, id)) << WORD_ID
                elif kind == 3 or kind == 4 or kind == 12:
                    if kind == 3:
                        id = map_unlock(m, id, map_lock(m, id))
                    if map_put(m, id, references, &seen) == 0:
                        map_free(m, id)
                        word[0] = 0
                    elif kind < 12:
                        word[0] = 0
                elif kind == 5 or kind == 11:
                    before = id
                    failed = map_dup(m, &id, references)
                    if id != before:
                        # Its storage has to be told: what that takes of the map is a part of the dup.
                        seen = map_lock(m, id)
                        map_owner(m, id, holders[i])
                        id = map_unlock(m, id, seen)
                    word[0] = id << WORD_ID
                    if kind == 5 and not failed:
                        self.words[into[i]] = id << WORD_ID
                elif kind == 6:
                    map_count(m, id)
                elif kind == 7 or kind == 8:
                    seen = map_lock(m, id)
                    failed = map_cache(m, id, <uint32_t>holders[i] + 1 if kind == 7 else 0)
                    word[0] = map_unlock(m, id, seen) << WORD_ID
                elif kind == 9:
                    seen += map_cached(m, id)
                elif map_try_owner(m, owners[i], olds[i]):
                    map_unlock_owner(m, owners[i], entry32(e.SLOT, id - 1) if m.lay.has & BOUND_TO_SLOTS else inside)
                    inside += step
                else:
                    failed = 2
                i += 1
            began = us_now() - began
            if olds != NULL:
                munmap(olds, <uint64_t>n * 8)
            if owners != NULL:
                munmap(owners, <uint64_t>n * 4)
        if failed == 3:
            raise TimeoutError("the other threads of the measurement did not come")
        if failed == 2:
            raise ValueError("another holder of the same id was written back before: give one holder of each")
        if failed == -EOVERFLOW:
            raise OverflowError(f"to {op} holder {holders[i - 1]:,} is more than a word can have")
        if failed:
            raise MemoryError(f"no memory to {op} at {i:,} of {n:,}")
        return <double>began / <double>n if n else 0.0

    def swapoff(self):
        """Empty the swap file: ``(ids that left it, nanoseconds)``. See ``Map.swapoff``.

        A direct id is found by looking at every holder, and so are all of slot and swap_table, whose ids end; vswap's
        through its reverse map, the others' through all ids.
        """
        cdef Map* m = self.map
        cdef uint64_t holder, entry, moved = 0, at = 0
        cdef uint32_t id = 0, seen
        cdef int64_t began
        with nogil:
            began = us_now()
            for holder in range(self.most if m.lay.has & (HAS_DIRECT | BOUND_TO_SLOTS) else 0):
                seen = us_load32(&self.words[holder])
                id = seen >> WORD_ID
                if m.lay.has & BOUND_TO_SLOTS:
                    if id == 0:
                        continue
                    entry = map_lock(m, id)
                    map_unlock(m, id, entry)
                    if type32(entry) != e.SLOT:
                        continue
                    us_store32(&self.words[holder], 0)
                    if map_put(m, id, 1, &entry) == 0:
                        map_free(m, id)
                        moved += 1
                elif id & DIRECT and type32(direct_entry(id)) == e.SLOT:
                    if map_try_owner(m, map_owner(m, id, holder), direct_entry(id)):
                        moved += 1
                        map_unlock_owner(m, map_owner(m, id, holder), entry32(e.ZSWAP, moved))
            while not m.lay.has & BOUND_TO_SLOTS:
                id = map_next(m, &at)
                if id == 0:
                    break
                moved += 1
                map_unlock(m, id, entry32(e.ZSWAP, moved))
            began = us_now() - began
        return moved, began

    def stress(self, uint64_t[::1] holders, int64_t[::1] counters, uint64_t spare, uint64_t spares,
               Py_ssize_t rounds, uint64_t seed):
        """What one of several threads does to the same ids: ``(increments, mistakes)``.

        Holder i has the entry of i: ZSWAP i << 2 and anything, or slot i. Threads may have the same holders, or their
        own ones of the same ids. In random order: lock, add one to the id's counter without any atomic, change the
        entry, unlock; the same from the side of storage; dup and put with ``spares`` holders from ``spare`` on; swap
        cache in and out; ids of its own. The caller checks that counters grew by the increments.
        """
        cdef Map* m = self.map
        cdef uint64_t state = seed * 0x9E3779B97F4A7C15u | 1
        cdef uint64_t r, entry, live = 0, k
        cdef Py_ssize_t _round, i, n = holders.shape[0]
        cdef int64_t done = 0, wrong = 0
        cdef uint32_t id, folio, owner
        cdef uint32_t* word
        if n == 0 or n >> 16 or counters.shape[0] != n or spares < 2 or spare + spares > self.most:
            raise ValueError("stress needs holders, as many counters, and spare holders")
        for i in range(n):
            self.held(holders[i])
            self.check_payload(e.SLOT, <uint64_t>i)
        with nogil:
            for _round in range(rounds + <Py_ssize_t>spares):
                r = next_random(&state)
                i = <Py_ssize_t>((r >> 8) % <uint64_t>n)
                r &= 255
                word = &self.words[holders[i]]
                if _round >= rounds:
                    r = 60      # at the end only puts
                if r < 100:
                    if r < 50 and live < spares:
                        id = holder_lock(word)
                        # Every other id stays direct, if it is.
                        if i & 1 == 0 or not is_direct(m, id):
                            wrong += map_dup(m, &id, 1) != 0
                            self.words[spare + live] = id << WORD_ID
                            live += 1
                            wrong += map_count(m, id) < 2
                        us_word32_release(word, id << WORD_ID, WAITERS)
                    elif live and r >= 50:
                        live -= 1
                        k = spare + next_random(&state) % (live + 1)
                        id = self.words[k] >> WORD_ID
                        self.words[k] = self.words[spare + live]
                        self.words[spare + live] = 0
                        wrong += map_put(m, id, 1, &entry) < 1
                elif r < 200:
                    id = holder_lock(word)
                    entry = map_lock(m, id)
                    wrong += not stress_right(m, id, i, entry)
                    one_more(&counters[i])
                    done += 1
                    if r < 115:
                        wrong += map_cache(m, id, <uint32_t>i + 1) != 0
                    elif r < 130:
                        wrong += map_cache(m, id, 0) != 0
                    id = map_unlock(m, id, stress_entry(m, id, i, next_random(&state)))
                    folio = map_cached(m, id)
                    wrong += folio != 0 and folio != <uint32_t>i + 1
                    us_word32_release(word, id << WORD_ID, WAITERS)
                elif r < 230:
                    # The id is live, as somebody holds it all the time; the entry is a guess.
                    id = us_load32(word) >> WORD_ID
                    owner = map_owner(m, id, holders[i])
                    if map_try_owner(m, owner, stress_entry(m, id, i, next_random(&state))):
                        one_more(&counters[i])
                        done += 1
                        map_unlock_owner(m, owner, stress_entry(m, id, i, next_random(&state)))
                else:
                    id = map_alloc(m, entry32(e.ZSWAP, r))
                    if id == 0:
                        wrong += 1
                        continue
                    wrong += map_lock(m, id) != entry32(e.ZSWAP, r)
                    id = map_unlock(m, id, entry32(e.ZSWAP, r + 1))
                    wrong += map_cached(m, id) != 0
                    wrong += map_put(m, id, 1, &entry) != 0 or entry != entry32(e.ZSWAP, r + 1)
                    map_free(m, id)
        return done, wrong


# Not atomic, on purpose, and with time for somebody else who should not be there.
cdef void one_more(int64_t* counter) noexcept nogil:
    cdef int64_t seen = us_read(counter)
    us_chaos()
    us_write(counter, seen + 1)


cdef uint64_t stress_entry(Map* m, uint32_t id, Py_ssize_t i, uint64_t r) noexcept nogil:
    if r & 3 == 0:
        return entry32(e.SLOT, id - 1 if m.lay.has & BOUND_TO_SLOTS else <uint64_t>i)
    return entry32(e.ZSWAP, <uint64_t>i << 2 | (r & 3))


cdef bint stress_right(Map* m, uint32_t id, Py_ssize_t i, uint64_t entry) noexcept nogil:
    if type32(entry) == e.ZSWAP:
        return entry >> 5 == <uint64_t>i
    return entry == stress_entry(m, id, i, 0)
