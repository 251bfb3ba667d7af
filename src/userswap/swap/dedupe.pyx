"""The index of identical folios: see dedupe.pxd for what it is and why it needs no lock."""
from libc.errno cimport ENOMEM
from libc.stdint cimport int64_t, uint64_t

from userswap.native.mman cimport (
    MADV_DONTDUMP, MAP_ANONYMOUS, MAP_FAILED, MAP_NORESERVE, MAP_PRIVATE, PROT_READ, PROT_WRITE, madvise, mmap, munmap,
)
from userswap.native.us cimport us_assert, us_load, us_store

cdef enum:
    BYTES_A_WORD = 16384        # of the budget: at 2:1 a pool of nothing but swapped folios fills half the index
    SET_BYTES = DEDUPE_WAYS * 8

cdef extern from *:
    """
    #define US_DEDUPE_HOLDER ((1ull << 45) - 1)
    """
    const uint64_t HOLDER_BITS "US_DEDUPE_HOLDER"


cdef int dedupe_open(Dedupe* d, int64_t limit) noexcept nogil:
    cdef int log = 6
    cdef void* memory
    while (<int64_t>DEDUPE_WAYS << (log + 1)) <= limit // BYTES_A_WORD:
        log += 1
    memory = mmap(NULL, <uint64_t>SET_BYTES << log, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    if memory == MAP_FAILED:
        return -ENOMEM
    madvise(memory, <uint64_t>SET_BYTES << log, MADV_DONTDUMP)
    d.words = <uint64_t*>memory
    d.shift = 64 - log
    d.bytes = <int64_t>SET_BYTES << log
    return 0


cdef void dedupe_close(Dedupe* d) noexcept nogil:
    if d.words != NULL:
        munmap(d.words, <uint64_t>d.bytes)
    d.words = NULL
    d.bytes = 0


# The set comes from the top bits of the hash, what a word keeps of it from the bottom.
cdef inline uint64_t* set_of(Dedupe* d, uint64_t hash) noexcept nogil:
    return d.words + (hash >> d.shift) * DEDUPE_WAYS


cdef int dedupe_find(Dedupe* d, uint64_t hash, uint64_t* holders) noexcept nogil:
    cdef uint64_t* words = set_of(d, hash)
    cdef uint64_t word
    cdef int i, found = 0
    for i in range(DEDUPE_WAYS):
        word = us_load(&words[i])
        if word and (word ^ (hash << 45)) >> 45 == 0:
            holders[found] = (word & HOLDER_BITS) << 3
            found += 1
    return found


cdef void dedupe_add(Dedupe* d, uint64_t hash, uint64_t holder) noexcept nogil:
    cdef uint64_t* words = set_of(d, hash)
    cdef uint64_t fresh = (hash << 45) | (holder >> 3)
    cdef int i
    us_assert(holder != 0 and holder & 7 == 0 and holder >> 48 == 0, "a holder is the address of a word")
    for i in range(DEDUPE_WAYS):
        # A holder has one folio: what it had before is not there any more.
        if us_load(&words[i]) == 0 or (us_load(&words[i]) & HOLDER_BITS) == holder >> 3:
            us_store(&words[i], fresh)
            return
    # The oldest goes: words move down by one.
    for i in range(DEDUPE_WAYS - 1):
        us_store(&words[i], us_load(&words[i + 1]))
    us_store(&words[DEDUPE_WAYS - 1], fresh)
