/* The preloaded library: malloc and its kin, in front of libc's.
 *
 * `userswap run` puts it into LD_PRELOAD, so every library of the process allocates here. Until the core has set
 * `userswap_shim`, and for everything small, a call goes straight to whoever was next (libc, or another allocator that
 * the user has preloaded). Large requests are offered to the core; what is ours is told apart by its address.
 *
 * Nothing here may allocate, use thread-locals, or touch the memory that it hands out, except to copy for realloc.
 * Linked against libc alone.
 */
#define _GNU_SOURCE
#include "shim.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#if !defined(__GLIBC__)
#error "userswap's allocator stands in front of glibc's; other C libraries are not supported yet"
#endif

#define EXPORT __attribute__((visibility("default")))
#define CALLER ((uintptr_t)__builtin_return_address(0))
#define LIKELY(c) __builtin_expect(!!(c), 1)
#define UNLIKELY(c) __builtin_expect(!!(c), 0)

EXPORT struct us_shim userswap_shim = {.least = SIZE_MAX};
#define shim userswap_shim

/* ---- those that are next ---- */

static struct {
    void *(*malloc)(size_t);
    void *(*calloc)(size_t, size_t);
    void *(*realloc)(void *, size_t);
    void (*free)(void *);
    void *(*memalign)(size_t, size_t);
    void *(*aligned_alloc)(size_t, size_t);
    int (*posix_memalign)(void **, size_t, size_t);
    size_t (*usable)(void *);
} real;

/* dlsym may allocate a little before we know whom to ask (glibc before 2.34). It is never given back. */
static char spare[4096] __attribute__((aligned(16)));
static size_t spare_used;
static int is_spare(const void *data) { return (uintptr_t)data - (uintptr_t)spare < sizeof spare; }
static void *spare_malloc(size_t size) {
    size_t at = spare_used;
    if (size > sizeof spare - at) return NULL;
    spare_used = (at + size + 15) & ~(size_t)15;
    return spare + at;
}
static void *spare_calloc(size_t count, size_t size) { return spare_malloc(count * size); }
static void *spare_realloc(void *data, size_t size) {
    char *fresh = spare_malloc(size);
    for (size_t i = 0; fresh && data && i < size && (char *)data + i < spare + sizeof spare; i++)
        fresh[i] = ((char *)data)[i];
    return fresh;
}
static void spare_free(void *data) { (void)data; }

/* By one thread: the first allocation of a process is the loader's, or a constructor's. */
static void find_real(void) {
    if (real.malloc) return;
    real.malloc = spare_malloc;
    real.calloc = spare_calloc;
    real.realloc = spare_realloc;
    real.free = spare_free;
    void *calloc_ = dlsym(RTLD_NEXT, "calloc"), *realloc_ = dlsym(RTLD_NEXT, "realloc");
    void *malloc_ = dlsym(RTLD_NEXT, "malloc"), *free_ = dlsym(RTLD_NEXT, "free");
    *(void **)&real.memalign = dlsym(RTLD_NEXT, "memalign");
    *(void **)&real.aligned_alloc = dlsym(RTLD_NEXT, "aligned_alloc");
    *(void **)&real.posix_memalign = dlsym(RTLD_NEXT, "posix_memalign");
    *(void **)&real.usable = dlsym(RTLD_NEXT, "malloc_usable_size");
    *(void **)&real.calloc = calloc_;
    *(void **)&real.realloc = realloc_;
    *(void **)&real.free = free_;
    *(void **)&real.malloc = malloc_;
}

/* ---- large requests ---- */

static int ours(const void *data) { return (uintptr_t)data - shim.start < shim.length; }

/* Whether the core is to be asked. Not by who allocates for system calls that he makes by himself (libc, the loader),
 * nor by what works while memory is swapped (the core, the compressor). */
static __attribute__((noinline)) int wanted(uintptr_t caller) {
    if (!__atomic_load_n(&shim.allocate, __ATOMIC_ACQUIRE)) return 0;
    for (int i = 0; i < shim.caller_count; i++)
        if (caller - shim.callers[i].start < shim.callers[i].length) return 0;
    return 1;
}

static __attribute__((noinline)) void *large(size_t size, size_t alignment, int zeros, uintptr_t caller) {
    int kept = errno;
    void *data = wanted(caller) ? shim.allocate(size, alignment, zeros) : NULL;
    errno = kept;
    return data;
}

static int is_large(size_t size) { return UNLIKELY(size >= __atomic_load_n(&shim.least, __ATOMIC_RELAXED)); }

static void release(void *data) {
    int kept = errno;
    shim.release(data);
    errno = kept;
}

/* From one allocator to the other. */
static void *move(void *old, size_t old_size, void *fresh, size_t size) {
    if (!fresh) return NULL;
    memcpy(fresh, old, old_size < size ? old_size : size);
    if (ours(old)) release(old);
    else real.free(old);
    return fresh;
}

