# The swap space: a SwapMap with the backends behind it. Bytes go in and an id comes out; an id goes in
# and the bytes come out. Knows no addresses of regions; nobody above it knows which device holds an id.
from libc.stdint cimport int16_t, int32_t, int64_t, uint8_t, uint32_t, uint64_t

from userswap.backends.codec cimport PARTS, Worker
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
    uint32_t tiers              # where its data may be: TIER_ZSWAP, and a bit for each tier of swap files

cdef enum:
    MOST_DEVICES = 16
    RUN_FOLIOS = 16             # folios of the largest large folio: 1 MiB
    FETCH_MOST = 32             # folios that swap_fetch takes at once
    MOVE_RUNS = 256             # folios that are written back or moved together
    MOST_TIERS = 8              # of swap files
    TIER_ZSWAP = 1              # of a policy; the bits of the tiers of swap files follow
    ALL_TIERS = 511
    DIRECTORY_BYTES = 256
    PLACE_FREE = 0
    PLACE_ON = 1
    PLACE_DRAINING = 2          # a swapoff empties it: nothing new goes there

ctypedef SwapFile* SwapFilePointer
ctypedef KinSlots* KinSlotsPointer

# What is written together, folio by folio: packed with the sums of its parts (backends/seal), or as it is.
cdef struct Folio:
    uint64_t[PARTS] sums
    int length
    bint raw

cdef struct Deferred:
    int64_t slot
    int16_t slots
    int16_t device
    int32_t id                  # of a map whose ids are slots: freed with them; else 0

# A swap file that was asked for, and in a forked process one that it may have: it is made when it is first needed.
cdef struct Place:
    int64_t state
    int64_t device              # its number; -1: not there (yet)
    int64_t retry_at            # ns: no write before this, after one failed
    int tier                    # the bit of a policy
    int priority
    uint64_t limit              # bytes
    char[DIRECTORY_BYTES] directory     # where a forked process makes one; empty: it may not

# All that have one priority, in the order in which they are asked for room.
cdef struct Tier:
    int priority
    uint32_t bit
    int count
    int[MOST_DEVICES] places
    int64_t turn                # slots given or tried, ever: whose turn it is
    int64_t crowded             # more is in use than shall be: demotion brings that down

cdef struct SwapSpace:
    SwapMap* map
    const HolderOps* holders
    void* holders_ctx
    Dedupe dedupe
    Zswap* zswap
    # Swap files by the number that an entry has; NULL: it is free. What an ancestor of a forked process opened is read,
    # never written or freed. These and the places change with the gate closed, so with nobody in here; but for what a
    # forked process opens when it first needs it.
    SwapFilePointer[MOST_DEVICES] devices
    # Of the same file: which of its slots other processes refer to (swap/kin). NULL: no process was forked that may.
    KinSlotsPointer[MOST_DEVICES] shared
    int[MOST_DEVICES] inherited                 # it is an ancestor's
    int64_t[MOST_DEVICES] referred              # of those: slots that our ids have
    int64_t[MOST_DEVICES] kept                  # of ours: slots that we freed and other processes still refer to
    char* keys                  # a page: of each file that is encrypted; NULL: there is none
    bint[MOST_DEVICES] encrypted
    bint encrypt                # what is opened from now on shall be
    int64_t[MOST_DEVICES] bytes_read
    int64_t[MOST_DEVICES] bytes_written
    bint untold                 # one was, and there was no memory to note which: so none is given out again
    bint is_child
    Place[MOST_DEVICES] places
    Tier[MOST_TIERS] tiers      # the first ones are used, by priority
    int tier_count
    us_mutex open_lock          # of a forked process that opens its own. Leaf
    Deferred* deferred          # slots that we freed and other processes still refer to
    int64_t deferred_count
    int64_t deferred_next       # the one that is asked about next
    int64_t deferred_at         # ns: not before this
    us_mutex deferred_lock      # guards the four above; before the leaf mutexes of devices
    bint newest_first           # what is stored from now on is the first to be written back: the rest is not ours alone
    int64_t[MOST_DEVICES] swept  # what kin_deaths said when an orphaned file was looked through
    us_mutex writeback_lock     # one at a time gathers, or moves: guards `bounce`, `incoming`. Outside entry locks.
    char* bounce                # what is written together is gathered here; page aligned; NULL: there was no file yet
    us_mutex spare_lock         # who finds `bounce` taken gathers in `spare`. As above.
    char* spare                 # NULL: there was no need of it yet
    int64_t spare_bytes         # that it has
    char* incoming              # and what is moved from one file to another is read to here
    bint incoming_used          # it has memory
    uint64_t[MOVE_RUNS] moving  # of what is gathered or moved: handles in zswap, or slots; locked
    uint64_t[MOVE_RUNS] owners  # and what storage remembers
    int[MOVE_RUNS] picked       # those that go together
    uint8_t[MOVE_RUNS] left     # which are still to be picked
    Folio[MOVE_RUNS] opened     # what they are
    Folio[MOVE_RUNS] closing    # what is about to be written
    int64_t demote_at           # ns: not before this
    int64_t tidy_at
    int64_t untidy              # something was freed since nothing was found to give back
    int64_t bounce_bytes
    int64_t retry_at            # ns: no writeback before this, after there was no room
    int64_t device_error        # errno of the last failed write, 0 when the last one worked
    int64_t swap_outs
    int64_t swap_ins
    int64_t part_ins            # parts of folios that came by themselves
    int64_t part_outs           # and that were stored so
    int64_t part_updates        # times that was done in place
    int64_t promotions          # folios moved from a slot to zswap, or to one of a faster swap file
    int64_t demotions           # and from one swap file to a slower one
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
# `slots_bytes`: how large the swap file is that a map whose ids are slots is made for; 0: there will be none. `bounce`:
# of a write that is gathered, bytes. `holders` and `ctx`: of the rooms above, see map.pxd. NULL: no memory or no such
# design.
cdef SwapSpace* space_new(const char* design, uint64_t address_space, uint64_t slots_bytes, int64_t bounce,
                          const HolderOps* holders, void* ctx) noexcept nogil
