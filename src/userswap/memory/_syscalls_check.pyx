"""A small arena of really missing memory, to try the system-call wrappers on.

What lives here: one mapping registered with a userfaultfd in SIGBUS mode, PinOps that fill its folios
with UFFDIO_COPY and take them away again, and a SIGBUS handler for the program's own loads and stores.
It is the smallest pool there can be: one lock, a copy of everything, no budget. Imported by the tests
and by whoever wants to see the wrappers at work; nothing in the package imports it. Touches its own
mapping and its copy of it only.
"""
from libc.errno cimport errno
from libc.stdint cimport int64_t, uint8_t, uint64_t
from libc.string cimport memcpy, memset

from userswap.memory.syscalls cimport (
    PinOps, sigbus_chain, sigbus_install, siginfo_t, syscalls_install,
)
from userswap.native.us cimport us_lock, us_mutex, us_unlock


cdef extern from "us.h" nogil:
    enum:
        UFFD_API
        UFFD_FEATURE_SIGBUS
        UFFD_USER_MODE_ONLY
        UFFDIO_API
        UFFDIO_REGISTER
        UFFDIO_COPY
        UFFDIO_REGISTER_MODE_MISSING
        SYS_userfaultfd
        O_CLOEXEC
    struct uffdio_api:
        uint64_t api
        uint64_t features
    struct uffdio_range:
        uint64_t start
        uint64_t len
    struct uffdio_register:
        uffdio_range range
        uint64_t mode
    struct uffdio_copy:
        uint64_t dst
        uint64_t src
        uint64_t len
        uint64_t mode
        int64_t copy
    long syscall(long, ...)
    int ioctl(int, unsigned long, ...)

cdef extern from * nogil:
    """
    #include <errno.h>
    #include <fcntl.h>
    /* A pin may change errno; this one always does, so that a wrapper that forgets is found out. */
    static void us_spoil_errno(void) { errno = ENOENT; }
    """
    void spoil_errno "us_spoil_errno"()

cdef extern from "<sys/mman.h>" nogil:
    enum:
        PROT_READ
        PROT_WRITE
        MAP_PRIVATE
        MAP_ANONYMOUS
        MADV_DONTNEED
    void* MAP_FAILED
    void* mmap(void*, size_t, int, int, int, long)
    int madvise(void*, size_t, int)

cdef enum:
    FOLIO = 65536
    FOLIOS = 4096

cdef char* arena = NULL
cdef char* store = NULL
cdef size_t arena_bytes = 0
cdef int uffd = -1
cdef us_mutex lock
cdef uint8_t resident[FOLIOS]
cdef int pins[FOLIOS]
cdef int failing[FOLIOS]        # the errno that pinning this folio gives
cdef bint eager = True          # a folio leaves with its last pin
cdef int64_t share = 4 * FOLIO
cdef int64_t pin_calls = 0
cdef int64_t most_pinned = 0
cdef int64_t now_pinned = 0     # bytes

cdef bint ours(const void* start, size_t length) noexcept nogil:
    # As one comparison of offsets: NULL, length 0 and ranges that run past the end of memory come out right.
    cdef uint64_t low = <uint64_t>start, high = low + length
    if length == 0:
        return False
    if high < low:
        high = <uint64_t>-1
    return low < <uint64_t>arena + arena_bytes and high > <uint64_t>arena

# Under the lock. 0 or -errno.
cdef int bring(size_t folio) noexcept nogil:
    cdef uffdio_copy copy
    if resident[folio]:
        return 0
    copy.dst = <uint64_t>(arena + folio * FOLIO)
    copy.src = <uint64_t>(store + folio * FOLIO)
    copy.len = FOLIO
    copy.mode = 0
    copy.copy = 0
    if ioctl(uffd, UFFDIO_COPY, &copy) != 0:
        return -errno
    resident[folio] = 1
    return 0

cdef void drop(size_t folio) noexcept nogil:
    if resident[folio] and pins[folio] == 0:
        memcpy(store + folio * FOLIO, arena + folio * FOLIO, FOLIO)
        resident[folio] = 0
        madvise(arena + folio * FOLIO, FOLIO, MADV_DONTNEED)

cdef int64_t pin(void* start, size_t length, bint writing) noexcept nogil:
    global pin_calls, now_pinned, most_pinned
    cdef char* address = <char*>start
    cdef char* end = address + length
    cdef char* stop
    cdef size_t folio
    cdef int64_t mine = 0
    cdef int error = 0
    if address < arena:
        stop = arena if end > arena else end
        return stop - address
    if address >= arena + arena_bytes:
        return <int64_t>length
    us_lock(&lock)
    pin_calls += 1
    while address < end and address < arena + arena_bytes and mine < share:
        folio = <size_t>(address - arena) // FOLIO
        error = -failing[folio] if failing[folio] else bring(folio)
        if error:
            break
        pins[folio] += 1
        mine += FOLIO
        now_pinned += FOLIO
        address = arena + (folio + 1) * FOLIO
    if now_pinned > most_pinned:
        most_pinned = now_pinned
    us_unlock(&lock)
    spoil_errno()
    if mine == 0:
        return error
    if address >= arena + arena_bytes or address > end:
        address = end
    return address - <char*>start

