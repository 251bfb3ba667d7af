"""The radix tree and its slab: see radix.pxd for what they are and who locks.

Lifetime, and why a lookup needs no lock. An id is looked up by who holds a reference to it, or by who
knows of storage that it owns; either keeps the id in its leaf until the lookup is done with the word.

- A node is freed only when it is empty. A leaf that has the id is not, nor is any node above it.
- So a node that a reader may stand in is never freed under it, and no grace period is needed.
- The tree becomes higher by putting a new root over the old one, which stays in place as child 0:
  a reader that saw the old root finds its id under that, one that saw the new root goes one node more.
- The tree does not become lower while it holds anything: a root with child 0 only looks useless, but
  readers of ids below child 0 may stand in it. It goes when the tree is empty, when nobody reads.
- A reader learned its id after the id was put into the tree (a page-table word was stored with release
  and loaded with acquire), so the root and every pointer that it loads are at least as new as that.

Marks are low bits of the pointers in interior nodes; a reader masks them off, so changing them under
the mutex is invisible to it. They are what keeps ids dense: ROOM leads to the lowest leaf that has a
free id, DENSE to the lowest index without a leaf, each in one descent.

The slab never calls malloc, as it runs in the fault handler. It maps 256 KiB at a time. A free node's page goes
back to the system at once, but for a few that are kept so that an id that comes and goes does not cost a
system call each time; a chunk goes back when it is wholly free and another one has free nodes.
"""
from libc.stdint cimport uint64_t
from libc.string cimport memset

from userswap.native.mman cimport (
    MADV_DONTNEED, MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, madvise, mmap, munmap,
)
from userswap.native.us cimport us_add, us_assert, us_chaos, us_debug, us_store


cdef extern from * nogil:
    int ctz "__builtin_ctzll"(uint64_t)
    int popcount "__builtin_popcountll"(uint64_t)

cdef enum:
    IDLE_NODES = 6              # free nodes that keep their memory
    POISON = 0xC0               # in freed nodes of the debug build: a FREE entry, a pointer to nowhere

cdef uint64_t ALL_FREE = ~<uint64_t>1      # all pages but the one of the headers


# ---- slab; all of it under the owner's mutex ----

cdef inline Chunk* chunk_of(Node* node) noexcept nogil:
    return <Chunk*>(<uint64_t>node & ~<uint64_t>(CHUNK_BYTES - 1))


cdef void partial_insert(Slab* slab, Chunk* chunk) noexcept nogil:
    chunk.prev = NULL
    chunk.next = slab.partial
    if chunk.next != NULL:
        chunk.next.prev = chunk
    slab.partial = chunk


cdef void partial_remove(Slab* slab, Chunk* chunk) noexcept nogil:
    if chunk.prev != NULL:
        chunk.prev.next = chunk.next
    else:
        slab.partial = chunk.next
    if chunk.next != NULL:
        chunk.next.prev = chunk.prev
    chunk.next = NULL
    chunk.prev = NULL


cdef void* map_pages(size_t length) noexcept nogil:
    cdef void* memory = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    return NULL if memory == MAP_FAILED else memory


cdef void* chunk_map() noexcept nogil:
    # Mappings are mostly put below one another, so that after the first one they come aligned.
    cdef uint64_t memory = <uint64_t>map_pages(CHUNK_BYTES)
    cdef uint64_t head
    if memory & (CHUNK_BYTES - 1):
        munmap(<void*>memory, CHUNK_BYTES)
        memory = <uint64_t>map_pages(2 * CHUNK_BYTES)
        head = -memory & <uint64_t>(CHUNK_BYTES - 1)
        if memory:
            if head:
                munmap(<void*>memory, head)
            munmap(<void*>(memory + head + CHUNK_BYTES), CHUNK_BYTES - head)
            memory += head
    return <void*>memory


cdef Chunk* chunk_new(Slab* slab) noexcept nogil:
    cdef Chunk* chunk = <Chunk*>chunk_map()
    us_assert(sizeof(Node) == 64 and sizeof(Chunk) == 64, "a header is 64 bytes")
    if chunk == NULL:
        return NULL
    chunk.free = ALL_FREE
    chunk.touched = 1
    chunk.next_all = slab.all
    if chunk.next_all != NULL:
        chunk.next_all.prev_all = chunk
    slab.all = chunk
    us_add(&slab.bytes, PAGE_BYTES)
    partial_insert(slab, chunk)
    return chunk


cdef void chunk_delete(Slab* slab, Chunk* chunk) noexcept nogil:
    partial_remove(slab, chunk)
    if chunk.prev_all != NULL:
        chunk.prev_all.next_all = chunk.next_all
    else:
        slab.all = chunk.next_all
    if chunk.next_all != NULL:
        chunk.next_all.prev_all = chunk.prev_all
    us_add(&slab.bytes, -PAGE_BYTES * popcount(chunk.touched))
    slab.idle -= popcount(chunk.touched & chunk.free)
    us_chaos()
    munmap(chunk, CHUNK_BYTES)


