# The swap space: a SwapMap with the backends behind it. Bytes go in and an id comes out; an id goes in
# and the bytes come out. Knows no addresses of regions; nobody above it knows which device holds an id.
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t

from userswap.backends.codec cimport Worker
from userswap.backends.swapfile cimport SwapFile
from userswap.backends.zswap cimport Zswap
from userswap.native.us cimport us_mutex
from userswap.swap.dedupe cimport Dedupe
from userswap.swap.kin cimport KinSlots
from userswap.swap.map cimport HolderOps, SwapMap

# What a region's data is best compressed with, found by sampling. Plain fields: a lost update only costs
# a sample too many. One belongs to every region; the swap space reads and writes it.
cdef struct CodecHint:
    int32_t recipe              # -1: sample at the next swap-out
    int32_t expected            # packed length of 64 KiB that made us keep the recipe; 0: did not compress
    int32_t left                # swap-outs until the next sample

cdef enum:
    MOST_DEVICES = 16
    RUN_FOLIOS = 16             # folios of the largest large folio: 1 MiB
    FETCH_MOST = 32             # folios that swap_fetch takes at once

ctypedef SwapFile* SwapFilePointer
ctypedef KinSlots* KinSlotsPointer

cdef struct Deferred:
    int64_t slot
    int32_t slots
    int32_t id                  # of a map whose ids are slots: freed with them; else 0

cdef struct SwapSpace:
    SwapMap* map
    const HolderOps* holders
    void* holders_ctx
    Dedupe dedupe
    Zswap* zswap
    # Swap files by the number that an entry has. In a forked process the first `inherited` belong to its
    # ancestors: read, never written or freed. `current` is the one that is ours, -1 when there is none (yet).
    SwapFilePointer[MOST_DEVICES] devices
    # Of the same file: which of its slots other processes refer to (swap/kin). NULL: no process was forked that may.
    KinSlotsPointer[MOST_DEVICES] shared
    bint untold                 # one was, and there was no memory to note which: so none is given out again
    int inherited
    int current
    uint64_t file_limit         # of a file that a forked process makes for itself, bytes
    char[256] directory         # and where; empty: it may not
    Deferred* deferred          # slots that we freed and other processes still refer to
    int64_t deferred_count
    int64_t deferred_next       # the one that is asked about next
    int64_t deferred_at         # ns: not before this
    us_mutex deferred_lock      # leaf: guards the four above
    bint newest_first           # what is stored from now on is the first to be written back: the rest is not ours alone
    int64_t[MOST_DEVICES] swept  # what kin_deaths said when an orphaned file was looked through
    us_mutex writeback_lock     # one writeback at a time: guards `bounce`. Outside entry locks.
    char* bounce                # writeback gathers here; page aligned
    int64_t bounce_bytes
    int64_t retry_at            # ns: no writeback before this, after the device failed
    int64_t device_error        # errno of the last failed write, 0 when the last one worked
    int64_t swap_outs
    int64_t swap_ins
    int64_t part_ins            # parts of folios that came by themselves
    int64_t part_outs           # and that were stored so
    int64_t part_updates        # times that was done in place
    int64_t promotions          # folios moved from a slot to zswap
    int64_t writebacks          # folios moved from zswap to a slot, or put there at once
    int64_t slot_stored         # packed bytes in slots
    int64_t reads_again         # folios that had to be read from a slot once more
    int64_t reads_lost          # and in vain
    uint64_t lost_at            # entry of the last folio that was not what it was
    int64_t same_filled
    int64_t runs                # large folios that left together
    int64_t cache_hits          # swap-ins served from another holder's folio

# What happens on swap-in is decided by who asks (memory/faults):
#   exclusive and to be written   swap_in, swap_put: the id ends, its storage is free
#   to be read                    swap_in, the id stays with the clean folio: the swap cache. Leaving again is free
#   shared                        the same; swap_put leaves the count to the others, who still find the id. A clean
#                                 folio of a shared id is in the map's swap cache: the next holder copies it from there
#
# Takes the device over (NULL: no swap file). `holders` and `ctx`: of the rooms above, see map.pxd. NULL: no memory or
# no such design.
cdef SwapSpace* space_new(const char* design, uint64_t address_space, SwapFile* device, int64_t bounce_bytes,
                          uint64_t file_limit, const char* directory, const HolderOps* holders,
                          void* ctx) noexcept nogil
# Identical folios are stored once from now on. 0 or -ENOMEM.
cdef int space_dedupe(SwapSpace* s, int64_t limit) noexcept nogil
cdef void space_delete(SwapSpace* s) noexcept nogil
# Every call with an id comes from its holder, which the caller has locked (see map.pxd); `holder` names it.
# Stores n bytes (whole pages): an id (a new one, or one more reference to an identical folio's), or 0 with -errno in
# `error`. `data` may not change meanwhile.
cdef uint64_t swap_out(SwapSpace* s, Worker* worker, const void* data, int n, CodecHint* hint, uint64_t holder,
                       int* error) noexcept nogil
# The same for `count` (1 .. RUN_FOLIOS) neighbours that leave together, of FOLIO_BYTES each but for the last, which
# has n: `ids` gets 0 where one could not leave. A bit in `cold` (the lowest for the first): what does not fit in zswap
# shall rather be this one.
cdef void swap_out_run(SwapSpace* s, Worker* worker, const void* data, int count, int n, CodecHint* hint,
                       uint64_t holder, uint32_t cold, uint64_t* ids, int* error) noexcept nogil
