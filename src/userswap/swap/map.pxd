# SwapMap: the indirection. A swap id names swapped data; a map says what entry (where the data is), what swap
# count (how many page-table words refer to it) and what swap cache (the folio that holds the same bytes) an id
# has. Knows no address above it and no device below it. Every design (designs/*.pyx) fills in one SwapMapOps.
#
# Who may call what:
# - A *holder* has a reference to an id: a page-table word with the id in it, locked by the caller (BUSY), so that it
#   cannot change meanwhile. Everything that takes an id is called by a holder.
# - *Storage* remembers an owner (what owner() said), and whoever found live storage under the storage's own lock
#   calls try_owner. A *device* to be emptied is asked for with next.
#
# Rules that every design keeps:
# - alloc gives an id with count 1 and the given entry, unlocked. An id is 1 .. 2**48 - 1.
# - An entry is replaced under its lock: lock, then unlock with the entry as it shall be. An id may be another one
#   after unlock or dup: the holder stores what it gets. Ids that have two holders never change.
# - put that reaches 0 leaves the id allocated and its entry locked and returns the entry, so that the caller can
#   give back the storage first and then call free. Hence storage that exists has a live owner.
# - dup, and a put that leaves a count, never wait for the lock of the entry: it may be held during I/O.
#   A reference is not put while it is being dupped.
# - All calls are noexcept nogil, safe from any thread, and never malloc.
#
# Order between the parts of an id, whichever structures a design keeps them in:
# - entry and count are independent: an entry changes under its lock while the count goes up and down;
# - the count reaches 0 only by a put that then takes the lock, so no transition of the entry is under way when
#   storage is given back, and what it gives back is what the last transition left;
# - the swap cache changes under the entry's lock, so that "storage or cache" is one decision.
from libc.stdint cimport int64_t, uint64_t

# What the holders' side gives to the map. A holder is the address of a word with an id in it (holder.pxd): below
# 2**48, and the same while the reference exists; holders of a run are 8 apart.
cdef struct HolderOps:
    # Locks a holder that may be gone, if it has this id (any, if 0) and nobody is at it: the id, or 0.
    uint64_t (*trylock)(void* ctx, uint64_t holder, uint64_t id) noexcept nogil
    # The first holder after this one (0: of all) that has an id just now; 0: there is none. Locks nothing.
    uint64_t (*next)(void* ctx, uint64_t after, uint64_t* id) noexcept nogil

cdef struct SwapMapOptions:
    const HolderOps* holders
    void* ctx
    # The swap file, in slots as large as a folio; 0: there is none. Designs whose ids are slots take memory for each
    # of them at once, as at swapon, and can't give more ids than that.
    uint64_t slots
    int slot_run                # 4 KiB slots that one of these takes

cdef struct SwapMap:
    const SwapMapOps* ops
    # each design's own state follows

cdef struct SwapMapOps:
    const char* name
    bint bound                  # an id is a slot of device 0: the only SLOT entry that it may have is home(id)
    int64_t count_max           # more references than this are refused
    # NULL: no memory. A bound design without a swap file gives no id at all.
    SwapMap* (*new)(const SwapMapOptions* options) noexcept nogil
    void (*delete)(SwapMap* map) noexcept nogil
    # 0: no memory, or no slot. In a bound design any SLOT entry stands for home(id).
    uint64_t (*alloc)(SwapMap* map, uint64_t entry, uint64_t holder) noexcept nogil
    # Ids for the n (2 .. 32) folios of a large one, with consecutive numbers if ids are numbers: all of them (True),
    # or none: then take them one by one. Each lives and dies on its own.
    bint (*alloc_run)(SwapMap* map, const uint64_t* entries, uint64_t holder, int n, uint64_t* ids) noexcept nogil
    void (*free)(SwapMap* map, uint64_t id) noexcept nogil
    uint64_t (*home)(SwapMap* map, uint64_t id) noexcept nogil          # bound designs; NULL in the others
    # ---- the entry ----
    uint64_t (*lock)(SwapMap* map, uint64_t id) noexcept nogil          # waits; the entry
    uint64_t (*unlock)(SwapMap* map, uint64_t id, uint64_t entry) noexcept nogil  # the id from now on
    # ---- the same from the side of storage ----
    uint64_t (*owner)(SwapMap* map, uint64_t id, uint64_t holder) noexcept nogil  # what storage shall remember
    # Locks what the owner has, if that still is `entry`, and nobody is at it.
    bint (*try_owner)(SwapMap* map, uint64_t owner, uint64_t entry) noexcept nogil
    void (*unlock_owner)(SwapMap* map, uint64_t owner, uint64_t entry) noexcept nogil
    # The next owner after this one (0: of all) that has a SLOT entry on the device, with that entry locked;
    # 0: no more. Those that somebody is at are passed over and counted in `busy`. Not in bound designs, where
    # it gives the slots in use, unlocked: whoever holds them must be found by walking all holders.
    uint64_t (*next)(SwapMap* map, int device, uint64_t after, uint64_t* entry, int64_t* busy) noexcept nogil
    # ---- the count ----
    # n more; 0, or -ENOMEM / -EOVERFLOW and nothing has changed. If the id is another one after it, so is the
    # owner: `moved` gets the entry, and the caller, who has the only holder locked, tells the storage. Until then
    # nobody can reach the new id, so that the entry stays what it is.
    int (*dup)(SwapMap* map, uint64_t* id, int64_t n, uint64_t* moved) noexcept nogil
    int64_t (*put)(SwapMap* map, uint64_t id, int64_t n, uint64_t* entry) noexcept nogil  # the count that is left
    int64_t (*count)(SwapMap* map, uint64_t id) noexcept nogil
    # ---- the swap cache; a hint, worth keeping for ids that are shared ----
    # The folio (a token below 2**48) that has the same bytes; 0: none any more. Under the entry's lock. 0 or -ENOMEM.
    # An entry CACHE needs one. Only for an id that has had two holders: the only holder of one knows by itself.
    int (*cache)(SwapMap* map, uint64_t id, uint64_t folio) noexcept nogil
    uint64_t (*cached)(SwapMap* map, uint64_t id) noexcept nogil        # no lock needed; 0: none
    # ---- figures ----
    int64_t (*ids)(SwapMap* map) noexcept nogil                         # live ids
    int64_t (*metadata)(SwapMap* map) noexcept nogil                    # bytes really allocated

cdef const SwapMapOps* swap_map_design(const char* name) noexcept nogil  # NULL: no such design
