"""The stage: frames on their way in and out (see stage.pxd). Touches address space of its own, and frames below it.

Not in a forked child: what is kept would be shared with the parent, and a shared page can't be moved (UFFDIO_MOVE wants
pages that are a process's own). Lock: `stage_lock`, a leaf mutex; nothing is read or written under it but the tables.
"""
from libc.errno cimport ENOMEM
from libc.stdint cimport int64_t, uint32_t, uint64_t

from userswap.backends.codec cimport FOLIO_BYTES, FOLIO_SHIFT
from userswap.memory.frames cimport frames_can_move, frames_register_stage
from userswap.native.mman cimport (
    MADV_DONTDUMP, MADV_DONTFORK, MADV_DONTNEED, MADV_NOHUGEPAGE, MADV_POPULATE_WRITE, MAP_ANONYMOUS, MAP_FAILED,
    MAP_FIXED_NOREPLACE, MAP_NORESERVE, MAP_PRIVATE, PROT_READ, PROT_WRITE, madvise, mmap, munmap,
)
from userswap.native.us cimport us_assert, us_lock, us_mutex, us_read, us_unlock, us_write

cdef enum:
    WINDOWS = 64
    WINDOW_BYTES = STAGE_SLOTS << FOLIO_SHIFT
    STAGE_BYTES = WINDOWS * WINDOW_BYTES

ctypedef char* Frame

cdef us_mutex stage_lock
cdef char* stage = NULL
cdef uint32_t[WINDOWS] taken            # slots that are not free; kept ones are among them
cdef Frame[STAGE_MOST_KEPT] kept
cdef int64_t have = 0                   # how many are kept
cdef int64_t most = STAGE_MOST_KEPT
cdef int last = 0                       # the window that gave the last slot


cdef int stage_map(char* at, int how) noexcept nogil:
    """Address space for the stage, registered; `at` NULL: anywhere."""
    global stage
    cdef char* start = <char*>mmap(at, STAGE_BYTES + (WINDOW_BYTES if at == NULL else 0), PROT_READ | PROT_WRITE,
                                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | how, -1, 0)
    if start == MAP_FAILED:
        return -ENOMEM
    if at == NULL:
        start = <char*>((<uint64_t>start + WINDOW_BYTES - 1) & ~<uint64_t>(WINDOW_BYTES - 1))
    madvise(start, STAGE_BYTES, MADV_DONTDUMP)
    madvise(start, STAGE_BYTES, MADV_DONTFORK)
    madvise(start, STAGE_BYTES, MADV_NOHUGEPAGE)
    cdef int error = frames_register_stage(start, STAGE_BYTES)
    if error:
        munmap(start, STAGE_BYTES)
        return error
    stage = start
    return 0


cdef int stage_open() noexcept nogil:
    if not frames_can_move() or stage != NULL:
        return 0
    return stage_map(NULL, 0)


cdef void stage_renew() noexcept nogil:
    global stage, have
    cdef char* at = stage
    cdef int i
    stage = NULL
    us_write(&have, 0)
    for i in range(WINDOWS):
        taken[i] = 0
    if at != NULL and frames_can_move():
        stage_map(at, MAP_FIXED_NOREPLACE)      # without one, frames are copied


cdef void stage_keep(int64_t wish) noexcept nogil:
    global most
    us_lock(&stage_lock)
    if wish < most:
        most = wish
    us_unlock(&stage_lock)


cdef int64_t stage_kept() noexcept nogil:
    return us_read(&have)


cdef char* stage_room(int count) noexcept nogil:
    global last
    cdef uint32_t bits = <uint32_t>((<uint64_t>1 << count) - 1)
    cdef uint32_t wanted
    cdef int i, shift, window
    cdef char* found = NULL
    if stage == NULL:
        return NULL
    us_lock(&stage_lock)
    for i in range(WINDOWS):
        window = (last + i) % WINDOWS
        if taken[window] == ~<uint32_t>0:
            continue
        for shift in range(STAGE_SLOTS - count + 1):
            wanted = bits << shift
            if taken[window] & wanted == 0:
                taken[window] |= wanted
                found = stage + <uint64_t>window * WINDOW_BYTES + (<uint64_t>shift << FOLIO_SHIFT)
                break
        if found != NULL:
            last = window
            break
    us_unlock(&stage_lock)
    return found


cdef char* stage_take(bint* zeros) noexcept nogil:
    cdef char* frame = NULL
    zeros[0] = False
    if stage == NULL:
        return NULL
    us_lock(&stage_lock)
    if have:
        us_write(&have, have - 1)
        frame = kept[have]
    us_unlock(&stage_lock)
    if frame == NULL:
        frame = stage_room(1)
        zeros[0] = True
        if frame != NULL and madvise(frame, FOLIO_BYTES, MADV_POPULATE_WRITE) != 0:
            stage_moved(frame, 1)               # no memory, just now
            return NULL
    return frame


cdef void stage_moved(char* slots, int count) noexcept nogil:
    cdef uint64_t offset = slots - stage
    cdef uint32_t bits = <uint32_t>((<uint64_t>1 << count) - 1) << ((offset >> FOLIO_SHIFT) & (STAGE_SLOTS - 1))
    cdef int window = <int>(offset // WINDOW_BYTES)
    us_lock(&stage_lock)
    us_assert(taken[window] & bits == bits, "slots that are given back were taken")
    taken[window] &= ~bits
    us_unlock(&stage_lock)


cdef void stage_give(char* frames, int count) noexcept nogil:
    us_lock(&stage_lock)
    while count and have < most:
        count -= 1
        kept[have] = frames + (<uint64_t>count << FOLIO_SHIFT)
        us_write(&have, have + 1)
    us_unlock(&stage_lock)
    if count:
        madvise(frames, <uint64_t>count << FOLIO_SHIFT, MADV_DONTNEED)
        stage_moved(frames, count)
