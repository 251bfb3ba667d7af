"""The keyed sum (see sum.pxd), and a window into it for tests. Touches its key, and reads what it is given."""
from libc.stdint cimport uint64_t

cdef extern from "sum.h" nogil:
    enum:
        US_SUM_KINDS
    int us_sum_kind
    int us_sum_can(int kind)
    int us_sum_start()
    uint64_t us_sum_by(int kind, const void* data, uint64_t bytes)

NAMES = ("nh", "clnh 256", "clnh 512")


cdef int sum_start() noexcept nogil:
    return us_sum_start()


cdef uint64_t sum_folio(const void* data, uint64_t bytes) noexcept nogil:
    return us_sum_by(us_sum_kind, data, bytes)


def kinds() -> list[str]:
    """The kinds of sum that this processor can do; the last is what userswap uses."""
    return [NAMES[kind] for kind in range(US_SUM_KINDS) if us_sum_can(kind)]


def used() -> str:
    """The kind that userswap uses here."""
    if sum_start() != 0:
        raise OSError("the system gives no random numbers")
    return NAMES[us_sum_kind]


def sum_by(kind: str, const unsigned char[::1] data not None) -> int:
    """The sum of a multiple of 1 KiB, up to 64 KiB, at an address that is a multiple of 8."""
    used()
    cdef int number = NAMES.index(kind)
    if data.shape[0] % 1024 or not 0 < data.shape[0] <= 65536 or <uint64_t>&data[0] % 8:
        raise ValueError("a sum is of 1 to 64 KiB, in whole ones, at a multiple of 8")
    if not us_sum_can(number):
        raise ValueError(f"this processor can't do {kind}")
    return us_sum_by(number, &data[0], <uint64_t>data.shape[0])
