"""Reclaim: the budget and the balance between resident folios, zswap and the swap file.

Knows the swap space below it, and by `family` what other processes leave; asks the room above it to evict through a
function pointer only. Holds no lock of its own: the sums are atomic, and every thread that is over the budget
reclaims for itself, so that compression runs on as many cores as there are threads that need memory.

Order of measures, cheapest first:
0. frames that freed memory keeps;
1. give back pool memory that holds nothing (compaction), when it is more than WASTE_PERCENT of what is stored;
2. evict folios (clean ones just leave, dirty ones are compressed into zswap);
3. when few folios are left in place, write cold ones back from zswap to the swap file;
4. evict those few folios too.
"""
from libc.stdint cimport int64_t, uint64_t
from libc.stdio cimport snprintf
from libc.string cimport strerror

from userswap.native.us cimport us_add, us_max, us_now, us_read, us_swap, us_write
from userswap.reclaim.family cimport (
    Account, family_before_fork, family_counts, family_delete, family_due, family_inherit, family_pressed,
    family_settle,
)
from userswap.swap.space cimport (
    space_churn, space_crowded, space_demote, space_has_cold, space_has_device, space_metadata, space_packed_bytes,
    space_pool_bytes, swap_compact, swap_writeback,
)

cdef extern from "<unistd.h>" nogil:
    ssize_t write(int fd, const void* buffer, size_t length)
    void _exit(int status)

cdef enum:
    WASTE_PERCENT = 3
    COMPACT_EFFORT = 1 << 18
    DEMOTE_BYTES = 4 << 20      # that move to a slower swap file before the thread looks at what else there is
    WRITEBACK_BYTES = 3 << 18   # less than is gathered for one write, so that one write is enough
    LEAST_HEADROOM = 8 << 16
    LEAST_RESIDENT = 16 << 16
    ROUNDS = 256
    WINDOWS = 4 << 20           # so much of what is inherited stays in place rather than what was stored since
    REST_NS = 5000000           # of rest at least after a try in vain
    RESTS = 4                   # and so many times as long as it took: it may have been a look at everything
    PRESSED = 4096
    GIVE_WAY = 2                # for each byte that comes so many leave, above what other processes leave us
    STATUS_OVER_BUDGET = 137            # what a process ended by the OOM killer exits with

cdef int64_t ALL = <int64_t>1 << 62


cdef int64_t reclaim_used(Reclaim* r) noexcept nogil:
    return (us_read(&r.resident) + us_read(r.aside) + space_pool_bytes(r.swap) + space_metadata(r.swap)
            + us_read(&r.overhead))


cdef Account account(Reclaim* r) noexcept nogil:
    cdef Account a
    a.limit = r.limit
    a.resident = us_read(&r.resident)
    a.pool = space_pool_bytes(r.swap)
    a.metadata = us_read(r.aside) + space_metadata(r.swap) + us_read(&r.overhead)
    a.used = a.resident + a.pool + a.metadata
    a.brought = us_read(&r.brought)
    a.came = (space_churn(r.swap) + space_packed_bytes(r.swap)) // 2
    a.went = (space_churn(r.swap) - space_packed_bytes(r.swap)) // 2
    return a


cdef int64_t reclaim_ceiling(Reclaim* r) noexcept nogil:
    cdef int64_t allowed = us_read(&r.family.allowed) if r.family.lines != NULL else r.limit
    return allowed if allowed < r.limit else r.limit


cdef void settle(Reclaim* r) noexcept nogil:
    cdef Account a = account(r)
    family_settle(&r.family, &a)
    r.swap.newest_first = us_read(&r.family.credit) > 0


cdef void reclaim_settle(Reclaim* r) noexcept nogil:
    if family_counts(&r.family):
        settle(r)


cdef inline int64_t one_write(Reclaim* r) noexcept nogil:
    return WRITEBACK_BYTES if WRITEBACK_BYTES < r.limit // 32 else r.limit // 32


cdef int64_t shrink(Reclaim* r, int64_t over, bint parts) noexcept nogil:
    """One step of the list above; 0 when no step gives anything."""
    cdef int64_t freed = r.give_up(r.ctx, over) if us_read(&r.kept) else 0
    # What was inherited and is the parent's too makes no room when it leaves, only what was stored since does.
    cdef bint inherited = us_read(&r.family.credit) > 0 and reclaim_used(r) <= r.limit - r.headroom
    if freed == 0:
        freed = swap_compact(r.swap, WASTE_PERCENT, COMPACT_EFFORT)
    if freed > 0:
        return freed
    if us_read(&r.resident) > (WINDOWS if inherited and WINDOWS > r.least_resident else r.least_resident):
        freed = r.evict(r.ctx, over, parts)
        if freed > 0:
            return freed
    if not inherited or space_has_cold(r.swap):
        freed = swap_writeback(r.swap, one_write(r), False)
        if freed > 0:
            return freed
    if inherited and us_read(&r.resident) <= r.least_resident:
        return 0
    return r.evict(r.ctx, over, parts)


