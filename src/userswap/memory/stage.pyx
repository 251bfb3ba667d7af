"""The stage: frames on their way in and out (see stage.pxd). Touches address space of its own, and frames below it.

Not in a forked child: what is kept would be shared with the parent, and a shared page can't be moved (UFFDIO_MOVE wants
pages that are a process's own). Lock: `stage_lock`, a leaf mutex; nothing is read or written under it but the tables.
"""
from libc.errno cimport ENOMEM
from libc.stdint cimport int64_t, uint32_t, uint64_t

from userswap.backends.codec cimport FOLIO_BYTES, FOLIO_SHIFT, PART_BYTES
from userswap.memory.frames cimport frame_vacate, frames_can_move, frames_register_stage
from userswap.native.mman cimport (
    MADV_DONTDUMP, MADV_DONTFORK, MADV_HUGEPAGE, MADV_NOHUGEPAGE, MADV_POPULATE_WRITE,
    MAP_ANONYMOUS, MAP_FAILED, MAP_FIXED_NOREPLACE, MAP_NORESERVE, MAP_PRIVATE, PROT_READ, PROT_WRITE, madvise, mmap,
    munmap,
)
from userswap.native.us cimport us_assert, us_lock, us_mutex, us_unlock, us_write

cdef enum:
    WINDOWS = 64
    SINGLE = 32                 # windows of which folios are taken one by one; the others only go as a whole
    WINDOW_BYTES = STAGE_SLOTS << FOLIO_SHIFT
    PART_SLOTS = 512
    PARTS_AT = WINDOWS * WINDOW_BYTES
    STAGE_BYTES = PARTS_AT + PART_SLOTS * PART_BYTES

ctypedef char* Frame

cdef us_mutex stage_lock
cdef char* stage = NULL
cdef uint32_t[WINDOWS] taken            # slots that are not free; kept ones are among them
cdef Frame[STAGE_MOST_KEPT] kept
cdef int64_t have = 0                   # how many are kept
cdef Frame[STAGE_MOST_WINDOWS] kept_windows
cdef int64_t have_windows = 0
cdef int64_t most = STAGE_MOST_KEPT
cdef int64_t most_windows = STAGE_MOST_WINDOWS
cdef int last = 0                       # the window that gave the last slot
# Slots of one part, behind the windows: kept ones, and free ones below `used_parts`, the first that never had a user.
cdef Frame[STAGE_MOST_PARTS] kept_parts
cdef Frame[PART_SLOTS] free_parts
cdef int64_t have_parts = 0
cdef int64_t have_free = 0
cdef int64_t used_parts = 0
cdef int64_t most_parts = STAGE_MOST_PARTS
cdef int64_t kept_bytes = 0             # of all that is kept; read without the lock


cdef inline void count_kept() noexcept nogil:
    us_write(&kept_bytes, have * FOLIO_BYTES + have_windows * WINDOW_BYTES + have_parts * PART_BYTES)


cdef const int64_t* stage_kept() noexcept nogil:
    return &kept_bytes


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
    madvise(start, SINGLE * WINDOW_BYTES, MADV_NOHUGEPAGE)
    madvise(start + SINGLE * WINDOW_BYTES, (WINDOWS - SINGLE) * WINDOW_BYTES, MADV_HUGEPAGE)
    madvise(start + PARTS_AT, PART_SLOTS * PART_BYTES, MADV_NOHUGEPAGE)
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


cdef bint stage_usable() noexcept nogil:
    return stage != NULL


cdef void stage_renew() noexcept nogil:
    global stage, have, have_windows, have_parts, have_free, used_parts
    cdef char* at = stage
    cdef int i
    stage = NULL
    have = have_windows = have_parts = have_free = used_parts = 0
    count_kept()
    for i in range(WINDOWS):
        taken[i] = 0
    if at != NULL and frames_can_move():
        stage_map(at, MAP_FIXED_NOREPLACE)      # without one, frames are copied


cdef void stage_keep(int64_t bytes) noexcept nogil:
    global most, most_windows, most_parts
    cdef int64_t frames = bytes // 4 // FOLIO_BYTES
    cdef int64_t parts = bytes // 4 // PART_BYTES
    cdef int64_t windows = bytes // 2 // WINDOW_BYTES
    frames = frames if frames < STAGE_MOST_KEPT else STAGE_MOST_KEPT
    parts = parts if parts < STAGE_MOST_PARTS else STAGE_MOST_PARTS
    windows = windows if windows < STAGE_MOST_WINDOWS else STAGE_MOST_WINDOWS
    us_lock(&stage_lock)
    most = frames
    most_parts = parts
    most_windows = windows
    us_unlock(&stage_lock)
    trim(kept, &have, frames, 1)
    trim(kept_windows, &have_windows, windows, STAGE_SLOTS)
    trim(kept_parts, &have_parts, parts, 0)


cdef void trim(Frame* those_kept, int64_t* left, int64_t goal, int count) noexcept nogil:
    """Frees what is kept beyond `goal`: frames of `count` folios, or of one part, if that is 0."""
    cdef char* frame
    while True:
        frame = NULL
        us_lock(&stage_lock)
        if left[0] > goal:
            left[0] -= 1
            frame = those_kept[left[0]]
            count_kept()
        us_unlock(&stage_lock)
        if frame == NULL:
            return
        frame_vacate(frame, <uint64_t>count << FOLIO_SHIFT if count else PART_BYTES)
        if count:
            stage_moved(frame, count)
        else:
            stage_part_moved(frame)


