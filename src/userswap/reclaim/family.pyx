"""Family: what of a pool's budget each process of a family may use (see family.pxd).

Touches the ledger: a line is written by its process alone, so that one killed at any instruction leaves a line that is
a few milliseconds old, and nobody counts it when the process is known to be gone. No lock.
"""
from libc.stdint cimport int64_t, uint64_t

from userswap.native.mman cimport (
    MADV_DONTDUMP, MAP_ANONYMOUS, MAP_FAILED, MAP_NORESERVE, MAP_SHARED, PROT_READ, PROT_WRITE, madvise, mmap, munmap,
)
from userswap.native.us cimport us_chaos, us_load, us_now, us_read, us_store, us_write
from userswap.swap.kin cimport KIN_MOST, kin_generation, kin_gone, kin_me, kin_rows

cdef extern from *:
    """
    #include <errno.h>
    #include <stdint.h>
    #include <sys/resource.h>

    /* Page faults of this process that gave it pages: none of its own can have come otherwise, but by our calls. */
    static int64_t family_page_faults(void) {
        struct rusage usage;
        int kept = errno;
        int64_t faults = getrusage(RUSAGE_SELF, &usage) == 0 ? usage.ru_minflt : INT64_MAX / 8192;
        errno = kept;
        return faults;
    }
    """
    int64_t family_page_faults() nogil

cdef enum:
    SETTLE_NS = 5000000
    PRESSED_NS = 200000000
    PAGE = 4096
    LEAST = 8 << 20             # beside its metadata, for any process: what the smallest pool has

cdef struct Line:
    uint64_t generation         # whose it is; 0: it has not used the pool since it was forked
    int64_t own                 # bytes
    int64_t pressed             # ns: when it would have had more
    int64_t left                # bytes that were resident and are not, ever
    int64_t went                # the same of the pool
    int64_t[3] unused           # a line of the cache each


cdef inline int64_t positive(int64_t n) noexcept nogil:
    return n if n > 0 else 0


cdef inline Line* own_line(Family* f) noexcept nogil:
    return &f.lines[kin_me()] if f.lines != NULL and kin_me() >= 0 else NULL


cdef int64_t credit(Family* f, const Account* a) noexcept nogil:
    """Of what we use, what is still the parent's as well, for all that is known."""
    cdef Line* line
    cdef int64_t left, went, pool, copied
    if f.parent < 0 or kin_gone(f.parent, f.parent_generation):
        return 0
    line = &f.lines[f.parent]
    if us_load(&line.generation) != f.parent_generation:
        return 0
    left = positive(us_read(&line.left) - f.left)
    went = positive(us_read(&line.went) - f.went)
    pool = a.pool if a.pool < f.pool else f.pool
    # What was stored since is in new pages, as many as there are, or else in holes of the old ones.
    copied = positive(a.came - f.came - (a.pool - pool))
    return (positive(a.resident - (a.brought - f.brought) - left
                     - (family_page_faults() - f.page_faults) * PAGE)
            + positive(pool - copied - went))


cdef void say(Family* f, Line* line, const Account* a, int64_t shared) noexcept nogil:
    us_write(&line.own, a.used - shared)
    us_write(&line.left, a.brought - a.resident)
    us_write(&line.went, a.went)
    if us_load(&line.generation) != kin_generation(kin_me()):
        us_write(&line.pressed, 0)
        us_chaos()
        us_store(&line.generation, kin_generation(kin_me()))


cdef bint family_counts(Family* f) noexcept nogil:
    cdef Line* line = own_line(f)
    return line != NULL and us_load(&line.generation) == kin_generation(kin_me())


cdef bint family_due(Family* f) noexcept nogil:
    return f.lines != NULL and us_now() >= us_read(&f.again_at)


cdef void family_settle(Family* f, const Account* a) noexcept nogil:
    cdef Line* line = own_line(f)
    cdef int64_t now = us_now()
    cdef int64_t shared, equal, least, room, own, others = 0
    cdef int row, count = 1
    cdef uint64_t generation
    us_write(&f.again_at, now + SETTLE_NS)
    if line == NULL:
        us_write(&f.allowed, a.limit)
        us_write(&f.credit, 0)
        us_write(&f.others, 0)
        return
    shared = credit(f, a)
    us_write(&f.credit, shared)
    say(f, line, a, shared)
    for row in range(kin_rows()):
        generation = us_load(&f.lines[row].generation)
        count += row != kin_me() and generation != 0 and not kin_gone(row, generation)
    equal = a.limit // count
    room = a.limit
    for row in range(kin_rows()):
        generation = us_load(&f.lines[row].generation)
        if row == kin_me() or generation == 0 or kin_gone(row, generation):
            continue
        own = us_read(&f.lines[row].own)
        others += own
        # Who wants more and has less than an equal share shall find room for that.
        if own < equal and now - us_read(&f.lines[row].pressed) < PRESSED_NS:
            own = equal
        room -= own
    us_write(&f.others, others)
    least = equal // 2 if equal // 2 > a.metadata + LEAST else a.metadata + LEAST
    room = (room if room > least else least) + shared
    us_write(&f.allowed, room if room < a.limit else a.limit)


cdef void family_pressed(Family* f) noexcept nogil:
    cdef Line* line = own_line(f)
    if line != NULL:
        us_write(&line.pressed, us_now())


cdef void family_before_fork(Family* f, const Account* a) noexcept nogil:
    cdef void* p
    if f.apart or kin_me() < 0:
        return
    if f.lines == NULL:
        p = mmap(NULL, KIN_MOST * sizeof(Line), PROT_READ | PROT_WRITE,
                 MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        if p == MAP_FAILED:
            return
        madvise(p, KIN_MOST * sizeof(Line), MADV_DONTDUMP)
        us_write(&f.allowed, a.limit)
        f.parent = -1
        f.lines = <Line*>p
    f.page_faults_then = family_page_faults()
    if f.parent < 0 or family_counts(f):
        say(f, own_line(f), a, credit(f, a))        # a child's credit is told from it, also if we never use it again


cdef void family_inherit(Family* f, const Account* a, int parent, uint64_t parent_generation) noexcept nogil:
    us_write(&f.allowed, a.limit)
    us_write(&f.credit, 0)
    us_write(&f.again_at, 0)
    if f.lines == NULL or parent < 0:
        f.parent = -1
        return
    if f.parent >= 0 and us_load(&f.lines[parent].generation) != parent_generation:
        # Our parent has not used it since it was forked: what we have is its parent's, but for what it wrote to.
        f.page_faults = family_page_faults() - (f.page_faults_then - f.page_faults)
        return
    f.parent = parent
    f.parent_generation = parent_generation
    f.pool = a.pool
    f.brought = a.brought
    f.left = a.brought - a.resident
    f.came = a.came
    f.went = a.went
    f.page_faults = family_page_faults()


cdef void family_delete(Family* f) noexcept nogil:
    cdef Line* line = own_line(f)
    if family_counts(f):
        us_store(&line.generation, 0)
    if f.lines != NULL:
        munmap(f.lines, KIN_MOST * sizeof(Line))
        f.lines = NULL