# Stores a whole folio that is what `id` holds but for the parts (of PARTS) that `parts` has pointers to: a new id; or
# `id` itself, `updated`, if nobody else has it and there is room where it is. 0: it can't be done so (`id` is not in
# zswap, the result hardly compresses): it has to leave as a whole.
cdef uint64_t swap_out_parts(SwapSpace* s, Worker* worker, uint64_t id, const void* const* parts, CodecHint* hint,
                             uint64_t holder, bint cold, bint* updated) noexcept nogil
# Loads the n bytes of an id into `data`: 0 or -errno (-EIO: the device says so; -EBADMSG, -ESTALE, -EXDEV: what is there
# is not what was stored, see backends/seal; -ENXIO: it was in the swap file of an ancestor that is out of reach). The id keeps its copy and its count.
# `folio`: the holder whose clean folio it becomes, for the swap cache; 0: it will be written.
cdef int swap_in(SwapSpace* s, Worker* worker, uint64_t id, void* data, int n, uint64_t folio) noexcept nogil
# One part of a whole folio, PART_BYTES.
cdef int swap_in_part(SwapSpace* s, Worker* worker, uint64_t id, int part, void* data) noexcept nogil
# What a swap-in has just loaded with this worker moves to zswap if it came from a slot: the id from now on.
cdef uint64_t swap_promote(SwapSpace* s, Worker* worker, uint64_t id, uint64_t holder) noexcept nogil
# Is it in a swap file, just now: it takes long to read.
cdef bint swap_far(SwapSpace* s, uint64_t id) noexcept nogil
# For n folios that come together: what is in a swap file is read, packed as it is, to their frames (FOLIO_BYTES each,
# one behind the other), what lies in a row there by one request. `entries` gets what swap_unpack, which does the rest,
# has to know of each; 0: swap_in has to bring that one. `scrap`: FOLIO_BYTES for what nobody wants.
# Locks several entries at once: of ids that nobody else has, so that only storage, which waits for none, can be at
# them.
cdef void swap_fetch(SwapSpace* s, const uint64_t* ids, int n, char* frames, char* scrap,
                     uint64_t* entries) noexcept nogil
cdef int swap_unpack(SwapSpace* s, Worker* worker, uint64_t entry, char* frame) noexcept nogil  # 0 or -EIO
# The holder that has a clean folio with the same bytes, by what the swap cache says; 0: none. A hint: ask that holder.
cdef uint64_t swap_cached(SwapSpace* s, uint64_t id) noexcept nogil
# The holder's clean folio leaves, and the id stays.
cdef void swap_uncache(SwapSpace* s, uint64_t id, uint64_t folio) noexcept nogil
# One reference more, for a second holder: 0, -ENOMEM or -EOVERFLOW. The id of both may be another one afterwards.
cdef int swap_dup(SwapSpace* s, uint64_t* id, uint64_t holder) noexcept nogil
cdef bint swap_put(SwapSpace* s, uint64_t id) noexcept nogil     # whether it ended and was in a swap file
cdef bint swap_shared(SwapSpace* s, uint64_t id) noexcept nogil  # has more than one holder, just now
cdef bint swap_same(SwapSpace* s, uint64_t id) noexcept nogil     # same-filled: nothing is stored
# Moves cold folios from zswap to the device, about `want` packed bytes: how many it moved, 0 or -errno. `rest`: once
# those are gone that were cold from the start, others too; else the caller sees first whether that was enough.
cdef int64_t swap_writeback(SwapSpace* s, int64_t want, bint rest) noexcept nogil
# Gives back memory of the zswap pool that holds nothing, beyond `percent` of what it stores.
cdef int64_t swap_compact(SwapSpace* s, int percent, int64_t effort) noexcept nogil
# fork, after kin_before_fork: notes which slots the child will refer to. In the child: what its devices are from now
# on.
cdef void space_before_fork(SwapSpace* s) noexcept nogil
cdef void space_inherit(SwapSpace* s) noexcept nogil
# Where the last folio was that could not be loaded: text for a message.
cdef void space_lost_at(SwapSpace* s, int error, char* text, int n) noexcept nogil
cdef bint space_has_device(SwapSpace* s) noexcept nogil          # writeback has somewhere to go, or may have
cdef int64_t space_slot_bytes(SwapSpace* s) noexcept nogil       # in use in swap files
cdef int64_t space_pool_bytes(SwapSpace* s) noexcept nogil
cdef int64_t space_churn(SwapSpace* s) noexcept nogil             # bytes stored and freed in zswap, ever
cdef int64_t space_packed_bytes(SwapSpace* s) noexcept nogil      # what lives of them
cdef bint space_has_cold(SwapSpace* s) noexcept nogil            # writeback would begin with what was stored as cold
cdef int64_t space_packed(SwapSpace* s) noexcept nogil           # how many folios are in zswap
cdef int64_t space_stored_bytes(SwapSpace* s) noexcept nogil      # packed bytes, in zswap and in slots
cdef int64_t space_metadata(SwapSpace* s) noexcept nogil
