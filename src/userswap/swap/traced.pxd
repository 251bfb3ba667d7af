# A swap map that records what it is asked: the design `sparse`, with a tape. See traced.pyx.
from userswap.swap.map cimport SwapMap, SwapMapOps

# What a trace consists of, in this order in EVENTS: what a map was asked, as whoever replays it must ask it.
# Each has a ref, the number of a holder; ref, types (what the entry was and is from then on) and value are as said.
cdef enum:
    EVENT_ALLOC             # an id; value: the payload of a SLOT entry
    EVENT_RUN               # the first of several ids at once, in holders in a row
    EVENT_MORE              # each of the others, right behind it
    EVENT_FAULT             # lock, unlock
    EVENT_CACHE             # lock, into the swap cache, unlock
    EVENT_UNCACHE           # lock, out of it, unlock
    EVENT_WRITEBACK         # from the side of storage: into a slot
    EVENT_MOVE              # from the side of storage: elsewhere (compaction; swapoff, back to zswap)
    EVENT_DUP               # value: how many references more
    EVENT_PUT               # value: how many less; some are left
    EVENT_FREE              # value: the last ones are put, and the id is freed
    EVENT_COUNT             # the count was asked
    EVENT_CACHED            # the swap cache was asked
    EVENT_KINDS

cdef const SwapMapOps* traced_design() noexcept nogil
# Ends the recording: (columns, cut), the columns being bytes (kinds u8, types u8, threads u16, refs u32, times i64 in
# ns since the map was made, values i64), `cut` whether there was no room for all. None for a map that is not traced.
cdef object traced_events(SwapMap* map)
