# The swap entry: an 8-byte tagged word that says where swapped data is. Helpers only; no state lives here.
#
#   63       53 52             8   7     6   5   3   2       1        0
#   +----------+----------------+------+----+-----+------+---------+------+
#   | map (11) |  payload (45)  |CACHED|GONE| type|SHARED| WAITERS |LOCKED|
#   +----------+----------------+------+----+-----+------+---------+------+
#
#   FREE   payload: the map's own
#   SAME   payload: kind (2 bits at 32), 32-bit pattern: the whole folio repeats one 8-byte value
#   ZSWAP  payload: handle of an object in the zswap pool
#   SLOT   payload: offset of the first slot (35), number of slots - 1 (5), raw (1), device (4)
#   CACHE  no payload: the data is in the swap cache only, and no storage holds it
#
# Callers give and get entries with everything but type and payload clear. The rest is the map's own: a design
# that keeps the word as it is locks it with LOCKED and WAITERS (futex on the low half) and marks with GONE that
# the count reached 0; what SHARED, CACHED and the top bits mean is said in the design's file.
#
# Transitions of an entry, each made by whoever has the id locked, in one store that also unlocks:
#
#   alloc:              -> SAME | ZSWAP | SLOT      swap-out; count 1, nobody else knows the id yet
#   writeback:    ZSWAP -> SLOT                     from the side of storage (try_owner, unlock_owner)
#   compaction:   ZSWAP -> ZSWAP                    the same
#   swapoff:       SLOT -> ZSWAP | SLOT             from the side of the device (next, unlock)
#   keep no copy: ZSWAP | SLOT -> CACHE             swap-in gave up the storage, the folio is in the swap cache
#   swap-out:     CACHE -> SAME | ZSWAP | SLOT      the cached folio leaves: it is stored again
#   last put:       any -> locked, and then free    the only one that also ends the id
#
# Any other change is a mistake: an entry never becomes SAME again without CACHE between, nor FREE but by free.
from libc.stdint cimport uint32_t, uint64_t

cdef enum:
    ENTRY_LOCKED = 1
    ENTRY_WAITERS = 2
    ENTRY_SHARED = 4
    ENTRY_GONE = 64
    ENTRY_CACHED = 128
    ENTRY_TYPE_SHIFT = 3
    ENTRY_TYPE_MASK = 7
    ENTRY_PAYLOAD_SHIFT = 8
    ENTRY_PAYLOAD_BITS = 45
    ENTRY_TOP_SHIFT = 53

    FREE = 0
    SAME = 1
    ZSWAP = 2
    SLOT = 3
    CACHE = 4

    SLOT_DEVICES = 16           # devices that an entry can name
    SLOT_RUN = 32               # and slots in a run

cdef extern from *:
    """
    #define ENTRY_SEEN 0x001FFFFFFFFFFF38ull    /* type and payload: what callers see of a word */
    """
    const uint64_t ENTRY_SEEN

cdef inline uint64_t entry_make(int type, uint64_t payload) noexcept nogil:
    return (payload << ENTRY_PAYLOAD_SHIFT) | (<uint64_t>type << ENTRY_TYPE_SHIFT)

cdef inline int entry_type(uint64_t entry) noexcept nogil:
    return <int>((entry >> ENTRY_TYPE_SHIFT) & ENTRY_TYPE_MASK)

cdef inline uint64_t entry_payload(uint64_t entry) noexcept nogil:
    return (entry & ENTRY_SEEN) >> ENTRY_PAYLOAD_SHIFT

# A word without what is the map's own.
cdef inline uint64_t entry_seen(uint64_t word) noexcept nogil:
    return word & ENTRY_SEEN

# ---- SAME: kinds of 8-byte values that fit ----
cdef enum:
    SAME_REPEAT = 0     # the 32-bit pattern twice
    SAME_LOW = 1        # high half zero: small integers
    SAME_HIGH = 2       # low half zero: round float64 values

cdef inline bint same_fits(uint64_t value) noexcept nogil:
    cdef uint64_t low = value & 0xFFFFFFFFu
    cdef uint64_t high = value >> 32
    return low == high or high == 0 or low == 0

cdef inline uint64_t same_make(uint64_t value) noexcept nogil:
    cdef uint64_t low = value & 0xFFFFFFFFu
    cdef uint64_t high = value >> 32
    if low == high:
        return entry_make(SAME, low)
    if high == 0:
        return entry_make(SAME, (<uint64_t>SAME_LOW << 32) | low)
    return entry_make(SAME, (<uint64_t>SAME_HIGH << 32) | high)

cdef inline uint64_t same_value(uint64_t entry) noexcept nogil:
    cdef uint64_t pattern = entry_payload(entry) & 0xFFFFFFFFu
    cdef uint64_t kind = entry_payload(entry) >> 32
    if kind == SAME_REPEAT:
        return (pattern << 32) | pattern
    if kind == SAME_LOW:
        return pattern
    return pattern << 32

# ---- SLOT ----
cdef inline uint64_t slot_make(int device, uint64_t offset, int slots, bint raw) noexcept nogil:
    return entry_make(SLOT, offset | (<uint64_t>(slots - 1) << 35) | (<uint64_t>raw << 40)
                      | (<uint64_t>device << 41))

cdef inline uint64_t slot_offset(uint64_t entry) noexcept nogil:
    return entry_payload(entry) & ((<uint64_t>1 << 35) - 1)

cdef inline int slot_count(uint64_t entry) noexcept nogil:
    return <int>((entry_payload(entry) >> 35) & 31) + 1

cdef inline bint slot_raw(uint64_t entry) noexcept nogil:
    return (entry_payload(entry) >> 40) & 1

cdef inline int slot_device(uint64_t entry) noexcept nogil:
    return <int>((entry_payload(entry) >> 41) & 15)
