# The index of identical folios: from the hash of what was stored to the holder that it was stored for. Touches its
# table only; every answer is a hint that the swap space verifies byte for byte.
#
# A word is | hash bits (19) | holder >> 3 (45) |, eight to a set, one cache line. No lock: a word is stored and
# loaded whole, a lost one costs a folio that is stored twice. It names holders, not ids or storage, since those
# move while a holder stays: who finds that the holder has something else by now goes on.
from libc.stdint cimport int64_t, uint64_t

cdef enum:
    DEDUPE_WAYS = 8

cdef struct Dedupe:
    uint64_t* words             # NULL: switched off
    int shift                   # 64 - log2 of the sets
    int64_t bytes
    int64_t shared              # swap-outs that found their folio stored already
    int64_t bytes_saved         # what they would have taken
    int64_t refused             # same hash bits, other bytes (or not to be had just now)

# For a pool of this budget: a word for each 16 KiB of it. 0 or -ENOMEM.
cdef int dedupe_open(Dedupe* d, int64_t limit) noexcept nogil
cdef void dedupe_close(Dedupe* d) noexcept nogil
# Holders that may have a folio with this hash: how many.
cdef int dedupe_find(Dedupe* d, uint64_t hash, uint64_t* holders) noexcept nogil
cdef void dedupe_add(Dedupe* d, uint64_t hash, uint64_t holder) noexcept nogil
