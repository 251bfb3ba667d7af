# A radix tree of 8-byte words, 512 to a node, and the slab that its nodes come from. Knows neither
# what the words mean nor who locks: it touches only the tree, the slab and the nodes it is given.
#
# A tree maps 48-bit numbers (ids) to words. A leaf holds the words of 512 ids, `id >> 9` is the leaf's
# index; interior nodes hold pointers to nodes with two marks in their low bits. The root word is a
# pointer with the height in its low bits: one 8-byte store makes the tree higher.
#
# Locking: everything that changes a tree or its slab, and every function here but radix_slot(), runs
# under the owner's mutex. radix_slot() takes no lock; see there and in radix.pyx for why it may.
from libc.stdint cimport int16_t, int64_t, uint64_t

from userswap.native.us cimport us_load

cdef enum:
    RADIX_SHIFT = 9
    RADIX_SLOTS = 512
    RADIX_MASK = 511
    RADIX_TAGS = 4095           # a node's words are a page: low bits of a pointer to it are free
    MARK_ROOM = 1               # there is a leaf with room below (the owner says so: radix_room)
    MARK_DENSE = 2              # there is no absent leaf below

# A chunk is 256 KiB, aligned: a page of 64 headers, and 63 pages of words. Header 0 is the chunk's own,
# header i belongs to page i. So an id in a full leaf costs 8.127 bytes, words and headers are found from each
# other by arithmetic, and a free node's page can go back to the system on its own.
cdef enum:
    CHUNK_BYTES = 262144
    PAGE_SHIFT = 12
    PAGE_BYTES = 4096
    HEADER_SHIFT = 6
    CHUNK_NODES = 63

# Header of a node: 64 bytes, read and written under the owner's mutex only.
cdef struct Node:
    uint64_t* slots             # the page of words
    Node* parent                # NULL in the root
    uint64_t index              # a leaf's index; in an interior node: that of its leaves, shifted down
    int16_t height              # 0: a leaf
    int16_t used                # leaf: words in use, the owner counts; interior: children
    int16_t rooms               # leaf: 1 when it has room; interior: children that are marked so
    int16_t dense               # interior: children that are marked so
    int16_t first_room          # interior: no child before this one has the ROOM mark
    int16_t first_hole          # interior: every child before this one has the DENSE mark
    int16_t free                # leaf, the owner's: where its chain of free words starts
    int16_t fresh               # leaf, the owner's: words from here on were never used
    Node* side                  # leaf, the owner's: a second page for the same ids, freed with the leaf; NULL: none
    uint64_t reserved[2]

cdef struct Chunk:              # 64 bytes; bit i of the masks is page i
    Chunk* next                 # among chunks with a free node
    Chunk* prev
    Chunk* next_all
    Chunk* prev_all
    uint64_t free               # nodes that are not in use
    uint64_t touched            # pages that have memory: what is free and not touched reads as zeros
    uint64_t reserved[2]

cdef struct Slab:
    Chunk* partial
    Chunk* all
    int64_t nodes               # in use
    int64_t idle                # free, but with memory
    int64_t bytes               # of memory; us_read() it without the mutex

cdef struct RadixTree:
    uint64_t root               # pointer | height; 0: empty
    Slab* slab                  # trees under one mutex may share one

cdef void slab_delete(Slab* slab) noexcept nogil                # unmaps everything, used or not
cdef void* chunk_map() noexcept nogil                           # CHUNK_BYTES of zeros, aligned to that; NULL: no memory
# A page of zeros that is in no tree, with its header; NULL: no memory.
cdef Node* slab_alloc(Slab* slab) noexcept nogil
cdef void slab_free(Slab* slab, Node* node) noexcept nogil

# The leaf with this index, which is there already or made now. NULL: no memory, and nothing was changed.
# A new leaf is all zeros, without room, and has height, index and parent set.
cdef Node* radix_make(RadixTree* tree, uint64_t index) noexcept nogil
# Takes an empty leaf out and frees it, and every interior node that is empty with it.
cdef void radix_drop(RadixTree* tree, Node* leaf) noexcept nogil
# Says whether a leaf has room, for radix_first_room().
cdef void radix_room(Node* leaf, bint room) noexcept nogil
# The leaf with room that has the lowest index; NULL: none has.
cdef Node* radix_first_room(RadixTree* tree) noexcept nogil
# The leaf with the lowest index that is not below this one; NULL: there is none.
cdef Node* radix_next_leaf(RadixTree* tree, uint64_t index) noexcept nogil
# The lowest index that has no leaf; RADIX_INDEXES: none is left.
cdef uint64_t radix_first_hole(RadixTree* tree) noexcept nogil

cdef enum:
    RADIX_INDEX_BITS = 39       # 48-bit ids
    RADIX_HEIGHT_MAX = 5

# The header of the node that a word of an interior node, or the root word, points to; NULL for 0.
cdef inline Node* radix_node(uint64_t word) noexcept nogil:
    cdef uint64_t page = word >> PAGE_SHIFT
    return <Node*>((word & ~<uint64_t>(CHUNK_BYTES - 1)) | ((page & CHUNK_NODES) << HEADER_SHIFT))

# The word of an id. Lock-free, and the id must be in the tree and stay there until the caller is done
# with the word: then nothing on its path is freed, and any root that was seen leads to it.
cdef inline uint64_t* radix_slot(RadixTree* tree, uint64_t id) noexcept nogil:
    cdef uint64_t word = us_load(&tree.root)
    cdef int shift = <int>(word & RADIX_TAGS) * RADIX_SHIFT
    cdef uint64_t* slots = <uint64_t*>(word & ~<uint64_t>RADIX_TAGS)
    while shift:
        slots = <uint64_t*>(us_load(&slots[(id >> shift) & RADIX_MASK]) & ~<uint64_t>RADIX_TAGS)
        shift -= RADIX_SHIFT
    return &slots[id & RADIX_MASK]

# The header of the leaf that a word is in.
cdef inline Node* radix_leaf_of(const uint64_t* word) noexcept nogil:
    return radix_node(<uint64_t>word)

# The leaf with this index or NULL; under the owner's mutex.
cdef inline Node* radix_leaf(RadixTree* tree, uint64_t index) noexcept nogil:
    cdef int height = <int>(tree.root & RADIX_TAGS)
    cdef Node* node = radix_node(tree.root)
    if index >> (height * RADIX_SHIFT):
        return NULL
    while height and node != NULL:
        height -= 1
        node = radix_node(node.slots[(index >> (height * RADIX_SHIFT)) & RADIX_MASK])
    return node
