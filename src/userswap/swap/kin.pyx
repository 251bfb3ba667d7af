"""Kin: who of the processes that share our swap files lives, and which slots each refers to (see kin.pxd).

Touches its file of locks, its descriptors and the shared mappings.

Locking: none between processes, as any may be killed at any instruction. A row belongs to who has its file lock; a
bitmap is written by its process (and by its parent, before it is born); whoever looks at several bitmaps looks again if
meanwhile a child was born, because that is how a bit gets from one that is still to be looked at to one that was.
"""
from libc.errno cimport EMFILE, ENOMEM, errno
from libc.stdint cimport int64_t, uint64_t
from libc.stdio cimport snprintf

from userswap.native.descriptors cimport FIRST_FD, descriptor_guard, descriptor_release, descriptor_up
from userswap.native.mman cimport (
    MADV_DONTDUMP, MADV_REMOVE, MAP_ANONYMOUS, MAP_FAILED, MAP_NORESERVE, MAP_SHARED, PROT_READ, PROT_WRITE, madvise,
    mmap, munmap,
)
from userswap.native.us cimport us_add, us_and, us_cas, us_chaos, us_load, us_now, us_or, us_read, us_store, us_write

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <fcntl.h>
    #include <stdint.h>
    #include <sys/mman.h>
    #include <unistd.h>

    /* 0 if byte `row` of the file is not locked (and, if `take`, is now locked by this open file description). */
    static int kin_lock(int fd, int row, int take) {
        struct flock lock = {0};
        lock.l_type = F_WRLCK;
        lock.l_whence = SEEK_SET;
        lock.l_start = row;
        lock.l_len = 1;
        if (fcntl(fd, take ? F_OFD_SETLK : F_OFD_GETLK, &lock) != 0)
            return -1;
        return take || lock.l_type == F_UNLCK ? 0 : -1;
    }
    """
    int kin_lock(int fd, int row, bint take) nogil
    int memfd_create(const char* name, unsigned int flags) nogil
    int open(const char* path, int flags, ...) nogil
    int close(int fd) nogil
    enum:
        MFD_CLOEXEC
        O_CLOEXEC
        O_RDWR

cdef enum:
    ASK_NS = 10000000
    LOOK_NS = 50000000
    UNCOUNTED = KIN_MOST        # the row in a table of all children that have none
    PAGE = 4096

cdef struct Family:
    uint64_t rows               # all that were ever used are below
    uint64_t[KIN_MOST] generation

cdef struct KinSlots:
    uint64_t length             # of the mapping
    uint64_t row_bytes
    uint64_t top                # words of a row that may have a bit
    uint64_t changes            # births
    uint64_t closed
    uint64_t owner_generation
    int64_t owner
    uint64_t[KIN_MOST + 1] generation       # whose bits a row's are; 0: nobody's
    # the rows follow, whole pages each

# Of all kin:
cdef Family* family = NULL
cdef int family_fd = -1
# Ours:
cdef int me = -1
cdef int my_fd = -1             # whose description has the lock of our row
cdef uint64_t[KIN_MOST] dead    # by row: no generation up to this one lives
cdef int64_t[KIN_MOST] asked    # ns
cdef int64_t deaths = 0
cdef int64_t looked = 0         # ns
# Of the fork under way:
cdef int child = -1
cdef int child_fd = -1


cdef void* share(uint64_t n) noexcept nogil:
    """Zeros that all children see too. NULL: no memory."""
    cdef void* p = mmap(NULL, n, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    if p == MAP_FAILED:
        return NULL
    madvise(p, n, MADV_DONTDUMP)
    return p


cdef void raise_to(uint64_t* p, uint64_t least) noexcept nogil:
    cdef uint64_t seen = us_load(p)
    while seen < least and not us_cas(p, seen, least):
        seen = us_load(p)


# ---- rows ----

cdef int take_row(int* fd) noexcept nogil:
    """A row that nobody has, and the descriptor that has it; or -errno."""
    cdef char[64] path
    cdef int row
    snprintf(path, sizeof(path), "/proc/self/fd/%d", family_fd)
    fd[0] = open(path, O_RDWR | O_CLOEXEC)
    if fd[0] < 0:
        return -errno
    fd[0] = descriptor_up(fd[0], FIRST_FD)
    for row in range(KIN_MOST):
        if row != me and kin_lock(fd[0], row, True) == 0:
            # A child that closed it by accident would be taken for gone, and its slots be written over.
            descriptor_guard(fd[0])
            us_store(&family.generation[row], us_load(&family.generation[row]) + 1)
            raise_to(&family.rows, <uint64_t>row + 1)
            return row
    close(fd[0])
    fd[0] = -1
    return -EMFILE


cdef void let_go(int* fd) noexcept nogil:
    if fd[0] >= 0:
        descriptor_release(fd[0])
        close(fd[0])
    fd[0] = -1


cdef int begin() noexcept nogil:
    """The first fork: the family is founded."""
    global family, family_fd, me
    cdef int row
    family_fd = memfd_create("userswap-kin", MFD_CLOEXEC)
    if family_fd < 0:
        return -errno
    family_fd = descriptor_up(family_fd, FIRST_FD)
    family = <Family*>share(sizeof(Family))
    if family == NULL:
        close(family_fd)
        family_fd = -1
        return -ENOMEM
    descriptor_guard(family_fd)
    row = take_row(&my_fd)
    me = row if row >= 0 else -1
    return 0


cdef int kin_before_fork() noexcept nogil:
    global child
    cdef int kept = errno
    cdef int row = begin() if family == NULL else 0
    child = -1
    if row == 0:
        row = take_row(&child_fd)
        child = row if row >= 0 else -1
    (&errno)[0] = kept
    return row if row < 0 else 0


cdef void kin_after_fork(bint is_child) noexcept nogil:
    global me, my_fd, child, child_fd
    cdef int kept = errno
    if is_child:
        let_go(&my_fd)          # the parent's: it shall not live as long as we do
        my_fd = child_fd
        me = child
        child_fd = -1
    else:
        let_go(&child_fd)       # there was no child: then nobody has the row
    child = -1
    (&errno)[0] = kept


cdef int kin_me() noexcept nogil:
    return me


cdef int kin_child() noexcept nogil:
    return child


cdef int kin_rows() noexcept nogil:
    return <int>us_load(&family.rows) if family != NULL else 0


cdef uint64_t kin_generation(int row) noexcept nogil:
    return us_load(&family.generation[row])


cdef bint kin_gone(int row, uint64_t generation) noexcept nogil:
    cdef int64_t now
    cdef int kept
    cdef bint gone
    if us_load(&dead[row]) >= generation:
        return True
    # Who has it next locked it before: another generation means that this one's lock was free.
    gone = us_load(&family.generation[row]) != generation
    if not gone and row != me:
        now = us_now()
        if now - us_read(&asked[row]) > ASK_NS:
            us_write(&asked[row], now)
            kept = errno
            gone = kin_lock(family_fd, row, False) == 0
            (&errno)[0] = kept
    if gone:
        raise_to(&dead[row], generation)
        us_add(&deaths, 1)
    return gone


cdef int64_t kin_deaths() noexcept nogil:
    cdef int64_t now = us_now()
    cdef int row
    if now - us_read(&looked) > LOOK_NS:
        us_write(&looked, now)
        for row in range(kin_rows()):
            kin_gone(row, us_load(&family.generation[row]))
    return us_read(&deaths)


# ---- tables ----

cdef inline uint64_t head_bytes() noexcept nogil:
    return (sizeof(KinSlots) + PAGE - 1) & ~<uint64_t>(PAGE - 1)


cdef inline uint64_t* row_of(KinSlots* t, int row) noexcept nogil:
    return <uint64_t*>(<char*>t + head_bytes() + <uint64_t>row * t.row_bytes)


cdef inline int mine() noexcept nogil:
    return me if me >= 0 else <int>UNCOUNTED


cdef KinSlots* kin_slots_new(uint64_t slots) noexcept nogil:
    cdef uint64_t row_bytes = ((slots + 511) // 512 * 64 + PAGE - 1) & ~<uint64_t>(PAGE - 1)
    cdef uint64_t length = head_bytes() + (KIN_MOST + 1) * row_bytes
    cdef int kept = errno
    cdef KinSlots* t = <KinSlots*>share(length)
    (&errno)[0] = kept
    if t == NULL:
        return NULL
    t.length = length
    t.row_bytes = row_bytes
    t.owner = me
    t.owner_generation = us_load(&family.generation[me]) if me >= 0 else 0
    return t


cdef void kin_slots_delete(KinSlots* t) noexcept nogil:
    munmap(t, t.length)


cdef uint64_t* kin_slots_open(KinSlots* t, uint64_t top) noexcept nogil:
    cdef int row = child if child >= 0 else <int>UNCOUNTED
    cdef uint64_t* bits = row_of(t, row)
    if child >= 0 and us_load(&t.generation[row]):
        # What somebody left who had the row before. Not before its generation is gone: another one may look at it.
        us_store(&t.generation[row], 0)
        madvise(bits, t.row_bytes, MADV_REMOVE)
    raise_to(&t.top, top)
    return bits


cdef void kin_slots_show(KinSlots* t) noexcept nogil:
    us_chaos()
    if child >= 0:
        us_store(&t.generation[child], us_load(&family.generation[child]))
    else:
        us_store(&t.generation[<int>UNCOUNTED], 1)
    us_add(<int64_t*>&t.changes, 1)


cdef void kin_slots_pass(KinSlots* t) noexcept nogil:
    cdef uint64_t top = us_load(&t.top)
    cdef uint64_t* bits = kin_slots_open(t, top)
    cdef uint64_t* ours = row_of(t, mine())
    cdef uint64_t i, word
    for i in range(top):
        word = us_load(&ours[i])
        if word:
            us_or(&bits[i], word)
    kin_slots_show(t)


cdef inline uint64_t mask_of(int64_t slot, int64_t end, uint64_t word) noexcept nogil:
    """The bits of slots slot .. end - 1 in this word."""
    cdef int64_t low = slot - <int64_t>(word << 6)
    cdef int64_t high = end - <int64_t>(word << 6)
    cdef uint64_t mask = ~<uint64_t>0
    if low > 0:
        mask <<= low
    if high < 64:
        mask &= (<uint64_t>1 << high) - 1
    return mask


cdef void kin_slots_clear(KinSlots* t, int64_t slot, int n) noexcept nogil:
    cdef uint64_t word
    if me < 0:
        return                  # others may be behind that bit too
    for word in range(<uint64_t>slot >> 6, (<uint64_t>(slot + n - 1) >> 6) + 1):
        us_and(&row_of(t, me)[word], ~mask_of(slot, slot + n, word))


cdef inline bint lives(KinSlots* t, int row, uint64_t generation) noexcept nogil:
    return row == <int>UNCOUNTED or not kin_gone(row, generation)


cdef uint64_t look(KinSlots* t, uint64_t word, uint64_t mask, bint ours) noexcept nogil:
    """Those of these slots that a living process refers to; `ours`: we too."""
    cdef uint64_t seen, generation, bits, found
    cdef int i, row, rows
    while True:
        seen = us_load(&t.changes)
        found = 0
        rows = kin_rows()
        for i in range(rows + 1):
            row = i if i < rows else <int>UNCOUNTED
            generation = us_load(&t.generation[row])
            if generation == 0 or (row == me and not ours):
                continue
            bits = us_load(&row_of(t, row)[word]) & mask & ~found
            if bits and lives(t, row, generation):
                found |= bits
        us_chaos()
        if found == mask or us_load(&t.changes) == seen:
            return found


cdef bint kin_slots_held(KinSlots* t, int64_t slot, int n) noexcept nogil:
    cdef uint64_t word
    for word in range(<uint64_t>slot >> 6, (<uint64_t>(slot + n - 1) >> 6) + 1):
        if word < us_load(&t.top) and look(t, word, mask_of(slot, slot + n, word), False):
            return True
    return False


cdef uint64_t kin_slots_word(KinSlots* t, uint64_t word) noexcept nogil:
    return look(t, word, ~<uint64_t>0, True)


cdef uint64_t kin_slots_top(KinSlots* t) noexcept nogil:
    return us_load(&t.top)


cdef bint kin_slots_any(KinSlots* t) noexcept nogil:
    cdef uint64_t generation
    cdef int row
    if us_load(&t.generation[<int>UNCOUNTED]):
        return True
    for row in range(kin_rows()):
        generation = us_load(&t.generation[row])
        if generation and row != me and lives(t, row, generation):
            return True
    return False


cdef void kin_slots_close(KinSlots* t) noexcept nogil:
    us_store(&t.closed, 1)


cdef bint kin_slots_orphaned(KinSlots* t) noexcept nogil:
    return us_load(&t.closed) != 0 or (t.owner >= 0 and kin_gone(<int>t.owner, t.owner_generation))


cdef int64_t kin_slots_bytes(KinSlots* t) noexcept nogil:
    return <int64_t>(head_bytes() + us_load(&t.top) * 8 * <uint64_t>kin_rows())
