"""The malloc family's front end: what the preloaded library (native/shim.c) offers us, from any library of the process.

`userswap run` preloads it; without it there is nothing here to install. Touches memory_new, memory_free and
memory_resize only. What is freed or resized is told apart by its address, whoever allocates now, and so it may be freed
by any thread, after the pool was closed, in a forked child, and while the process ends.

What stays libc's, whatever its size: what is asked for while this thread is in the middle of a transition, and what
libc, the loader, the compressor and our own modules ask for (told by the caller's address). libc makes system calls on
such memory without anybody's wrapper; the others work with it while something is swapped.
"""
from libc.stdint cimport uint64_t
from libc.stdlib cimport abort
from libc.string cimport memcpy, strlen

from userswap._core cimport Core
from userswap.memory.faults cimport memory_free, memory_inside, memory_new, memory_resize
from userswap.memory.regions cimport MemoryPool, Region, arena_bytes, arena_start, pool_get, region_at
from userswap.memory.syscalls cimport left_alone
from userswap.native.us cimport us_load_ptr, us_store_ptr

cdef extern from "shim.h" nogil:
    enum:
        US_SHIM_CALLERS
    struct us_shim_caller:
        uint64_t start
        uint64_t length
    struct us_shim:
        uint64_t start
        uint64_t length
        size_t least
        us_shim_caller callers[US_SHIM_CALLERS]
        int caller_count
        void* (*allocate)(size_t size, size_t alignment, int zeros) noexcept nogil
        void* (*resize)(void* data, size_t size) noexcept nogil
        void (*release)(void* data) noexcept nogil
        size_t (*usable)(const void* data) noexcept nogil
    us_shim* us_shim_find()

cdef extern from "<link.h>" nogil:
    enum:
        PT_LOAD
    ctypedef struct Phdr "Elf64_Phdr":
        int p_type
        uint64_t p_vaddr
        uint64_t p_memsz
    struct dl_phdr_info:
        uint64_t dlpi_addr
        const char* dlpi_name
        const Phdr* dlpi_phdr
        unsigned short dlpi_phnum
    int dl_iterate_phdr(int (*)(dl_phdr_info*, size_t, void*) noexcept nogil, void*)

cdef extern from "<unistd.h>" nogil:
    ssize_t write(int fd, const void* buffer, size_t length)

cdef enum:
    FOLIO = 65536
    # Whatever --min-array says: nobody makes a path, a socket address, an iovec or a signal stack so large.
    LEAST = 65536

# Where new memory comes from. Read by every large allocation, by whatever thread; it is not taken back from the pool
# when it changes, as somebody may be about to use it.
cdef MemoryPool* installed = NULL


cdef void* allocate(size_t size, size_t alignment, int zeros) noexcept nogil:
    cdef MemoryPool* pool = <MemoryPool*>us_load_ptr(<void**>&installed)
    cdef uint64_t data
    if pool == NULL or memory_inside():
        return NULL
    if alignment <= FOLIO:
        return memory_new(pool, size, zeros)
    if size > arena_bytes() or alignment > arena_bytes():
        return NULL
    data = <uint64_t>memory_new(pool, size + alignment, zeros)
    return <void*>((data + alignment - 1) & ~<uint64_t>(alignment - 1))


cdef void release(void* data) noexcept nogil:
    cdef Region* region = region_at(data)
    cdef const char* text = b"userswap: free(): invalid pointer\n"
    if region == NULL or <uint64_t>data & (FOLIO - 1):
        # As libc does: freed twice, or never allocated.
        write(2, text, strlen(text))
        abort()
    memory_free(region.base)        # not `data`, if it was aligned to more than regions are


cdef size_t usable(const void* data) noexcept nogil:
    cdef Region* region = region_at(data)
    return <size_t>(region.base + region.bytes - <char*>data) if region != NULL else 0


cdef void* resize(void* data, size_t size) noexcept nogil:
    cdef size_t before = usable(data)
    cdef void* fresh = memory_resize(data, size)
    if fresh == NULL and before:
        # It was aligned to more than regions are, and need not be any more; or there is no address space.
        fresh = allocate(size, 16, False)
        if fresh != NULL:
            memcpy(fresh, data, before if before < size else size)
            release(data)
    return fresh


cdef int add_caller(dl_phdr_info* info, size_t size, void* data) noexcept nogil:
    cdef us_shim* shim = <us_shim*>data
    cdef uint64_t low = <uint64_t>-1, high = 0
    cdef const Phdr* segment
    cdef int i
    if not left_alone(info.dlpi_name):
        return 0
    for i in range(info.dlpi_phnum):
        segment = &info.dlpi_phdr[i]
        if segment.p_type == PT_LOAD:
            low = min(low, segment.p_vaddr)
            high = max(high, segment.p_vaddr + segment.p_memsz)
    if high > low:
        if shim.caller_count == US_SHIM_CALLERS:
            return 1
        shim.callers[shim.caller_count].start = info.dlpi_addr + low
        shim.callers[shim.caller_count].length = high - low
        shim.caller_count += 1
    return 0


def install(core: Core | None, least_bytes: int) -> bool:
    """From now on large allocations of any library live in the pool of `core`; None ends that.

    `least_bytes`: from this size on, or from 64 KiB. Returns whether the library was preloaded: else nothing is done.
    """
    global installed
    cdef us_shim* shim = us_shim_find()
    cdef size_t least = max(<size_t>least_bytes, <size_t>LEAST)
    if shim == NULL:
        return False
    if core is None:
        shim.least = <size_t>-1
        us_store_ptr(<void**>&installed, NULL)
        return True
    if shim.allocate == NULL:
        if dl_iterate_phdr(add_caller, shim) != 0:
            raise RuntimeError("userswap has more modules than its allocator has room for")
        # First what tells our memory apart, for there may be some as soon as there is `allocate`.
        shim.release = release
        shim.usable = usable
        shim.resize = resize
        shim.start = <uint64_t>arena_start
        shim.length = arena_bytes()
        us_store_ptr(<void**>&shim.allocate, <void*>allocate)
    pool_get((<Core>core).pool)     # for ever: see `installed`
    us_store_ptr(<void**>&installed, (<Core>core).pool)
    shim.least = least
    return True


def preloaded() -> bool:
    """Whether the library is in this process."""
    return us_shim_find() != NULL


def owns(buffer) -> bool:
    """Whether the first byte of a buffer is swapped memory."""
    cdef const unsigned char[::1] view = memoryview(buffer).cast("B")
    return len(view) > 0 and region_at(&view[0]) != NULL
