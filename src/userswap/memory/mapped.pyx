"""Mapped frames: protections of the mapping and /proc/self/mem, where there is no userfaultfd (see mapped.pxd).

Touches the arena's protections and address space of its own, and has a descriptor. Lock: `books_lock`, a leaf mutex:
who holds it may wait for the kernel's lock of the address space, which nobody keeps while waiting for us.

A write to /proc/self/mem goes to pages that no thread can see (FOLL_FORCE), which is what makes filling atomic; they
become visible when the protection is lifted.
"""
from libc.errno cimport EACCES, EINTR, EIO, ENOMEM, ESRCH, errno
from libc.stdint cimport int64_t, uint8_t, uint64_t
from libc.string cimport memcmp, memset

from userswap.backends.codec cimport FOLIO_BYTES, FOLIO_SHIFT
from userswap.native.descriptors cimport descriptor_guard, descriptor_release, descriptor_up
from userswap.native.mman cimport (
    MADV_DONTNEED, MADV_NOHUGEPAGE, MADV_WIPEONFORK, MAP_ANONYMOUS, MAP_FAILED, MAP_NORESERVE, MAP_PRIVATE, PROT_READ,
    PROT_WRITE, madvise, mmap, mprotect, munmap,
)
from userswap.native.us cimport us_lock, us_mutex, us_read, us_unlock, us_write

cdef extern from *:
    """
    #include <fcntl.h>
    #include <sys/prctl.h>
    #include <unistd.h>
    """
    enum:
        PR_GET_DUMPABLE
        PR_SET_DUMPABLE
        O_CLOEXEC
        O_RDWR
    int prctl(int option, unsigned long value, unsigned long, unsigned long, unsigned long) nogil
    int open(const char* path, int flags) nogil
    int close(int fd) nogil
    ssize_t pwrite64(int fd, const void* data, size_t length, int64_t offset) nogil

cdef enum:
    PAGE = 4096
    PROT_NONE = 0
    HIGH_FD = 60                # as in frames
    # What is written down of each folio.
    HIDDEN = 0
    READABLE = 1
    WRITABLE = 2
    UNKNOWN = 3                 # a change failed half way
    HOW = 3
    SHORT = 4                   # a region's last one: what lies behind it is hidden
    SEAM = 8                    # the mapping ends behind it, whatever the next one is
    SPARE = 256                 # mappings kept to be given up when the kernel has none left
    LEAST = 32                  # that we get along with

cdef int memory = -1            # /proc/self/mem
cdef uint64_t* ours = NULL      # a page that a clone with memory of its own finds empty: not so a child of vfork
cdef char* range_start = NULL
cdef uint64_t range_length = 0
cdef us_mutex books_lock
cdef uint8_t* books = NULL      # of each folio of the range, HIDDEN at first
cdef int64_t caused = 0         # mappings, as the books have it; changed under the lock
cdef int64_t most_mappings = 0
cdef char* spare = NULL
cdef int64_t caused_without_spare = 0   # how far we were when we tried to take them back last


cdef int open_memory() noexcept nogil:
    """-errno, or a descriptor of this process's memory: not of its parent's, which an inherited one would be."""
    cdef int fd = open(b"/proc/self/mem", O_RDWR | O_CLOEXEC)
    cdef int high, dumpable
    if fd < 0 and errno == EACCES:
        # A process that has dropped privileges may not look into itself until it says that others may.
        dumpable = prctl(PR_GET_DUMPABLE, 0, 0, 0, 0)
        if prctl(PR_SET_DUMPABLE, 1, 0, 0, 0) == 0:
            fd = open(b"/proc/self/mem", O_RDWR | O_CLOEXEC)
            high = errno
            if dumpable == 0:
                prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
            (&errno)[0] = high
    if fd < 0:
        return -errno
    return descriptor_up(fd, HIGH_FD)


