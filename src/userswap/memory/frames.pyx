"""Frames: populate, protect, vacate. The only room that speaks to userfaultfd (see frames.pxd).

Bytes go in with UFFDIO_COPY (which can write-protect in the same step) and leave with MADV_DONTNEED; or memory is
moved, in and out, with UFFDIO_MOVE, which allocates, copies and frees nothing. Without userfaultfd (BY_SEGV) it is
`mapped` that does these things. No lock: the caller owns the folio (BUSY), the kernel does the rest.
"""
from libc.errno cimport EACCES, EAGAIN, EBUSY, EEXIST, EINVAL, ENOENT, ENOSYS, EPERM, errno
from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport strtol
from libc.string cimport strcmp

from userswap.memory.mapped cimport (
    mapped_expose, mapped_fill, mapped_fill_zeros, mapped_full, mapped_hide, mapped_mend, mapped_open, mapped_ours,
    mapped_probe, mapped_protect, mapped_reopen, mapped_right, mapped_unit, mapped_unprotect,
)
from userswap.native.mman cimport (
    MADV_DONTNEED, MADV_DONTNEED_LOCKED, MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, madvise, mmap, munlock,
)
from userswap.native.descriptors cimport descriptor_guard, descriptor_release, descriptor_up

cdef extern from "us.h" nogil:
    struct uffdio_api:
        uint64_t api
        uint64_t features
        uint64_t ioctls
    struct uffdio_range:
        uint64_t start
        uint64_t len
    struct uffdio_register:
        uffdio_range range
        uint64_t mode
        uint64_t ioctls
    struct uffdio_copy:
        uint64_t dst
        uint64_t src
        uint64_t len
        uint64_t mode
        int64_t copy
    struct uffdio_move:
        uint64_t dst
        uint64_t src
        uint64_t len
        uint64_t mode
        int64_t move
    struct uffdio_writeprotect:
        uffdio_range range
        uint64_t mode
    struct uffdio_poison:
        uffdio_range range
        uint64_t mode
        int64_t updated
    unsigned long UFFD_API
    unsigned long UFFDIO_API
    unsigned long UFFDIO_REGISTER
    unsigned long UFFDIO_COPY
    unsigned long UFFDIO_MOVE
    unsigned long UFFDIO_WRITEPROTECT
    unsigned long UFFDIO_WAKE
    unsigned long UFFDIO_POISON
    unsigned long USERFAULTFD_IOC_NEW
    enum:
        SYS_userfaultfd
        UFFD_USER_MODE_ONLY
        UFFD_FEATURE_SIGBUS
        UFFD_FEATURE_THREAD_ID
        UFFD_FEATURE_PAGEFAULT_FLAG_WP
        UFFD_FEATURE_MOVE
        UFFDIO_REGISTER_MODE_MISSING
        UFFDIO_REGISTER_MODE_WP
        UFFDIO_COPY_MODE_WP
        UFFDIO_COPY_MODE_DONTWAKE
        UFFDIO_MOVE_MODE_DONTWAKE
        UFFDIO_WRITEPROTECT_MODE_DONTWAKE
        UFFDIO_WRITEPROTECT_MODE_WP
        O_CLOEXEC
        O_NONBLOCK
    int ioctl(int fd, unsigned long request, ...)
    long syscall(long number, ...)

cdef extern from "<fcntl.h>" nogil:
    enum:
        O_RDWR
    int open(const char* path, int flags)

cdef extern from "<unistd.h>" nogil:
    int close(int fd)

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef extern from "<sys/utsname.h>" nogil:
    cdef struct utsname:
        char[65] release
        char[65] machine
    int uname(utsname* system)

cdef enum:
    UNKNOWN, NO, YES

cdef enum:
    PAGE = 4096
    ZEROS = 1 << 16
    MOVE_TRIES = 64
    HIGH_FD = 60                # see native/descriptors

