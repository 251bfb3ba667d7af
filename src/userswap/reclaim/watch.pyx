"""Watch: what the cgroups and the machine leave, read again and again (see watch.pxd).

How often is a matter of how soon it could be too late: memory is touched at about a byte a nanosecond, so what a limit
has left says when the next look is due. Most looks read one number for each limit; the rest only when that has moved,
or a quarter of a second has gone by.

Pressure (tasks that stall for memory, PSI; charges that came to the limit, memory.events or failcnt) says that the
reserve is too small for what goes on: more is held back as long as it lasts. It counts only where little is left, since
the machine's figures are about others too, and a limit that is full of page cache is met all the time.
"""
import os

from libc.errno cimport errno
from libc.stdint cimport int64_t
from libc.stdlib cimport calloc, free, strtoll
from libc.string cimport memchr, strlen, strncmp, strstr

from userswap.native.descriptors cimport FIRST_FD, descriptor_guard, descriptor_release, descriptor_up
from userswap.native.us cimport us_now

cdef extern from "<fcntl.h>" nogil:
    int open(const char* path, int flags)
    int O_RDONLY, O_CLOEXEC

cdef extern from "<unistd.h>" nogil:
    ssize_t pread(int fd, void* buffer, size_t length, int64_t offset)
    int close(int fd)

cdef extern from "<stdio.h>" nogil:
    int snprintf(char* to, size_t size, const char* format, ...)

cdef enum:
    TEXT = 8192                 # memory.stat and meminfo are half as long
    LEAST_PAUSE = 8             # ms
    MOST_PAUSE = 250
    IDLE_PAUSE = 1000
    PRESSED_SHARE = 10          # per cent of the time in which somebody stalls
    MOST_EXTRA = 4              # one in so many bytes of the budget is held back at most
    MOVED = 16                  # one in so many bytes of the reserve: less is as it was

NO_LIMIT = <int64_t>1 << 60     # version 1 writes "no limit" as the largest multiple of a page

cdef int64_t LOOK_NS = 250000000
cdef int64_t PRESSURE_NS = 100000000
# Beside the arrays there is the interpreter with its libraries, and page cache for the files it reads.
LEAST_RESERVE = 64 << 20
RESERVED_SHARE = 10             # per cent of the limit
MACHINE_SHARE = 75              # per cent of what the machine has available: others live on it too
cdef int64_t least_reserve = LEAST_RESERVE
cdef int64_t reserved_share = RESERVED_SHARE
cdef int64_t machine_share = MACHINE_SHARE

ctypedef const char* Name
cdef Name[2][FILES] NAMES
NAMES[0] = ["memory.limit_in_bytes", "", "memory.usage_in_bytes", "memory.stat", "memory.failcnt"]
NAMES[1] = ["memory.max", "memory.high", "memory.current", "memory.stat", "memory.events"]


# ---- files ----

cdef int open_file(const char* directory, const char* name) noexcept nogil:
    """A descriptor, which the program may not close; or -errno."""
    cdef char[4096] path
    cdef int fd
    if name[0] == 0 or snprintf(path, sizeof(path), "%s/%s", directory, name) >= <int>sizeof(path):
        return -1
    fd = open(path, O_RDONLY | O_CLOEXEC)
    if fd < 0:
        return -errno
    fd = descriptor_up(fd, FIRST_FD)
    descriptor_guard(fd)
    return fd


cdef void close_file(int fd) noexcept nogil:
    if fd >= 0:
        descriptor_release(fd)
        close(fd)


cdef bint text_of(int fd, char* text) noexcept nogil:
    cdef ssize_t got = pread(fd, text, TEXT - 1, 0) if fd >= 0 else -1
    text[got if got > 0 else 0] = 0
    return got > 0


cdef int64_t number_at(const char* text) noexcept nogil:
    """The decimal number that a word or a line is; -1: it is something else, as "max" is."""
    cdef char* end = NULL
    cdef int64_t number
    while text[0] == b' ':
        text += 1
    if not b'0' <= text[0] <= b'9':
        return -1
    number = strtoll(text, &end, 10)
    return number if end[0] in (0, b'\n', b' ') else -1


cdef int64_t number_of(int fd) noexcept nogil:
    cdef char[TEXT] text
    return number_at(text) if text_of(fd, text) else -1


cdef int64_t value_of(const char* text, const char* name) noexcept nogil:
    """The number in the line that begins with `name`; -1: there is none."""
    cdef size_t length = strlen(name)
    while text != NULL and text[0] != 0:
        if strncmp(text, name, length) == 0 and text[length] in (b' ', b':'):
            return number_at(text + length + 1)
        text = <const char*>memchr(text, b'\n', strlen(text))
        text = text + 1 if text != NULL else NULL
    return -1


cdef inline int64_t at_least_0(int64_t number) noexcept nogil:
    return number if number > 0 else 0


