/* What Cython cannot say: atomics, futex locks, thread-locals, userfaultfd's numbers.
 *
 * Everything here is static inline and small. No other room defines atomics or locks.
 *
 * Lock order, outermost first (see docs/architecture.md, "Locks"):
 *   gate > page-table word BUSY > swap entry LOCKED > one of the leaf mutexes
 * A leaf mutex (region list, clock hand, zswap, swap map, slots, workers) is held for a
 * few instructions and nothing in it can fault on region memory.
 */
#ifndef USERSWAP_NATIVE_US_H
#define USERSWAP_NATIVE_US_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <linux/userfaultfd.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* ---- what the headers of an older system lack, though the kernel may have it ---- */

#ifndef UFFDIO_MOVE /* Linux 6.8 */
struct uffdio_move {
    __u64 dst, src, len, mode;
    __s64 move;
};
#define UFFDIO_MOVE _IOWR(UFFDIO, 0x05, struct uffdio_move)
#define UFFDIO_MOVE_MODE_DONTWAKE ((__u64)1 << 0)
#endif
#ifndef UFFD_FEATURE_MOVE
#define UFFD_FEATURE_MOVE (1 << 16)
#endif
#ifndef UFFDIO_POISON /* Linux 6.6 */
struct uffdio_poison {
    struct uffdio_range range;
    __u64 mode;
    __s64 updated;
};
#define UFFDIO_POISON _IOWR(UFFDIO, 0x08, struct uffdio_poison)
#endif
#ifndef USERFAULTFD_IOC_NEW /* Linux 6.1 */
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif

/* ---- assertions and injected delays: only in the debug build (make debug) ---- */

#ifdef US_DEBUG
static inline void us_assert_fail(const char *what, const char *file, int line) {
    char text[256];
    int n = snprintf(text, sizeof text, "userswap: assertion failed: %s (%s:%d)\n", what, file, line);
    ssize_t ignored = write(2, text, n > 0 ? (size_t)n : 0);
    (void)ignored;
    abort();
}
#define US_ASSERT(c) ((c) ? (void)0 : us_assert_fail(#c, __FILE__, __LINE__))
#else
#define US_ASSERT(c) ((void)0)
#endif
/* As a function, so that Cython can call it with a C expression; the text names the rule. */
static inline void us_assert(int condition, const char *rule) {
#ifdef US_DEBUG
    if (!condition) us_assert_fail(rule, "userswap", 0);
#else
    (void)condition; (void)rule;
#endif
}
static inline int us_debug(void) {
#ifdef US_DEBUG
    return 1;
#else
    return 0;
#endif
}

/* ---- atomics: 64-bit words, acquire on load, release on store, acq_rel on change ---- */

