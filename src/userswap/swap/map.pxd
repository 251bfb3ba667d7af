# SwapMap: the indirection. A swap id names swapped data; a map says what entry (where the data is)
# and what swap count (how many page-table words refer to it) an id has. Knows no address above it
# and no device below it. Every design (designs/*.pyx) fills in one SwapMapOps.
#
# Rules that every design keeps:
# - alloc gives an id (never 0) with count 1 and the given entry, unlocked.
# - Entries are read, replaced and freed under their lock: lock / trylock, then unlock(next).
# - dup and put move the count. put that reaches 0 leaves the id allocated and its entry LOCKED and
#   returns the entry, so that the caller can give back the storage first and then call free(id).
#   Hence: storage that exists has a live id, and trylock on its owner is always safe.
# - lock, unlock, dup, put and count are called by who holds a reference: a page-table word that has
#   the id and cannot change meanwhile. A reference is not put while it is being dupped.
# - dup, and a put that leaves a count, never wait for the lock of the entry: it may be held during I/O.
# - An id is 1 .. 2**48 - 1. All calls are noexcept nogil, safe from any thread, and never malloc.
from libc.stdint cimport int64_t, uint64_t

cdef struct SwapMap:
    const SwapMapOps* ops
    # each design's own state follows

cdef struct SwapMapOps:
    const char* name
    SwapMap* (*new)() noexcept nogil                                    # NULL: no memory
    void (*delete)(SwapMap* map) noexcept nogil
    uint64_t (*alloc)(SwapMap* map, uint64_t entry) noexcept nogil      # 0: no memory
    void (*free)(SwapMap* map, uint64_t id) noexcept nogil
    uint64_t (*lock)(SwapMap* map, uint64_t id) noexcept nogil          # waits; the entry, flags cleared
    uint64_t (*trylock)(SwapMap* map, uint64_t id) noexcept nogil       # 0: somebody else has it
    void (*unlock)(SwapMap* map, uint64_t id, uint64_t entry) noexcept nogil  # entry: as it shall be now
    # 0, or -ENOMEM / -EOVERFLOW and nothing has changed.
    int (*dup)(SwapMap* map, uint64_t id) noexcept nogil
    int64_t (*put)(SwapMap* map, uint64_t id, uint64_t* entry) noexcept nogil  # the count that is left
    # dup n times at once (n < 0: put, but at least one must be left), for counts that no loop reaches.
    int (*add)(SwapMap* map, uint64_t id, int64_t n) noexcept nogil     # 0, or -ENOMEM / -EOVERFLOW
    int64_t (*count)(SwapMap* map, uint64_t id) noexcept nogil          # 0 between the last put and free
    int64_t (*ids)(SwapMap* map) noexcept nogil                         # live ids
    int64_t (*metadata)(SwapMap* map) noexcept nogil                    # bytes really allocated

cdef const SwapMapOps* swap_map_design(const char* name) noexcept nogil  # NULL: no such design