# A node of zeros, or NULL.
cdef Node* slab_alloc(Slab* slab) noexcept nogil:
    cdef Chunk* chunk = slab.partial
    cdef Node* node
    cdef uint64_t* slots
    cdef uint64_t idle
    cdef int i
    if chunk == NULL:
        chunk = chunk_new(slab)
        if chunk == NULL:
            return NULL
    idle = chunk.free & chunk.touched
    i = ctz(idle if idle else chunk.free)
    slots = <uint64_t*>(<char*>chunk + i * PAGE_BYTES)
    if idle:
        memset(slots, 0, PAGE_BYTES)
        slab.idle -= 1
    else:
        us_add(&slab.bytes, PAGE_BYTES)
    node = <Node*>(<char*>chunk + (i << HEADER_SHIFT))
    memset(node, 0, sizeof(Node))
    node.slots = slots
    chunk.touched |= <uint64_t>1 << i
    chunk.free &= ~(<uint64_t>1 << i)
    if chunk.free == 0:
        partial_remove(slab, chunk)
    slab.nodes += 1
    return node


cdef void slab_free(Slab* slab, Node* node) noexcept nogil:
    cdef Chunk* chunk = chunk_of(node)
    cdef uint64_t bit = <uint64_t>1 << ((<uint64_t>node >> HEADER_SHIFT) & CHUNK_NODES)
    us_assert((chunk.free & bit) == 0, "a node is freed once")
    us_chaos()
    if us_debug():
        memset(node.slots, POISON, PAGE_BYTES)
    if slab.idle < IDLE_NODES or madvise(node.slots, PAGE_BYTES, MADV_DONTNEED) != 0:
        slab.idle += 1
    else:
        chunk.touched &= ~bit
        us_add(&slab.bytes, -PAGE_BYTES)
    if chunk.free == 0:
        partial_insert(slab, chunk)
    chunk.free |= bit
    slab.nodes -= 1
    if chunk.free == ALL_FREE and (chunk.next != NULL or chunk.prev != NULL):
        # Another chunk has free nodes. So at most one is ever kept that is wholly free.
        chunk_delete(slab, chunk)


cdef void slab_delete(Slab* slab) noexcept nogil:
    cdef Chunk* chunk = slab.all
    cdef Chunk* after
    while chunk != NULL:
        after = chunk.next_all
        munmap(chunk, CHUNK_BYTES)
        chunk = after
    memset(slab, 0, sizeof(Slab))


# ---- marks; under the owner's mutex ----

cdef inline bint node_dense(Node* node) noexcept nogil:
    return node.height == 0 or node.dense == RADIX_SLOTS


# Sets or clears MARK_ROOM in the pointer to `node`, and above as far as that changes anything.
cdef void mark_room(Node* node, bint room) noexcept nogil:
    cdef Node* parent = node.parent
    cdef int i
    while parent != NULL:
        i = node.index & RADIX_MASK
        if ((parent.slots[i] & MARK_ROOM) != 0) == room:
            return
        us_store(&parent.slots[i], parent.slots[i] ^ MARK_ROOM)
        if room:
            if i < parent.first_room:
                parent.first_room = i
            parent.rooms += 1
            if parent.rooms > 1:
                return
        else:
            parent.rooms -= 1
            if parent.rooms > 0:
                return
        node = parent
        parent = node.parent


# The same for MARK_DENSE.
cdef void mark_dense(Node* node, bint dense) noexcept nogil:
    cdef Node* parent = node.parent
    cdef int i
    while parent != NULL:
        i = node.index & RADIX_MASK
        if ((parent.slots[i] & MARK_DENSE) != 0) == dense:
            return
        us_store(&parent.slots[i], parent.slots[i] ^ MARK_DENSE)
        if dense:
            parent.dense += 1
            if parent.dense < RADIX_SLOTS:
                return
        else:
            if i < parent.first_hole:
                parent.first_hole = i
            parent.dense -= 1
            if parent.dense < RADIX_SLOTS - 1:
                return
        node = parent
        parent = node.parent


cdef void radix_room(Node* leaf, bint room) noexcept nogil:
    leaf.rooms = room
    mark_room(leaf, room)


# ---- the tree; under the owner's mutex ----

# Publishes `child` below `parent`. Its words must be in place: readers may come at once.
cdef void link_child(Node* parent, Node* child) noexcept nogil:
    cdef int i = child.index & RADIX_MASK
    child.parent = parent
    us_assert(parent.slots[i] == 0, "a child is linked into an empty slot")
    us_chaos()
    us_store(&parent.slots[i], <uint64_t>child.slots)
    parent.used += 1
    if child.rooms:
        mark_room(child, True)
    if node_dense(child):
        mark_dense(child, True)


