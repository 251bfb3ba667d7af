# The page-table word: 64 bits for each folio of a region. Helpers only; no state lives here. Where the id is and what
# locks the word is the swap room's to say (swap/holder.pxd), since where an id is its entry, that room changes it.
#
#   63              16 15       7    6       5      4      3       2    1 0
#   +-----------------+----------+------+-------+-----+---------+-----+-----+
#   | swap id (48)    | pins (9) |STAGED|GUARDED|YOUNG| WAITERS |BUSY |state|
#   |                 |          |PARTIAL       |     |         |     |     |
#   +-----------------+----------+------+-------+-----+---------+-----+-----+
#
#   EMPTY    never touched: reads as zeros, holds nothing
#   DIRTY    resident, the only copy. FILED: the copy that it had was in the swap file (the bit of STAGED)
#   CLEAN    resident, and `id` has its bytes (the swap cache). GUARDED: write-protected, so a write would be noticed.
#            Otherwise it was equal when it came, and its sum says whether it still is. PARTIAL: only some of its parts
#            are in place, and each has its sum; `id` has the others. It has no pins and is not GUARDED
#   SWAPPED  not resident; `id` holds the bytes. STAGED: readahead has, or had, them on the stage, and nothing has
#            happened to the folio since (any transition makes a new word without the flag)
#
# Changed only by compare-and-swap. Who sets BUSY owns the transition and is the only one to change the
# word or the frame until it stores the next word (which wakes who waits on the futex in the low half).
# Pins change only while BUSY is clear; a folio with pins is resident and stays.
from libc.stdint cimport uint64_t

from userswap.swap.holder cimport HOLDER_BUSY, HOLDER_ID_SHIFT, HOLDER_WAITERS

cdef enum:
    EMPTY = 0
    DIRTY = 1
    CLEAN = 2
    SWAPPED = 3
    STATE_MASK = 3
    BUSY = HOLDER_BUSY
    WAITERS = HOLDER_WAITERS
    YOUNG = 16
    GUARDED = 32
    STAGED = 64                 # of SWAPPED
    PARTIAL = 64                # of CLEAN
    FILED = 64                  # of DIRTY
    PIN_SHIFT = 7
    PIN_ONE = 128
    PIN_MAX = 511
    PIN_MASK = 65408
    ID_SHIFT = HOLDER_ID_SHIFT

cdef inline int word_state(uint64_t word) noexcept nogil:
    return <int>(word & STATE_MASK)

cdef inline uint64_t word_id(uint64_t word) noexcept nogil:
    return word >> ID_SHIFT

cdef inline uint64_t word_make(int state, uint64_t id) noexcept nogil:
    return (id << ID_SHIFT) | <uint64_t>state

cdef inline uint64_t word_with_id(uint64_t word, uint64_t id) noexcept nogil:
    return (id << ID_SHIFT) | (word & ((<uint64_t>1 << ID_SHIFT) - 1))

cdef inline int word_pins(uint64_t word) noexcept nogil:
    return <int>((word & PIN_MASK) >> PIN_SHIFT)

cdef inline bint word_partial(uint64_t word) noexcept nogil:
    return word & PARTIAL and word_state(word) == CLEAN

cdef inline bint word_resident(uint64_t word) noexcept nogil:
    return word_state(word) == DIRTY or word_state(word) == CLEAN