static inline uint64_t us_load(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
static inline void us_store(uint64_t *p, uint64_t v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
static inline int us_cas(uint64_t *p, uint64_t seen, uint64_t next) {
    return __atomic_compare_exchange_n(p, &seen, next, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
}
static inline uint64_t us_swap(uint64_t *p, uint64_t v) { return __atomic_exchange_n(p, v, __ATOMIC_ACQ_REL); }
static inline uint64_t us_or(uint64_t *p, uint64_t v) { return __atomic_fetch_or(p, v, __ATOMIC_ACQ_REL); }
static inline uint64_t us_and(uint64_t *p, uint64_t v) { return __atomic_fetch_and(p, v, __ATOMIC_ACQ_REL); }
/* Signed counters: returns the value after the addition. */
static inline int64_t us_add(int64_t *p, int64_t v) { return __atomic_add_fetch(p, v, __ATOMIC_ACQ_REL); }
static inline int64_t us_read(const int64_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
static inline void us_write(int64_t *p, int64_t v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
static inline void us_max(int64_t *p, int64_t v) {
    int64_t seen = __atomic_load_n(p, __ATOMIC_RELAXED);
    while (v > seen && !__atomic_compare_exchange_n(p, &seen, v, 1, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
}
static inline void *us_load_ptr(void *const *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
static inline void us_store_ptr(void **p, void *v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }

/* Bytes that others read without the lock that they change under. */
static inline uint8_t us_load_byte(const uint8_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
static inline void us_store_byte(uint8_t *p, uint8_t v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }

/* Words of 32 bits: the lab's designs for machines whose words are that long. */
static inline uint32_t us_load32(const uint32_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
static inline void us_store32(uint32_t *p, uint32_t v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
static inline int us_cas32(uint32_t *p, uint32_t seen, uint32_t next) {
    return __atomic_compare_exchange_n(p, &seen, next, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
}
static inline uint32_t us_swap32(uint32_t *p, uint32_t v) { return __atomic_exchange_n(p, v, __ATOMIC_ACQ_REL); }

static inline void us_pause(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* ---- futex ---- */

static inline void us_futex_wait(uint32_t *p, uint32_t seen) {
    int kept = errno;
    syscall(SYS_futex, p, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
    errno = kept;
}
static inline void us_futex_wake(uint32_t *p, int n) {
    int kept = errno;
    syscall(SYS_futex, p, FUTEX_WAKE_PRIVATE, n, NULL, NULL, 0);
    errno = kept;
}

/* A mutex of 4 bytes: 0 free, 1 held, 2 held and waited for. Never held while region memory is touched. */
typedef struct { uint32_t state; } us_mutex;

static inline int us_trylock(us_mutex *m) {
    uint32_t seen = 0;
    return __atomic_compare_exchange_n(&m->state, &seen, 1, 0, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED);
}
static inline void us_lock(us_mutex *m) {
    uint32_t seen = 0;
    if (__atomic_compare_exchange_n(&m->state, &seen, 1, 0, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED)) return;
    for (int i = 0; i < 100; i++) {
        us_pause();
        seen = 0;
        if (__atomic_compare_exchange_n(&m->state, &seen, 1, 0, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED)) return;
    }
    while (__atomic_exchange_n(&m->state, 2, __ATOMIC_ACQUIRE) != 0) us_futex_wait(&m->state, 2);
}
static inline void us_unlock(us_mutex *m) {
    US_ASSERT(m->state != 0);
    if (__atomic_exchange_n(&m->state, 0, __ATOMIC_RELEASE) == 2) us_futex_wake(&m->state, 1);
}
/* For assertions: somebody has it, which is the caller or (seldom enough to find the mistake) another thread. */
static inline int us_locked(const us_mutex *m) { return __atomic_load_n(&m->state, __ATOMIC_RELAXED) != 0; }

/* A lock that is only ever tried: who finds it taken does something else. Cheaper than a mutex by half. */
static inline int us_try(uint32_t *p) {
    uint32_t seen = 0;
    return __atomic_compare_exchange_n(p, &seen, 1, 0, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED);
}
static inline void us_untry(uint32_t *p) { __atomic_store_n(p, 0, __ATOMIC_RELEASE); }

/* A 64-bit word with a lock bit and a waiters bit, both in its low half: page-table words (BUSY)
 * and swap entries (LOCKED). Unlocking is storing a new word with both bits clear. */
static inline void us_word_wait(uint64_t *p, uint64_t seen, uint64_t waiters) {
    if (!(seen & waiters)) {
        if (!us_cas(p, seen, seen | waiters)) return;
        seen |= waiters;
    }
    us_futex_wait((uint32_t *)p, (uint32_t)seen);
}
/* Whether it changed while it was looked at so often: shorter than going to sleep and being woken. */
static inline int us_word_spin(const uint64_t *p, uint64_t seen, int looks) {
    while (looks-- > 0) {
        us_pause();
        if (us_load(p) != seen) return 1;
    }
    return 0;
}
static inline void us_word_release(uint64_t *p, uint64_t next, uint64_t waiters) {
    if (us_swap(p, next) & waiters) us_futex_wake((uint32_t *)p, INT_MAX);
}

/* The same for a word of 32 bits. */
static inline void us_word32_wait(uint32_t *p, uint32_t seen, uint32_t waiters) {
    if (!(seen & waiters)) {
        if (!us_cas32(p, seen, seen | waiters)) return;
        seen |= waiters;
    }
    us_futex_wait(p, seen);
}
static inline void us_word32_release(uint32_t *p, uint32_t next, uint32_t waiters) {
    if (us_swap32(p, next) & waiters) us_futex_wake(p, INT_MAX);
}

/* ---- time ---- */

static inline int64_t us_now(void) { /* ns, monotonic; vDSO, safe in a signal handler */
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* Injected delay at a transition, for stress tests: nothing in the release build. In the debug build
 * USERSWAP_CHAOS=N in the environment makes about every N-th call sleep up to 100 us. */
#ifdef US_DEBUG
static inline void us_chaos(void) {
    static int64_t rate = -1;
    static __thread uint64_t x;
    if (rate < 0) {
        const char *text = getenv("USERSWAP_CHAOS");
        rate = text ? atoll(text) : 0;
    }
    if (rate == 0) return;
    if (!x) x = (uint64_t)us_now() | 1;
    x ^= x << 13; x ^= x >> 7; x ^= x << 17;
    if (x % (uint64_t)rate) return;
    struct timespec t = {0, (long)((x >> 32) % 100000)};
    int kept = errno;
    nanosleep(&t, NULL);
    errno = kept;
}
#else
static inline void us_chaos(void) {}
#endif

/* ---- stripes: threads that mostly do not meet. The same for a thread's whole life ---- */

static inline unsigned us_stripe(void) {
    static unsigned threads;
    static __thread unsigned mine;
    if (!mine) mine = __atomic_add_fetch(&threads, 1, __ATOMIC_RELAXED);
    return mine;
}

/* ---- userfaultfd: numbers that the C library's header may be too old to have ---- */

#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif
#ifndef UFFD_FEATURE_EXACT_ADDRESS
#define UFFD_FEATURE_EXACT_ADDRESS (1 << 11)
#endif

#endif
