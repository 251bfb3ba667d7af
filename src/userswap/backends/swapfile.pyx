"""A swap file as a device, and `SwapDevice`, a window into it for tests and experiments.

Slots of 4 KiB come in runs that lie within one cluster of 512. Clusters are kept in lists by the longest run
of free slots they may have, so that a run is found without a search; the number is an upper bound (freeing makes
it exact or keeps it high enough, a search that failed makes it exact). Writing goes on in one current cluster
as long as it lasts, then in a whole free one, and only then into holes. Clusters in use are also in a queue, in the
order in which they were begun: what is in the first ones has not been wanted for longest.

Owners are words in reserved address space, a page of 4 KiB for each cluster, with memory only where a run has one.

Touches its file and its own mappings, nothing else. Everything but the window runs without the GIL, maybe
inside a signal handler: no malloc, errors as return codes, errno left alone.

Locking: `mutex` is a leaf and guards bitmaps, lists and counts; transfers need no lock, since slots belong to
who allocated them. A cluster whose hole is being punched is in no list, so it cannot be handed out meanwhile; who
punches it lists it again, whatever was freed in it meanwhile.
"""
from libc cimport errno as c
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset, strncpy
from posix.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_NORESERVE, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap
from posix.unistd cimport close, pread, pwrite

import os

from userswap.native.descriptors cimport descriptor_guard, descriptor_release
from userswap.native.us cimport (
    us_add, us_assert, us_chaos, us_load, us_lock, us_mutex, us_now, us_read, us_unlock, us_write,
)


cdef extern from "<sys/mman.h>" nogil:
    int madvise(void* start, size_t length, int advice)
    enum:
        MADV_DONTDUMP
        MADV_DONTNEED
        MADV_NOHUGEPAGE

cdef extern from "<sys/uio.h>" nogil:
    ssize_t preadv(int fd, const iovec* parts, int count, int64_t offset)

cdef extern from "<unistd.h>" nogil:
    int ftruncate(int fd, int64_t length)

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef extern from "<fcntl.h>" nogil:
    int fallocate(int fd, int mode, int64_t offset, int64_t length)
    enum:
        FALLOC_FL_PUNCH_HOLE
        FALLOC_FL_KEEP_SIZE

cdef extern from * nogil:
    int lowest "__builtin_ctzll"(uint64_t word) noexcept    # undefined for 0
    int leading "__builtin_clzll"(uint64_t word) noexcept   # undefined for 0

cdef enum:
    PAGE_BYTES = 4096
    CLUSTER_SHIFT = 9
    CLUSTER_BYTES = 2097152
    WORDS = 8                   # of a cluster's bitmap
    ROOMS = 513                 # a longest free run of 0 .. 512
    ROOM_WORDS = 9
    NAME_BYTES = 256
    STALLS = 8                  # transfers in a row that brought nothing
    PATIENCE = 100              # an interrupted one counts as so much less
    OWNED_BYTES = 4096          # words of a cluster's owners
    TIDY_LOOKS = 1024           # clusters that one look for something to give back passes

# Clusters are numbered from 1 in lists: 0 ends one.
cdef struct Cluster:
    uint64_t used[WORDS]        # a bit for each slot; those past the limit are set from the start
    uint32_t next               # of the same room
    uint32_t prev
    uint16_t count              # slots in use
    uint16_t room               # no run of free slots is longer
    uint32_t newer              # in the queue by age
    uint32_t older
    uint8_t listed
    uint8_t punching
    uint8_t queued
    uint8_t owned               # its page of owners has memory
    uint8_t holes               # a run became free that is worth a hole, and has none
    uint8_t sealed              # its page of `seals` has memory
    uint8_t apart[2]

cdef struct SwapFile:
    us_mutex mutex
    int fd
    int punches                 # 0: the file system cannot
    int64_t retired             # no slots are given out any more
    uint64_t mapped
    uint64_t slots              # at most
    uint32_t limit              # clusters
    uint32_t fresh              # clusters that were ever used: 1 .. fresh
    uint32_t current            # cluster that is being filled, or 0
    uint32_t position           # next slot to try in it
    int64_t used                # slots; read without the mutex
    uint64_t rooms[ROOM_WORDS]  # which lists are not empty
    uint32_t heads[ROOMS]
    uint32_t oldest             # queue of the clusters in use
    uint32_t newest
    uint32_t tidied             # the cluster that was last looked at for holes
    int64_t owned               # pages of owners with memory; read without the mutex
    uint64_t* owners            # by slot
    char name[NAME_BYTES]
    Cluster* clusters           # index 0 is cluster number 1
    uint64_t* seals             # a word for each slot: a page for each cluster
    int64_t sealed              # clusters whose page has memory


# ---- the system calls, and errors that tests put in their place ----

