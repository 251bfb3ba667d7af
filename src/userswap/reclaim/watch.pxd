# Watch: what a program that was given no budget may have *now*, as its cgroups and the machine say. Reads files whose
# descriptors are kept, and computes; knows nothing of pools. Who calls, how often, and what then happens is the memory
# room's (memory/watcher). Not for several threads at once.
#
# Of each limit is left what others do not use, less a reserve. What we use is a part of what the cgroup uses:
#
#     budget = limit - reserve - (in use, without page cache - ours)
#
# so it shrinks when the program's other memory grows, or another process's, and grows when that goes.
from libc.stdint cimport int64_t

cdef enum:
    WATCH_LEVELS = 16           # of cgroups above each other; what is further up is not watched

cdef enum:
    LIMIT, HIGH, USAGE, STAT, EVENTS, FILES

# A cgroup, of version 1 or 2.
cdef struct Level:
    int version
    int[FILES] fds              # -1: there is no such file
    int64_t limit               # NO_LIMIT: none that counts
    int file                    # that says so: LIMIT, HIGH, or STAT for one further up that is not visible
    int64_t used                # of it, without page cache that is not mapped
    int64_t usage               # with it, at the same time
    int64_t ours                # and what the pool used then
    int64_t events              # times that somebody came to the limit

cdef struct Watch:
    int count
    Level[WATCH_LEVELS] levels
    int meminfo
    int pressure                # PSI: of the cgroup if it has one, else the machine's
    int64_t total               # RAM of the machine
    int64_t available
    int64_t ours                # what the pool used when that was read
    int64_t spare               # what the tightest bound has left in all, with its reserve
    int64_t all_at              # ns: when everything is to be read again
    int64_t pressure_at         # ns: when pressure was looked at
    int64_t stalled             # us of pressure until then
    int64_t extra               # held back because of pressure
    bint moved                  # the last look found something else than the one before

cdef int64_t NO_LIMIT

cdef Watch* watch_new() noexcept nogil                              # NULL: no memory
cdef int watch_machine(Watch* w, const char* meminfo, const char* pressure) noexcept nogil  # 0 or -errno
cdef void watch_add(Watch* w, int version, const char* directory) noexcept nogil
cdef void watch_delete(Watch* w) noexcept nogil
# Bytes for a pool that uses `ours` of them now; may be negative. `now`: ns.
cdef int64_t watch_look(Watch* w, int64_t ours, int64_t now) noexcept nogil
cdef int64_t watch_pause(const Watch* w) noexcept nogil             # ms until the next look is due
# Descriptors that poll() wakes for (POLLPRI) when somebody comes to a limit: how many.
cdef int watch_events(const Watch* w, int* fds, int most) noexcept nogil
