"""Pages, trees, ids and structs of 4-byte words: see nodes32.pxd for the interface and the rules."""
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memset

from userswap.native.mman cimport MADV_DONTNEED, madvise, munmap
from userswap.native.us cimport us_assert, us_chaos, us_load32, us_read, us_store32, us_write
from userswap.swap.pages cimport pages_reserve


cdef enum:
    IDLE_MOST = 4               # free pages that keep their memory: an id that comes and goes costs no system call
    PATH_MOST = 2 * HEIGHT_MAX + 1          # pages that making a leaf may take: new roots, and the way down
    BITMAP_BYTES = PAGES_MOST // 8
    STRUCT_WORDS = 4
    PAGE_STRUCTS = 256


# ---- pages ----

cdef bint pool_init(Pool* pool, uint32_t most) noexcept nogil:
    pool.words = <uint32_t*>pages_reserve(<uint64_t>most * PAGE_BYTES)
    pool.pages = <Page*>pages_reserve(<uint64_t>most * sizeof(Page))
    pool.most = most
    pool.fresh = 1
    return pool.words != NULL and pool.pages != NULL


cdef void pool_end(Pool* pool) noexcept nogil:
    if pool.words != NULL:
        munmap(pool.words, <uint64_t>pool.most * PAGE_BYTES)
    if pool.pages != NULL:
        munmap(pool.pages, <uint64_t>pool.most * sizeof(Page))


# Headers have memory up to the highest page that was ever used, page 0's included.
cdef int64_t pool_bytes(Pool* pool) noexcept nogil:
    cdef int64_t headers = us_load32(&pool.fresh)
    headers = (headers * <int64_t>sizeof(Page) + PAGE_BYTES - 1) // PAGE_BYTES if headers > 1 else 0
    return (us_read(&pool.used) + us_read(&pool.idle) + headers) * PAGE_BYTES


cdef bint pool_room(Pool* pool, uint32_t n, bint pledged) noexcept nogil:
    return <int64_t>pool.most - 1 - pool.used >= <int64_t>n + (0 if pledged else pool.kept)


cdef uint32_t pool_take(Pool* pool) noexcept nogil:
    cdef uint32_t page = pool.free
    cdef Page* header
    if page:
        header = &pool.pages[page]
        pool.free = header.next
        us_write(&pool.idle, pool.idle - header.memory)
    else:
        us_assert(pool.fresh < pool.most, "a page is taken when there is one")
        page = pool.fresh
        us_store32(&pool.fresh, page + 1)
        header = &pool.pages[page]
    memset(header, 0, sizeof(Page))
    us_write(&pool.used, pool.used + 1)
    return page


cdef void pool_give(Pool* pool, uint32_t page) noexcept nogil:
    cdef Page* header = &pool.pages[page]
    us_chaos()
    us_write(&pool.used, pool.used - 1)
    # One that madvise can't take back is cleared by hand and keeps its memory.
    if pool.idle < IDLE_MOST or madvise(page_words(pool, page), PAGE_BYTES, MADV_DONTNEED) != 0:
        memset(page_words(pool, page), 0, PAGE_BYTES)
        header.memory = 1
        us_write(&pool.idle, pool.idle + 1)
    else:
        header.memory = 0
    header.next = pool.free
    pool.free = page


# ---- trees ----

cdef uint32_t tree_make(Tree* tree, uint32_t index, bint pledged) noexcept nogil:
    cdef Pool* pool = tree.pool
    cdef uint32_t page = tree_find(tree, index), above
    cdef uint32_t* slot
    cdef int height = tree.root & 3
    if page:
        return page
    # Before anything is changed, so that nothing has to be undone.
    if index >> (HEIGHT_MAX * PAGE_SHIFT) or not pool_room(pool, PATH_MOST, pledged):
        return 0
    while index >> (height * PAGE_SHIFT):
        height += 1
        if tree.root:
            above = pool_take(pool)
            page_words(pool, above)[0] = tree.root >> 2
            pool.pages[above].used = 1
            us_chaos()
            us_store32(&tree.root, above << 2 | <uint32_t>height)
    if tree.root == 0:
        us_store32(&tree.root, pool_take(pool) << 2 | <uint32_t>height)
    page = tree.root >> 2
    while height:
        height -= 1
        slot = &page_words(pool, page)[(index >> (height * PAGE_SHIFT)) & (PAGE_WORDS - 1)]
        if slot[0] == 0:
            pool.pages[page].used += 1
            us_store32(slot, pool_take(pool))
            us_chaos()
        page = slot[0]
    pool.pages[page].index = index
    return page