cdef void unpin(void* start, size_t length) noexcept nogil:
    global now_pinned
    cdef char* address = <char*>start
    cdef char* end = address + length
    cdef size_t folio, last
    if address < arena:
        address = arena
    if end > arena + arena_bytes:
        end = arena + arena_bytes
    if address >= end:
        return
    us_lock(&lock)
    last = <size_t>(end - 1 - arena) // FOLIO
    for folio in range(<size_t>(address - arena) // FOLIO, last + 1):
        pins[folio] -= 1
        now_pinned -= FOLIO
        if eager:
            drop(folio)
    us_unlock(&lock)
    spoil_errno()

cdef void on_sigbus(int signal, siginfo_t* info, void* context) noexcept nogil:
    cdef char* address = <char*>info.si_addr
    cdef int error
    if info.si_code > 0 and arena <= address < arena + arena_bytes:
        us_lock(&lock)
        error = bring(<size_t>(address - arena) // FOLIO)
        us_unlock(&lock)
        if error == 0:
            return
    sigbus_chain(signal, info, context)

cdef void discard(void* start, size_t length) noexcept nogil:
    madvise(start, length, MADV_DONTNEED)

cdef PinOps check_ops
check_ops.ours = ours
check_ops.pin = pin
check_ops.unpin = unpin
check_ops.discard = discard


def start(bytes_: int) -> int:
    """Make the arena (once), patch the libraries, take SIGBUS; the arena's address."""
    global arena, store, arena_bytes, uffd
    cdef uffdio_api api
    cdef uffdio_register register
    cdef int error
    cdef size_t length = bytes_
    if arena != NULL:
        if length != arena_bytes:
            raise ValueError("there is one arena, of another size")
        return <uint64_t>arena
    if length % FOLIO or length > <size_t>FOLIOS * FOLIO:
        raise ValueError("whole folios, please, and not too many")
    uffd = <int>syscall(SYS_userfaultfd, <long>(O_CLOEXEC | UFFD_USER_MODE_ONLY))
    if uffd < 0:
        raise OSError(errno, "userfaultfd is not available")
    memset(&api, 0, sizeof(api))
    api.api = UFFD_API
    api.features = UFFD_FEATURE_SIGBUS
    if ioctl(uffd, UFFDIO_API, &api) != 0:
        raise OSError(errno, "userfaultfd cannot deliver SIGBUS")
    store = <char*>mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    # A guard on both sides: what lies beside the arena is not somebody else's memory by chance.
    memory = <char*>mmap(NULL, length + 2 * FOLIO, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    if store == <char*>MAP_FAILED or memory == <char*>MAP_FAILED:
        raise OSError(errno, "no memory for the arena")
    register.range.start = (<uint64_t>memory + FOLIO - 1) // FOLIO * FOLIO
    register.range.len = length
    register.mode = UFFDIO_REGISTER_MODE_MISSING
    if ioctl(uffd, UFFDIO_REGISTER, &register) != 0:
        raise OSError(errno, "cannot register the arena")
    arena_bytes = length
    arena = <char*>register.range.start
    with nogil:
        error = syscalls_install(&check_ops)
        if error == 0:
            error = sigbus_install(on_sigbus)
    if error:
        raise OSError(-error, "cannot install the wrappers")
    return <uint64_t>arena


def evict() -> None:
    """Take every folio that is not pinned out of memory."""
    cdef size_t folio
    with nogil:
        us_lock(&lock)
        for folio in range(arena_bytes // FOLIO):
            drop(folio)
        us_unlock(&lock)


def wipe() -> None:
    """Make the arena all zeros and out of memory; forget failures, counts and settings."""
    global share, eager, pin_calls, most_pinned
    evict()
    memset(store, 0, arena_bytes)
    memset(failing, 0, sizeof(failing))
    share = 4 * FOLIO
    eager = True
    pin_calls = 0
    most_pinned = 0


def fail(offset: int, error: int) -> None:
    """Make pinning the folio at this offset fail with an errno (0: no more)."""
    failing[<size_t>offset // FOLIO] = error


def set_share(bytes_: int, leave: bool = True) -> None:
    """Set the most bytes that one pin holds, and whether a folio leaves with its last pin."""
    global share, eager
    share = bytes_
    eager = leave


def counts() -> tuple[int, int, int]:
    """Count calls of pin, the most bytes pinned at a time, bytes pinned now."""
    return pin_calls, most_pinned, now_pinned


def is_resident(offset: int) -> bool:
    """Whether the folio at this offset is in memory."""
    return bool(resident[<size_t>offset // FOLIO])
