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

The slab never calls malloc, as it runs in the fault handler. It maps 256 KiB at a time and gives a chunk
back when it is wholly free, but keeps one, so that an id that comes and goes at the edge of a chunk does
not map and unmap.
"""
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memset

from userswap.native.us cimport us_add, us_assert, us_chaos, us_debug, us_store


cdef extern from "<sys/mman.h>" nogil:
    enum:
        PROT_READ
        PROT_WRITE
        MAP_PRIVATE
        MAP_ANONYMOUS
    void* MAP_FAILED
    void* mmap(void* address, size_t length, int prot, int flags, int fd, long offset)
    int munmap(void* address, size_t length)


cdef enum:
    CHUNK_BYTES = 262144
    CHUNK_NODES = 63
    CHUNK_HEADER = 64
    PAGE = 4096
    KEPT_NODES = 4              # an empty slab keeps a chunk that touched no more than this
    POISON = 0xC0               # in freed nodes of the debug build: a FREE entry, a pointer to nowhere


# ---- slab; all of it under the owner's mutex ----

cdef inline int64_t chunk_bytes(Chunk* chunk) noexcept nogil:
    # Pages that were never touched are address space, not memory.
    return (CHUNK_HEADER + chunk.fresh * <int64_t>sizeof(Node) + PAGE - 1) & ~<int64_t>(PAGE - 1)


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


cdef Chunk* chunk_new(Slab* slab) noexcept nogil:
    cdef void* memory = mmap(NULL, CHUNK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    cdef Chunk* chunk
    us_assert(CHUNK_HEADER + CHUNK_NODES * sizeof(Node) == CHUNK_BYTES, "a chunk is filled to the byte")
    if memory == MAP_FAILED:
        return NULL
    chunk = <Chunk*>memory
    chunk.next_all = slab.all
    if chunk.next_all != NULL:
        chunk.next_all.prev_all = chunk
    slab.all = chunk
    us_add(&slab.bytes, chunk_bytes(chunk))
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
    us_add(&slab.bytes, -chunk_bytes(chunk))
    us_chaos()
    munmap(chunk, CHUNK_BYTES)


# A node of zeros, or NULL.
cdef Node* slab_alloc(Slab* slab) noexcept nogil:
    cdef Chunk* chunk = slab.partial
    cdef Node* node
    cdef int64_t before
    if chunk == NULL:
        chunk = chunk_new(slab)
        if chunk == NULL:
            return NULL
    node = chunk.free
    if node != NULL:
        chunk.free = node.parent
        memset(node, 0, sizeof(Node))
    else:
        before = chunk_bytes(chunk)
        node = <Node*>(<char*>chunk + CHUNK_HEADER + chunk.fresh * sizeof(Node))
        chunk.fresh += 1
        us_add(&slab.bytes, chunk_bytes(chunk) - before)
    node.chunk = chunk
    chunk.used += 1
    if chunk.used == CHUNK_NODES:
        partial_remove(slab, chunk)
    slab.nodes += 1
    return node


cdef void slab_free(Slab* slab, Node* node) noexcept nogil:
    cdef Chunk* chunk = node.chunk
    cdef Chunk* after
    us_chaos()
    if us_debug():
        memset(node, POISON, sizeof(Node))
        node.chunk = chunk
    node.parent = chunk.free
    chunk.free = node
    if chunk.used == CHUNK_NODES:
        partial_insert(slab, chunk)
    chunk.used -= 1
    slab.nodes -= 1
    if slab.nodes == 0:
        # All chunks are empty, hence all in the list. What is kept for the next id is small.
        chunk = slab.partial
        while chunk != NULL:
            after = chunk.next
            if chunk.fresh > KEPT_NODES or slab.all.next_all != NULL:
                chunk_delete(slab, chunk)
            chunk = after
    elif chunk.used == 0 and (chunk.next != NULL or chunk.prev != NULL):
        # Others have free nodes: at most one empty chunk is ever kept.
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
    us_store(&parent.slots[i], <uint64_t>child)
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
        us_store(&tree.root, <uint64_t>at | <uint64_t>need)
    elif need > height:
        while height < need:
            n -= 1
            height += 1
            child = at
            at = spare[n]
            at.height = height
            link_child(at, child)
        us_chaos()
        us_store(&tree.root, <uint64_t>at | <uint64_t>height)
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
        if (node.index & RADIX_MASK) < <uint64_t>parent.first_hole:
            parent.first_hole = node.index & RADIX_MASK
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
