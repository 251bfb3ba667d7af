"""The server: who reads faults, and who serves them (see server.pxd). Touches its own few words and userfaultfd.

`server_lock` is a leaf mutex. It is taken outside of the gate, so a forked child may find it held, and makes it anew.
"""
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset

from userswap.memory.frames cimport frame_wake, frames_descriptor
from userswap.native.thread cimport thread_detached
from userswap.native.us cimport (
    us_assert, us_futex_wait, us_futex_wake, us_load32, us_lock, us_mutex, us_store32,
    us_unlock,
)

cdef extern from *:
    """
    #include "us.h"

    struct us_fault { char *address; uint32_t thread; int writing; };

    /* The next fault: 1, or 0 if there was none, and errno says why. */
    static int us_next_fault(int fd, struct us_fault *fault) {
        struct uffd_msg message;
        ssize_t length = read(fd, &message, sizeof message);
        if (length != (ssize_t)sizeof message || message.event != UFFD_EVENT_PAGEFAULT) return 0;
        fault->address = (char *)(uintptr_t)message.arg.pagefault.address;
        fault->thread = message.arg.pagefault.feat.ptid;
        fault->writing = (message.arg.pagefault.flags & (UFFD_PAGEFAULT_FLAG_WRITE | UFFD_PAGEFAULT_FLAG_WP)) != 0;
        return 1;
    }
    """
    ctypedef struct Fault "struct us_fault":
        char* address
        uint32_t thread
        bint writing
    int us_next_fault(int fd, Fault* fault) nogil

cdef enum:
    QUEUE = 256
    PAGE = 4096

cdef us_mutex server_lock
cdef Fault[QUEUE] queue             # read, and nobody's yet
cdef int first = 0
cdef int waiting = 0
cdef bint somebody_reads = False
cdef int idle = 0                   # threads that wait for a fault, or for their turn to read
cdef uint32_t changed = 0           # what they sleep on
cdef int threads_wanted = 0
cdef const ServerOps* operations = NULL


cdef inline char* page_of(char* address) noexcept nogil:
    return <char*>(<uint64_t>address & ~<uint64_t>(PAGE - 1))


cdef bint read_fault(Fault* fault) noexcept nogil:
    """Until there is one for `fault`, which others don't wait for this thread for. False: never again."""
    while True:
        if us_next_fault(frames_descriptor(), fault):
            if not operations.mend(fault.address, fault.thread):
                return True
        elif errno != EINTR and errno != EAGAIN:
            return False


cdef bint read_until_served(Fault* fault) noexcept nogil:
    """Reads, until somebody else can: then `fault` is to be served by this thread. False: there will be none."""
    global waiting, somebody_reads
    cdef bint passed_on
    while read_fault(fault):
        us_lock(&server_lock)
        passed_on = idle > 0
        if passed_on:
            somebody_reads = False
            us_store32(&changed, changed + 1)
        elif waiting < QUEUE:
            # The others come for it when they are done.
            queue[(first + waiting) % QUEUE] = fault[0]
            waiting += 1
        us_unlock(&server_lock)
        if passed_on:
            us_futex_wake(&changed, 1)
            return True
        if waiting == QUEUE:
            frame_wake(page_of(fault.address), PAGE)        # it will fault again
    return False


cdef void* body(void* nothing) noexcept nogil:
    global first, waiting, somebody_reads, idle
    cdef Fault fault
    cdef uint32_t seen
    us_lock(&server_lock)
    while True:
        if waiting:
            fault = queue[first]
            first = (first + 1) % QUEUE
            waiting -= 1
            us_unlock(&server_lock)
        elif somebody_reads:
            idle += 1
            seen = us_load32(&changed)
            us_unlock(&server_lock)
            us_futex_wait(&changed, seen)
            us_lock(&server_lock)
            idle -= 1
            continue
        else:
            somebody_reads = True
            us_unlock(&server_lock)
            if not read_until_served(&fault):
                return NULL
        operations.serve(fault.address, fault.writing, fault.thread)
        us_lock(&server_lock)


cdef int server_start(const ServerOps* ops, int threads) noexcept nogil:
    global operations, threads_wanted
    if operations != NULL:
        return 0
    us_assert(threads > 1, "somebody serves while somebody reads")
    operations = ops
    threads_wanted = threads
    return server_renew()


cdef int server_renew() noexcept nogil:
    global first, waiting, somebody_reads, idle
    cdef int _i, error
    memset(&server_lock, 0, sizeof(server_lock))
    first = waiting = idle = 0
    somebody_reads = False
    for _i in range(threads_wanted):
        error = thread_detached(body, NULL, 0)
        if error:
            return error
    return 0