# Swap files that are opened from now on are encrypted: 0, -ENOMEM, or -ENOSYS: there is no cipher.
cdef int space_encrypt(SwapSpace* s) noexcept nogil
# ---- swap files come and go with the gate closed, so that nobody else is in here ----
# Takes the device over: its place, or -ENOMEM, -EMFILE (there are as many as can be), -EINVAL (the design has one
# only). `directory`: where a forked process may make one of its own.
cdef int space_swapon(SwapSpace* s, SwapFile* device, uint64_t limit, int priority, uint32_t tier,
                      const char* directory) noexcept nogil
# Nothing new goes to the place from now on, or (not `on`) it does again. 0; -ENOENT: there is none, -EALREADY: it is
# being emptied, or is not.
cdef int space_drain(SwapSpace* s, int place, bint on) noexcept nogil
# Its bytes in use by our ids, or on their way to be.
cdef int64_t space_left(SwapSpace* s, int place) noexcept nogil
# The place ends, if nothing is left there (else -EBUSY). Forked processes that refer to its slots keep the file.
cdef int space_swapoff(SwapSpace* s, int place) noexcept nogil
# What moving from a file did; bytes of slots.
cdef struct Moved:
    int64_t files               # went to other files
    int64_t zswap               # or to zswap
    int64_t busy                # runs that somebody was at
    int64_t stuck               # for which there is no room, or that may not be where there is some
    int64_t error               # -errno of a run that can't be read; 0: none
# One piece of a swapoff: empties a cluster, or a part of it, from where `cluster` and `at` say on, to other files, and
# of what finds no room there, up to `zswap` bytes to zswap. False: the end of the file; `cluster` and `at` are 0 again.
cdef bint space_drain_some(SwapSpace* s, int place, uint32_t* cluster, uint32_t* at, int64_t zswap,
                           Moved* moved) noexcept nogil
# Moves what is oldest in tiers that are too full to slower ones, about `most` bytes; and gives back room in clusters
# that stay partly used. What it did, bytes.
cdef int64_t space_demote(SwapSpace* s, int64_t most) noexcept nogil
cdef bint space_crowded(SwapSpace* s) noexcept nogil             # there is something for it to do
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
# Loads the n bytes of an id into `data`: 0 or -errno (-EIO: the device says so; -EBADMSG, -ESTALE, -EXDEV: what is
# there is not what was stored, see backends/seal; -ENXIO: it was in the swap file of an ancestor that is out of
# reach). The id keeps its copy and its count. `folio`: the holder whose clean folio it becomes, for the swap cache;
# 0: it will be written.
cdef int swap_in(SwapSpace* s, Worker* worker, uint64_t id, void* data, int n, uint64_t folio) noexcept nogil
# One part of a whole folio, PART_BYTES.
cdef int swap_in_part(SwapSpace* s, Worker* worker, uint64_t id, int part, void* data) noexcept nogil
# What a swap-in has just loaded with this worker moves, if it came from a slot: to zswap, or what may not be there or
# does not compress to a faster swap file that has room. The id from now on.
cdef uint64_t swap_promote(SwapSpace* s, Worker* worker, uint64_t id, uint32_t tiers, uint64_t holder) noexcept nogil
# How many folios there are, or would have room, where swap_promote would move it; 0: it would do nothing.
cdef int64_t swap_better(SwapSpace* s, const Worker* worker, uint32_t tiers) noexcept nogil
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
# Alone: whether storage remembers the holder of an id rightly; and whether runs that nobody has are in use in our
# files, how many slots too many or too few.
cdef bint space_owns(SwapSpace* s, uint64_t id, uint64_t holder) noexcept nogil
cdef int64_t space_lost(SwapSpace* s) noexcept nogil
