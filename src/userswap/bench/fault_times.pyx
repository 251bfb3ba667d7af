"""How long a pool's faults took, for benchmarks: reads its counters, touches nothing."""
from userswap._core cimport Core
from userswap.memory.regions cimport BUCKETS
from userswap.native.us cimport us_read


def fault_times(core: Core) -> list[int]:
    """Return the number of faults so far, by how long they took: 8 buckets to an octave of nanoseconds."""
    cdef int i
    return [us_read(&core.alive().fault_times[i]) for i in range(BUCKETS)]


def percentile(times: list[int], share: float) -> int:
    """Return what so many per cent of faults took at most, ns: the middle of that bucket, 0 if there was no fault."""
    seen = 0
    total = sum(times)
    for index, number in enumerate(times):
        seen += number
        if number and seen * 100 >= total * share:
            # As `bucket` in memory/faults has it.
            octave = (index >> 3) - 1
            return index if index < 16 else ((8 + (index & 7)) << octave) + (1 << octave >> 1)
    return 0