cdef enum:
    SHORT = -2                  # a transfer of half
    FLIPPED = -3                # a bit of what was read is another one

cdef int64_t armed = 0          # all that it costs when there is none
cdef int inject_kind, inject_error
cdef int64_t inject_left, inject_times, inject_fired


cdef int tampered(int kind) noexcept nogil:
    # 0: this call is left alone; an errno, SHORT or FLIPPED
    cdef int64_t left
    if kind != inject_kind:
        return 0
    left = us_add(&inject_left, -1)
    if left >= 0 or left < -inject_times:
        return 0
    us_add(&inject_fired, 1)
    if inject_error > 0:
        c.errno = inject_error
    return inject_error

cdef bint swapfile_refused(int kind) noexcept nogil:
    return us_read(&armed) and tampered(kind) > 0

cdef inline int64_t io_write(int fd, const void* buffer, int64_t n, int64_t at) noexcept nogil:
    cdef int how = tampered(IO_WRITE) if us_read(&armed) else 0
    if how > 0:
        return -1
    if how == SHORT:
        n = n // 2 & ~<int64_t>(SLOT_BYTES - 1)
    return pwrite(fd, buffer, n, at) if n else 0

cdef inline int64_t io_read(int fd, void* buffer, int64_t n, int64_t at) noexcept nogil:
    cdef int how = tampered(IO_READ) if us_read(&armed) else 0
    cdef int64_t got
    if how > 0:
        return -1
    if how == SHORT and n > SLOT_BYTES:
        n = n // 2 & ~<int64_t>(SLOT_BYTES - 1)
    got = pread(fd, buffer, n, at)
    if how == FLIPPED and got > 100:
        (<char*>buffer)[100] ^= 1
    return got

cdef inline int64_t io_scatter(int fd, const iovec* parts, int count, int64_t at) noexcept nogil:
    cdef int how = tampered(IO_SCATTER) if us_read(&armed) else 0
    cdef int64_t got
    if how > 0:
        return -1
    got = preadv(fd, parts, count if how != SHORT else (count + 1) // 2, at)
    if how == FLIPPED and got > 100:
        (<char*>parts[0].iov_base)[100] ^= 1
    return got

cdef inline int io_punch(int fd, int64_t at, int64_t n) noexcept nogil:
    if us_read(&armed) and tampered(IO_PUNCH) > 0:
        return -1
    return fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, at, n)


# ---- lists; all with the mutex held ----

cdef inline Cluster* cluster(SwapFile* f, uint32_t number) noexcept nogil:
    return &f.clusters[number - 1]

cdef inline uint32_t slots_of(SwapFile* f, uint32_t number) noexcept nogil:
    cdef uint64_t rest = f.slots - (<uint64_t>(number - 1) << CLUSTER_SHIFT)
    return <uint32_t>rest if rest < CLUSTER_SLOTS else CLUSTER_SLOTS

cdef inline void unlist(SwapFile* f, uint32_t number) noexcept nogil:
    cdef Cluster* k = cluster(f, number)
    if not k.listed:
        return
    k.listed = 0
    if k.next:
        cluster(f, k.next).prev = k.prev
    if k.prev:
        cluster(f, k.prev).next = k.next
    else:
        f.heads[k.room] = k.next
        if not k.next:
            f.rooms[k.room >> 6] &= ~(<uint64_t>1 << (k.room & 63))

cdef inline void enlist(SwapFile* f, uint32_t number, uint32_t room) noexcept nogil:
    cdef Cluster* k = cluster(f, number)
    unlist(f, number)
    k.room = <uint16_t>room
    k.listed = 1
    k.prev = 0
    k.next = f.heads[room]
    if k.next:
        cluster(f, k.next).prev = number
    f.heads[room] = number
    f.rooms[room >> 6] |= <uint64_t>1 << (room & 63)

cdef inline uint32_t with_room(SwapFile* f, uint32_t n) noexcept nogil:
    # A cluster that may have a run of n free slots, one with little room first; 0: there is none.
    cdef uint32_t w = n >> 6
    cdef uint64_t word = f.rooms[w] & (~<uint64_t>0 << (n & 63))
    while not word:
        w += 1
        if w == ROOM_WORDS:
            return 0
        word = f.rooms[w]
    return f.heads[64 * w + <uint32_t>lowest(word)]


cdef inline void unqueue(SwapFile* f, uint32_t number) noexcept nogil:
    cdef Cluster* k = cluster(f, number)
    if not k.queued:
        return
    k.queued = 0
    if k.newer:
        cluster(f, k.newer).older = k.older
    else:
        f.newest = k.older
    if k.older:
        cluster(f, k.older).newer = k.newer
    else:
        f.oldest = k.newer