static void *resize(void *data, size_t size, uintptr_t caller) {
    void *fresh = NULL;
    if (ours(data)) {
        if (size == 0) {
            release(data);
            return NULL;
        }
        size_t old = shim.usable(data);
        if (size <= old && size >= old / 2) return data;
        if (is_large(size) && wanted(caller)) {
            int kept = errno;
            fresh = shim.resize(data, size);
            errno = kept;
            if (fresh) return fresh;
        }
        return move(data, old, real.malloc(size), size);
    }
    if (is_large(size)) fresh = large(size, 16, 0, caller);
    if (!fresh) return real.realloc(data, size);
    return move(data, real.usable(data), fresh, size);
}

/* ---- the family ---- */

EXPORT void *malloc(size_t size) {
    if (UNLIKELY(!real.malloc)) find_real();
    void *data = is_large(size) ? large(size, 16, 0, CALLER) : NULL;
    return LIKELY(!data) ? real.malloc(size) : data;
}

EXPORT void *calloc(size_t count, size_t size) {
    if (UNLIKELY(!real.malloc)) find_real();
    size_t bytes;
    void *data = NULL;
    if (!__builtin_mul_overflow(count, size, &bytes) && is_large(bytes)) data = large(bytes, 16, 1, CALLER);
    return LIKELY(!data) ? real.calloc(count, size) : data;
}

EXPORT void *realloc(void *data, size_t size) {
    if (UNLIKELY(!real.malloc)) find_real();
    if (UNLIKELY(is_spare(data))) return move(data, (size_t)(spare + sizeof spare - (char *)data), malloc(size), size);
    if (!data) {
        void *fresh = is_large(size) ? large(size, 16, 0, CALLER) : NULL;
        return fresh ? fresh : real.malloc(size);
    }
    if (UNLIKELY(ours(data)) || is_large(size)) return resize(data, size, CALLER);
    return real.realloc(data, size);
}

EXPORT void *reallocarray(void *data, size_t count, size_t size) {
    size_t bytes;
    if (__builtin_mul_overflow(count, size, &bytes)) {
        errno = ENOMEM;
        return NULL;
    }
    if (UNLIKELY(!real.malloc)) find_real();
    if (data && (ours(data) || is_large(bytes))) return resize(data, bytes, CALLER);
    void *fresh = !data && is_large(bytes) ? large(bytes, 16, 0, CALLER) : NULL;
    return fresh ? fresh : real.realloc(data, bytes);
}

EXPORT void free(void *data) {
    if (UNLIKELY(ours(data))) release(data);
    else if (LIKELY(data && !is_spare(data))) {
        if (UNLIKELY(!real.malloc)) find_real();
        real.free(data);
    }
}

static int is_power(size_t alignment) { return alignment && !(alignment & (alignment - 1)); }

EXPORT int posix_memalign(void **where, size_t alignment, size_t size) {
    if (UNLIKELY(!real.malloc)) find_real();
    void *data = NULL;
    if (is_large(size) && is_power(alignment) && alignment % sizeof(void *) == 0)
        data = large(size, alignment, 0, CALLER);
    if (!data) return real.posix_memalign(where, alignment, size);
    *where = data;
    return 0;
}

EXPORT void *aligned_alloc(size_t alignment, size_t size) {
    if (UNLIKELY(!real.malloc)) find_real();
    void *data = is_large(size) && is_power(alignment) ? large(size, alignment, 0, CALLER) : NULL;
    return data ? data : real.aligned_alloc(alignment, size);
}

EXPORT void *memalign(size_t alignment, size_t size) {
    if (UNLIKELY(!real.malloc)) find_real();
    void *data = is_large(size) && is_power(alignment) ? large(size, alignment, 0, CALLER) : NULL;
    return data ? data : real.memalign(alignment, size);
}

/* Both are aligned to a page; the other one fills it too. */
EXPORT void *valloc(size_t size) {
    if (UNLIKELY(!real.malloc)) find_real();
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    void *data = is_large(size) ? large(size, page, 0, CALLER) : NULL;
    return data ? data : real.memalign(page, size);
}
EXPORT void *pvalloc(size_t size) {
    if (UNLIKELY(!real.malloc)) find_real();
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    if (size > SIZE_MAX - page) {
        errno = ENOMEM;
        return NULL;
    }
    size = (size + page - 1) / page * page;
    void *data = is_large(size) ? large(size, page, 0, CALLER) : NULL;
    return data ? data : real.memalign(page, size);
}

EXPORT size_t malloc_usable_size(void *data) {
    if (UNLIKELY(ours(data))) return shim.usable(data);
    if (!data || is_spare(data)) return 0;
    if (UNLIKELY(!real.malloc)) find_real();
    return real.usable(data);
}

/* ---- fork (see us_shim_atfork) ---- */

static void before_fork(void) {
    if (__atomic_load_n(&shim.before_fork, __ATOMIC_ACQUIRE)) shim.before_fork();
}
static void in_parent(void) {
    if (shim.before_fork) shim.after_in_parent();
}
static void in_child(void) {
    if (shim.before_fork) shim.after_in_child();
}

__attribute__((constructor)) static void start(void) {
    find_real();
    pthread_atfork(before_fork, in_parent, in_child);
}