cdef Node* radix_make(RadixTree* tree, uint64_t index) noexcept nogil:
    cdef Node* spare[2 * RADIX_HEIGHT_MAX + 1]
    cdef Node* at = radix_node(tree.root)
    cdef Node* child
    cdef int height = <int>(tree.root & RADIX_TAGS)
    cdef int need = 0
    cdef int level
    cdef int missing
    cdef int n = 0
    while index >> (need * RADIX_SHIFT):
        need += 1
    us_assert(need <= RADIX_HEIGHT_MAX, "an id has 48 bits")
    if at == NULL:
        level = need
        missing = need + 1
    elif need > height:
        # The path leaves the new root by another child than 0, where the old root goes.
        level = need
        missing = need - height + need
    else:
        level = height
        while level:
            child = radix_node(at.slots[(index >> ((level - 1) * RADIX_SHIFT)) & RADIX_MASK])
            if child == NULL:
                break
            at = child
            level -= 1
        missing = level
        if missing == 0:
            return at
    # All memory first: nothing is to be undone in a tree that readers walk.
    while n < missing:
        spare[n] = slab_alloc(tree.slab)
        if spare[n] == NULL:
            while n:
                n -= 1
                slab_free(tree.slab, spare[n])
            return NULL
        n += 1
    if at == NULL:
        n -= 1
        at = spare[n]
        at.height = need
        us_chaos()
        us_store(&tree.root, <uint64_t>at.slots | <uint64_t>need)
    elif need > height:
        while height < need:
            n -= 1
            height += 1
            child = at
            at = spare[n]
            at.height = height
            link_child(at, child)
        us_chaos()
        us_store(&tree.root, <uint64_t>at.slots | <uint64_t>height)
    while level:
        n -= 1
        level -= 1
        child = spare[n]
        child.height = level
        child.index = index >> (level * RADIX_SHIFT)
        link_child(at, child)
        at = child
    us_assert(n == 0, "as many nodes are used as were taken")
    return at


cdef void radix_drop(RadixTree* tree, Node* leaf) noexcept nogil:
    cdef Node* node = leaf
    cdef Node* parent
    # No reader stands in the leaf or in any node freed here: see the top of the file.
    us_assert(leaf.used == 0, "only an empty leaf is freed")
    radix_room(leaf, False)
    while True:
        parent = node.parent
        if parent == NULL:
            us_store(&tree.root, 0)
            slab_free(tree.slab, node)
            return
        mark_dense(node, False)
        us_store(&parent.slots[node.index & RADIX_MASK], 0)
        slab_free(tree.slab, node)
        parent.used -= 1
        if parent.used:
            return
        us_assert(parent.rooms == 0 and parent.dense == 0, "an empty node has no marks")
        node = parent


cdef Node* radix_first_room(RadixTree* tree) noexcept nogil:
    cdef Node* node = radix_node(tree.root)
    if node == NULL or node.rooms == 0:
        return NULL
    while node.height:
        while not node.slots[node.first_room] & MARK_ROOM:
            node.first_room += 1
            us_assert(node.first_room < RADIX_SLOTS, "a child has room")
        node = radix_node(node.slots[node.first_room])
    return node


cdef uint64_t radix_first_hole(RadixTree* tree) noexcept nogil:
    cdef Node* node = radix_node(tree.root)
    if node == NULL:
        return 0
    if node_dense(node):
        return <uint64_t>1 << (node.height * RADIX_SHIFT)
    while True:
        while node.slots[node.first_hole] & MARK_DENSE:
            node.first_hole += 1
            us_assert(node.first_hole < RADIX_SLOTS, "a child has a hole")
        if node.slots[node.first_hole] == 0:
            return ((node.index << RADIX_SHIFT) | <uint64_t>node.first_hole) << ((node.height - 1) * RADIX_SHIFT)
        node = radix_node(node.slots[node.first_hole])


cdef Node* radix_next_leaf(RadixTree* tree, uint64_t index) noexcept nogil:
    cdef Node* root = radix_node(tree.root)
    cdef Node* node = root
    cdef Node* child
    cdef uint64_t i
    if root == NULL or index >> (root.height * RADIX_SHIFT):
        return NULL
    while node.height:
        # `index` is below `node` here, or left of all of it
        i = (index >> ((node.height - 1) * RADIX_SHIFT)) & RADIX_MASK
        child = NULL
        while i < RADIX_SLOTS:
            child = radix_node(node.slots[i])
            if child != NULL:
                break
            i += 1
            index = 0           # further right everything counts
        if child == NULL:
            # up, and on to the right
            while node.parent != NULL and (node.index & RADIX_MASK) == RADIX_MASK:
                node = node.parent
            if node.parent == NULL:
                return NULL
            index = (node.index + 1) << (node.height * RADIX_SHIFT)
            node = node.parent
            continue
        node = child
    return node
