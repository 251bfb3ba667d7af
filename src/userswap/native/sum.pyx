"""The keyed sum (see sum.pxd), and a window into it for tests. Touches its key, and reads what it is given."""
from libc.stdint cimport int64_t, uint64_t

from userswap.native.us cimport us_now

cdef extern from "sum.h" nogil:
    enum:
        US_SUM_KINDS
    int us_sum_kind
    int us_sum_can(int kind)
    int us_sum_start()
    uint64_t us_sum_by(int kind, const void* data, uint64_t bytes)
    uint64_t us_sum_bound(int kind, const void* data, uint64_t bytes, uint64_t one, uint64_t other)

NAMES = ("nh", "clnh 256", "clnh 512")


cdef int sum_start() noexcept nogil:
    return us_sum_start()


cdef uint64_t sum_folio(const void* data, uint64_t bytes) noexcept nogil:
    return us_sum_by(us_sum_kind, data, bytes)


cdef uint64_t sum_bound(const void* data, uint64_t bytes, uint64_t one, uint64_t other) noexcept nogil:
    return us_sum_bound(us_sum_kind, data, bytes, one, other)


def sum_speed(n: int, rounds: int) -> float:
    """Nanoseconds for a sum of n bytes, at most 64 KiB."""
    used()
    cdef int _i, turns = rounds
    cdef uint64_t bytes = n, sum = 0
    room = bytearray(n)
    cdef const char* data = room
    cdef int64_t started = us_now()
    for _i in range(turns):
        sum ^= sum_bound(data, bytes, sum, _i)
    return <double>(us_now() - started) / turns


def kinds() -> list[str]:
    """The kinds of sum that this processor can do; the last is what userswap uses."""
    return [NAMES[kind] for kind in range(US_SUM_KINDS) if us_sum_can(kind)]


def used() -> str:
    """The kind that userswap uses here."""
    if sum_start() != 0:
        raise OSError("the system gives no random numbers")
    return NAMES[us_sum_kind]


def sum_by(kind: str, const unsigned char[::1] data not None, uint64_t one=0, uint64_t other=0,
           bint bound=False) -> int:
    """The sum of up to 64 KiB; `bound`: of what belongs to the words `one` and `other`."""
    used()
    cdef int number = NAMES.index(kind)
    if not 0 < data.shape[0] <= 65536:
        raise ValueError("a sum is of 1 byte to 64 KiB")
    if not us_sum_can(number):
        raise ValueError(f"this processor can't do {kind}")
    if bound:
        return us_sum_bound(number, &data[0], <uint64_t>data.shape[0], one, other)
    return us_sum_by(number, &data[0], <uint64_t>data.shape[0])
