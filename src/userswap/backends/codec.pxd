# The codec: Blosc2 on contexts made once. A Worker is a set of contexts with two buffers; a thread
# takes one, (de)compresses, gives it back. A recipe is a number that says codec, filter and item size.
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t

cdef enum:
    FOLIO_SHIFT = 16
    FOLIO_BYTES = 65536
    PACKED_BYTES = 69632        # a folio that does not compress, its header, rounded to slots
    PARTS = 4                   # of a folio, each of which can be had and replaced without the others
    PART_SHIFT = 14
    PART_BYTES = 16384
    RECIPES = 9

cdef struct Worker:
    char* folio                 # FOLIO_BYTES, page aligned: decompressed data
    char* packed                # PACKED_BYTES, page aligned: compressed data
    void* compressors[RECIPES]
    void* short_compressor      # of what is less than a block, whatever the recipe
    void* decompressor
    int loaded                  # bytes of `packed` that a swap-in has just read from a slot, else 0 (see swap_promote)
    uint64_t source             # and the swap entry that they were read from
    uint64_t[PARTS] sums        # and their sums (backends/seal)
    Worker* next

# A part packed by itself; PART_BYTES long: as it is.
cdef struct PackedPart:
    const void* data            # NULL: it has not changed
    int length

# 0, or -1 with the reason in `why` (codec_load), or -ENOMEM.
cdef int codec_load(const char* library, char* why, int why_bytes) noexcept nogil
cdef int codec_start(int workers) noexcept nogil                # makes workers up to this many
cdef int64_t codec_metadata() noexcept nogil                    # bytes of RAM that the workers have
cdef Worker* codec_take() noexcept nogil                        # waits for a free one
cdef void codec_give(Worker* worker) noexcept nogil
# Compresses `n` bytes to worker.packed: its length, or 0 when it does not save at least an eighth, or < 0.
cdef int codec_compress(Worker* worker, int recipe, const void* data, int n) noexcept nogil
# The same for what has to be kept packed whether it compresses or not.
cdef int codec_keep(Worker* worker, const void* data, int n) noexcept nogil
# Tries every recipe on the data, returns the one to use from now on.
cdef int codec_choose(Worker* worker, const void* data, int n) noexcept nogil
# 0, or -EIO when the packed data is not whole or is not of n bytes.
cdef int codec_decompress(Worker* worker, const void* packed, int length, void* data, int n) noexcept nogil
# The same for one part of a packed folio, PART_BYTES long.
cdef int codec_part(Worker* worker, const void* packed, int length, int part, void* data) noexcept nogil
# Parts to be stored by themselves: each of `parts` that is not NULL is packed, to worker.folio; of the others `data` is
# NULL.
cdef void codec_pack_parts(Worker* worker, int recipe, const void* const* parts, PackedPart* fresh) noexcept nogil
# Puts them into a packed folio where it is, which no one else may look at. False: they have no room there, and nothing
# has changed.
cdef bint codec_update(char* packed, int length, const PackedPart* fresh) noexcept nogil
# A packed folio with these parts instead of its own: to worker.packed, which `packed` may not be. Its length, 0 when it
# does not save an eighth, or -EIO.
cdef int codec_replace(Worker* worker, int recipe, const void* packed, int length,
                       const PackedPart* fresh) noexcept nogil
# Makes what codec_replace has left as long as `room`, so that its parts may grow later (codec_update).
cdef void codec_spread(Worker* worker, int length, int room) noexcept nogil
# XXH64 of the data (the copy that Blosc2's library has), for finding identical folios. 0 when the library has none.
cdef uint64_t codec_hash(const void* data, int n) noexcept nogil
# What was packed, bytes, from the header; -1: there is none.
cdef int codec_size(const void* packed, int length) noexcept nogil
# How long it is packed, of at most `length` bytes; -1: it is not whole.
cdef int codec_length(const void* packed, int length) noexcept nogil
# Where a packed folio's parts begin, behind a header that all of them need: PARTS places and the end of the last.
# False: it has none that could be had by themselves.
cdef bint codec_bounds(const void* packed, int length, int* bounds) noexcept nogil
