# Seals: is what was stored what comes back? Of a packed folio there is a sum for each part (with the header that all
# parts need), made when it is packed and carried along wherever the folio goes; where it is, a check over these sums
# binds them to that place. So a part is verified alone, a folio that moves is not read again, and damage on the way
# is never sealed anew.
#
#   in zswap       packed bytes | sums | check                              bound to the handle
#   in slots       packed bytes | zeros | sums | tag | stamp | place | length | check
#                  at the end of the run's last slot; the stamp is also in RAM (swapfile_seals)
#   raw, 16 slots  as it is; stamp and sums by part are in RAM alone, bound to the place
#
# With a key, packed bytes and sums, or each part of a raw folio, are encrypted in place, with the stamp as nonce. The
# tag of a raw part is in RAM instead of its sum.
#
# A stamp is given once in the life of a process. Touches what it is handed, and that counter.
from libc.stdint cimport int64_t, uint64_t

cdef enum:
    SEAL_WHOLE = 4120           # packed folios shorter than this have one sum
    TRAILER_BYTES = 80
    RAW_LENGTH = 15             # the word, of the 16 that a raw folio has in RAM, that says how long it is
    ALL_PARTS = 15

# What a check says, as -errno: 0, or
#   -EBADMSG   bytes have changed
#   -ESTALE    it is what was there before: a write was lost
#   -EXDEV     it belongs elsewhere: a write, or this read, went astray
# (-EIO is the device's own word, -ENXIO that of a process that can't get at it.)

# ---- sums of a packed folio ----
cdef void seal_sums(const void* packed, int length, uint64_t* sums) noexcept nogil
# After codec_update: of those parts (bits) alone.
cdef void seal_update(const void* packed, int length, uint64_t* sums, int parts) noexcept nogil

# ---- objects in zswap; `total` is their length, seal and all ----
cdef inline int seal_total(int length) noexcept nogil:
    return length + (16 if length < SEAL_WHOLE else 40)

# The longest packed folio for which seal_total is no more than `total`.
cdef inline int seal_length(int total) noexcept nogil:
    return total - 40 if total >= SEAL_WHOLE + 40 else (total if total < SEAL_WHOLE + 16 else SEAL_WHOLE + 15) - 16

cdef void seal_object(char* object, int length, const uint64_t* sums, uint64_t handle) noexcept nogil
# `parts`: bits, of those to be verified. `length` and `sums` (if not NULL) get what it has. 0 or -errno.
cdef int seal_look(const char* object, int total, uint64_t handle, int parts, int* length,
                   uint64_t* sums) noexcept nogil
cdef void seal_moved(char* object, int total, uint64_t before, uint64_t after) noexcept nogil

# ---- runs of slots ----
cdef uint64_t seal_stamp() noexcept nogil                       # one that was never given before
cdef inline uint64_t seal_place(int device, int64_t slot) noexcept nogil:
    return <uint64_t>device << 48 | <uint64_t>slot

# Slots for a packed folio of that length.
cdef int seal_slots(int length) noexcept nogil
# Closes a run that has the packed bytes at its start; all of the rest is written to.
cdef void seal_run(char* run, int slots, int length, const uint64_t* sums, uint64_t place, uint64_t stamp,
                   const char* key) noexcept nogil
# As seal_look; `stamp` is what has to be there. What was encrypted is decrypted in place.
cdef int seal_open(char* run, int slots, uint64_t place, uint64_t stamp, const char* key, int parts, int* length,
                   uint64_t* sums) noexcept nogil

# ---- raw folios, whose seal is in RAM ----
cdef void seal_raw(char* data, int bytes, uint64_t place, uint64_t stamp, const char* key,
                   uint64_t* words) noexcept nogil
# A folio of `bytes`, or one part of it (`part` >= 0, the only one in `data`). 0 or -EBADMSG.
cdef int seal_open_raw(char* data, int bytes, int part, uint64_t place, const char* key,
                       const uint64_t* words) noexcept nogil