cdef int delivery = BY_SIGNAL
cdef int64_t most_mappings = 0
cdef int uffd = -1
cdef char* range_start = NULL
cdef uint64_t range_length = 0
cdef bint can_move = False
cdef bint may_move = True
cdef int tables = UNKNOWN
cdef char* zeros = NULL         # read-only: all of it is the kernel's one zero page


cdef int new_descriptor() noexcept nogil:
    """A userfaultfd that has agreed with the kernel on what we need, or -errno."""
    global can_move
    cdef uffdio_api api
    cdef int fresh, high, error
    if delivery == BY_SIGNAL:
        fresh = <int>syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY)
    else:
        # Without O_NONBLOCK: a thread waits in read().
        fresh = <int>syscall(SYS_userfaultfd, O_CLOEXEC)
        if fresh < 0 and (errno == EPERM or errno == ENOSYS or errno == EACCES):
            error = errno
            high = open(b"/dev/userfaultfd", O_RDWR | O_CLOEXEC)
            if high >= 0:
                fresh = ioctl(high, USERFAULTFD_IOC_NEW, O_CLOEXEC)
                error = errno
                close(high)
            (&errno)[0] = error
    if fresh < 0:
        return -errno
    fresh = descriptor_up(fresh, HIGH_FD)
    api.api = UFFD_API
    api.features = UFFD_FEATURE_PAGEFAULT_FLAG_WP
    api.features |= UFFD_FEATURE_SIGBUS if delivery == BY_SIGNAL else UFFD_FEATURE_THREAD_ID
    api.ioctls = 0
    if ioctl(fresh, UFFDIO_API, &api) != 0:
        error = -errno
        close(fresh)
        return error
    can_move = may_move and api.features & UFFD_FEATURE_MOVE != 0
    return fresh


cdef int frames_probe(int wanted) noexcept nogil:
    global delivery, can_move
    cdef int before = delivery
    cdef bint could_move = can_move
    cdef int fd
    if wanted == BY_SEGV:
        return mapped_probe()
    delivery = wanted
    fd = new_descriptor()
    delivery = before
    can_move = could_move
    if fd < 0:
        return fd
    close(fd)
    return 0


cdef void frames_choose(int wanted, int64_t most) noexcept nogil:
    global delivery, most_mappings
    delivery = wanted
    most_mappings = most


cdef int frames_delivery() noexcept nogil:
    return delivery


cdef int frames_descriptor() noexcept nogil:
    return uffd


cdef int frames_reopen() noexcept nogil:
    global uffd
    cdef uffdio_register register
    cdef int fresh
    if delivery == BY_SEGV:
        return mapped_reopen()
    if uffd >= 0:
        # The parent's, of no use here: first, so that a process that is out of descriptors can open its own.
        descriptor_release(uffd)
        close(uffd)
        uffd = -1
    fresh = new_descriptor()
    if fresh < 0:
        return fresh
    register.range.start = <uint64_t>range_start
    register.range.len = range_length
    register.mode = UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_WP
    register.ioctls = 0
    if ioctl(fresh, UFFDIO_REGISTER, &register) != 0:
        register.mode = errno
        close(fresh)
        return -<int>register.mode
    uffd = fresh
    descriptor_guard(uffd)
    return 0


