"""A swap map that records what it is asked, for `userswap run --trace`: the design `sparse` behind a tape.

Recording is a design of its own, so that nothing else has a hook, and who does not trace pays nothing. It wraps
`sparse` because ids never change there: an id names the same data from alloc to free. Touches the map that it
wraps, its own tape, and nothing else.

The tape is one mapping made with the map: a head, and room for RECORDS records, which take memory as they are written
(beside the budget: what is recorded must not be changed by the recording). A record's place is taken by one atomic
addition, its last word is stored last: a word that is 0 was not written yet. When the tape is full recording ends.
In a forked child the tape reads as zeros (MADV_WIPEONFORK), `running` among them: a child records nothing, and pays
for no copy.

No lock is taken here. What makes the order of records an order in which the same calls can be made one after the
other is when they are written:

- after the call, what gives something: alloc, lock, try_owner, next, dup. Before that nobody else can use it.
- before the call, what takes something away: unlock, unlock_owner, put, free. After it somebody else could be first.
- in between, what happens under the lock of the entry: cache.

So a count that follows the records is never above the real one, and it does not reach 0 before the last put: the
reference of a dup that is not recorded yet is not the only one, since its holder's is not put meanwhile. The one
exception is in time, not in number: the last put is recorded before it waits for the lock, and a writeback may
still end in between. Therefore the last put of an id counts where the id is freed (see `traced_events`).
"""
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from userswap.native.mman cimport (
    MADV_DONTDUMP, MADV_WIPEONFORK, MAP_ANONYMOUS, MAP_FAILED, MAP_NORESERVE, MAP_PRIVATE, PROT_READ, PROT_WRITE,
    madvise, mmap, munmap,
)
from userswap.native.us cimport us_add, us_assert, us_chaos, us_load, us_now, us_read, us_store
from userswap.swap.designs.sparse cimport sparse_design
from userswap.swap.entry cimport SLOT, entry_payload, entry_type
from userswap.swap.map cimport SwapMap, SwapMapOps, SwapMapOptions

cdef extern from "<pthread.h>" nogil:
    uint64_t pthread_self()     # an address; nothing is called, so it will do in a fault handler


cdef enum:
    MAP_BYTES = 4096            # what the map itself lives in
    RECORDS = 1 << 23           # 256 MiB when it is full
    ID_BITS = 48
    RUN_SHIFT = 48              # of the first record of a run: how many there are
    CALL_SHIFT = 56

# What a record is about. Not 0, so that a record is never 0.
cdef enum Call:
    ALLOC = 1
    RUN
    MORE
    FREE
    LOCK
    UNLOCK
    TRY
    RELEASE
    DUP
    PUT
    CACHE
    COUNT
    CACHED

cdef struct Record:
    int64_t when                # ns, monotonic
    uint64_t thread
    uint64_t value              # entry, number of references, or folio
    uint64_t what               # id (48) | length of a run (8) | call (8)

cdef struct Tape:
    uint64_t running
    int64_t taken               # places; may be more than there are
    int64_t began
    uint64_t reserved
    Record[RECORDS] records

cdef struct Traced:
    SwapMap head
    SwapMap* inner
    Tape* tape

cdef enum:
    TAPE_BYTES = 32 + RECORDS * 32