cdef inline void enqueue(SwapFile* f, uint32_t number) noexcept nogil:
    cdef Cluster* k = cluster(f, number)
    unqueue(f, number)
    k.queued = 1
    k.newer = 0
    k.older = f.newest
    if f.newest:
        cluster(f, f.newest).newer = number
    else:
        f.oldest = number
    f.newest = number


# ---- bitmaps; all with the mutex held ----

cdef inline uint32_t next_free(Cluster* k, uint32_t i) noexcept nogil:
    # The first free slot at or after i; 512 if there is none.
    cdef uint64_t word
    while i < CLUSTER_SLOTS:
        word = ~k.used[i >> 6] >> (i & 63)
        if word:
            return i + <uint32_t>lowest(word)
        i = (i | 63) + 1
    return CLUSTER_SLOTS

cdef inline uint32_t next_used(Cluster* k, uint32_t i) noexcept nogil:
    cdef uint64_t word
    while i < CLUSTER_SLOTS:
        word = k.used[i >> 6] >> (i & 63)
        if word:
            return i + <uint32_t>lowest(word)
        i = (i | 63) + 1
    return CLUSTER_SLOTS

cdef inline uint32_t find_run(Cluster* k, uint32_t i, uint32_t n, uint32_t* longest) noexcept nogil:
    # The first run of n free slots at or after i; 512 if there is none, and then how long the longest is.
    cdef uint32_t end
    longest[0] = 0
    while True:
        i = next_free(k, i)
        if i == CLUSTER_SLOTS:
            return i
        end = next_used(k, i)
        if end - i >= n:
            return i
        if end - i > longest[0]:
            longest[0] = end - i
        i = end

cdef inline void set_range(Cluster* k, uint32_t first, uint32_t n, bint used) noexcept nogil:
    cdef uint32_t last = first + n - 1
    cdef uint32_t w, low, high
    cdef uint64_t mask
    for w in range(first >> 6, (last >> 6) + 1):
        low = first - 64 * w if first > 64 * w else 0
        high = last - 64 * w if last < 64 * w + 63 else 63
        mask = (~<uint64_t>0 << low) & (~<uint64_t>0 >> (63 - high))
        if used:
            us_assert(k.used[w] & mask == 0, b"a slot belongs to one run")
            k.used[w] |= mask
        else:
            us_assert(k.used[w] & mask == mask, b"a slot is freed once")
            k.used[w] &= ~mask

cdef inline uint32_t run_around(Cluster* k, uint32_t first, uint32_t n) noexcept nogil:
    # How long the free run is of which these n free slots are a part.
    cdef uint32_t start = first
    cdef uint64_t word
    while start:
        word = k.used[(start - 1) >> 6] << (63 - ((start - 1) & 63))
        if word >> 63:
            break
        if word:        # the nearest used slot below is in this word
            start -= <uint32_t>leading(word)
        else:
            start = (start - 1) & ~63u
    return next_used(k, first + n) - start


# ---- the interface ----

