# The stage: frames that no region has. Bytes are put into a frame here, out of every program's sight, before it is moved
# into place; a folio that leaves is moved here first, and looked at when nobody can write to it any more. Frames go
# round: what left last is filled next, so that in a steady state no page is allocated, zeroed or freed.
#
# One stage a process. Its address space is cut into *windows* of 2 MiB, a window into slots of a folio each; a slot is
# free (no memory), kept (has memory, for whoever wants a frame) or taken. How many frames are kept is bounded by
# what every pool sets aside for it (stage_keep).
from libc.stdint cimport int64_t, uint64_t

cdef enum:
    STAGE_SLOTS = 32            # folios of a window
    STAGE_MOST_KEPT = 16        # frames

# After frames_open, where frames can be moved: 0 or -errno. Without a stage, all below give NULL.
cdef int stage_open() noexcept nogil
cdef void stage_renew() noexcept nogil                          # in a forked child, which does not inherit it
cdef void stage_keep(int64_t most) noexcept nogil               # keep at most so many; the smallest wish counts
cdef int64_t stage_kept() noexcept nogil
# A frame with memory; NULL: there is none. `zeros`: it reads as zeros.
cdef char* stage_take(bint* zeros) noexcept nogil
# `count` (1 .. STAGE_SLOTS) slots in a row without memory, for folios to be moved to. NULL: there are none.
cdef char* stage_room(int count) noexcept nogil
cdef void stage_moved(char* slots, int count) noexcept nogil    # their memory was moved away
cdef void stage_give(char* frames, int count) noexcept nogil    # they have memory: kept, or freed
