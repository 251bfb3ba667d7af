"""NumPy's front end: its data allocator (NEP 49), in two forms. Touches memory_new, memory_free and memory_resize only.

A pool's own arrays (``Pool.zeros`` and so on) are made under a handler of that pool, set with PyDataMem_SetHandler
for the duration of the call: they are ordinary arrays that own their data, and hold the handler, which holds the pool.

``install()`` is about every array that the program makes, in whatever thread. A handler that is set lives in a
context variable, which other threads don't inherit, so ``install`` changes what NumPy's *default* handler does:
large blocks come from the installed pool, the rest from where they came before. What is freed or resized is told
apart by its address, so arrays made before, inside and after each free rightly, also long after the end of a
``with`` block and from any thread.

Under ``userswap run`` NumPy's blocks would also reach malloc_hook. They are taken here, because only here the size that
was asked for counts whatever it is, and because an inner `install` or a pool of one's own is NumPy's alone. An array is
large in both places, so it never gets there; and what there is, is told apart by the same addresses.
"""
from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_New
from cpython.ref cimport PyObject
from libc.stdint cimport uint8_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, strncpy

from userswap._core cimport Core
from userswap.memory.faults cimport memory_free, memory_new, memory_pool_close, memory_resize
from userswap.memory.regions cimport MemoryPool, Region, pool_get, region_at

cdef extern from *:
    """
    /* Where the arrays may be that this thread makes now; 0: where the pool says. */
    static __thread unsigned us_tiers;
    static unsigned us_wanted_tiers(void) { return us_tiers; }
    static unsigned us_want_tiers(unsigned tiers) { unsigned before = us_tiers; us_tiers = tiers; return before; }
    """
    unsigned us_wanted_tiers() nogil
    unsigned us_want_tiers(unsigned tiers) nogil

cdef extern from "numpy/arrayobject.h":
    ctypedef struct PyDataMemAllocator:
        void* ctx
        void* (*malloc)(void* ctx, size_t size) noexcept nogil
        void* (*calloc)(void* ctx, size_t count, size_t size) noexcept nogil
        void* (*realloc)(void* ctx, void* data, size_t size) noexcept nogil
        void (*free)(void* ctx, void* data, size_t size) noexcept nogil
    ctypedef struct PyDataMem_Handler:
        char name[127]
        uint8_t version
        PyDataMemAllocator allocator
    object PyDataMem_SetHandler(object handler)
    PyObject* PyDataMem_DefaultHandler
    int _import_array() except -1

cdef extern from "<malloc.h>" nogil:
    size_t malloc_usable_size(void* data)

cdef enum:
    LEAST_ARRAY = 4096

_import_array()

# NumPy's own allocator, as it was before we came. Set once, never changed.
cdef PyDataMemAllocator plain
cdef PyDataMem_Handler* default_handler = NULL
# What install() set: read by every allocation. Changed with the GIL held; in a free-threaded build a pool that is
# replaced stays open until `uninstall` returns, which is after the pointer has changed.
cdef MemoryPool* installed = NULL
cdef size_t least = 0


cdef void* move_block(void* old, size_t old_size, void* fresh, size_t size) noexcept nogil:
    if fresh != NULL:
        memcpy(fresh, old, old_size if old_size < size else size)
    return fresh


cdef void* resize(MemoryPool* pool, size_t threshold, void* data, size_t size) noexcept nogil:
    """realloc for any block: ours or not, before and after. `pool` may be NULL."""
    cdef Region* region = region_at(data)
    cdef void* fresh
    cdef size_t old
    if region == NULL:
        if pool == NULL or size < threshold:
            return plain.realloc(plain.ctx, data, size)
        fresh = memory_new(pool, size)
        if fresh == NULL:
            return plain.realloc(plain.ctx, data, size)
        if data != NULL:
            old = malloc_usable_size(data)
            move_block(data, old, fresh, size)
            plain.free(plain.ctx, data, old)        # by its size NumPy knows whether to keep it for later
        return fresh
    if size <= region.bytes and size >= region.bytes // 2:
        return data
    if size >= threshold:
        if pool == NULL or pool == region.pool:
            return memory_resize(data, size)
        fresh = memory_new(pool, size)
    else:
        fresh = plain.malloc(plain.ctx, size)
    if move_block(data, region.bytes, fresh, size) != NULL:
        memory_free(data)
    return fresh


cdef void release(void* data, size_t size) noexcept nogil:
    if region_at(data) != NULL:
        memory_free(data)
    else:
        plain.free(plain.ctx, data, size)


# ---- the default handler's functions while we are installed, and ever after ----

cdef void* default_malloc(void* ctx, size_t size) noexcept nogil:
    cdef void* data = NULL
    if installed != NULL and size >= least:
        data = memory_new(installed, size)
    return data if data != NULL else plain.malloc(plain.ctx, size)


