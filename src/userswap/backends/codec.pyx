"""The codec: Blosc2 through its C API, on contexts made once.

The library is loaded straight from the ``blosc2`` wheel (its Python package is not imported). What a
folio is best compressed with depends on an item size that nobody told us, so a few *recipes* are
tried on a sample and the winner is kept by the caller. Touches nothing but its arguments.
"""
from libc.stdint cimport int16_t, int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.string cimport memset

from userswap.native.us cimport (
    us_add, us_futex_wait, us_futex_wake, us_lock, us_mutex, us_read, us_unlock,
)


cdef extern from "blosc2.h" nogil:
    enum:
        BLOSC2_VERSION_MAJOR
        BLOSC_NOSHUFFLE
        BLOSC_SHUFFLE
        BLOSC_BITSHUFFLE
        BLOSC_LZ4
        BLOSC2_MAX_FILTERS
        BLOSC_FORWARD_COMPAT_SPLIT
        BLOSC_NEVER_SPLIT
        BLOSC_ALWAYS_SPLIT
        BLOSC2_MAX_OVERHEAD
    ctypedef struct blosc2_cparams:
        uint8_t compcode
        uint8_t clevel
        int32_t typesize
        int16_t nthreads
        int32_t blocksize
        int32_t splitmode
        uint8_t filters[6]
        uint8_t filters_meta[6]
    ctypedef struct blosc2_dparams:
        int16_t nthreads
    ctypedef struct blosc2_context:
        pass


cdef extern from "<dlfcn.h>" nogil:
    enum:
        RTLD_NOW
        RTLD_LOCAL
    void* dlopen(const char* path, int flags)
    void* dlsym(void* library, const char* name)
    char* dlerror()


cdef extern from "<sys/mman.h>" nogil:
    enum:
        PROT_READ
        PROT_WRITE
        MAP_PRIVATE
        MAP_ANONYMOUS
        MADV_DONTDUMP
    void* MAP_FAILED
    void* mmap(void* address, size_t length, int prot, int flags, int fd, long offset)
    int madvise(void* address, size_t length, int advice)


ctypedef blosc2_cparams (*cparams_fn)() noexcept nogil
ctypedef blosc2_dparams (*dparams_fn)() noexcept nogil
ctypedef void (*init_fn)() noexcept nogil
ctypedef const char* (*version_fn)() noexcept nogil
ctypedef blosc2_context* (*cctx_fn)(blosc2_cparams) noexcept nogil
ctypedef blosc2_context* (*dctx_fn)(blosc2_dparams) noexcept nogil
ctypedef int (*compress_fn)(blosc2_context*, const void*, int32_t, void*, int32_t) noexcept nogil
ctypedef int (*decompress_fn)(blosc2_context*, const void*, int32_t, void*, int32_t) noexcept nogil

cdef init_fn b_init = NULL
cdef cctx_fn b_cctx
cdef dctx_fn b_dctx
cdef cparams_fn b_cparams
cdef dparams_fn b_dparams
cdef compress_fn b_compress
cdef decompress_fn b_decompress
cdef version_fn b_version
