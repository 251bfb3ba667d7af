/* A keyed sum of a folio: is it what it was? Two levels over pairs of 64-bit words, key drawn once a process.
 *
 * Where the processor multiplies vectors without carries (VPCLMULQDQ), a pair gives (m0 ^ k0) (x) (m1 ^ k1), and
 * products are added by XOR: CLNH (Lemire, Kaser: Faster 64-bit universal hashing using carry-less multiplications,
 * 2016). Elsewhere it gives (m0 + k0) (m1 + k1) mod 2^128, and products are added: NH (Black, Halevi, Krawczyk, Krovetz,
 * Rogaway: UMAC, CRYPTO 1999). Both are almost universal: two different messages of the same length, chosen without the
 * key, have the same result with a chance of at most 2^-64. Say they differ in m0 of a pair: whatever the rest is, the
 * results are equal for at most one k1.
 *
 * First level: each block of 1 KiB with the same key, to 128 bits (CLNH: 128 bits for each of the stripes that a vector's
 * lanes make of it). Second: all blocks' results, with another key, to 128 bits. In the end a multiplication by keys of 128
 * bits folds these to 64, where two differing ones meet with a chance of at most 2^-63. Together: at most 2^-62 for each
 * comparison. No program can see the key without looking for it, and it is not an attacker: it would harm itself.
 *
 * Any length: the last block is filled up with zeros, and the length is added to the blocks' sum. Two words that the data is
 * bound to (where and when it was stored) are a pair of NH with two keys of their own, so that a sum is good for one place
 * only: other words, the same sum, with a chance of at most 2^-62.
 *
 * NH takes as long as memory takes to be read, CLNH in vectors of 512 bits a quarter of it. Holds no state but the key and
 * which of them it is. */
#ifndef USERSWAP_SUM_H
#define USERSWAP_SUM_H
#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <sys/random.h>

#define US_SUM_BLOCK 128 /* words: 1 KiB */
#define US_SUM_BLOCKS 68 /* of a folio that was packed and got longer */
#define US_SUM_LANES 4   /* at most, of 128 bits */

enum { US_SUM_NH, US_SUM_CLNH_256, US_SUM_CLNH_512, US_SUM_KINDS };

typedef unsigned __int128 us_u128;
static struct {
    uint64_t block[US_SUM_BLOCK];
    uint64_t outer[US_SUM_BLOCKS * 2 * US_SUM_LANES];
    uint64_t fold[4];
    uint64_t bound[2];
} us_sum_key __attribute__((aligned(64)));
static int us_sum_kind = -1; /* -1: there is no key yet */

static inline uint64_t us_sum_fold(us_u128 all) {
    const uint64_t *k = us_sum_key.fold;
    return (uint64_t)(((((us_u128)k[0] << 64) | k[1]) * (uint64_t)all
                       + (((us_u128)k[2] << 64) | k[3]) * (uint64_t)(all >> 64)) >> 64);
}

static inline us_u128 us_sum_pair(uint64_t one, uint64_t other) {
    return (us_u128)(one + us_sum_key.bound[0]) * (other + us_sum_key.bound[1]);
}

static uint64_t us_sum_nh(const void *data, uint64_t bytes, us_u128 bound) {
    const char *m = (const char *)data;
    const uint64_t *k = us_sum_key.block, *outer = us_sum_key.outer;
    uint64_t w[4], tail[US_SUM_BLOCK], left = bytes;
    us_u128 all = bytes + bound;
    for (uint64_t block = 0; left; block++) {
        us_u128 a = 0, b = 0; /* two, so that one does not wait for the other's carry */
        int words = US_SUM_BLOCK;
        if (left < 8 * US_SUM_BLOCK) {
            words = (int)((left + 31) / 32 * 4);
            memset(tail + words - 4, 0, 32);
            memcpy(tail, m, left);
            m = (const char *)tail;
            left = 8 * US_SUM_BLOCK;
        }
        for (int i = 0; i < words; i += 4) {
            memcpy(w, m + 8 * i, 32); /* data may be anywhere */
            a += (us_u128)(w[0] + k[i]) * (w[1] + k[i + 1]);
            b += (us_u128)(w[2] + k[i + 2]) * (w[3] + k[i + 3]);
        }
        a += b;
        all += (us_u128)((uint64_t)a + outer[2 * block]) * ((uint64_t)(a >> 64) + outer[2 * block + 1]);
        m += 8 * US_SUM_BLOCK;
        left -= 8 * US_SUM_BLOCK;
    }
    return us_sum_fold(all);
}

#if defined(__x86_64__) && defined(__GNUC__) && !defined(US_SUM_PORTABLE)
#include <immintrin.h>