cdef void* default_calloc(void* ctx, size_t count, size_t size) noexcept nogil:
    cdef void* data = NULL
    if installed != NULL and size != 0 and count <= <size_t>-1 // size and count * size >= least:
        data = memory_new(installed, count * size)      # a new region reads as zeros
    return data if data != NULL else plain.calloc(plain.ctx, count, size)


cdef void* default_realloc(void* ctx, void* data, size_t size) noexcept nogil:
    return resize(installed, least if installed != NULL else LEAST_ARRAY, data, size)


cdef void default_free(void* ctx, void* data, size_t size) noexcept nogil:
    release(data, size)


# ---- a pool's own handler: ctx is the pool ----

cdef inline void* pool_new(void* ctx, size_t size) noexcept nogil:
    cdef void* data = memory_new(<MemoryPool*>ctx, size)
    if data != NULL and us_wanted_tiers():
        region_at(data).hint.tiers = us_wanted_tiers()
    return data


cdef void* pool_malloc(void* ctx, size_t size) noexcept nogil:
    cdef void* data = pool_new(ctx, size) if size >= LEAST_ARRAY else NULL
    return data if data != NULL or size >= LEAST_ARRAY else plain.malloc(plain.ctx, size)


cdef void* pool_calloc(void* ctx, size_t count, size_t size) noexcept nogil:
    if size != 0 and count > <size_t>-1 // size:
        return NULL
    if count * size >= LEAST_ARRAY:
        return pool_new(ctx, count * size)
    return plain.calloc(plain.ctx, count, size)


cdef void* pool_realloc(void* ctx, void* data, size_t size) noexcept nogil:
    return resize(<MemoryPool*>ctx, LEAST_ARRAY, data, size)


cdef void pool_free(void* ctx, void* data, size_t size) noexcept nogil:
    release(data, size)


cdef void handler_destroyed(object capsule) noexcept:
    cdef PyDataMem_Handler* handler = <PyDataMem_Handler*>PyCapsule_GetPointer(capsule, b"mem_handler")
    memory_pool_close(<MemoryPool*>handler.allocator.ctx)
    free(handler)


cdef void prepare() except *:
    """Remember what NumPy's default handler does."""
    global default_handler
    if default_handler != NULL:
        return
    cdef PyDataMem_Handler* handler = <PyDataMem_Handler*>PyCapsule_GetPointer(
        <object>PyDataMem_DefaultHandler, b"mem_handler")
    plain.ctx = handler.allocator.ctx
    plain.malloc = handler.allocator.malloc
    plain.calloc = handler.allocator.calloc
    plain.realloc = handler.allocator.realloc
    plain.free = handler.allocator.free
    default_handler = handler


def new_handler(core: Core):
    """A NEP 49 handler (a capsule) whose arrays live in the pool of `core`; holds the pool."""
    prepare()
    cdef PyDataMem_Handler* handler = <PyDataMem_Handler*>calloc(1, sizeof(PyDataMem_Handler))
    if handler == NULL:
        raise MemoryError
    strncpy(handler.name, b"userswap", sizeof(handler.name) - 1)
    handler.version = 1
    handler.allocator.ctx = (<Core>core).pool
    handler.allocator.malloc = pool_malloc
    handler.allocator.calloc = pool_calloc
    handler.allocator.realloc = pool_realloc
    handler.allocator.free = pool_free
    capsule = PyCapsule_New(handler, b"mem_handler", handler_destroyed)
    pool_get((<Core>core).pool)         # a small array of ours may outlive every region and then grow
    return capsule


def call_with_handler(handler, tiers, function, *args, **kwargs):
    """Call `function` with `handler` as NumPy's allocator in this context; returns what it returns. `tiers`: where what it
    allocates may be, a bit each; 0: where the pool says."""
    cdef unsigned wanted = us_want_tiers(tiers)
    before = PyDataMem_SetHandler(handler)
    try:
        return function(*args, **kwargs)
    finally:
        PyDataMem_SetHandler(before)
        us_want_tiers(wanted)


def install(core: Core | None, least_bytes: int) -> None:
    """From now on arrays of `least_bytes` and more, made under NumPy's default handler, live in the pool of `core`.

    None ends that; arrays that were made keep their memory. The caller keeps `core` open while it is installed.
    """
    global installed, least
    cdef PyDataMem_Handler* handler
    prepare()
    handler = default_handler
    if core is None:
        installed = NULL
        return
    # release and resize first: from the first array of ours on they must know it
    handler.allocator.free = default_free
    handler.allocator.realloc = default_realloc
    least = max(<size_t>least_bytes, <size_t>LEAST_ARRAY)
    installed = (<Core>core).pool
    handler.allocator.malloc = default_malloc
    handler.allocator.calloc = default_calloc
