"""Arrays in reserved address space: see pages.pxd."""
from libc.stdint cimport uint16_t, uint64_t

from userswap.native.mman cimport (
    MADV_DONTNEED, MADV_NOHUGEPAGE, MAP_ANONYMOUS, MAP_FAILED, MAP_NORESERVE, MAP_POPULATE, MAP_PRIVATE, PROT_READ,
    PROT_WRITE, madvise, mmap,
)
from userswap.native.us cimport us_add, us_assert, us_chaos, us_debug


cdef void* pages_reserve(uint64_t length) noexcept nogil:
    cdef void* memory = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    if memory == MAP_FAILED:
        return NULL
    # A huge page would be memory that nobody counts.
    madvise(memory, length, MADV_NOHUGEPAGE)
    return memory


cdef void* pages_populate(uint64_t length) noexcept nogil:
    cdef void* memory = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0)
    return NULL if memory == MAP_FAILED else memory


cdef void page_less(Pages* total, uint16_t* used, int n, void* page) noexcept nogil:
    cdef int now = used[0] - n
    cdef int i
    us_assert(now > 0, "a page is not used by fewer than none")
    us_chaos()
    used[0] = <uint16_t>now
    if now > 1:
        return
    if us_debug():
        for i in range(PAGE // 8):
            us_assert((<uint64_t*>page)[i] == 0, "a page without users holds nothing")
    us_chaos()
    if us_add(&total.idle, 1) <= IDLE_PAGES or madvise(page, PAGE, MADV_DONTNEED) != 0:
        return
    used[0] = 0
    us_add(&total.idle, -1)
    us_add(&total.bytes, -PAGE)