cdef uint32_t tree_find(Tree* tree, uint32_t index) noexcept nogil:
    cdef uint32_t page = tree.root >> 2
    cdef int height = tree.root & 3
    if index >> (height * PAGE_SHIFT):
        return 0
    while height and page:
        height -= 1
        page = page_words(tree.pool, page)[(index >> (height * PAGE_SHIFT)) & (PAGE_WORDS - 1)]
    return page


cdef void tree_drop(Tree* tree, uint32_t index) noexcept nogil:
    cdef Pool* pool = tree.pool
    cdef uint32_t[HEIGHT_MAX + 1] path
    cdef int top = tree.root & 3, height
    path[top] = tree.root >> 2
    for height in range(top - 1, -1, -1):
        path[height] = page_words(pool, path[height + 1])[(index >> (height * PAGE_SHIFT)) & (PAGE_WORDS - 1)]
    for height in range(top + 1):
        us_assert(pool.pages[path[height]].used == 0, "a node that is dropped holds nothing")
        if height == top:
            us_store32(&tree.root, 0)
            pool_give(pool, path[height])
            return
        us_store32(&page_words(pool, path[height + 1])[(index >> (height * PAGE_SHIFT)) & (PAGE_WORDS - 1)], 0)
        us_chaos()
        pool_give(pool, path[height])
        pool.pages[path[height + 1]].used -= 1
        if pool.pages[path[height + 1]].used:
            return


cdef bint side_set(Tree* tree, uint32_t id, uint32_t value, bint pledged) noexcept nogil:
    cdef uint32_t page = tree_make(tree, id >> PAGE_SHIFT, pledged)
    cdef uint32_t* word
    us_assert(value != 0, "a word of a side tree is not 0")
    if page == 0:
        return False
    word = &page_words(tree.pool, page)[id & (PAGE_WORDS - 1)]
    if word[0] == 0:
        tree.pool.pages[page].used += 1
    us_store32(word, value)
    return True


cdef void side_clear(Tree* tree, uint32_t id) noexcept nogil:
    cdef uint32_t page = tree_find(tree, id >> PAGE_SHIFT)
    cdef uint32_t* word
    if page == 0:
        return
    word = &page_words(tree.pool, page)[id & (PAGE_WORDS - 1)]
    if word[0]:
        us_store32(word, 0)
        tree.pool.pages[page].used -= 1
        if tree.pool.pages[page].used == 0:
            tree_drop(tree, id >> PAGE_SHIFT)


cdef uint32_t side_get(Tree* tree, uint32_t id) noexcept nogil:
    cdef uint32_t page = tree_find(tree, id >> PAGE_SHIFT)
    return page_words(tree.pool, page)[id & (PAGE_WORDS - 1)] if page else 0


# ---- ids ----

cdef bint ids_init(IdTree* t, Pool* pool, int words, uint32_t most) noexcept nogil:
    t.tree.pool = pool
    t.per_leaf = PAGE_WORDS // words
    t.shift = PAGE_SHIFT
    while 1 << t.shift > t.per_leaf:
        t.shift -= 1
    t.most = most
    t.present = <uint64_t*>pages_reserve(BITMAP_BYTES)
    t.room = <uint64_t*>pages_reserve(BITMAP_BYTES)
    return t.present != NULL and t.room != NULL


cdef void ids_end(IdTree* t) noexcept nogil:
    if t.present != NULL:
        munmap(t.present, BITMAP_BYTES)
    if t.room != NULL:
        munmap(t.room, BITMAP_BYTES)