cdef int64_t reclaim_down_to(Reclaim* r, int64_t goal, int64_t least, int64_t most, bint parts,
                             bint* stuck) noexcept nogil:
    """Reclaims until no more than `goal` is used, `most` has been freed or nothing more can be done (`stuck`), at least
    `least` bytes at a time: what is used then."""
    cdef int64_t used = reclaim_used(r)
    cdef int64_t round = 0, fewest = used, freed = 0, step
    # A step that frees folios can add as much to the pool (data that hardly compresses): stop when
    # many rounds in a row win nothing.
    while used > goal and freed < most:
        step = shrink(r, used - goal if used - goal > least else least, parts)
        stuck[0] = step <= 0 or round == ROUNDS
        if stuck[0]:
            break
        freed += step
        used = reclaim_used(r)
        round += 1
        if used < fewest:
            fewest = used
            round = 0
    return used


cdef void over_budget(Reclaim* r, int64_t used) noexcept nogil:
    cdef char[512] text
    cdef char[128] reason
    cdef int n
    us_add(&r.failures, 1)
    if us_swap(<uint64_t*>&r.warned, 1) and not r.hard:
        return
    if not space_has_device(r.swap) and not r.swap.is_child:
        snprintf(reason, sizeof(reason), "its data does not compress enough and there is no swap file")
    elif not space_has_device(r.swap):
        snprintf(reason, sizeof(reason), "its data does not compress enough and a forked process has no swap file")
    elif us_read(&r.swap.device_error):
        snprintf(reason, sizeof(reason), "the swap file can't take more (%s)",
                 strerror(<int>us_read(&r.swap.device_error)))
    else:
        snprintf(reason, sizeof(reason), "what is resident is pinned by system calls under way")
    n = snprintf(text, sizeof(text),
                 "userswap: the program needs %lld MiB more than its budget of %lld MiB: %s. %s\n",
                 <long long>((used - r.limit + (1 << 20) - 1) >> 20), <long long>(r.limit >> 20), reason,
                 b"It ends here because of --hard: give it more --ram or another --swap." if r.hard else
                 b"It goes on over the budget; nothing is lost. Give it more --ram or another --swap.")
    write(2, text, n if n < <int>sizeof(text) else <int>sizeof(text) - 1)
    if r.hard:
        _exit(STATUS_OVER_BUDGET)


cdef bint resting(Reclaim* r) noexcept nogil:
    return us_read(&r.rest_until) != 0 and us_now() < us_read(&r.rest_until)


cdef int64_t add(Reclaim* r, int64_t bytes, bint parts, bint* tried, bint* stuck) noexcept nogil:
    """Adds to what is resident and, if that is too much and it may, reclaims: what is used then."""
    cdef int64_t used, ceiling, goal, begun
    stuck[0] = False
    us_add(&r.resident, bytes)
    us_add(&r.brought, bytes)
    us_write(&r.piece, bytes)
    if family_due(&r.family):
        settle(r)
    used = reclaim_used(r)
    # What is kept costs nothing: the program never has more than it would have had without.
    if us_read(&r.kept) and used > us_read(&r.peak):
        r.give_up(r.ctx, used - us_read(&r.peak))
        used = reclaim_used(r)
    ceiling = reclaim_ceiling(r)
    tried[0] = used > ceiling - r.headroom and not resting(r)
    if tried[0]:
        us_write(&r.pressed, PRESSED)
        goal = ceiling - r.headroom
        if ceiling < r.limit:
            family_pressed(&r.family)
            # Others came to want their share, or gave way: no fault has to wait for all of that.
            if goal < used - GIVE_WAY * bytes:
                goal = used - GIVE_WAY * bytes
            if goal > r.limit - r.headroom:
                goal = r.limit - r.headroom
        # What comes as one piece makes room of its size, so that pieces leave as they are.
        begun = us_now()
        used = reclaim_down_to(r, goal, bytes, ALL, parts, stuck)
        if stuck[0]:
            us_write(&r.rest, max(<int64_t>REST_NS, RESTS * (us_now() - begun)))
        # What others leave us is less than we can do with: it is not the time for every fault to find that out.
        if stuck[0] and ceiling < r.limit and used <= r.limit:
            us_write(&r.rest_until, us_now() + us_read(&r.rest))
    return used


cdef void reclaim_charge(Reclaim* r, int64_t bytes, bint parts) noexcept nogil:
    cdef bint tried, stuck
    cdef int64_t used = add(r, bytes, parts, &tried, &stuck)
    if tried:
        # Not what became too much only now, because the budget was made smaller meanwhile.
        if stuck and used > r.limit:
            over_budget(r, used)
            us_write(&r.rest_until, us_now() + us_read(&r.rest))    # trying at every fault would only slow it down
        elif us_read(&r.warned) and used < r.limit - r.headroom:
            us_write(&r.warned, 0)
            us_write(&r.rest_until, 0)
    us_max(&r.peak, used)