# ---- a cgroup ----

cdef void level_open(Level* level, int version, const char* directory) noexcept nogil:
    cdef int i
    level.version = version
    level.limit = NO_LIMIT
    for i in range(FILES):
        level.fds[i] = open_file(directory, NAMES[version - 1][i])
    level.events = level_events(level)


cdef void level_close(Level* level) noexcept nogil:
    cdef int i
    for i in range(FILES):
        close_file(level.fds[i])


cdef int64_t level_events(const Level* level) noexcept nogil:
    cdef char[TEXT] text
    if level.version == 1:
        return at_least_0(number_of(level.fds[<int>EVENTS]))
    if not text_of(level.fds[<int>EVENTS], text):
        return 0
    return at_least_0(value_of(text, "high")) + at_least_0(value_of(text, "max"))


cdef void level_read(Level* level, int64_t total) noexcept nogil:
    """Everything about a level. A limit that can't bind, as the machine has no more, is none."""
    cdef char[TEXT] text
    cdef bint one = level.version == 1
    cdef int64_t size = number_of(level.fds[<int>LIMIT])
    cdef int64_t cache, mapped
    if not text_of(level.fds[<int>STAT], text):
        text[0] = 0
    level.limit = size if size >= 0 else NO_LIMIT
    level.file = LIMIT
    # Limits of cgroups above that are not visible from inside a container are only told there.
    size = value_of(text, "hierarchical_memory_limit") if one else number_of(level.fds[<int>HIGH])
    if 0 <= size < level.limit:
        level.limit = size
        level.file = STAT if one else HIGH
    if level.limit >= total:
        level.limit = NO_LIMIT
        return
    level.usage = at_least_0(number_of(level.fds[<int>USAGE]))
    cache = (at_least_0(value_of(text, "total_inactive_file" if one else "inactive_file"))
             + at_least_0(value_of(text, "total_active_file" if one else "active_file")))
    mapped = at_least_0(value_of(text, "total_mapped_file" if one else "file_mapped"))
    # The kernel drops page cache first.
    level.used = at_least_0(level.usage - at_least_0(cache - mapped))


cdef inline int64_t reserve_of(int64_t limit) noexcept nogil:
    # In two pieces, as a limit may be NO_LIMIT, of which many times as much is no number.
    cdef int64_t share = limit // 100 * reserved_share + limit % 100 * reserved_share // 100
    return share if share > least_reserve else least_reserve


# ---- all of them, and the machine ----

cdef Watch* watch_new() noexcept nogil:
    cdef Watch* w = <Watch*>calloc(1, sizeof(Watch))
    if w != NULL:
        w.meminfo = w.pressure = -1
    return w


cdef int watch_machine(Watch* w, const char* meminfo, const char* pressure) noexcept nogil:
    cdef char[TEXT] text
    w.meminfo = open_file(meminfo, "meminfo")
    if w.meminfo < 0:
        return w.meminfo
    if text_of(w.meminfo, text):
        w.total = at_least_0(value_of(text, "MemTotal")) << 10
    if w.total <= 0 or w.total > NO_LIMIT:
        w.total = NO_LIMIT
    if w.pressure < 0:
        w.pressure = open_file(pressure, "memory")
    w.stalled = stalls(w)
    return 0


cdef void watch_add(Watch* w, int version, const char* directory) noexcept nogil:
    if w.count == WATCH_LEVELS:
        return
    level_open(&w.levels[w.count], version, directory)
    w.count += 1
    if version == 2 and w.pressure < 0:
        w.pressure = open_file(directory, "memory.pressure")


cdef void watch_delete(Watch* w) noexcept nogil:
    cdef int i
    if w == NULL:
        return
    for i in range(w.count):
        level_close(&w.levels[i])
    close_file(w.meminfo)
    close_file(w.pressure)
    free(w)


cdef int64_t stalls(const Watch* w) noexcept nogil:
    """us for which some task has stalled for memory, ever: "some avg10=0.00 ... total=123"."""
    cdef char[TEXT] text
    cdef const char* found
    if not text_of(w.pressure, text):
        return 0
    found = strstr(text, "total=")
    return at_least_0(number_at(found + 6)) if found != NULL else 0


cdef inline bint far_from(int64_t one, int64_t other, int64_t reserve) noexcept nogil:
    return one - other > reserve // MOVED or other - one > reserve // MOVED


cdef bint level_look(Level* level, int64_t total, int64_t ours, bint all) noexcept nogil:
    """Reads a level, or of one that is limited how much is used, and the rest if that has moved. Whether it has."""
    cdef int64_t limit = level.limit
    cdef int64_t reserve = reserve_of(limit)
    cdef int64_t used = level.used
    cdef int64_t usage
    if not all:
        if limit == NO_LIMIT:
            return False
        usage = number_of(level.fds[<int>USAGE])
        # Of what is full of page cache only the rest says how much of it is memory by now.
        if usage < limit - reserve // 2 and not far_from(usage, level.usage, reserve):
            return False
    level_read(level, total)
    level.ours = ours
    return level.limit != limit or (limit != NO_LIMIT and far_from(level.used, used, reserve))


