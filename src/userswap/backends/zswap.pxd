# zswap: the compressed pool in RAM. Objects of any size up to a folio and its header, packed into
# segments by size class; gives pages back to the system when it shrinks. Needs no swap file.
#
# An object has an owner (the swap id) so that it can be moved and written back. Locking: one leaf
# mutex; zswap_memory() is lock-free and valid while the caller holds the owner's entry lock.
from libc.stdint cimport int64_t, uint32_t, uint64_t

cdef enum:
    OBJECT_MAX = 69632          # a folio that did not compress and its header (PACKED_BYTES of the codec)
    COMPACT_SLACK = 65536       # waste that is never worth a compaction

cdef extern from *:
    """
    #define ZSWAP_STAYS (255ull << 55)
    """
    const uint64_t ZSWAP_STAYS

cdef struct Zswap

# Called with the pool's mutex held. `locked` must try-lock the owner's entry and check that it still
# is `handle`; returns whether it is locked now. `moved` replaces the entry `handle` by `fresh` and unlocks it.
# Between the two the bytes are copied without the mutex: the owner's lock alone keeps the object there.
# Neither is called for owner 0, which says that the object is not published yet.
ctypedef bint (*zswap_try)(void* ctx, uint64_t owner, uint64_t handle) noexcept nogil
ctypedef void (*zswap_done)(void* ctx, uint64_t owner, uint64_t handle, uint64_t fresh) noexcept nogil

cdef Zswap* zswap_new(uint64_t address_space) noexcept nogil    # bytes of address space; NULL: no memory
cdef void zswap_delete(Zswap* z) noexcept nogil
# A new object of 1 .. OBJECT_MAX bytes; 0 when there is no address space or memory left. A handle is below
# 2**44 and not 0.
cdef uint64_t zswap_alloc(Zswap* z, uint32_t length, uint64_t owner) noexcept nogil
cdef void zswap_set_owner(Zswap* z, uint64_t handle, uint64_t owner) noexcept nogil
cdef uint64_t zswap_owner(Zswap* z, uint64_t handle) noexcept nogil      # the caller has it locked
# The same for an object that will hardly be asked for soon: the first that zswap_coldest gives, unless it is.
cdef void zswap_set_owner_cold(Zswap* z, uint64_t handle, uint64_t owner) noexcept nogil
cdef int zswap_cold(Zswap* z) noexcept nogil                    # how many there may be of those
# What an object of this length takes: it may become as long (zswap_resize). At least `length`.
cdef uint32_t zswap_room(uint32_t length) noexcept nogil
# Another length for an object whose owner is locked, its bytes to be written anew. False: its room is another.
cdef bint zswap_resize(Zswap* z, uint64_t handle, uint32_t length) noexcept nogil
cdef void zswap_free(Zswap* z, uint64_t handle) noexcept nogil
cdef char* zswap_memory(Zswap* z, uint64_t handle, uint32_t* length) noexcept nogil
# The same, and the object gets no younger by it.
cdef char* zswap_peek(Zswap* z, uint64_t handle, uint32_t* length) noexcept nogil
# Bytes of RAM in the segments: headers, holes that are not given back yet and one spare segment included, so
# that it equals what is resident in the mapping; bytes asked for by live objects; live objects.
cdef int64_t zswap_bytes(Zswap* z) noexcept nogil
cdef int64_t zswap_stored(Zswap* z) noexcept nogil
cdef int64_t zswap_objects(Zswap* z) noexcept nogil
cdef int64_t zswap_churn(Zswap* z) noexcept nogil               # bytes written and freed, ever; a hint
# Bytes of RAM outside the segments (control words, size classes): not part of zswap_bytes.
cdef int64_t zswap_metadata(Zswap* z) noexcept nogil
# Gives memory back until waste is below `percent` of what is stored (and COMPACT_SLACK), moving objects
# where that helps. Its work is bounded by about `effort`: a byte moved counts as one, a byte given back as a
# quarter, and what was begun with a segment is finished. One thread at a time works, others return at once.
# A call below the goal costs some ns, one that can gain nothing little more. Returns the bytes given back, net.
cdef int64_t zswap_compact(Zswap* z, int percent, int64_t effort,
                           zswap_try locked, zswap_done moved, void* ctx) noexcept nogil
# The coldest objects (second chance, in the order they came): locks up to `n` of them with
# `locked` and writes down their handles and owners; together at most `bytes` long (rounded up to 4 KiB each).
# An object is young when it is new, and again whenever zswap_memory() is asked for it. While there are cold ones
# (zswap_set_owner_cold), only those: the clock does not move. An owner with all bits of ZSWAP_STAYS is never among
# them.
cdef int zswap_coldest(Zswap* z, int n, int64_t bytes, uint64_t* handles, uint64_t* owners,
                       zswap_try locked, void* ctx) noexcept nogil
# Where the segments are, as far as any was ever used.
cdef char* zswap_mapping(Zswap* z, uint64_t* length) noexcept nogil
