# Reclaim: the budget, and what leaves when. Resident folios + compressed pool + metadata share one budget;
# a charge that takes the sum over it reclaims first. Which folio is cold is found by the memory room's clock
# hand, called through `evict`; what is cold in zswap by zswap's own.
from libc.stdint cimport int64_t, uint64_t

from userswap.reclaim.family cimport Family
from userswap.swap.space cimport SwapSpace

# Makes about `want` bytes of folios non-resident; returns how many bytes it did, 0 when nothing can leave. `parts`: of
# those that are in place in parts, as long as there are enough.
ctypedef int64_t (*reclaim_evict)(void* ctx, int64_t want, bint parts) noexcept nogil

# Takes about `want` bytes of frames from what is kept of freed memory; how many it took.
ctypedef int64_t (*reclaim_give_up)(void* ctx, int64_t want) noexcept nogil

cdef struct Reclaim:
    SwapSpace* swap
    reclaim_evict evict
    reclaim_give_up give_up
    void* ctx                   # for both
    int64_t limit               # the budget, bytes; it and headroom, slack may change at any time (reclaim_set_limit)
    Family family               # who else uses it
    int64_t headroom            # reclaim keeps the sum this far below the limit, for what runs at the same time
    int64_t slack               # how much further down a background thread reclaims
    int64_t pressed             # charges for which it goes on, after one had to reclaim by itself
    int64_t piece               # bytes of the last charge
    int64_t least_resident      # resident bytes that writeback spares while there is a device
    const int64_t* aside        # bytes that the room above keeps for what comes next, of all pools
    int64_t overhead            # metadata of the rooms above, bytes
    int64_t resident            # bytes of folios in place, or about to be
    int64_t kept                # of these, frames that freed memory keeps: the first that leave
    int64_t brought             # bytes that ever became so
    int64_t peak                # most ever of resident + pool + metadata
    int64_t failures            # charges that stayed over the budget
    int64_t warned              # 1 after the warning; 0 again when it fits
    int64_t rest                # ns: how long to rest after the last try in vain
    int64_t rest_until          # ns: nothing could leave a moment ago, don't try before this
    int64_t spare_at            # ns: there was no room for what nobody needs yet, don't try before this
    bint hard                   # end the program rather than exceed the budget

# The one way to set a budget, at first and while the program runs. `piece`: most bytes that come at once. More room can
# be used at once; for less, charges make room from now on, and reclaim_shrink at once.
cdef void reclaim_set_limit(Reclaim* r, int64_t limit, int64_t piece) noexcept nogil
# Reclaims about `most` bytes, if more than the budget is in use. Whether there is more to do, and some was done.
cdef bint reclaim_shrink(Reclaim* r, int64_t most) noexcept nogil
cdef int64_t reclaim_used(Reclaim* r) noexcept nogil            # resident + pool + metadata, bytes
# Before `bytes` more become resident: makes room. Never fails: with nowhere to go the budget is exceeded,
# with one warning (or the program ends, if `hard`). `parts`: see reclaim_evict.
cdef void reclaim_charge(Reclaim* r, int64_t bytes, bint parts) noexcept nogil
# The same for what nobody needs yet: False, and nothing is charged, if it would exceed the budget.
cdef bint reclaim_try(Reclaim* r, int64_t bytes) noexcept nogil
# Whether a background thread should reclaim now, so that the next charges need not; asked after a charge.
cdef bint reclaim_short(Reclaim* r) noexcept nogil
cdef void reclaim_background(Reclaim* r) noexcept nogil         # what it then does
# Whether so little is left in place that cold objects will have to go to the swap file soon, or what is oldest there to
# a slower one; and a write of them.
cdef bint reclaim_low(Reclaim* r) noexcept nogil
cdef void reclaim_write(Reclaim* r) noexcept nogil
# Whether swap files are to be tended: what is oldest goes to a slower one, what is free between what is in use back to
# the file system. The thread does that in passing; where there is none, whoever faults, a little of it.
cdef bint reclaim_untended(Reclaim* r) noexcept nogil
cdef void reclaim_tend(Reclaim* r) noexcept nogil
# Makes room for `bytes` of what moves to zswap by itself, without a fault: how much there is.
cdef int64_t reclaim_room(Reclaim* r, int64_t bytes) noexcept nogil
cdef void reclaim_uncharge(Reclaim* r, int64_t bytes) noexcept nogil
# What this process may use now: the limit, or less if forked processes share it. Reclaim goes down to that as fast as
# the process takes memory, and never calls it a failure if it does not get there: only the limit is hard.
cdef int64_t reclaim_ceiling(Reclaim* r) noexcept nogil
cdef void reclaim_settle(Reclaim* r) noexcept nogil             # lets the others know at once that we use less
# fork, with the gate closed.
cdef void reclaim_before_fork(Reclaim* r) noexcept nogil
cdef void reclaim_inherit(Reclaim* r, int parent, uint64_t parent_generation) noexcept nogil
cdef void reclaim_delete(Reclaim* r) noexcept nogil
