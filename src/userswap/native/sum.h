/* A keyed sum of a folio: is it what it was? Two levels of NH with words of 64 bits, key drawn once a process.
 *
 * NH (Black, Halevi, Krawczyk, Krovetz, Rogaway: UMAC, CRYPTO 1999) is almost universal: two different messages of the
 * same length, chosen without the key, have the same sum with a chance of 2^-64. Here a block of 1 KiB gives 128 bits
 * (first level), all blocks' results give 128 (second), and a multiplication folds those into 64: together below 2^-62
 * for each comparison. No program can see the key without looking for it, and it is not an attacker: it would harm itself.
 *
 * One multiplication 64 x 64 -> 128 for 16 bytes: about as fast as memory is read. Holds no state but the key. */
#ifndef USERSWAP_SUM_H
#define USERSWAP_SUM_H
#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <sys/random.h>

#define US_SUM_BLOCK 128 /* words: 1 KiB */
#define US_SUM_BLOCKS 64 /* of 64 KiB */

typedef unsigned __int128 us_u128;
static uint64_t us_sum_key[US_SUM_BLOCK + 2 * US_SUM_BLOCKS + 4];

static int us_sum_start(void) { /* 0 or -errno */
    size_t done = 0;
    if (us_sum_key[0]) return 0;
    while (done < sizeof us_sum_key) {
        ssize_t n = getrandom((char *)us_sum_key + done, sizeof us_sum_key - done, 0);
        if (n > 0) done += (size_t)n;
        else if (errno != EINTR) return -errno;
    }
    us_sum_key[0] |= 1; /* says that there is a key, for one bit of it */
    return 0;
}

/* `bytes`: a multiple of 1 KiB, at most 64 KiB; `data` aligned to 8. */
static uint64_t us_sum(const void *data, uint64_t bytes) {
    const uint64_t *m = (const uint64_t *)data, *k = us_sum_key, *outer = us_sum_key + US_SUM_BLOCK;
    us_u128 all = bytes;
    for (uint64_t block = 0; block < bytes / (8 * US_SUM_BLOCK); block++) {
        us_u128 a = 0, b = 0; /* two, so that one does not wait for the other's carry */
        for (int i = 0; i < US_SUM_BLOCK; i += 4) {
            a += (us_u128)(m[i] + k[i]) * (m[i + 1] + k[i + 1]);
            b += (us_u128)(m[i + 2] + k[i + 2]) * (m[i + 3] + k[i + 3]);
        }
        a += b;
        all += (us_u128)((uint64_t)a + outer[2 * block]) * ((uint64_t)(a >> 64) + outer[2 * block + 1]);
        m += US_SUM_BLOCK;
    }
    k = outer + 2 * US_SUM_BLOCKS;
    return (uint64_t)(((((us_u128)k[0] << 64) | k[1]) * (uint64_t)all
                       + (((us_u128)k[2] << 64) | k[3]) * (uint64_t)(all >> 64)) >> 64);
}
#endif