/* WORDS of 64 bits in a vector. The lanes are not put together before the end: each is a stripe of its own. */
#define US_SUM_CLNH(NAME, TARGET, VECTOR, WORDS, LOADU, LOAD, XOR, MULTIPLY, ZERO)                                 \
    __attribute__((target(TARGET))) static uint64_t NAME(const void *data, uint64_t bytes, us_u128 bound) {        \
        const uint64_t *m = (const uint64_t *)data, *k = us_sum_key.block, *outer = us_sum_key.outer;              \
        uint64_t lanes[WORDS] = {0}, low = bytes ^ (uint64_t)bound, high = (uint64_t)(bound >> 64);                \
        uint64_t block = 0, rest = bytes % (8 * US_SUM_BLOCK), tail[US_SUM_BLOCK];                                 \
        VECTOR all = ZERO(), x;                                                                                    \
        for (; block < bytes / (8 * US_SUM_BLOCK); block++) {                                    \
            VECTOR a = ZERO(), b = ZERO();                                                                         \
            _Pragma("GCC unroll 8") for (int i = 0; i < US_SUM_BLOCK; i += 2 * WORDS) {                            \
                x = XOR(LOADU((const void *)(m + i)), LOAD((const void *)(k + i)));                                \
                a = XOR(a, MULTIPLY(x, x, 0x10));                                                                  \
                x = XOR(LOADU((const void *)(m + i + WORDS)), LOAD((const void *)(k + i + WORDS)));                \
                b = XOR(b, MULTIPLY(x, x, 0x10));                                                                  \
            }                                                                                                      \
            x = XOR(XOR(a, b), LOAD((const void *)(outer + WORDS * block)));                                       \
            all = XOR(all, MULTIPLY(x, x, 0x10));                                                                  \
            m += US_SUM_BLOCK;                                                                                     \
        }                                                                                                          \
        if (rest) {                                                                                                \
            VECTOR a = ZERO();                                                                                     \
            int words = (int)((rest + 8 * WORDS - 1) / (8 * WORDS) * WORDS);                                       \
            memset(tail + words - WORDS, 0, 8 * WORDS);                                                            \
            memcpy(tail, m, rest);                                                                                 \
            for (int i = 0; i < words; i += WORDS) {                                                               \
                x = XOR(LOADU((const void *)(tail + i)), LOAD((const void *)(k + i)));                             \
                a = XOR(a, MULTIPLY(x, x, 0x10));                                                                  \
            }                                                                                                      \
            x = XOR(a, LOAD((const void *)(outer + WORDS * block)));                                               \
            all = XOR(all, MULTIPLY(x, x, 0x10));                                                                  \
        }                                                                                                          \
        memcpy(lanes, &all, sizeof lanes);                                                                         \
        for (int i = 0; i < WORDS; i += 2) {                                                                       \
            low ^= lanes[i];                                                                                       \
            high ^= lanes[i + 1];                                                                                  \
        }                                                                                                          \
        return us_sum_fold(((us_u128)high << 64) | low);                                                           \
    }
US_SUM_CLNH(us_sum_clnh_256, "avx2,vpclmulqdq", __m256i, 4, _mm256_loadu_si256, _mm256_load_si256, _mm256_xor_si256,
            _mm256_clmulepi64_epi128, _mm256_setzero_si256)
US_SUM_CLNH(us_sum_clnh_512, "avx512f,vpclmulqdq", __m512i, 8, _mm512_loadu_si512, _mm512_load_si512, _mm512_xor_si512,
            _mm512_clmulepi64_epi128, _mm512_setzero_si512)

static int us_sum_can(int kind) {
    __builtin_cpu_init();
    if (kind == US_SUM_CLNH_512) return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("vpclmulqdq");
    if (kind == US_SUM_CLNH_256) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("vpclmulqdq");
    return kind == US_SUM_NH;
}
#else
static inline uint64_t us_sum_clnh_256(const void *m, uint64_t n, us_u128 bound) { return us_sum_nh(m, n, bound); }
static inline uint64_t us_sum_clnh_512(const void *m, uint64_t n, us_u128 bound) { return us_sum_nh(m, n, bound); }
static int us_sum_can(int kind) { return kind == US_SUM_NH; }
#endif

static int us_sum_start(void) { /* draws the key, once: 0 or -errno */
    size_t done = 0;
    int kind = US_SUM_KINDS - 1;
    if (us_sum_kind >= 0) return 0;
    while (done < sizeof us_sum_key) {
        ssize_t n = getrandom((char *)&us_sum_key + done, sizeof us_sum_key - done, 0);
        if (n > 0) done += (size_t)n;
        else if (errno != EINTR) return -errno;
    }
    while (!us_sum_can(kind)) kind--;
    us_sum_kind = kind;
    return 0;
}

/* At most US_SUM_BLOCKS, from anywhere. */
static inline uint64_t us_sum_at(int kind, const void *data, uint64_t bytes, us_u128 bound) {
    if (kind == US_SUM_CLNH_512) return us_sum_clnh_512(data, bytes, bound);
    if (kind == US_SUM_CLNH_256) return us_sum_clnh_256(data, bytes, bound);
    return us_sum_nh(data, bytes, bound);
}
static inline uint64_t us_sum_by(int kind, const void *data, uint64_t bytes) { return us_sum_at(kind, data, bytes, 0); }
static inline uint64_t us_sum_bound(int kind, const void *data, uint64_t bytes, uint64_t one, uint64_t other) {
    return us_sum_at(kind, data, bytes, us_sum_pair(one, other));
}
#endif