cdef bint reclaim_try(Reclaim* r, int64_t bytes) noexcept nogil:
    cdef bint tried, stuck
    cdef int64_t used
    if us_read(&r.spare_at) != 0 and us_now() < us_read(&r.spare_at):
        return False
    used = add(r, bytes, False, &tried, &stuck)
    if used > reclaim_ceiling(r):
        us_add(&r.resident, -bytes)
        us_add(&r.brought, -bytes)
        us_write(&r.spare_at, us_now() + REST_NS)
        return False
    us_max(&r.peak, used)
    return True


cdef void reclaim_set_limit(Reclaim* r, int64_t limit, int64_t piece) noexcept nogil:
    cdef int64_t folios = LEAST_HEADROOM if LEAST_HEADROOM < limit // 64 else limit // 64
    # Faults of several threads at once go over the limit by a folio and its packed copy each, or by a window.
    us_write(&r.headroom, folios + (piece if piece < limit // 32 else limit // 32))
    us_write(&r.slack, piece if piece < limit // 64 else limit // 64)
    us_write(&r.least_resident, LEAST_RESIDENT if LEAST_RESIDENT > limit // 64 else limit // 64)
    us_write(&r.limit, limit)
    us_write(&r.rest_until, 0)      # what could not be done before, maybe can now
    us_write(&r.spare_at, 0)


cdef bint reclaim_shrink(Reclaim* r, int64_t most) noexcept nogil:
    cdef int64_t goal = r.limit - r.headroom
    cdef bint stuck = False
    return reclaim_down_to(r, goal, r.slack, most, False, &stuck) > goal and not stuck


cdef bint reclaim_short(Reclaim* r) noexcept nogil:
    # Not before somebody had to: a program that just fits would lose folios for nothing, over and over.
    cdef int64_t pressed = us_read(&r.pressed)
    if space_crowded(r.swap):
        return True
    if pressed == 0:
        return False
    us_write(&r.pressed, pressed - 1)
    return reclaim_used(r) > reclaim_ceiling(r) - r.headroom - r.slack // 2


cdef void reclaim_background(Reclaim* r) noexcept nogil:
    # Not while nothing can leave: it would only throw out what the program works with.
    cdef int64_t ceiling = reclaim_ceiling(r)
    cdef int64_t goal = ceiling - r.headroom - r.slack
    cdef int64_t over = reclaim_used(r) - goal
    cdef bint stuck = False
    space_demote(r.swap, DEMOTE_BYTES)
    if over > 0 and not resting(r):
        # No more than was asked for: else the thread would go on for as long as the program's faults keep pace with it,
        # and do all reclaim, at a TLB flush across processors for each folio.
        if reclaim_down_to(r, goal, us_read(&r.piece), over, False, &stuck) > ceiling - r.headroom and stuck:
            us_write(&r.rest_until, us_now() + REST_NS)


cdef bint low(Reclaim* r) noexcept nogil:
    return (us_read(&r.resident) < r.least_resident + one_write(r) // 2 and space_has_device(r.swap)
            and reclaim_used(r) > reclaim_ceiling(r) - r.headroom - one_write(r) // 2)


cdef bint reclaim_low(Reclaim* r) noexcept nogil:
    return space_crowded(r.swap) or low(r)


cdef void reclaim_write(Reclaim* r) noexcept nogil:
    space_demote(r.swap, DEMOTE_BYTES)
    if low(r) and not resting(r):
        swap_writeback(r.swap, one_write(r), False)


cdef bint reclaim_untended(Reclaim* r) noexcept nogil:
    return space_crowded(r.swap)


cdef void reclaim_tend(Reclaim* r) noexcept nogil:
    space_demote(r.swap, one_write(r))


cdef int64_t reclaim_room(Reclaim* r, int64_t bytes) noexcept nogil:
    cdef int64_t most = reclaim_ceiling(r) - r.headroom
    cdef bint stuck = False
    cdef int64_t used = reclaim_down_to(r, most - bytes, bytes, ALL, False, &stuck)
    return most - used if most > used else 0


cdef void reclaim_uncharge(Reclaim* r, int64_t bytes) noexcept nogil:
    us_add(&r.resident, -bytes)


cdef void reclaim_before_fork(Reclaim* r) noexcept nogil:
    cdef Account a = account(r)
    family_before_fork(&r.family, &a)


cdef void reclaim_inherit(Reclaim* r, int parent, uint64_t parent_generation) noexcept nogil:
    cdef Account a = account(r)
    family_inherit(&r.family, &a, parent, parent_generation)
    us_write(&r.rest_until, 0)


cdef void reclaim_delete(Reclaim* r) noexcept nogil:
    family_delete(&r.family)
