# The swap entry: an 8-byte tagged word that a swap id maps to. Helpers only; no state lives here.
#
#   63              8 7   6   5   3   2       1        0
#   +----------------+---+----+-----+------+---------+------+
#   | payload (56)   | 0 |GONE| type|SHARED| WAITERS |LOCKED|
#   +----------------+---+----+-----+------+---------+------+
#
#   FREE   payload: the map's own (next free id in the leaf)
#   SAME   payload: kind (2 bits at 32), 32-bit pattern: the whole folio repeats one 8-byte value
#   ZSWAP  payload: handle of an object in the zswap pool
#   SLOT   payload: offset of the first slot (36), number of slots - 1 (10), raw (1), device (6)
#   CACHE  reserved for an entry whose data is only resident
#
# LOCKED: who sets it owns the entry: may read the data behind it, replace or free it. Set by CAS,
# cleared by a CAS that carries SHARED over and wakes who waits (futex on the low half). SHARED: the
# swap count is in tree 2; clear means the count is one (or, with GONE, none). SHARED is the map's, not
# the lock holder's: it changes under the map's mutex by an atomic or/and, whether LOCKED is set or not.
# GONE: the count reached 0; set together with LOCKED, and the next thing that happens is free.
#
# The flags belong to the map: callers get and give entries with all of them clear.
from libc.stdint cimport uint32_t, uint64_t

cdef enum:
    ENTRY_LOCKED = 1
    ENTRY_WAITERS = 2
    ENTRY_SHARED = 4
    ENTRY_GONE = 64
    ENTRY_FLAGS = 71
    ENTRY_TYPE_SHIFT = 3
    ENTRY_TYPE_MASK = 7
    ENTRY_PAYLOAD_SHIFT = 8

    FREE = 0
    SAME = 1
    ZSWAP = 2
    SLOT = 3
    CACHE = 4

cdef inline uint64_t entry_make(int type, uint64_t payload) noexcept nogil:
    return (payload << ENTRY_PAYLOAD_SHIFT) | (<uint64_t>type << ENTRY_TYPE_SHIFT)

cdef inline int entry_type(uint64_t entry) noexcept nogil:
    return <int>((entry >> ENTRY_TYPE_SHIFT) & ENTRY_TYPE_MASK)

cdef inline uint64_t entry_payload(uint64_t entry) noexcept nogil:
    return entry >> ENTRY_PAYLOAD_SHIFT

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
    return entry_make(SLOT, offset | (<uint64_t>(slots - 1) << 36) | (<uint64_t>raw << 46)
                      | (<uint64_t>device << 47))

cdef inline uint64_t slot_offset(uint64_t entry) noexcept nogil:
    return entry_payload(entry) & ((<uint64_t>1 << 36) - 1)

cdef inline int slot_count(uint64_t entry) noexcept nogil:
    return <int>((entry_payload(entry) >> 36) & 1023) + 1

cdef inline bint slot_raw(uint64_t entry) noexcept nogil:
    return (entry_payload(entry) >> 46) & 1

cdef inline int slot_device(uint64_t entry) noexcept nogil:
    return <int>((entry_payload(entry) >> 47) & 63)