cdef SwapMap* traced_new(const SwapMapOptions* options) noexcept nogil:
    cdef void* memory = mmap(NULL, MAP_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    cdef void* tape = mmap(NULL, TAPE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    cdef SwapMap* inner = sparse_design().new(options)
    cdef Traced* m
    us_assert(sizeof(Tape) == TAPE_BYTES, "the tape is as long as it says")
    if (memory == MAP_FAILED or tape == MAP_FAILED or inner == NULL
            or madvise(tape, TAPE_BYTES, MADV_WIPEONFORK) != 0):
        if memory != MAP_FAILED:
            munmap(memory, MAP_BYTES)
        if tape != MAP_FAILED:
            munmap(tape, TAPE_BYTES)
        if inner != NULL:
            inner.ops.delete(inner)
        return NULL
    madvise(tape, TAPE_BYTES, MADV_DONTDUMP)
    m = <Traced*>memory
    m.head.ops = &ops
    m.inner = inner
    m.tape = <Tape*>tape
    m.tape.began = us_now()
    us_store(&m.tape.running, 1)
    return &m.head


cdef void traced_delete(SwapMap* map) noexcept nogil:
    cdef Traced* m = <Traced*>map
    m.inner.ops.delete(m.inner)
    munmap(m.tape, TAPE_BYTES)
    munmap(m, MAP_BYTES)


cdef inline SwapMap* inner_of(SwapMap* map) noexcept nogil:
    return (<Traced*>map).inner


# ---- writing ----

# Takes the places of n records in a row; the first, or -1 when nothing is recorded any more.
cdef inline int64_t take(Tape* tape, int n) noexcept nogil:
    cdef int64_t at
    if not us_load(&tape.running):
        return -1
    at = us_add(&tape.taken, n) - n
    if at + n > RECORDS:
        us_store(&tape.running, 0)
        return -1
    return at


cdef inline void write(Tape* tape, int64_t at, int call, uint64_t id, uint64_t value) noexcept nogil:
    cdef Record* record = &tape.records[at]
    record.when = us_now()
    record.thread = pthread_self()
    record.value = value
    us_chaos()
    us_store(&record.what, id | <uint64_t>call << CALL_SHIFT)


cdef inline void note(SwapMap* map, int call, uint64_t id, uint64_t value) noexcept nogil:
    cdef Tape* tape = (<Traced*>map).tape
    cdef int64_t at
    us_chaos()
    at = take(tape, 1)
    if at >= 0:
        write(tape, at, call, id, value)
    us_chaos()


cdef uint64_t traced_alloc(SwapMap* map, uint64_t entry, uint64_t holder) noexcept nogil:
    cdef SwapMap* inner = inner_of(map)
    cdef uint64_t id = inner.ops.alloc(inner, entry, holder)
    if id:
        note(map, ALLOC, id, entry)
    return id


cdef bint traced_alloc_run(SwapMap* map, const uint64_t* entries, uint64_t holder, int n, uint64_t* ids) noexcept nogil:
    cdef SwapMap* inner = inner_of(map)
    cdef Tape* tape = (<Traced*>map).tape
    cdef int64_t at
    cdef int i
    if not inner.ops.alloc_run(inner, entries, holder, n, ids):
        return False
    us_chaos()
    at = take(tape, n)
    if at >= 0:
        # Who reads may find the first ones without the others: a run counts when it is whole.
        write(tape, at, RUN, ids[0] | <uint64_t>n << RUN_SHIFT, entries[0])
        for i in range(1, n):
            write(tape, at + i, MORE, ids[i], entries[i])
    return True


cdef void traced_free(SwapMap* map, uint64_t id) noexcept nogil:
    cdef SwapMap* inner = inner_of(map)
    note(map, FREE, id, 0)
    inner.ops.free(inner, id)


cdef uint64_t traced_lock(SwapMap* map, uint64_t id) noexcept nogil:
    cdef SwapMap* inner = inner_of(map)
    cdef uint64_t entry = inner.ops.lock(inner, id)
    note(map, LOCK, id, entry)
    return entry


cdef uint64_t traced_unlock(SwapMap* map, uint64_t id, uint64_t entry) noexcept nogil:
    cdef SwapMap* inner = inner_of(map)
    note(map, UNLOCK, id, entry)
    return inner.ops.unlock(inner, id, entry)


cdef uint64_t traced_owner(SwapMap* map, uint64_t id, uint64_t holder) noexcept nogil:
    cdef SwapMap* inner = inner_of(map)
    return inner.ops.owner(inner, id, holder)


cdef bint traced_try_owner(SwapMap* map, uint64_t owner, uint64_t entry) noexcept nogil:
    cdef SwapMap* inner = inner_of(map)
    if not inner.ops.try_owner(inner, owner, entry):
        return False
    note(map, TRY, owner, entry)
    return True


cdef void traced_unlock_owner(SwapMap* map, uint64_t owner, uint64_t entry) noexcept nogil:
    cdef SwapMap* inner = inner_of(map)
    note(map, RELEASE, owner, entry)
    inner.ops.unlock_owner(inner, owner, entry)


cdef uint64_t traced_next(SwapMap* map, int device, uint64_t after, uint64_t* entry, int64_t* busy) noexcept nogil:
    cdef SwapMap* inner = inner_of(map)
    cdef uint64_t owner = inner.ops.next(inner, device, after, entry, busy)
    if owner:
        note(map, TRY, owner, entry[0])
    return owner


cdef int traced_dup(SwapMap* map, uint64_t* id, int64_t n, uint64_t* moved) noexcept nogil:
    cdef SwapMap* inner = inner_of(map)
    cdef int error = inner.ops.dup(inner, id, n, moved)
    if error == 0:
        note(map, DUP, id[0], <uint64_t>n)
    return error


cdef int64_t traced_put(SwapMap* map, uint64_t id, int64_t n, uint64_t* entry) noexcept nogil:
    cdef SwapMap* inner = inner_of(map)
    note(map, PUT, id, <uint64_t>n)
    return inner.ops.put(inner, id, n, entry)


cdef int64_t traced_count(SwapMap* map, uint64_t id) noexcept nogil:
    cdef SwapMap* inner = inner_of(map)
    note(map, COUNT, id, 0)
    return inner.ops.count(inner, id)


cdef int traced_cache(SwapMap* map, uint64_t id, uint64_t folio) noexcept nogil:
    cdef SwapMap* inner = inner_of(map)
    cdef int error = inner.ops.cache(inner, id, folio)
    if error == 0:
        note(map, CACHE, id, folio)
    return error


cdef uint64_t traced_cached(SwapMap* map, uint64_t id) noexcept nogil:
    cdef SwapMap* inner = inner_of(map)
    note(map, CACHED, id, 0)
    return inner.ops.cached(inner, id)


cdef int64_t traced_ids(SwapMap* map) noexcept nogil:
    cdef SwapMap* inner = inner_of(map)
    return inner.ops.ids(inner)


cdef int64_t traced_metadata(SwapMap* map) noexcept nogil:
    cdef SwapMap* inner = inner_of(map)
    return inner.ops.metadata(inner)


cdef SwapMapOps ops
ops.name = b"traced"
ops.bound = False
ops.count_max = sparse_design().count_max
ops.new = traced_new
ops.delete = traced_delete
ops.alloc = traced_alloc
ops.alloc_run = traced_alloc_run
ops.free = traced_free
ops.home = NULL
ops.lock = traced_lock
ops.unlock = traced_unlock
ops.owner = traced_owner
ops.try_owner = traced_try_owner
ops.unlock_owner = traced_unlock_owner
ops.next = traced_next
ops.dup = traced_dup
ops.put = traced_put
ops.count = traced_count
ops.cache = traced_cache
ops.cached = traced_cached
ops.ids = traced_ids
ops.metadata = traced_metadata


cdef const SwapMapOps* traced_design() noexcept nogil:
    return &ops


# ---- reading ----

EVENTS = ("alloc", "run", "more", "fault", "cache", "uncache", "writeback", "move", "dup", "put", "free", "count",
          "cached")
MOST_RECORDS = RECORDS

# An id while the records are read.
cdef struct Seen:
    uint64_t entry              # that whoever has it locked found
    uint64_t last               # references that the last put gave up
    int64_t count
    uint32_t ref
    uint32_t cached             # under this lock: 1 into the swap cache, 2 out of it

# The events, a column each.
cdef struct Columns:
    uint8_t* kinds
    uint8_t* types
    uint16_t* threads
    uint32_t* refs
    int64_t* times
    int64_t* values
    int64_t n


cdef void* reserve(uint64_t length) except NULL:
    cdef void* memory = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    if memory == MAP_FAILED:
        raise MemoryError("no address space to read a trace")
    return memory


cdef inline void emit(Columns* c, int kind, Seen* s, uint64_t before, uint64_t after, int64_t value) noexcept:
    c.kinds[c.n] = <uint8_t>kind
    c.types[c.n] = <uint8_t>(entry_type(before) | entry_type(after) << 4)
    c.refs[c.n] = s.ref
    c.values[c.n] = <int64_t>entry_payload(after) if value < 0 and entry_type(after) == SLOT else max(value, 0)
    c.n += 1


cdef object traced_events(SwapMap* map):
    """Turns records into events.

    A lock and its unlock become one event, where the unlock is; so do try_owner and unlock_owner. Nothing that
    happened to the id in between needs the lock, but for the swap cache, which becomes part of the event. The last put
    of an id becomes part of its end. Ids become refs: small numbers that are used again, in a row for a run. Locks that
    are still held at the end, and those of storage that changed nothing (a writeback that failed), are left out.
    """
    if map.ops != &ops:
        return None
    cdef Tape* tape = (<Traced*>map).tape
    us_store(&tape.running, 0)
    cdef int64_t taken = us_read(&tape.taken)
    cdef int64_t n = 0, i, latest = 0
    cdef uint64_t most = 0, id, last_thread = 0, what
    cdef uint32_t fresh = 0
    cdef int64_t spare = 0
    cdef int call, j, run
    cdef Record* record
    cdef Seen* s
    cdef Columns c
    cdef dict numbers = {}
    cdef uint16_t thread = 0
    # As far as they are whole: a thread that is not done may be at work yet.
    while n < min(taken, <int64_t>RECORDS):
        what = us_load(&tape.records[n].what)
        if what == 0:
            break
        run = <int>(what >> RUN_SHIFT) & 255 if what >> CALL_SHIFT == RUN else 1
        for j in range(1, run):
            if us_load(&tape.records[n + j].what) == 0:
                run = 0
                break
        if run == 0:
            break
        for j in range(run):
            most = max(most, tape.records[n + j].what & ((<uint64_t>1 << ID_BITS) - 1))
        n += run
    cdef uint64_t room = <uint64_t>n + 1
    cdef char* memory = <char*>reserve(room * 28 + (most + 1) * sizeof(Seen))
    cdef Seen* ids = <Seen*>memory
    c.times = <int64_t*>(ids + most + 1)
    c.values = c.times + room
    c.refs = <uint32_t*>(c.values + room)
    cdef uint32_t* spares = c.refs + room
    c.threads = <uint16_t*>(spares + room)
    c.kinds = <uint8_t*>(c.threads + room)
    c.types = c.kinds + room
    c.n = 0
    for i in range(n):
        record = &tape.records[i]
        id = record.what & ((<uint64_t>1 << ID_BITS) - 1)
        call = <int>(record.what >> CALL_SHIFT)
        s = &ids[id]
        if record.thread != last_thread:
            last_thread = record.thread
            thread = <uint16_t>min(numbers.setdefault(last_thread, len(numbers)), 65535)
        us_assert((s.count > 0) != (call in (ALLOC, RUN, MORE, FREE)) or call == TRY or call == RELEASE,
                  "an order of records in which the calls can be made")
        latest = max(latest, record.when - tape.began)      # threads write them down a little out of order
        c.threads[c.n] = thread
        c.times[c.n] = latest
        if call == ALLOC:
            if spare:
                spare -= 1
                s.ref = spares[spare]
            else:
                s.ref = fresh
                fresh += 1
            s.count = 1
            emit(&c, EVENT_ALLOC, s, 0, record.value, -1)
        elif call == RUN or call == MORE:
            s.ref = fresh
            fresh += 1
            s.count = 1
            emit(&c, EVENT_RUN if call == RUN else EVENT_MORE, s, 0, record.value, -1)
        elif call == LOCK or call == TRY:
            s.entry = record.value
            s.cached = 0
        elif call == CACHE:
            if s.cached:
                emit(&c, EVENT_CACHE if s.cached == 1 else EVENT_UNCACHE, s, s.entry, s.entry, -1)
            s.cached = 1 if record.value else 2
        elif call == UNLOCK:
            emit(&c, EVENT_FAULT if s.cached == 0 else EVENT_CACHE if s.cached == 1 else EVENT_UNCACHE, s, s.entry,
                 record.value, -1)
        elif call == RELEASE:
            if record.value != s.entry:
                emit(&c, EVENT_WRITEBACK if entry_type(record.value) == SLOT else EVENT_MOVE, s, s.entry,
                     record.value, -1)
        elif call == DUP:
            s.count += <int64_t>record.value
            emit(&c, EVENT_DUP, s, 0, 0, <int64_t>record.value)
        elif call == PUT:
            s.count -= <int64_t>record.value
            s.last = record.value
            if s.count:
                emit(&c, EVENT_PUT, s, 0, 0, <int64_t>record.value)
        elif call == FREE:
            emit(&c, EVENT_FREE, s, 0, 0, <int64_t>s.last)
            spares[spare] = s.ref
            spare += 1
        else:
            emit(&c, EVENT_COUNT if call == COUNT else EVENT_CACHED, s, 0, 0, 0)
    columns = (
        PyBytes_FromStringAndSize(<char*>c.kinds, c.n), PyBytes_FromStringAndSize(<char*>c.types, c.n),
        PyBytes_FromStringAndSize(<char*>c.threads, c.n * 2), PyBytes_FromStringAndSize(<char*>c.refs, c.n * 4),
        PyBytes_FromStringAndSize(<char*>c.times, c.n * 8), PyBytes_FromStringAndSize(<char*>c.values, c.n * 8),
    )
    munmap(memory, room * 28 + (most + 1) * sizeof(Seen))
    return columns, taken > RECORDS
