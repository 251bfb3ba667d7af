"""Seals of stored folios: sums, and what binds them to a place (see seal.pxd). Reads and writes what it is handed.

Why the sums can be carried along: a part's sum is bound to the header's, and the header's to the length, so none of
them says anything of a place; the check, over the sums, does. A check that is made anew for another place (compaction,
writeback, promotion) is made from the sums as they are, and whoever loads the folio compares those with its bytes.
"""
from libc.errno cimport EBADMSG, ESTALE, EXDEV
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memcpy, memset

from userswap.backends.cipher cimport TAG_BYTES, Piece, cipher_decrypt, cipher_encrypt
from userswap.backends.codec cimport PART_BYTES, PARTS, codec_bounds
from userswap.backends.swapfile cimport SLOT_BYTES
from userswap.native.sum cimport sum_bound
from userswap.native.us cimport us_add

# What a sum is bound to tells it apart from those of other things.
cdef enum:
    OF_HEADER = 8
    OF_WHOLE = 9
    OF_SUMS = 10
    OF_HANDLE = 11
    OF_TRAILER = 12
    OF_RAW = 16                 # and the part, above a place
    PACKED = PARTS              # in a nonce: not one of the parts

cdef packed struct Trailer:
    uint64_t[PARTS] sums
    char[TAG_BYTES] tag         # of packed bytes and sums; zeros if they are not encrypted
    uint64_t stamp
    uint64_t place
    uint64_t length
    uint64_t check              # of all above

cdef int64_t stamps = 0         # given so far


cdef uint64_t seal_stamp() noexcept nogil:
    return <uint64_t>us_add(&stamps, 1)


# ---- sums ----

cdef inline uint64_t part_sum(const char* packed, int part, const int* bounds, uint64_t header) noexcept nogil:
    return sum_bound(packed + bounds[part], bounds[part + 1] - bounds[part], header, part)


cdef void sums_of(const char* packed, int length, uint64_t* sums, int parts) noexcept nogil:
    """Those in `parts`; the first one is all there is of what has no parts."""
    cdef int[PARTS + 1] bounds
    cdef uint64_t header
    cdef int part
    if length < SEAL_WHOLE or not codec_bounds(packed, length, bounds):
        memset(sums, 0, PARTS * sizeof(uint64_t))
        sums[0] = sum_bound(packed, length, length, OF_WHOLE)
        return
    header = sum_bound(packed, bounds[0], length, OF_HEADER)
    for part in range(PARTS):
        if (parts >> part) & 1:
            sums[part] = part_sum(packed, part, bounds, header)


cdef void seal_sums(const void* packed, int length, uint64_t* sums) noexcept nogil:
    sums_of(<const char*>packed, length, sums, ALL_PARTS)


cdef void seal_update(const void* packed, int length, uint64_t* sums, int parts) noexcept nogil:
    sums_of(<const char*>packed, length, sums, parts)


cdef bint same_sums(const char* packed, int length, const uint64_t* sums, int parts) noexcept nogil:
    cdef uint64_t[PARTS] found
    cdef int part
    memcpy(found, sums, sizeof(found))
    sums_of(packed, length, found, parts)
    for part in range(PARTS):
        if found[part] != sums[part]:
            return False
    return True


# ---- objects ----

cdef inline int kept(int length) noexcept nogil:
    """Sums that are kept behind a packed folio."""
    return 1 if length < SEAL_WHOLE else PARTS


cdef inline uint64_t check_of(const uint64_t* sums, int length, uint64_t handle) noexcept nogil:
    # Put together so that one handle can be taken out for another.
    return sum_bound(sums, kept(length) * sizeof(uint64_t), length, OF_SUMS) ^ sum_bound(NULL, 0, handle, OF_HANDLE)


cdef void seal_object(char* object, int length, const uint64_t* sums, uint64_t handle) noexcept nogil:
    cdef int bytes = kept(length) * sizeof(uint64_t)
    cdef uint64_t check = check_of(sums, length, handle)
    memcpy(object + length, sums, bytes)
    memcpy(object + length + bytes, &check, sizeof(check))


cdef int seal_look(const char* object, int total, uint64_t handle, int parts, int* length,
                   uint64_t* sums) noexcept nogil:
    cdef uint64_t[PARTS] found
    cdef uint64_t check
    cdef int n = seal_length(total)
    cdef int bytes
    if n <= 0:
        return -EBADMSG
    length[0] = n
    bytes = kept(n) * sizeof(uint64_t)
    memset(found, 0, sizeof(found))
    memcpy(found, object + n, bytes)
    memcpy(&check, object + n + bytes, sizeof(check))
    if sums != NULL:
        memcpy(sums, found, sizeof(found))
    if check != check_of(found, n, handle) or (parts and not same_sums(object, n, found, parts)):
        return -EBADMSG
    return 0