cdef SwapFile* swapfile_new(int fd, uint64_t limit, const char* name) noexcept nogil:
    cdef uint64_t slots = limit // SLOT_BYTES
    cdef uint64_t clusters = (slots + CLUSTER_SLOTS - 1) >> CLUSTER_SHIFT
    cdef uint64_t head = (sizeof(SwapFile) + 63) & ~<uint64_t>63
    cdef uint64_t n
    cdef int kept = c.errno
    cdef void* p
    cdef void* owners
    cdef SwapFile* f
    # An entry has 35 bits for a slot; that is also far from what a list's 32 bits can number.
    if slots == 0 or slots > <uint64_t>1 << 35:
        return NULL
    n = head + clusters * sizeof(Cluster)
    p = mmap(NULL, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    owners = mmap(NULL, clusters * OWNED_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                  -1, 0) if p != MAP_FAILED else MAP_FAILED
    if owners == MAP_FAILED:
        if p != MAP_FAILED:
            munmap(p, n)
        c.errno = kept
        return NULL
    madvise(p, n, MADV_NOHUGEPAGE)
    madvise(p, n, MADV_DONTDUMP)
    madvise(owners, clusters * OWNED_BYTES, MADV_NOHUGEPAGE)
    c.errno = kept
    f = <SwapFile*>p
    f.seals = <uint64_t*>mmap(NULL, clusters * PAGE_BYTES, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    if f.seals == MAP_FAILED:
        munmap(p, n)
        munmap(owners, clusters * OWNED_BYTES)
        c.errno = kept
        return NULL
    madvise(f.seals, clusters * PAGE_BYTES, MADV_NOHUGEPAGE)
    madvise(f.seals, clusters * PAGE_BYTES, MADV_DONTDUMP)
    c.errno = kept
    f.owners = <uint64_t*>owners
    f.fd = fd
    f.punches = 1
    f.mapped = n
    f.slots = slots
    f.limit = <uint32_t>clusters
    f.clusters = <Cluster*>(<char*>p + head)
    strncpy(f.name, name, NAME_BYTES - 1)
    descriptor_guard(fd)
    return f

cdef void swapfile_delete(SwapFile* f, bint discard) noexcept nogil:
    cdef int kept = c.errno
    if discard:
        # A nameless file vanishes with the descriptor anyway; one that the user made beforehand keeps its name.
        ftruncate(f.fd, 0)
    descriptor_release(f.fd)
    close(f.fd)
    munmap(f.seals, <uint64_t>f.limit * PAGE_BYTES)
    munmap(f.owners, <uint64_t>f.limit * OWNED_BYTES)
    munmap(f, f.mapped)
    c.errno = kept

cdef const char* swapfile_name(SwapFile* f) noexcept nogil:
    return f.name

cdef inline void seals_wanted(SwapFile* f, Cluster* k) noexcept nogil:
    # Who has the slots writes them, without the mutex. Nobody has any here yet, so the first word is touched.
    if not k.sealed:
        k.sealed = 1
        f.seals[(k - f.clusters) * CLUSTER_SLOTS] = 0
        us_write(&f.sealed, f.sealed + 1)

cdef inline int64_t take(SwapFile* f, uint32_t number, uint32_t first, uint32_t n) noexcept nogil:
    cdef Cluster* k = cluster(f, number)
    if not k.count:
        enqueue(f, number)
    set_range(k, first, n, True)
    k.count += <uint16_t>n
    seals_wanted(f, k)
    us_write(&f.used, f.used + n)
    if k.count == slots_of(f, number):
        unlist(f, number)       # full; freeing lists it again
        k.room = 0
    elif k.room == CLUSTER_SLOTS:
        enlist(f, number, CLUSTER_SLOTS - n)    # whole free clusters only are in that list
    return (<int64_t>(number - 1) << CLUSTER_SHIFT) + first

cdef bint swapfile_retire(SwapFile* f) noexcept nogil:
    return us_add(&f.retired, 1) == 1

cdef bint swapfile_retired(SwapFile* f) noexcept nogil:
    return us_read(&f.retired) != 0

cdef int64_t swapfile_alloc(SwapFile* f, int n) noexcept nogil:
    cdef int64_t slot = -c.ENOSPC
    cdef uint32_t number, first, longest
    cdef Cluster* k
    if n < 1 or n > CLUSTER_SLOTS:
        return -c.EINVAL
    if us_read(&f.retired):
        return -c.EIO
    us_lock(&f.mutex)
    while True:
        if f.current:
            first = find_run(cluster(f, f.current), f.position, n, &longest)
            if first < CLUSTER_SLOTS:
                f.position = first + n
                slot = take(f, f.current, first, n)
                break
        number = f.heads[CLUSTER_SLOTS]
        if not number and f.fresh < f.limit:
            number = f.fresh + 1
            f.fresh = number
            first = slots_of(f, number)
            k = cluster(f, number)
            if first < CLUSTER_SLOTS:
                set_range(k, first, CLUSTER_SLOTS - first, True)
            enlist(f, number, first)
            if first < <uint32_t>n:
                number = 0      # the last cluster is a short one
        if number:
            f.current = number
            f.position = 0
            continue
        number = with_room(f, n)
        if not number:
            break
        k = cluster(f, number)
        first = find_run(k, 0, n, &longest)
        if first < CLUSTER_SLOTS:
            slot = take(f, number, first, n)
            break
        enlist(f, number, longest)      # the bound was too high: less from now on, so this ends
    us_unlock(&f.mutex)
    return slot

cdef void swapfile_take(SwapFile* f, int64_t slot, int n) noexcept nogil:
    cdef uint32_t number = <uint32_t>(slot >> CLUSTER_SHIFT) + 1
    cdef uint32_t first = <uint32_t>(slot & (CLUSTER_SLOTS - 1))
    cdef Cluster* k = cluster(f, number)
    us_assert(n >= 1 and first + n <= slots_of(f, number), b"a run lies in one cluster")
    while True:
        us_lock(&f.mutex)
        if not k.punching:
            break
        us_unlock(&f.mutex)
        sched_yield()           # what is written now would be punched out
    if number > f.fresh:
        f.fresh = number        # its part of the mapping has memory from now on
    set_range(k, first, n, True)
    k.count += <uint16_t>n
    seals_wanted(f, k)
    us_write(&f.used, f.used + n)
    us_unlock(&f.mutex)


cdef void punch(SwapFile* f, uint32_t number) noexcept nogil:
    # The cluster is marked and in no list; the mutex is not held. Gives its blocks back and lists it.
    cdef Cluster* k = cluster(f, number)
    cdef int kept = c.errno
    cdef int tries = 0
    cdef bint unsealed
    us_chaos()
    while f.punches and tries < STALLS:
        tries += 1
        if io_punch(f.fd, <int64_t>(number - 1) * CLUSTER_BYTES, CLUSTER_BYTES) == 0:
            break
        if c.errno != c.EINTR:
            # A hole is a courtesy: without it the blocks are used again later.
            if c.errno == c.EOPNOTSUPP or c.errno == c.ENOSYS:
                f.punches = 0
            break
    # No run is in it, so nobody has a seal or an owner to write down.
    unsealed = madvise(&f.seals[<uint64_t>(number - 1) * CLUSTER_SLOTS], PAGE_BYTES, MADV_DONTNEED) == 0
    if k.owned and madvise(f.owners + (<uint64_t>(number - 1) << CLUSTER_SHIFT), OWNED_BYTES, MADV_DONTNEED) == 0:
        k.owned = 0
        us_add(&f.owned, -1)
    c.errno = kept
    us_lock(&f.mutex)
    if unsealed and k.sealed:
        k.sealed = 0
        us_write(&f.sealed, f.sealed - 1)
    k.punching = 0
    k.holes = 0
    enlist(f, number, slots_of(f, number))
    us_unlock(&f.mutex)

cdef void swapfile_free(SwapFile* f, int64_t slot, int n) noexcept nogil:
    cdef uint32_t number = <uint32_t>(slot >> CLUSTER_SHIFT) + 1
    cdef uint32_t first = <uint32_t>(slot & (CLUSTER_SLOTS - 1))
    cdef uint32_t room
    cdef Cluster* k = cluster(f, number)
    cdef uint32_t holes[2]
    cdef int i
    holes[0] = 0
    holes[1] = 0
    us_assert(n >= 1 and first + n <= CLUSTER_SLOTS, b"a run lies in one cluster")
    us_lock(&f.mutex)
    set_range(k, first, n, False)
    if k.owned:
        memset(f.owners + slot, 0, n * 8)
    k.count -= <uint16_t>n
    us_write(&f.used, f.used - n)
    if not k.count:
        unqueue(f, number)
    if k.punching:
        k.holes = 1             # who is at it lists it
    elif k.count:
        room = run_around(k, first, n)
        k.holes |= room >= TIDY_SLOTS
        if room > k.room or not k.listed:
            enlist(f, number, room if room > k.room else k.room)
    elif number == f.current and f.used:
        # Still being filled: its blocks would be written again at once.
        f.position = 0
        enlist(f, number, slots_of(f, number))
    else:
        holes[0] = number
    if not f.used and f.current:
        # The last slot of the file: the current cluster's blocks go too, though it may have been kept above.
        if f.current != number and not cluster(f, f.current).punching:
            holes[1] = f.current
        f.current = 0
    for i in range(2):
        if holes[i]:
            unlist(f, holes[i])
            cluster(f, holes[i]).punching = 1
    us_unlock(&f.mutex)
    for i in range(2):
        if holes[i]:
            punch(f, holes[i])

cdef int swapfile_write(SwapFile* f, int64_t slot, int n, const void* buffer) noexcept nogil:
    cdef int64_t at = slot * SLOT_BYTES
    cdef int64_t done = 0
    cdef int64_t whole = <int64_t>n * SLOT_BYTES
    cdef int64_t got
    cdef int kept = c.errno
    cdef int result = 0
    cdef int stalls = 0
    cdef bint interrupted
    while done < whole:
        got = io_write(f.fd, <const char*>buffer + done, whole - done, at + done)
        if got < 0 and c.errno != c.EINTR:
            result = -c.errno
            break
        # A transfer that ended inside a slot goes on at its start: O_DIRECT wants whole blocks.
        interrupted = got < 0
        got = got & ~<int64_t>(SLOT_BYTES - 1) if got > 0 else 0
        done += got
        stalls = 0 if got else stalls + (1 if interrupted else PATIENCE)
        if stalls > STALLS * PATIENCE:
            result = -c.EINTR if interrupted else -c.EIO
            break
    c.errno = kept
    return result

cdef int swapfile_read(SwapFile* f, int64_t slot, int n, void* buffer) noexcept nogil:
    cdef int64_t at = slot * SLOT_BYTES
    cdef int64_t done = 0
    cdef int64_t whole = <int64_t>n * SLOT_BYTES
    cdef int64_t got
    cdef int kept = c.errno
    cdef int result = 0
    cdef int stalls = 0
    cdef bint interrupted
    while done < whole:
        got = io_read(f.fd, <char*>buffer + done, whole - done, at + done)
        if got == 0:
            result = -c.EIO     # the file is shorter than what was written to it
            break
        if got < 0 and c.errno != c.EINTR:
            result = -c.errno
            break
        interrupted = got < 0
        got = got & ~<int64_t>(SLOT_BYTES - 1) if got > 0 else 0
        done += got
        stalls = 0 if got else stalls + (1 if interrupted else PATIENCE)
        if stalls > STALLS * PATIENCE:
            result = -c.EINTR if interrupted else -c.EIO
            break
    c.errno = kept
    return result

cdef bint swapfile_scatter(SwapFile* f, int64_t slot, iovec* parts, int count) noexcept nogil:
    cdef int64_t whole = 0
    cdef int kept = c.errno
    cdef bint all_there
    cdef int i
    for i in range(count):
        whole += <int64_t>parts[i].iov_len
    all_there = io_scatter(f.fd, parts, count, slot * SLOT_BYTES) == whole
    c.errno = kept
    return all_there

cdef uint64_t* swapfile_seals(SwapFile* f, int64_t slot) noexcept nogil:
    return &f.seals[slot]

cdef int64_t swapfile_used(SwapFile* f) noexcept nogil:
    return us_read(&f.used)

cdef uint64_t swapfile_slots(SwapFile* f) noexcept nogil:
    return f.slots

cdef uint64_t swapfile_words(SwapFile* f) noexcept nogil:
    return <uint64_t>f.fresh * WORDS

cdef void swapfile_copy(SwapFile* f, uint64_t* bits) noexcept nogil:
    cdef Cluster* k
    cdef uint32_t number
    cdef int w
    for number in range(1, f.fresh + 1):
        k = cluster(f, number)
        if k.count == 0:
            continue            # what it is copied to may have no memory there yet
        for w in range(WORDS):
            bits[<uint64_t>(number - 1) * WORDS + w] |= k.used[w]

cdef void swapfile_punch(SwapFile* f, int64_t slot, int64_t n) noexcept nogil:
    cdef int kept = c.errno
    cdef int tries = 0
    us_chaos()
    while tries < STALLS and io_punch(f.fd, slot * SLOT_BYTES, n * SLOT_BYTES) != 0 and c.errno == c.EINTR:
        tries += 1
    c.errno = kept

cdef int64_t swapfile_metadata(SwapFile* f) noexcept nogil:
    # The mapping was touched up to the highest cluster that was ever used.
    cdef int64_t n = <char*>&f.clusters[f.fresh] - <char*>f
    return (((n + PAGE_BYTES - 1) & ~<int64_t>(PAGE_BYTES - 1)) + us_read(&f.owned) * OWNED_BYTES
            + us_read(&f.sealed) * PAGE_BYTES)


# ---- owners, and what is done to clusters in use ----

cdef void swapfile_set_owner(SwapFile* f, int64_t slot, uint64_t owner) noexcept nogil:
    cdef Cluster* k = cluster(f, <uint32_t>(slot >> CLUSTER_SHIFT) + 1)
    us_lock(&f.mutex)
    us_assert((k.used[(slot & (CLUSTER_SLOTS - 1)) >> 6] >> (slot & 63)) & 1, b"a run that has an owner is in use")
    if not k.owned:
        k.owned = 1
        us_add(&f.owned, 1)
    f.owners[slot] = owner
    us_unlock(&f.mutex)

cdef uint64_t swapfile_owner(SwapFile* f, int64_t slot) noexcept nogil:
    return us_load(&f.owners[slot]) if cluster(f, <uint32_t>(slot >> CLUSTER_SHIFT) + 1).owned else 0

cdef int swapfile_collect(SwapFile* f, uint32_t number, uint32_t* at, int n, int most, int longest, int64_t* slots,
                          uint64_t* owners, swapfile_try locked, void* ctx, int64_t* busy) noexcept nogil:
    cdef Cluster* k = cluster(f, number)
    cdef int64_t base = <int64_t>(number - 1) << CLUSTER_SHIFT
    cdef int taken = 0
    cdef uint32_t i
    us_lock(&f.mutex)
    i = next_used(k, at[0]) if k.owned else <uint32_t>CLUSTER_SLOTS
    while i < CLUSTER_SLOTS and taken < n and (taken == 0 or base + i + longest <= slots[0] + most):
        if f.owners[base + i]:
            if locked(ctx, f.owners[base + i], base + i):
                slots[taken] = base + i
                owners[taken] = f.owners[base + i]
                taken += 1
            else:
                busy[0] += 1
        i = next_used(k, i + 1)
    us_unlock(&f.mutex)
    at[0] = i
    return taken

cdef uint32_t swapfile_clusters(SwapFile* f) noexcept nogil:
    return f.fresh

cdef uint32_t swapfile_oldest(SwapFile* f) noexcept nogil:
    cdef uint32_t number
    us_lock(&f.mutex)
    number = f.oldest
    if number and number == f.current:
        number = cluster(f, number).newer
    if number:
        enqueue(f, number)
    us_unlock(&f.mutex)
    return number

cdef bint swapfile_tidy(SwapFile* f) noexcept nogil:
    cdef Cluster* k = NULL
    cdef Cluster seen
    cdef uint32_t number = 0, looks = 0, first, end, longest
    cdef int kept = c.errno, tries
    cdef bint empty
    us_lock(&f.mutex)
    while looks < TIDY_LOOKS and looks < f.fresh and f.punches:
        looks += 1
        f.tidied = f.tidied % f.fresh + 1
        k = cluster(f, f.tidied)
        if k.holes and k.count and not k.punching and f.tidied != f.current:
            number = f.tidied
            break
    if number:
        unlist(f, number)
        k.punching = 1
        k.holes = 0
        memcpy(seen.used, k.used, sizeof(seen.used))
    us_unlock(&f.mutex)
    if not number:
        return False
    us_chaos()
    end = 0
    while end < CLUSTER_SLOTS:
        first = next_free(&seen, end)
        end = next_used(&seen, first) if first < CLUSTER_SLOTS else <uint32_t>CLUSTER_SLOTS
        tries = 0
        while first < CLUSTER_SLOTS and end - first >= TIDY_SLOTS and f.punches and tries < STALLS:
            tries += 1
            if io_punch(f.fd, <int64_t>(number - 1) * CLUSTER_BYTES + <int64_t>first * SLOT_BYTES,
                        <int64_t>(end - first) * SLOT_BYTES) == 0:
                break
            if c.errno == c.EOPNOTSUPP or c.errno == c.ENOSYS:
                f.punches = 0
            elif c.errno != c.EINTR:
                break           # as in `punch`; the others may be luckier
    c.errno = kept
    us_chaos()
    us_lock(&f.mutex)
    empty = k.count == 0        # what was in use has gone meanwhile
    if not empty:
        k.punching = 0
        find_run(k, 0, CLUSTER_SLOTS + 1, &longest)
        k.room = <uint16_t>longest
        if longest:
            enlist(f, number, longest)
    us_unlock(&f.mutex)
    if empty:
        punch(f, number)
    return True


# ---- a window for tests and experiments ----

KINDS = {"read": IO_READ, "write": IO_WRITE, "scatter": IO_SCATTER, "punch": IO_PUNCH, "open": IO_OPEN}
INSTEAD = {"short": SHORT, "flipped": FLIPPED}


def inject(kind: str | None, after: int = 0, error: "int | str" = 0, times: int = 1) -> int:
    """From now on let `after` system calls of a kind pass ("read", "write", "scatter", "punch", "open"), and have the
    next ones (`times`) fail with an errno, transfer less ("short") or read a wrong bit ("flipped"). None: no more.

    Returns how often the last one did something.
    """
    global inject_kind, inject_error, inject_left, inject_times, inject_fired
    cdef int64_t fired = inject_fired
    us_write(&armed, 0)
    inject_fired = 0
    if kind is not None:
        inject_kind = KINDS[kind]
        inject_left = after
        inject_times = times
        inject_error = INSTEAD[error] if isinstance(error, str) else error
        us_write(&armed, 1)
    return fired


cdef class SwapDevice:
    """A swap file on an open descriptor, which it owns from now on."""

    cdef SwapFile* f

    def __cinit__(self, int fd, uint64_t limit, name="swap"):
        self.f = swapfile_new(fd, limit, os.fsencode(name))
        if self.f == NULL:
            raise ValueError(f"no swap file can have a limit of {limit} bytes")

    def __dealloc__(self):
        if self.f != NULL:
            swapfile_delete(self.f, True)

    @property
    def name(self):
        """What it was called."""
        return os.fsdecode(swapfile_name(self.f))

    @property
    def used(self):
        """Slots in use."""
        return swapfile_used(self.f)

    @property
    def metadata(self):
        """Bytes of RAM for the bitmaps."""
        return swapfile_metadata(self.f)

    @property
    def mapping(self):
        """Address and length of the bitmaps' mapping."""
        return <size_t>self.f, self.f.mapped

    @property
    def sealing(self):
        """Address and length of the seals' mapping."""
        return <size_t>self.f.seals, <uint64_t>self.f.limit * PAGE_BYTES

    def alloc(self, int n):
        """Take a run of `n` slots. Returns the first."""
        cdef int64_t slot
        with nogil:
            slot = swapfile_alloc(self.f, n)
        if slot < 0:
            raise OSError(-slot, os.strerror(-slot), self.name)
        return slot

    def take(self, int64_t slot, int n=1):
        """Take this very run, as for a swap map whose ids are slots. Not together with `alloc`."""
        self._range(slot, n)
        with nogil:
            swapfile_take(self.f, slot, n)

    def free(self, int64_t slot, int n=1):
        """Free slots of a run."""
        self._range(slot, n)
        with nogil:
            swapfile_free(self.f, slot, n)

    cdef int _range(self, int64_t slot, int n) except -1:
        if n < 1 or slot < 0 or slot + n > <int64_t>self.f.slots or slot % CLUSTER_SLOTS + n > CLUSTER_SLOTS:
            raise ValueError(f"slots {slot} to {slot + n - 1} are no run in one cluster of this file")
        return 0

    def write(self, int64_t slot, const unsigned char[::1] data not None):
        """Write whole slots; the buffer has to be aligned to 4096 bytes for O_DIRECT (an mmap is)."""
        cdef int n = <int>(data.shape[0] // SLOT_BYTES)
        cdef int result
        if data.shape[0] % SLOT_BYTES:
            raise ValueError("the data must be whole slots")
        self._range(slot, n)
        with nogil:
            result = swapfile_write(self.f, slot, n, &data[0])
        if result:
            raise OSError(-result, os.strerror(-result), self.name)

    def read(self, int64_t slot, unsigned char[::1] data not None):
        """Read whole slots into a writable buffer."""
        cdef int n = <int>(data.shape[0] // SLOT_BYTES)
        cdef int result
        if data.shape[0] % SLOT_BYTES:
            raise ValueError("the buffer must be whole slots")
        self._range(slot, n)
        with nogil:
            result = swapfile_read(self.f, slot, n, &data[0])
        if result:
            raise OSError(-result, os.strerror(-result), self.name)

    def stress(self, uint64_t seed, int64_t turns, int most, int live=32, int homes=0):
        """A thread's share of random runs of up to `most` slots, each written, read back and freed.

        Up to `live` (1 to 32) of them exist at a time. Returns the errors found. With `homes`, the number of threads
        (with seeds 1, 2 ..), the runs are not allocated but taken, `most` slots at places of this thread's own.
        """
        cdef int64_t errors = 0, turn
        cdef int64_t slots[32]
        cdef int sizes[32]
        cdef int i, j, n
        cdef uint64_t random = seed * 0x9E3779B97F4A7C15u + 1
        cdef uint64_t* words
        cdef void* buffer
        if not 1 <= most <= CLUSTER_SLOTS or not 1 <= live <= 32:
            raise ValueError("a run has 1 to 512 slots, and 1 to 32 of them exist at a time")
        if homes and (CLUSTER_SLOTS % most or <uint64_t>(32 * homes * most) > self.f.slots):
            raise ValueError("homes divide a cluster, and there is one for each run of each thread")
        buffer = mmap(NULL, CLUSTER_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
        if buffer == MAP_FAILED:
            raise MemoryError()
        words = <uint64_t*>buffer
        with nogil:
            for i in range(32):
                sizes[i] = 0
            for turn in range(turns + 32):
                random ^= random << 13
                random ^= random >> 7
                random ^= random << 17
                i = <int>((random >> 20) % <uint64_t>live) if turn < turns else <int>(turn - turns)
                if sizes[i]:
                    errors += swapfile_read(self.f, slots[i], sizes[i], buffer) != 0
                    for j in range(sizes[i]):
                        errors += words[512 * j] != seed or words[512 * j + 511] != <uint64_t>(slots[i] + j)
                    swapfile_free(self.f, slots[i], sizes[i])
                    sizes[i] = 0
                    continue
                if turn >= turns:
                    continue
                n = 1 + <int>((random >> 40) % <uint64_t>most) if not homes else most
                if homes:
                    slots[i] = <int64_t>(i * homes + <int>(seed % <uint64_t>homes)) * most
                    swapfile_take(self.f, slots[i], n)
                else:
                    slots[i] = swapfile_alloc(self.f, n)
                if slots[i] < 0:
                    continue
                sizes[i] = n
                for j in range(n):
                    words[512 * j] = seed
                    words[512 * j + 511] = <uint64_t>(slots[i] + j)
                errors += swapfile_write(self.f, slots[i], n, buffer) != 0
        munmap(buffer, CLUSTER_BYTES)
        return errors

    def time_alloc_free(self, int n, int live, int64_t turns):
        """Nanoseconds for one alloc and one free of a run, with about `live` others around."""
        cdef int64_t _turn, start, spent
        cdef uint64_t random = 88172645463325252u
        cdef int i
        cdef int64_t slots[4096]
        if not 1 <= live <= 4096:
            raise ValueError("up to 4096 others")
        runs = [self.alloc(n) for _ in range(live)]
        for i in range(live):
            slots[i] = runs[i]
        with nogil:
            start = us_now()
            for _turn in range(turns):
                random ^= random << 13
                random ^= random >> 7
                random ^= random << 17
                i = <int>(random % <uint64_t>live)
                swapfile_free(self.f, slots[i], n)
                slots[i] = swapfile_alloc(self.f, n)
            spent = us_now() - start
            for i in range(live):
                swapfile_free(self.f, slots[i], n)
        return spent / turns