cdef int write_to(int fd, char* at, const void* data, uint64_t length) noexcept nogil:
    cdef uint64_t done = 0
    cdef ssize_t part
    while done < length:
        part = pwrite64(fd, <const char*>data + done, length - done, <int64_t>(<uint64_t>at + done))
        if part > 0:
            done += <uint64_t>part
        elif part == 0 or errno != EINTR:
            return -errno if part < 0 else -EIO
    return 0


cdef int mapped_probe() noexcept nogil:
    cdef int fd = open_memory()
    cdef char* page
    cdef char[8] pattern
    cdef int error
    if fd < 0:
        return fd
    memset(pattern, 0xA5, 8)
    page = <char*>mmap(NULL, PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    error = -ENOMEM
    if page != MAP_FAILED:
        error = write_to(fd, page, pattern, 8)
        if error == 0:
            error = -errno if mprotect(page, PAGE, PROT_READ) != 0 else 0
        if error == 0 and memcmp(page, pattern, 8) != 0:
            error = -EIO
        munmap(page, PAGE)
    close(fd)
    return error


cdef void keep_spare() noexcept nogil:
    global spare
    cdef int i
    cdef char* pages
    pages = <char*>mmap(NULL, SPARE * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    if pages == MAP_FAILED:
        return
    for i in range(0, SPARE, 2):
        if mprotect(pages + i * PAGE, PAGE, PROT_READ) != 0:
            munmap(pages, SPARE * PAGE)
            return
    spare = pages


cdef int mapped_open(char* start, uint64_t length, int64_t most) noexcept nogil:
    global memory, range_start, range_length, books, most_mappings, ours
    cdef void* table
    if books == NULL:
        table = mmap(NULL, length >> FOLIO_SHIFT, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                     -1, 0)
        if table == MAP_FAILED:
            return -errno
        books = <uint8_t*>table
    if ours == NULL:
        table = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
        if table == MAP_FAILED:
            return -errno
        if madvise(table, PAGE, MADV_WIPEONFORK) != 0:
            munmap(table, PAGE)
            return -errno
        ours = <uint64_t*>table
    memory = open_memory()
    if memory < 0:
        return memory
    descriptor_guard(memory)
    ours[0] = 1
    range_start = start
    range_length = length
    most_mappings = most
    # Here a huge page would come by itself, with the first byte that is written.
    madvise(start, length, MADV_NOHUGEPAGE)
    # Mappings become one again only if they have the kernel's `anon_vma` in common: this one, from before any is split.
    start[0] = 1
    if mprotect(start, length, PROT_NONE) != 0:
        return -errno
    madvise(start, PAGE, MADV_DONTNEED)
    keep_spare()
    return 0


# ---- the books ----

cdef inline uint64_t folio_of(const char* at) noexcept nogil:
    return <uint64_t>(at - range_start) >> FOLIO_SHIFT


cdef inline bint ends(uint64_t folio) noexcept nogil:
    """Whether a mapping ends between this folio and the next."""
    cdef int how = books[folio]
    cdef int next = books[folio + 1] & HOW
    if how & SEAM:
        return True
    return (HIDDEN if how & SHORT else how & HOW) != next


cdef int64_t ends_between(uint64_t first, uint64_t last) noexcept nogil:
    """Of the folios `first` to `last`, and to their neighbours."""
    cdef int64_t found = 0
    cdef uint64_t i
    cdef uint64_t behind = last + 1 if last + 1 < range_length >> FOLIO_SHIFT else last
    for i in range(first - 1 if first else 0, behind):
        found += ends(i)
    for i in range(first, last + 1):
        found += books[i] & SHORT != 0      # within it
    return found


cdef int apply(char* at, uint64_t length, int how) noexcept nogil:
    """Gives a range a protection, and writes it down."""
    global caused, most_mappings, spare, caused_without_spare
    cdef uint64_t first = folio_of(at)
    cdef uint64_t last = folio_of(at + length - 1)
    cdef uint64_t i
    cdef int64_t before
    cdef int prot = PROT_NONE if how == HIDDEN else PROT_READ if how == READABLE else PROT_READ | PROT_WRITE
    cdef int error = 0
    cdef bint same = True
    us_lock(&books_lock)
    for i in range(first, last + 1):
        if books[i] & HOW != how:
            same = False
            break
    if not same:
        before = ends_between(first, last)
        while mprotect(at, length, prot) != 0:
            error = -errno
            if error != -ENOMEM or spare == NULL:
                break
            # The program itself has more mappings than we thought: from now on we get along with fewer, and as soon
            # as we do the spare ones are taken back.
            munmap(spare, SPARE * PAGE)
            spare = NULL
            error = 0
            caused_without_spare = caused
            most_mappings = caused - SPARE if caused > SPARE + LEAST else LEAST
        for i in range(first, last + 1):
            books[i] = (books[i] & SEAM) | (UNKNOWN if error else how)
        # An unknown one is as long as it was meant to be.
        if how != HIDDEN and length & (FOLIO_BYTES - 1):
            books[last] |= SHORT
        us_write(&caused, caused + ends_between(first, last) - before)
        if spare == NULL and caused < caused_without_spare:
            caused_without_spare = caused
            keep_spare()
    us_unlock(&books_lock)
    return error


cdef int mapped_reopen() noexcept nogil:
    """What was two mappings at the fork never becomes one again in the child: each has an `anon_vma` of its own."""
    global memory
    cdef uint64_t i
    cdef uint64_t folios = range_length >> FOLIO_SHIFT
    cdef int64_t left = caused
    descriptor_release(memory)
    close(memory)
    memory = open_memory()
    if memory < 0:
        return memory
    descriptor_guard(memory)
    ours[0] = 1
    i = 0
    # The books of all address space are long, and mostly never touched: no further than there is something in them.
    while left > 0 and i + 1 < folios:
        if books[i] & SHORT:
            left -= 1
        if ends(i):
            books[i] |= SEAM
            left -= 1
        i += 1
    return 0


# ---- what frames asks ----

cdef bint mapped_ours() noexcept nogil:
    return ours[0] != 0


cdef int mapped_expose(char* at, uint64_t length) noexcept nogil:
    # Not written down: another thread may have had the lock when this process began.
    return 0 if mprotect(at, length, PROT_READ | PROT_WRITE) == 0 else -errno


cdef int mapped_fill(char* at, const void* data, uint64_t length, bint protect) noexcept nogil:
    cdef int error = write_to(memory, at, data, length) if mapped_ours() else -ESRCH
    return error if error else apply(at, length, READABLE if protect else WRITABLE)


cdef int mapped_fill_zeros(char* at, uint64_t length) noexcept nogil:
    return apply(at, length, WRITABLE)


cdef int mapped_protect(char* at, uint64_t length) noexcept nogil:
    return apply(at, length, READABLE)


cdef int mapped_unprotect(char* at, uint64_t length) noexcept nogil:
    return apply(at, length, WRITABLE)


cdef int mapped_hide(char* at, uint64_t length) noexcept nogil:
    return apply(at, length, HIDDEN)


cdef bint mapped_right(char* page, bint protect) noexcept nogil:
    return books[folio_of(page)] & HOW == (READABLE if protect else WRITABLE)


cdef int mapped_mend(char* page, bint protect) noexcept nogil:
    # Not written down: it was the program that changed it, or it stays unknown.
    return 1 if mprotect(page, PAGE, PROT_READ if protect else PROT_READ | PROT_WRITE) == 0 else -errno


cdef int mapped_unit(int most) noexcept nogil:
    cdef int64_t now = us_read(&caused)
    if now < most_mappings // 2:
        return 1
    return 4 if now < most_mappings - most_mappings // 4 else most


cdef bint mapped_full() noexcept nogil:
    return us_read(&caused) >= most_mappings


cdef int64_t mapped_count() noexcept nogil:
    return us_read(&caused)