cdef int frames_open(char* start, uint64_t length) noexcept nogil:
    global range_start, range_length, zeros
    if delivery == BY_SEGV:
        return mapped_open(start, length, most_mappings)
    if zeros == NULL:
        zeros = <char*>mmap(NULL, ZEROS, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
        if zeros == MAP_FAILED:
            zeros = NULL
            return -errno
    range_start = start
    range_length = length
    return frames_reopen()


cdef bint frames_mapped() noexcept nogil:
    return delivery == BY_SEGV


cdef int frames_unit(int most) noexcept nogil:
    return mapped_unit(most) if delivery == BY_SEGV else 1


cdef bint frames_full() noexcept nogil:
    return delivery == BY_SEGV and mapped_full()


cdef bint frames_ours() noexcept nogil:
    return delivery != BY_SEGV or mapped_ours()


cdef int frame_expose(char* at, uint64_t length) noexcept nogil:
    return mapped_expose(at, length)


cdef bint frames_can_move() noexcept nogil:
    return can_move


cdef bint frames_free_tables() noexcept nogil:
    global tables
    cdef utsname system
    cdef char* rest = NULL
    cdef long major, minor
    if tables == UNKNOWN:
        tables = NO
        if uname(&system) == 0 and strcmp(system.machine, "x86_64") == 0:
            major = strtol(system.release, &rest, 10)
            minor = strtol(rest + 1, NULL, 10) if rest[0] == b'.' else 0
            tables = YES if major > 6 or (major == 6 and minor >= 14) else NO
    return tables == YES


cdef void frames_forbid_move() noexcept nogil:
    global can_move, may_move
    can_move = False
    may_move = False


cdef int frames_register_stage(char* start, uint64_t length) noexcept nogil:
    # The target of a move must be registered, for whatever: write protection is what takes no page fault away.
    cdef uffdio_register register
    register.range.start = <uint64_t>start
    register.range.len = length
    register.mode = UFFDIO_REGISTER_MODE_WP
    register.ioctls = 0
    return 0 if ioctl(uffd, UFFDIO_REGISTER, &register) == 0 else -errno


cdef int move(char* to, char* source, uint64_t length) noexcept nogil:
    """0, or -errno, and then any of the pages may have been moved.

    Any: Linux 6.18 forgets to forget an EAGAIN, so that pages that it moves after one are not counted. With
    UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES it then goes round for ever at the next hole, so that mode is not used."""
    cdef uffdio_move move
    cdef int tries = 0
    move.dst = <uint64_t>to
    move.src = <uint64_t>source
    move.len = length
    move.mode = UFFDIO_MOVE_MODE_DONTWAKE if delivery == BY_THREAD else 0
    while True:
        move.move = 0
        if ioctl(uffd, UFFDIO_MOVE, &move) == 0:
            return 0
        if errno != EAGAIN or move.move > 0 or tries == MOVE_TRIES:
            return -errno
        tries += 1
        sched_yield()                           # the address space is changing, or the kernel is at such a page


cdef int move_pages_in(char* at, char* staged, uint64_t length) noexcept nogil:
    """What is on the stage of a range, page by page, and nothing stays there: 0, or -errno if a page has no place."""
    cdef uint64_t done = 0
    cdef int error, failed = 0
    while done < length:
        error = move(at + done, staged + done, PAGE)
        # ENOENT: not on the stage. EEXIST: in place. Neither can be in the way of a page: it was moved and not counted,
        # or had not left, or is missing at home too.
        if error != 0 and error != -ENOENT and error != -EEXIST:
            error = frame_fill(at + done, staged + done, PAGE, False)
            failed = error if error else failed
        done += PAGE
    frame_vacate(staged, length)                # what was copied; locked memory, too (mlockall): nothing may stay
    return failed


cdef int frame_move_in(char* at, char* staged, uint64_t length) noexcept nogil:
    return move_pages_in(at, staged, length) if move(at, staged, length) != 0 else 0


cdef int frame_move_out(char* at, char* staged, uint64_t length) noexcept nogil:
    if move(staged, at, length) == 0:
        return 0
    move_pages_in(at, staged, length)           # fails if the program unmapped its place: then they are gone
    return -EBUSY


cdef int frame_fill(char* at, const void* data, uint64_t length, bint protect) noexcept nogil:
    cdef uffdio_copy copy
    cdef uint64_t done = 0
    cdef uint64_t part = length
    if delivery == BY_SEGV:
        return mapped_fill(at, data, length, protect)
    while done < length:
        copy.dst = <uint64_t>at + done
        copy.src = <uint64_t>data + done
        copy.len = part if part < length - done else length - done
        copy.mode = UFFDIO_COPY_MODE_WP if protect else 0
        if delivery == BY_THREAD:
            copy.mode |= UFFDIO_COPY_MODE_DONTWAKE
        copy.copy = 0
        if ioctl(uffd, UFFDIO_COPY, &copy) == 0:
            done += copy.len
        elif copy.copy > 0:
            done += <uint64_t>copy.copy         # interrupted half way: go on from there
        elif errno == EAGAIN:
            sched_yield()                       # the address space is changing (mmap, fork): again
        elif errno == ENOENT and part > PAGE:
            part = PAGE                         # the program split the mapping here (madvise, mlock)
        else:
            return -errno
    return 0


cdef int frame_fill_zeros(char* at, uint64_t length) noexcept nogil:
    cdef uint64_t done = 0
    cdef uint64_t part
    cdef int error
    if delivery == BY_SEGV:
        return mapped_fill_zeros(at, length)
    while done < length:
        part = length - done if length - done < ZEROS else ZEROS
        error = frame_fill(at + done, zeros, part, False)
        if error:
            return error
        done += part
    return 0


cdef int frame_mend(char* page, bint protect) noexcept nogil:
    cdef int error
    if delivery == BY_SEGV:
        return mapped_mend(page, protect)
    error = frame_fill(page, zeros, PAGE, protect)
    if error == 0:
        return 1
    return 0 if error == -EEXIST else error


cdef bint frame_right(char* page, bint protect) noexcept nogil:
    return delivery == BY_SEGV and mapped_right(page, protect)


cdef int write_protect(char* at, uint64_t length, uint64_t mode) noexcept nogil:
    cdef uffdio_writeprotect protect
    cdef uint64_t done = 0
    cdef uint64_t part = length
    while done < length:
        protect.range.start = <uint64_t>at + done
        protect.range.len = part if part < length - done else length - done
        protect.mode = mode
        if ioctl(uffd, UFFDIO_WRITEPROTECT, &protect) == 0:
            done += protect.range.len
        elif errno == EAGAIN:
            sched_yield()
        elif errno == ENOENT and part > PAGE:
            part = PAGE                         # a split mapping, before Linux 6.1
        else:
            return -errno
    return 0


cdef int frame_protect(char* at, uint64_t length) noexcept nogil:
    if delivery == BY_SEGV:
        return mapped_protect(at, length)
    return write_protect(at, length, UFFDIO_WRITEPROTECT_MODE_WP)


cdef int frame_unprotect(char* at, uint64_t length) noexcept nogil:
    if delivery == BY_SEGV:
        return mapped_unprotect(at, length)
    return write_protect(at, length, UFFDIO_WRITEPROTECT_MODE_DONTWAKE if delivery == BY_THREAD else 0)


cdef int frame_vacate(char* at, uint64_t length) noexcept nogil:
    cdef int advice = MADV_DONTNEED
    cdef bint locked = True
    cdef int error
    if delivery == BY_SEGV:
        # First: what is thrown away reads as zeros for who can see it.
        error = mapped_hide(at, length)
        if error:
            return error
    while madvise(at, length, advice) != 0:
        if errno == EAGAIN:
            sched_yield()
        elif errno == EINVAL and advice == MADV_DONTNEED and locked:
            # The program locked the mapping (mlock, mlockall). What is resident is ours to say, and a part of the
            # range may be gone already, so it goes all the same.
            advice = MADV_DONTNEED_LOCKED
        elif errno == EINVAL and locked:
            munlock(at, length)                 # Linux before 5.18 knows no other way
            advice = MADV_DONTNEED
            locked = False
        else:
            return -errno
    return 0


cdef void frame_wake(char* at, uint64_t length) noexcept nogil:
    cdef uffdio_range woken
    woken.start = <uint64_t>at
    woken.len = length
    ioctl(uffd, UFFDIO_WAKE, &woken)


cdef int frame_poison(char* page) noexcept nogil:
    cdef uffdio_poison poison
    poison.range.start = <uint64_t>page
    poison.range.len = PAGE
    poison.mode = 0
    return 0 if ioctl(uffd, UFFDIO_POISON, &poison) == 0 else -errno
