# The stage: frames that no region has. Bytes are put into a frame here, out of the program's sight, before it is moved
# into place; a folio that leaves is moved here first, and looked at when nobody can write to it any more. Frames go
# round: what left last is filled next, so that in a steady state no page is allocated, zeroed or freed.
#
# One stage a process. Its address space is cut into *windows* of 2 MiB, a window into slots of a folio each; a slot is
# free (no memory), kept (has memory, for whoever wants a frame) or taken. Whole windows are huge pages where the
# kernel gives them, and stay whole. How much is kept is bounded (stage_keep), and every pool counts it.
from libc.stdint cimport int64_t, uint64_t

cdef enum:
    STAGE_SLOTS = 32            # folios of a window
    STAGE_MOST_KEPT = 16        # frames
    STAGE_MOST_WINDOWS = 2
    STAGE_MOST_PARTS = 128

# After frames_open, where frames can be moved: 0 or -errno. Without a stage, all below give NULL.
cdef int stage_open() noexcept nogil
cdef bint stage_usable() noexcept nogil
cdef void stage_renew() noexcept nogil                          # in a forked child, which does not inherit it
cdef void stage_keep(int64_t bytes) noexcept nogil              # at most; what is kept beyond that is freed
cdef const int64_t* stage_kept() noexcept nogil                 # where it says how many bytes are kept just now
# A frame with memory; NULL: there is none. `zeros`: it reads as zeros.
cdef char* stage_take(bint* zeros) noexcept nogil
cdef char* stage_take_window(bint* zeros) noexcept nogil        # STAGE_SLOTS of them in a row
# `count` (1 .. STAGE_SLOTS) slots in a row without memory, for folios to be moved to. NULL: there are none.
cdef char* stage_room(int count) noexcept nogil
cdef void stage_moved(char* slots, int count) noexcept nogil    # their memory was moved away
# They have memory: kept, or freed. `whole`: a window that is one piece, if it is one.
cdef void stage_give(char* frames, int count, bint whole) noexcept nogil
# The same for one part of a folio (PART_BYTES): a frame with memory; a slot without; emptied by a move; done with.
cdef char* stage_take_part() noexcept nogil
cdef char* stage_part_room() noexcept nogil
cdef void stage_part_moved(char* slot) noexcept nogil
cdef void stage_part_give(char* frame) noexcept nogil