cdef char* stage_room(int count) noexcept nogil:
    global last
    cdef uint32_t bits = <uint32_t>((<uint64_t>1 << count) - 1)
    cdef int i, shift, window
    cdef char* found = NULL
    if stage == NULL:
        return NULL
    us_lock(&stage_lock)
    for i in range(SINGLE):
        window = SINGLE + i if count == STAGE_SLOTS else (last + i) % SINGLE
        if taken[window] == ~<uint32_t>0:
            continue
        for shift in range(STAGE_SLOTS - count + 1):
            if taken[window] & (bits << shift) == 0:
                taken[window] |= bits << shift
                found = stage + <uint64_t>window * WINDOW_BYTES + (<uint64_t>shift << FOLIO_SHIFT)
                break
        if found != NULL:
            if count < STAGE_SLOTS:
                last = window
            break
    us_unlock(&stage_lock)
    return found


cdef char* take_new(int count) noexcept nogil:
    cdef char* frames = stage_room(count)
    if frames != NULL and madvise(frames, <uint64_t>count << FOLIO_SHIFT, MADV_POPULATE_WRITE) != 0:
        frame_vacate(frames, <uint64_t>count << FOLIO_SHIFT)
        stage_moved(frames, count)              # no memory, just now
        return NULL
    return frames


cdef char* take(Frame* those_kept, int64_t* left, int count, bint* zeros) noexcept nogil:
    cdef char* frames = NULL
    us_lock(&stage_lock)
    if left[0]:
        left[0] -= 1
        frames = those_kept[left[0]]
        count_kept()
    us_unlock(&stage_lock)
    zeros[0] = frames == NULL
    return take_new(count) if frames == NULL else frames


cdef char* stage_take(bint* zeros) noexcept nogil:
    return take(kept, &have, 1, zeros)


cdef char* stage_take_window(bint* zeros) noexcept nogil:
    return take(kept_windows, &have_windows, STAGE_SLOTS, zeros)


cdef void stage_moved(char* slots, int count) noexcept nogil:
    cdef uint64_t offset = slots - stage
    cdef uint32_t bits = <uint32_t>((<uint64_t>1 << count) - 1) << ((offset >> FOLIO_SHIFT) & (STAGE_SLOTS - 1))
    cdef int window = <int>(offset // WINDOW_BYTES)
    us_lock(&stage_lock)
    us_assert(taken[window] & bits == bits, "slots that are given back were taken")
    taken[window] &= ~bits
    us_unlock(&stage_lock)


cdef void stage_give(char* frames, int count, bint whole) noexcept nogil:
    global have, have_windows
    cdef bint single = frames < stage + SINGLE * WINDOW_BYTES
    us_lock(&stage_lock)
    if count == STAGE_SLOTS and whole and have_windows < most_windows:
        kept_windows[have_windows] = frames
        have_windows += 1
        count = 0
    # Not of a window that is whole, or was: what is left of a huge page keeps all of it.
    while single and count and have < most:
        count -= 1
        kept[have] = frames + (<uint64_t>count << FOLIO_SHIFT)
        have += 1
    count_kept()
    us_unlock(&stage_lock)
    if count:
        # Of a whole window this frees the page table too (Linux 6.14), so that a huge page can come here again.
        frame_vacate(frames, <uint64_t>count << FOLIO_SHIFT)
        stage_moved(frames, count)


# ---- single parts ----

cdef char* stage_part_room() noexcept nogil:
    global have_free, used_parts
    cdef char* found = NULL
    if stage == NULL:
        return NULL
    us_lock(&stage_lock)
    if have_free:
        have_free -= 1
        found = free_parts[have_free]
    elif used_parts < PART_SLOTS:
        found = stage + PARTS_AT + used_parts * PART_BYTES
        used_parts += 1
    us_unlock(&stage_lock)
    return found


cdef char* stage_take_part() noexcept nogil:
    global have_parts
    cdef char* frame = NULL
    us_lock(&stage_lock)
    if have_parts:
        have_parts -= 1
        frame = kept_parts[have_parts]
        count_kept()
    us_unlock(&stage_lock)
    if frame == NULL:
        frame = stage_part_room()
        if frame != NULL and madvise(frame, PART_BYTES, MADV_POPULATE_WRITE) != 0:
            frame_vacate(frame, PART_BYTES)
            stage_part_moved(frame)             # no memory, just now
            frame = NULL
    return frame


cdef void stage_part_moved(char* slot) noexcept nogil:
    global have_free
    us_lock(&stage_lock)
    us_assert(have_free < PART_SLOTS, "a slot that is given back was taken")
    free_parts[have_free] = slot
    have_free += 1
    us_unlock(&stage_lock)


cdef void stage_part_give(char* frame) noexcept nogil:
    global have_parts
    us_lock(&stage_lock)
    if have_parts < most_parts:
        kept_parts[have_parts] = frame
        have_parts += 1
        count_kept()
        frame = NULL
    us_unlock(&stage_lock)
    if frame != NULL:
        frame_vacate(frame, PART_BYTES)
        stage_part_moved(frame)
