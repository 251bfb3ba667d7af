/* Between the preloaded library (shim.c) and the core in the Python process: what the core hands over.
 *
 * The library knows nothing of regions. The core finds it by its one symbol, `userswap_shim`, if it was preloaded.
 */
#ifndef USERSWAP_NATIVE_SHIM_H
#define USERSWAP_NATIVE_SHIM_H

#include <dlfcn.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

#define US_SHIM_CALLERS 128

/* A range of code whose large allocations stay libc's. */
struct us_shim_caller { uintptr_t start, length; };

struct us_shim {
    /* Addresses that may be ours. Set once, never changed: what is freed is told apart by it, for ever. */
    uintptr_t start, length;
    /* Allocations from this size on are offered to the core; SIZE_MAX: none. */
    size_t least;
    struct us_shim_caller callers[US_SHIM_CALLERS];
    int caller_count;
    /* Aligned to `alignment`, and if `zeros` all zeros; NULL: libc shall give it. */
    void *(*allocate)(size_t size, size_t alignment, int zeros);
    /* realloc of memory of ours; NULL: it can't be had, and the memory is as it was. */
    void *(*resize)(void *data, size_t size);
    void (*release)(void *data);
    /* Bytes from `data` to the end of its block, 0 if it is in none. */
    size_t (*usable)(const void *data);
    /* fork: before those of any library that was loaded later has been called, and after them. */
    void (*before_fork)(void), (*after_in_parent)(void), (*after_in_child)(void);
};

/* NULL: the library was not preloaded. */
static inline struct us_shim *us_shim_find(void) {
    return (struct us_shim *)dlsym(RTLD_DEFAULT, "userswap_shim");
}

/* pthread_atfork for the core. Handlers run from the last registered to the first before a fork, and from the first
 * to the last after it, so what the preloaded library registers is inmost: no handler of any library runs while our
 * gate is closed, or in a child that has no userfaultfd yet. Without it we are as early as we are loaded. */
static inline int us_shim_atfork(void (*before)(void), void (*in_parent)(void), void (*in_child)(void)) {
    struct us_shim *shim = us_shim_find();
    if (!shim) return pthread_atfork(before, in_parent, in_child);
    shim->after_in_parent = in_parent;
    shim->after_in_child = in_child;
    __atomic_store_n(&shim->before_fork, before, __ATOMIC_RELEASE);
    return 0;
}

#endif