cdef int64_t held_back(Watch* w, int64_t budget, bint tight, bint pressed, int64_t now) noexcept nogil:
    """What pressure asks for beside the reserve."""
    cdef int64_t total
    cdef bint due = now - w.pressure_at >= PRESSURE_NS
    if due:
        total = stalls(w)
        pressed = pressed or (w.pressure_at != 0
                              and (total - w.stalled) * 1000 > (now - w.pressure_at) // 100 * PRESSED_SHARE)
        w.stalled = total
        w.pressure_at = now
    if pressed and tight:
        w.extra = 2 * w.extra if w.extra > budget // 128 else budget // 64
    elif due:
        w.extra -= (w.extra + 3) // 4
    if w.extra > budget // MOST_EXTRA:
        w.extra = budget // MOST_EXTRA
    return w.extra if w.extra > 0 else 0


cdef int64_t watch_look(Watch* w, int64_t ours, int64_t now) noexcept nogil:
    cdef char[TEXT] text
    cdef bint all = now >= w.all_at
    cdef bint tight = False
    cdef bint pressed = False
    cdef int64_t budget, left, events
    cdef Level* level
    cdef int i
    w.moved = False
    if all:
        w.all_at = now + LOOK_NS
        if text_of(w.meminfo, text):
            left = value_of(text, "MemAvailable")
            if left < 0:
                left = at_least_0(value_of(text, "MemFree")) + at_least_0(value_of(text, "Cached"))
            w.moved = far_from(left << 10, w.available, w.total // MOVED)
            w.available = left << 10
            w.ours = ours
    budget = (w.available + w.ours) * machine_share // 100
    w.spare = w.available
    tight = w.spare < w.total // 16
    for i in range(w.count):
        level = &w.levels[i]
        w.moved = level_look(level, w.total, ours, all) or w.moved
        if level.limit == NO_LIMIT:
            continue
        left = level.limit - level.used
        if left < w.spare:
            w.spare = left
        tight = tight or left < 2 * reserve_of(level.limit)
        events = level_events(level)
        pressed = pressed or (events != level.events and left < reserve_of(level.limit) // 2)
        level.events = events
        if left - reserve_of(level.limit) + level.ours < budget:
            budget = left - reserve_of(level.limit) + level.ours
    return budget - held_back(w, budget, tight, pressed, now)


cdef int64_t watch_pause(const Watch* w) noexcept nogil:
    cdef int64_t pause = w.spare >> 20
    cdef int64_t most = MOST_PAUSE if w.moved else IDLE_PAUSE
    pause = pause if pause < most else most
    return pause if pause > LEAST_PAUSE else LEAST_PAUSE


cdef int watch_events(const Watch* w, int* fds, int most) noexcept nogil:
    cdef int i, count = 0
    for i in range(w.count):
        if w.levels[i].version == 2 and w.levels[i].fds[<int>EVENTS] >= 0 and count < most:
            fds[count] = w.levels[i].fds[<int>EVENTS]
            count += 1
    return count


# ---- for Python ----

def read_level(version: int, directory: str, total: int):
    """(file that limits, bytes allowed, bytes used) of a cgroup; None without a limit below `total`."""
    cdef Level level
    cdef bytes path = os.fsencode(directory)
    level_open(&level, version, path)
    level_read(&level, total)
    level_close(&level)
    if level.limit == NO_LIMIT:
        return None
    name = NAMES[version - 1][level.file].decode()
    return (f"{name}: hierarchical_memory_limit" if level.file == STAT else name), level.limit, level.used


def reserve(limit: int) -> int:
    """Bytes of a limit to leave to the interpreter and to page cache."""
    return reserve_of(limit)


cdef class Reader:
    """A watch of one's own, for tests and figures: see watch.pxd."""
    cdef Watch* watch

    def __cinit__(self, levels, proc: str):
        self.watch = watch_new()
        if self.watch == NULL:
            raise MemoryError("no memory for a watch")
        for version, directory in levels:
            watch_add(self.watch, version, os.fsencode(directory))
        error = watch_machine(self.watch, os.fsencode(proc), os.fsencode(proc + "/pressure"))
        if error:
            raise OSError(-error, os.strerror(-error))

    def __dealloc__(self):
        watch_delete(self.watch)

    def look(self, ours: int, now: int | None = None) -> tuple[int, int]:
        """Bytes for a pool that uses `ours`, and ms until the next look is due. `now`: ns; the clock's, if None."""
        cdef int64_t budget = watch_look(self.watch, ours, us_now() if now is None else now)
        return budget, watch_pause(self.watch)
