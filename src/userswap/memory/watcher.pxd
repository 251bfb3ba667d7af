# The watcher: a thread that gives pools whose budget was not given what the machine leaves now. It looks
# (reclaim/watch), sets another budget, and reclaims what is too much by that, whether or not the program faults.
#
# A thread of ours and not Python's: it must come to look while a program holds the GIL, and threads of Python's are
# seen by programs. Not the one of memory/ahead: that waits for swap files, and is not there with one processor. A
# forked child has none: its budget stays what it was.
cdef enum:
    WATCHER_PIECE = 16 << 20    # bytes that are reclaimed at once: then it looks again, and a fork may go on

cdef int watcher_start() noexcept nogil                         # the thread, once a process: 0 or -errno
cdef void watcher_rest() noexcept nogil                         # the process ends: it does nothing any more
