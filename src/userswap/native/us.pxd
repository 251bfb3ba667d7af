# The interface of us.h: atomics, futex locks, time, assertions. See the comments there.
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

cdef extern from "us.h" nogil:
    ctypedef struct us_mutex:
        uint32_t state

    void us_assert(bint condition, const char* rule) noexcept
    bint us_debug() noexcept
    void us_chaos() noexcept

    uint64_t us_load(const uint64_t* p) noexcept
    void us_store(uint64_t* p, uint64_t v) noexcept
    bint us_cas(uint64_t* p, uint64_t seen, uint64_t next) noexcept
    uint64_t us_swap(uint64_t* p, uint64_t v) noexcept
    uint64_t us_or(uint64_t* p, uint64_t v) noexcept     # returns the word before
    uint64_t us_and(uint64_t* p, uint64_t v) noexcept
    int64_t us_add(int64_t* p, int64_t v) noexcept       # returns the sum after
    int64_t us_read(const int64_t* p) noexcept
    void us_write(int64_t* p, int64_t v) noexcept
    void us_max(int64_t* p, int64_t v) noexcept
    void* us_load_ptr(void** p) noexcept
    void us_store_ptr(void** p, void* v) noexcept
    uint8_t us_load_byte(const uint8_t* p) noexcept
    void us_store_byte(uint8_t* p, uint8_t v) noexcept
    uint32_t us_load32(const uint32_t* p) noexcept
    void us_store32(uint32_t* p, uint32_t v) noexcept
    bint us_cas32(uint32_t* p, uint32_t seen, uint32_t next) noexcept
    uint32_t us_swap32(uint32_t* p, uint32_t v) noexcept
    void us_pause() noexcept

    void us_futex_wait(uint32_t* p, uint32_t seen) noexcept
    void us_futex_wake(uint32_t* p, int n) noexcept
    bint us_trylock(us_mutex* m) noexcept
    void us_lock(us_mutex* m) noexcept
    bint us_locked(const us_mutex* m) noexcept           # by anybody; for assertions
    bint us_try(uint32_t* p) noexcept
    void us_untry(uint32_t* p) noexcept
    void us_unlock(us_mutex* m) noexcept
    bint us_word_spin(const uint64_t* p, uint64_t seen, int looks) noexcept
    void us_word_wait(uint64_t* p, uint64_t seen, uint64_t waiters) noexcept
    void us_word_release(uint64_t* p, uint64_t next, uint64_t waiters) noexcept
    void us_word32_wait(uint32_t* p, uint32_t seen, uint32_t waiters) noexcept
    void us_word32_release(uint32_t* p, uint32_t next, uint32_t waiters) noexcept

    unsigned int us_stripe() noexcept                    # of this thread: take it modulo the stripes that there are
    int64_t us_now() noexcept                            # nanoseconds, monotonic