cdef void seal_moved(char* object, int total, uint64_t before, uint64_t after) noexcept nogil:
    cdef uint64_t check
    cdef char* at = object + seal_total(seal_length(total)) - sizeof(check)
    memcpy(&check, at, sizeof(check))
    check ^= sum_bound(NULL, 0, before, OF_HANDLE) ^ sum_bound(NULL, 0, after, OF_HANDLE)
    memcpy(at, &check, sizeof(check))


# ---- runs of slots ----

cdef int seal_slots(int length) noexcept nogil:
    return (length + TRAILER_BYTES + SLOT_BYTES - 1) // SLOT_BYTES


cdef inline uint64_t trailer_check(const Trailer* trailer) noexcept nogil:
    return sum_bound(trailer, sizeof(Trailer) - sizeof(uint64_t), 0, OF_TRAILER)


cdef inline void both_pieces(Piece* pieces, char* run, int length, Trailer* trailer) noexcept nogil:
    pieces[0].source = run
    pieces[0].target = run
    pieces[0].bytes = length
    pieces[1].source = <char*>trailer.sums
    pieces[1].target = <char*>trailer.sums
    pieces[1].bytes = sizeof(trailer.sums)


cdef void seal_run(char* run, int slots, int length, const uint64_t* sums, uint64_t place, uint64_t stamp,
                   const char* key) noexcept nogil:
    cdef Trailer* trailer = <Trailer*>(run + slots * SLOT_BYTES - TRAILER_BYTES)
    cdef Piece[2] pieces
    # Nothing of what was in this memory before goes to the file.
    memset(run + length, 0, <char*>trailer - run - length)
    memcpy(trailer.sums, sums, sizeof(trailer.sums))
    trailer.stamp = stamp
    trailer.place = place
    trailer.length = length
    memset(trailer.tag, 0, TAG_BYTES)
    if key != NULL:
        both_pieces(pieces, run, length, trailer)
        if not cipher_encrypt(key, stamp, PACKED, pieces, 2, trailer.tag):
            # Never seen. Nothing readable goes to the file: whoever reads it back is told that it is lost.
            memset(run, 0, <char*>trailer - run)
            memset(trailer.sums, 0, sizeof(trailer.sums))
    trailer.check = trailer_check(trailer)


cdef int seal_open(char* run, int slots, uint64_t place, uint64_t stamp, const char* key, int parts, int* length,
                   uint64_t* sums) noexcept nogil:
    cdef Piece[2] pieces
    cdef Trailer* trailer = <Trailer*>(run + slots * SLOT_BYTES - TRAILER_BYTES)
    if trailer.check != trailer_check(trailer):
        return -EBADMSG
    if trailer.place != place:
        return -EXDEV
    if trailer.stamp != stamp:
        return -ESTALE
    if trailer.length == 0 or seal_slots(<int>trailer.length) != slots:
        return -EBADMSG
    if key != NULL:
        both_pieces(pieces, run, <int>trailer.length, trailer)
        if not cipher_decrypt(key, stamp, PACKED, pieces, 2, trailer.tag):
            return -EBADMSG
    if not same_sums(run, <int>trailer.length, trailer.sums, parts):
        return -EBADMSG
    length[0] = <int>trailer.length
    memcpy(sums, trailer.sums, sizeof(trailer.sums))
    return 0


# ---- raw folios ----

cdef inline int part_bytes(int bytes, int at) noexcept nogil:
    return bytes - at if bytes - at < PART_BYTES else PART_BYTES


cdef void seal_raw(char* data, int bytes, uint64_t place, uint64_t stamp, const char* key,
                   uint64_t* words) noexcept nogil:
    cdef Piece piece
    cdef int part = 0, at = 0
    words[0] = stamp
    words[RAW_LENGTH] = bytes
    while at < bytes:
        if key == NULL:
            words[1 + part] = sum_bound(data + at, part_bytes(bytes, at), stamp,
                                        place | <uint64_t>(OF_RAW + part) << 56)
        else:
            piece.source = data + at
            piece.target = data + at
            piece.bytes = part_bytes(bytes, at)
            if not cipher_encrypt(key, stamp, part, &piece, 1, <char*>&words[1 + 2 * part]):
                memset(data + at, 0, piece.bytes)   # as in seal_run
        at += PART_BYTES
        part += 1


cdef int seal_open_raw(char* data, int bytes, int part, uint64_t place, const char* key,
                       const uint64_t* words) noexcept nogil:
    cdef Piece piece
    cdef int at = 0, here = part if part >= 0 else 0
    if part < 0 and words[RAW_LENGTH] != <uint64_t>bytes:
        return -EBADMSG
    while at < bytes:
        if key == NULL:
            if words[1 + here] != sum_bound(data + at, part_bytes(bytes, at), words[0],
                                            place | <uint64_t>(OF_RAW + here) << 56):
                return -EBADMSG
        else:
            piece.source = data + at
            piece.target = data + at
            piece.bytes = part_bytes(bytes, at)
            if not cipher_decrypt(key, words[0], here, &piece, 1, <const char*>&words[1 + 2 * here]):
                return -EBADMSG
        at += PART_BYTES
        here += 1
    return 0
