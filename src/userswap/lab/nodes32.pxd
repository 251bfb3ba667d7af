# Memory as a machine with 4-byte words has it, for the lab: pages of 1024 words out of 4 GiB of address space, trees of
# such pages, ids from a tree, and small structs. Knows neither entries nor counts.
#
# A reference to a page is its number, 20 bits; page 0 is nobody's. Headers are an array beside the pages, 16 bytes
# each, so an id that is one word in a full leaf is 4.02 bytes with its share of header and interior node.
#
# Locks: none here. Everything runs under the owner's mutex but tree_leaf(), which takes no lock: who asks for a leaf
# has something alive in it, so nothing on the way to it is freed, and any root that was seen leads to it, as a root
# that grows becomes the first child of the new one. Addresses never go away: a late look reads zeros.
from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t

from userswap.native.us cimport us_load32

cdef enum:
    PAGE_WORDS = 1024
    PAGE_SHIFT = 10             # of words
    PAGE_BYTES = 4096
    PAGES_MOST = 1 << 20        # all of a 32-bit machine's address space
    HEIGHT_MAX = 2              # interior nodes above a leaf: 2**20 leaves

cdef struct Page:               # the header: 16 bytes
    uint32_t index              # leaf: its own; page of structs: the page before it in the list
    uint32_t next               # in a list of pages
    uint16_t used               # words, children or structs
    uint16_t free               # where the chain of free words starts, and one
    uint16_t fresh              # words from here on were never used
    uint16_t memory             # a free page that has memory, all zeros

cdef struct Pool:
    uint32_t* words
    Page* pages
    uint32_t most
    uint32_t fresh              # pages from here on were never used
    uint32_t free               # list of free pages
    uint32_t kept               # pages that only pledged stores may take: they can't fail
    int64_t used
    int64_t idle                # free pages that have memory

cdef struct Tree:
    uint32_t root               # page | height (2); 0: empty
    Pool* pool

# A tree whose leaves have ids to give, lowest first. Two bitmaps, a bit a leaf: it exists; it has a free id.
cdef struct IdTree:
    Tree tree
    uint64_t* present
    uint64_t* room
    uint32_t hole_hint          # no word of the bitmap before this has a 0, or a 1
    uint32_t room_hint
    uint32_t leaves             # one more than the highest that there ever was
    uint32_t here               # leaves that exist
    uint32_t most               # ids are below this
    int per_leaf                # a power of two
    int shift
    int64_t ids

cdef bint pool_init(Pool* pool, uint32_t most) noexcept nogil
cdef void pool_end(Pool* pool) noexcept nogil
cdef int64_t pool_bytes(Pool* pool) noexcept nogil
# Whether n pages can be taken: what is kept back is for stores that were pledged, because they can't fail.
cdef bint pool_room(Pool* pool, uint32_t n, bint pledged) noexcept nogil
# A page of zeros. Only after pool_room().
cdef uint32_t pool_take(Pool* pool) noexcept nogil
# The leaf with this index, made if it is not there. 0: no memory, and nothing has changed.
cdef uint32_t tree_make(Tree* tree, uint32_t index, bint pledged) noexcept nogil
cdef uint32_t tree_find(Tree* tree, uint32_t index) noexcept nogil          # 0: there is none
cdef void tree_drop(Tree* tree, uint32_t index) noexcept nogil              # a leaf that holds nothing
# Side trees: words that are not 0 for few of the ids.
cdef bint side_set(Tree* tree, uint32_t id, uint32_t value, bint pledged) noexcept nogil
cdef void side_clear(Tree* tree, uint32_t id) noexcept nogil                # 0 stays 0
cdef uint32_t side_get(Tree* tree, uint32_t id) noexcept nogil              # 0: none

cdef bint ids_init(IdTree* t, Pool* pool, int words, uint32_t most) noexcept nogil
cdef void ids_end(IdTree* t) noexcept nogil
cdef int64_t ids_bytes(IdTree* t) noexcept nogil
# A free id; 0: no memory. The caller stores its words.
cdef uint32_t ids_take(IdTree* t) noexcept nogil
cdef void ids_give(IdTree* t, uint32_t id) noexcept nogil
cdef uint32_t ids_leaf_after(IdTree* t, uint32_t index) noexcept nogil      # this or a later leaf; `leaves`: none

# Structs of 4 words, 256 to a page; a reference is page | place (8). 0: no memory.
cdef uint32_t struct_take(Pool* pool, uint32_t* partial) noexcept nogil
cdef void struct_give(Pool* pool, uint32_t* partial, uint32_t reference) noexcept nogil

cdef inline uint32_t* page_words(Pool* pool, uint32_t page) noexcept nogil:
    return pool.words + (<uint64_t>page << PAGE_SHIFT)

cdef inline uint32_t* tree_leaf(Tree* tree, uint32_t index) noexcept nogil:
    cdef uint32_t root = us_load32(&tree.root)
    cdef uint32_t page = root >> 2
    cdef int height = root & 3
    while height:
        height -= 1
        page = us_load32(&page_words(tree.pool, page)[(index >> (height * PAGE_SHIFT)) & (PAGE_WORDS - 1)])
    return page_words(tree.pool, page)

# The first word of a live id.
cdef inline uint32_t* ids_word(IdTree* t, uint32_t id) noexcept nogil:
    return tree_leaf(&t.tree, id >> t.shift) + (id & <uint32_t>(t.per_leaf - 1)) * <uint32_t>(PAGE_WORDS // t.per_leaf)