cdef int64_t ids_bytes(IdTree* t) noexcept nogil:
    return 2 * ((<int64_t>us_load32(&t.leaves) + 8 * PAGE_BYTES - 1) // (8 * PAGE_BYTES)) * PAGE_BYTES


cdef inline int lowest_bit(uint64_t bits) noexcept nogil:
    cdef int i = 0
    while not bits >> i & 1:
        i += 1
    return i


cdef inline void ids_room(IdTree* t, uint32_t leaf, bint room) noexcept nogil:
    if room:
        t.room[leaf >> 6] |= <uint64_t>1 << (leaf & 63)
        t.room_hint = min(t.room_hint, leaf >> 6)
    else:
        t.room[leaf >> 6] &= ~(<uint64_t>1 << (leaf & 63))


# The lowest leaf with a free id, made if need be; 0: no memory.
cdef uint32_t leaf_with_room(IdTree* t) noexcept nogil:
    cdef uint32_t words = (t.leaves + 63) >> 6, leaf, page
    while t.room_hint < words and t.room[t.room_hint] == 0:
        t.room_hint += 1
    if t.room_hint < words:
        return tree_find(&t.tree, t.room_hint << 6 | <uint32_t>lowest_bit(t.room[t.room_hint]))
    while t.hole_hint < words and ~t.present[t.hole_hint] == 0:
        t.hole_hint += 1
    leaf = t.hole_hint << 6
    if t.hole_hint < PAGES_MOST // 64:
        leaf |= <uint32_t>lowest_bit(~t.present[t.hole_hint])
    if leaf >= PAGES_MOST or max(<uint64_t>leaf << t.shift, 1) >= t.most:
        return 0
    page = tree_make(&t.tree, leaf, False)
    if page:
        # Id 0 is never given: an empty page-table word must not name anything.
        t.tree.pool.pages[page].fresh = 1 if leaf == 0 else 0
        t.present[leaf >> 6] |= <uint64_t>1 << (leaf & 63)
        us_store32(&t.leaves, max(t.leaves, leaf + 1))
        t.here += 1
        ids_room(t, leaf, True)
    return page


# Whether all ids of a leaf are taken; the last leaf of a swap file may be shorter.
cdef inline bint leaf_full(IdTree* t, Page* leaf) noexcept nogil:
    return leaf.free == 0 and (leaf.fresh == t.per_leaf
                               or (<uint64_t>leaf.index << t.shift) + leaf.fresh >= t.most)


cdef uint32_t ids_take(IdTree* t) noexcept nogil:
    cdef uint32_t page = leaf_with_room(t)
    cdef Page* leaf
    cdef uint32_t place
    if page == 0:
        return 0
    leaf = &t.tree.pool.pages[page]
    if leaf.free:
        place = leaf.free - 1
        leaf.free = page_words(t.tree.pool, page)[place * <uint32_t>(PAGE_WORDS // t.per_leaf)] >> 5
    else:
        place = leaf.fresh
        leaf.fresh += 1
    leaf.used += 1
    if leaf_full(t, leaf):
        ids_room(t, leaf.index, False)
    us_write(&t.ids, t.ids + 1)
    return leaf.index << t.shift | place


# A free word is a link to the next, in the bits above the type, so that its type is 0.
cdef void ids_give(IdTree* t, uint32_t id) noexcept nogil:
    cdef uint32_t index = id >> t.shift, page = tree_find(&t.tree, index)
    cdef uint32_t place = id & <uint32_t>(t.per_leaf - 1)
    cdef Page* leaf
    us_assert(page != 0, "free: no such id")
    leaf = &t.tree.pool.pages[page]
    us_chaos()
    us_store32(ids_word(t, id), <uint32_t>leaf.free << 5)
    leaf.free = place + 1
    leaf.used -= 1
    ids_room(t, index, leaf.used != 0)
    if leaf.used == 0:
        t.present[index >> 6] &= ~(<uint64_t>1 << (index & 63))
        t.hole_hint = min(t.hole_hint, index >> 6)
        t.here -= 1
        tree_drop(&t.tree, index)
    us_write(&t.ids, t.ids - 1)


cdef uint32_t ids_leaf_after(IdTree* t, uint32_t index) noexcept nogil:
    while index < t.leaves and not t.present[index >> 6] >> (index & 63) & 1:
        index += 1
    return index


# ---- structs ----

cdef uint32_t struct_take(Pool* pool, uint32_t* partial) noexcept nogil:
    cdef uint32_t page = partial[0], place
    cdef Page* header
    if page == 0:
        if not pool_room(pool, 1, False):
            return 0
        page = partial[0] = pool_take(pool)
    header = &pool.pages[page]
    if header.free:
        place = header.free - 1
        header.free = page_words(pool, page)[place * STRUCT_WORDS] >> 5
    else:
        place = header.fresh
        header.fresh += 1
    header.used += 1
    if header.used == PAGE_STRUCTS:
        partial[0] = header.next
        pool.pages[header.next].index = 0
        header.next = 0
    return page << 8 | place


cdef void struct_give(Pool* pool, uint32_t* partial, uint32_t reference) noexcept nogil:
    cdef uint32_t page = reference >> 8
    cdef Page* header = &pool.pages[page]
    us_chaos()
    us_store32(&page_words(pool, page)[(reference & 255) * STRUCT_WORDS], <uint32_t>header.free << 5)
    header.free = (reference & 255) + 1
    header.used -= 1
    if header.used == PAGE_STRUCTS - 1:
        header.next = partial[0]
        header.index = 0
        pool.pages[header.next].index = page
        partial[0] = page
    elif header.used == 0:
        if header.index:
            pool.pages[header.index].next = header.next
        else:
            partial[0] = header.next
        pool.pages[header.next].index = header.index
        pool_give(pool, page)
