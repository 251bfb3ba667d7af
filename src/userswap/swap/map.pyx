"""The registry of SwapMap designs, and a window for Python: ``Map``.

The rest of userswap uses a map through its SwapMapOps and never through this window. Tests drive every
design with it, the lab measures with it: one call at a time, or loops that run at C's speed without
the GIL. Touches nothing but the map it made.

The window plays the rooms above and below a map. Above: a table of *holders*, the page-table words, one word
each (holder.pxd). Below: a table of *objects*, storage that remembers its owner.
"""
cimport cython
from libc.errno cimport EOVERFLOW
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport strcmp

from userswap.native.mman cimport (
    MAP_ANONYMOUS, MAP_FAILED, MAP_NORESERVE, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap,
)
from userswap.native.us cimport (
    us_add, us_cas, us_chaos, us_debug, us_load, us_lock, us_mutex, us_now, us_pause, us_read, us_store, us_unlock,
    us_word_release, us_word_wait, us_write,
)
from userswap.swap cimport entry as e
from userswap.swap.designs.descriptor cimport descriptor_design
from userswap.swap.designs.on_demand cimport on_demand_design
from userswap.swap.designs.redirect cimport redirect_design
from userswap.swap.designs.single_tree cimport single_tree_design
from userswap.swap.designs.slot cimport slot_design
from userswap.swap.designs.sparse cimport sparse_design
from userswap.swap.designs.swap_table cimport swap_table_design
from userswap.swap.designs.two_trees cimport two_trees_design
from userswap.swap.designs.vswap cimport vswap_design
from userswap.swap.holder cimport (
    HOLDER_BUSY as BUSY, HOLDER_ID_SHIFT as ID_SHIFT, HOLDER_WAITERS as WAITERS, holder_id,
)
from userswap.swap.traced cimport (
    EVENT_ALLOC, EVENT_CACHE, EVENT_CACHED, EVENT_COUNT, EVENT_DUP, EVENT_FAULT, EVENT_FREE, EVENT_KINDS, EVENT_MORE,
    EVENT_MOVE, EVENT_PUT, EVENT_RUN, EVENT_UNCACHE, EVENT_WRITEBACK, traced_design, traced_events,
)

# A new design is a line here and a file in designs/. The default comes first, then the older before the newer.
cdef enum:
    DESIGNS = 9

cdef const SwapMapOps* designs[DESIGNS]
designs[0] = on_demand_design()
designs[1] = sparse_design()
designs[2] = two_trees_design()
designs[3] = single_tree_design()
designs[4] = descriptor_design()
designs[5] = slot_design()
designs[6] = swap_table_design()
designs[7] = vswap_design()
designs[8] = redirect_design()


cdef const SwapMapOps* swap_map_design(const char* name) noexcept nogil:
    cdef int i
    for i in range(DESIGNS):
        if strcmp(designs[i].name, name) == 0:
            return designs[i]
    return traced_design() if strcmp(traced_design().name, name) == 0 else NULL


# `sparse` with a tape that records what it is asked: no design to choose, so not among the names.
TRACED = traced_design().name.decode()
DESIGN_NAMES = tuple([designs[i].name.decode() for i in range(DESIGNS)])
BOUND = frozenset([designs[i].name.decode() for i in range(DESIGNS) if designs[i].bound])
COUNT_MAX = {designs[i].name.decode(): designs[i].count_max for i in range(DESIGNS)}
SAME, ZSWAP, SLOT, CACHE = e.SAME, e.ZSWAP, e.SLOT, e.CACHE
DEBUG = bool(us_debug())


def entry(int type, payload=0):
    """An entry word from a type (``SAME``, ``ZSWAP``, ``SLOT``, ``CACHE``) and a payload below 2**45."""
    if type not in (e.SAME, e.ZSWAP, e.SLOT, e.CACHE):
        raise ValueError(f"{type} is not the type of an entry that an id may have")
    if not 0 <= payload < <uint64_t>1 << e.ENTRY_PAYLOAD_BITS:
        raise ValueError(f"an entry's payload is below 2**{int(e.ENTRY_PAYLOAD_BITS)}, {payload} is not")
    return e.entry_make(type, payload)


def slot(int device, uint64_t offset, int slots=16, bint raw=True):
    """A SLOT entry: a run of ``slots`` (1 .. 32) 4 KiB slots from ``offset`` on, on ``device`` (0 .. 15)."""
    if not (0 <= device < e.SLOT_DEVICES and 1 <= slots <= e.SLOT_RUN and offset < <uint64_t>1 << 35):
        raise ValueError("a slot's device is below 16, its run at most 32, its offset below 2**35")
    return e.slot_make(device, offset, slots, raw)


cdef int64_t PATIENCE = 60 * <int64_t>1000000000     # ns that a thread of run() waits for the others

cdef inline uint64_t next_random(uint64_t* state) noexcept nogil:
    state[0] ^= state[0] << 13
    state[0] ^= state[0] >> 7
    state[0] ^= state[0] << 17
    return state[0] >> 11


# ---- holders: what the memory room gives to a map, with a table of words instead of page tables ----

cdef struct Table:
    uint64_t* words
    uint64_t most

cdef uint64_t table_trylock(void* ctx, uint64_t holder, uint64_t id) noexcept nogil:
    cdef uint64_t* word = <uint64_t*>holder
    cdef uint64_t seen = us_load(word)
    us_chaos()
    if seen & BUSY or holder_id(seen) == 0 or (id and holder_id(seen) != id):
        return 0
    return holder_id(seen) if us_cas(word, seen, seen | BUSY) else 0


cdef uint64_t table_next(void* ctx, uint64_t after, uint64_t* id) noexcept nogil:
    cdef Table* table = <Table*>ctx
    cdef uint64_t i = (after - <uint64_t>table.words) // 8 + 1 if after else 0
    while i < table.most:
        id[0] = holder_id(us_load(&table.words[i]))
        if id[0]:
            return <uint64_t>&table.words[i]
        i += 1
    return 0


cdef HolderOps holder_ops
holder_ops.trylock = table_trylock
holder_ops.next = table_next


# What a replay knows of the id in a holder.
cdef struct Shadow:
    uint64_t entry
    uint64_t owner              # what its storage has to remember
    int64_t count               # of references; 0: the holder is empty

# What can be wrong in a replay.
cdef enum:
    WRONG_RUN = 1
    WRONG_HELD
    WRONG_EMPTY
    WRONG_TYPE
    WRONG_ENTRY
    WRONG_OWNER
    WRONG_COUNT
    WRONG_PUT
    WRONG_MEMORY
    WRONG_OVERFLOW

REPLAY_ERRORS = {
    WRONG_RUN: "a run is of 2 to 32 ids, for holders in a row",
    WRONG_HELD: "the holder has an id",
    WRONG_EMPTY: "the holder has no id",
    WRONG_TYPE: "the entry is of no type that it could have",
    WRONG_ENTRY: "the entry is another one",
    WRONG_OWNER: "storage could not lock its owner",
    WRONG_COUNT: "there are not so many references",
    WRONG_PUT: "the map has another count or another last entry",
}


# The entry of event i: a slot is what the trace says, anything else has a number of its own, from 1 on.
cdef inline uint64_t replayed_entry(int type, int64_t value, Py_ssize_t i) noexcept nogil:
    if type == e.SLOT:
        return e.entry_make(e.SLOT, <uint64_t>value & ((<uint64_t>1 << e.ENTRY_PAYLOAD_BITS) - 1))
    return e.entry_make(type, <uint64_t>i + 1 if type == e.ZSWAP else 0)


# Storage, as a backend has it. Object i has handle i + 1; `tag` stands for the bytes that it holds.
cdef struct Object:
    uint64_t owner              # 0: not published
    uint64_t entry              # FREE: the object is free
    uint64_t tag


@cython.final
cdef class Map:
    """A swap map of the named design, with holders to put its ids in.

    An instrument for tests and the lab, with the rules of ``map.pxd``. Ids live in *holders* 0 .. ``holders`` - 1, as
    they live in page-table words; every call names holders, and the holder keeps the id when a design changes it.
    Calls lock the holder (but for the loops of ``run``), release the GIL, and so meet in the map itself.

    Args:
        design: one of ``DESIGN_NAMES``.
        holders: how many there are; memory only for those that are used.
        slots: the swap file, in slots as large as a folio; 0 for none. A design in ``BOUND`` can't do without.
        slot_run: 4 KiB slots that one of these takes (1 .. 32).

    Raises:
        ValueError: no such design. A call that makes no sense (an empty holder, an entry of no type) raises it too.
        MemoryError: no memory for the map, or no slot for another id.
    """

    cdef SwapMap* map
    cdef Table table
    cdef Object* objects
    cdef uint64_t most_objects
    cdef uint64_t fresh_object
    cdef us_mutex storage       # the lock of the objects
    cdef int64_t arrived        # threads that came to a run() with others, ever
    cdef int64_t started        # when the last of them did
    cdef int64_t begun          # programs that began, and that ended
    cdef int64_t moves          # of all movers
    cdef int64_t ended
    cdef readonly str design

    def __cinit__(self, str design="on_demand", *, uint64_t holders=1 << 20, uint64_t slots=1 << 18, int slot_run=16):
        name = design.encode()
        cdef const SwapMapOps* ops = swap_map_design(name)
        cdef SwapMapOptions options
        if ops == NULL:
            raise ValueError(f"no swap map design is called {design!r}; there are: {', '.join(DESIGN_NAMES)}")
        if not 1 <= slot_run <= e.SLOT_RUN:
            raise ValueError("a slot as large as a folio takes 1 to 32 slots of 4 KiB")
        self.table.words = <uint64_t*>reserve(holders * 8)
        self.table.most = holders
        if self.table.words == NULL:
            raise MemoryError("no address space for the holders")
        options.holders = &holder_ops
        options.ctx = &self.table
        options.slots = slots
        options.slot_run = slot_run
        self.map = ops.new(&options)
        if self.map == NULL:
            raise MemoryError("no memory for a swap map")
        self.design = design

    def __dealloc__(self):
        if self.map != NULL:
            self.map.ops.delete(self.map)
        if self.table.words != NULL:
            munmap(self.table.words, self.table.most * 8)
        if self.objects != NULL:
            munmap(self.objects, self.most_objects * sizeof(Object))

    # ---- holders ----

    cdef uint64_t* word(self, uint64_t holder) except NULL:
        if holder >= self.table.most:
            raise ValueError(f"there is no holder {holder}")
        return &self.table.words[holder]

    cdef uint64_t* held(self, uint64_t holder) except NULL:
        cdef uint64_t* word = self.word(holder)
        if holder_id(us_load(word)) == 0:
            raise ValueError(f"holder {holder} has no id")
        return word

    cdef uint64_t* empty(self, uint64_t holder) except NULL:
        cdef uint64_t* word = self.word(holder)
        if us_load(word) != 0:
            raise ValueError(f"holder {holder} has an id")
        return word

    def id(self, uint64_t holder):
        """The id that a holder has, 0 for none."""
        return holder_id(us_load(self.word(holder)))

    # ---- the calls of a map ----

    def alloc(self, uint64_t holder, uint64_t entry):
        """A new id with count one and this entry, into an empty holder."""
        cdef uint64_t* word = self.empty(holder)
        cdef uint64_t id
        check_entry(entry)
        with nogil:
            id = self.map.ops.alloc(self.map, entry, <uint64_t>word)
        if id == 0:
            raise MemoryError("no memory or no slot for another swap id")
        us_store(word, id << ID_SHIFT)

    def alloc_run(self, uint64_t holder, entries):
        """Ids for the folios of a large one, into holders in a row: whether there were as many."""
        cdef uint64_t[32] given
        cdef uint64_t[32] ids
        cdef int n = len(entries)
        cdef int i
        cdef bint done
        if not 2 <= n <= 32:
            raise ValueError("a run has 2 to 32 ids")
        for i in range(n):
            given[i] = entries[i]
            check_entry(given[i])
            self.empty(holder + i)
        with nogil:
            done = self.map.ops.alloc_run(self.map, given, <uint64_t>&self.table.words[holder], n, ids)
        if done:
            for i in range(n):
                us_store(&self.table.words[holder + i], ids[i] << ID_SHIFT)
        return done

    def lock(self, uint64_t holder):
        """Lock the holder and the entry of its id, waiting for whoever has them; the entry."""
        cdef uint64_t* word = self.held(holder)
        cdef uint64_t entry
        with nogil:
            entry = self.map.ops.lock(self.map, word_lock(word))
        return entry

    def unlock(self, uint64_t holder, uint64_t entry):
        """Unlock both, with the entry as it shall be from now on."""
        cdef uint64_t* word = self.held(holder)
        check_entry(entry)
        with nogil:
            us_word_release(word, self.map.ops.unlock(self.map, holder_id(us_load(word)), entry) << ID_SHIFT, WAITERS)

    def owner(self, uint64_t holder):
        """What the storage of a holder's id has to remember."""
        cdef uint64_t* word = self.held(holder)
        return self.map.ops.owner(self.map, holder_id(us_load(word)), <uint64_t>word)

    def try_owner(self, uint64_t owner, uint64_t entry):
        """From the side of storage: lock the entry if it still is this one and nobody is at it; whether it did."""
        cdef bint locked
        with nogil:
            locked = self.map.ops.try_owner(self.map, owner, entry)
        return locked

    def unlock_owner(self, uint64_t owner, uint64_t entry):
        """Unlock what `try_owner` or `next` has locked, with the entry as it shall be from now on."""
        check_entry(entry)
        with nogil:
            self.map.ops.unlock_owner(self.map, owner, entry)

    def next(self, int device, uint64_t after=0):
        """The next owner on a device, its entry, and how many were passed over; owner 0 at the end.

        The entry is locked, but not in a bound design.
        """
        cdef uint64_t owner, entry = 0
        cdef int64_t busy = 0
        with nogil:
            owner = self.map.ops.next(self.map, device, after, &entry, &busy)
        return owner, entry, busy

    def home(self, uint64_t holder):
        """The only SLOT entry that the holder's id may have, in a bound design; else ``None``."""
        if self.map.ops.home == NULL:
            return None
        return self.map.ops.home(self.map, holder_id(us_load(self.held(holder))))

    def dup(self, uint64_t holder, uint64_t into):
        """One reference more, for an empty holder."""
        cdef uint64_t* target = self.empty(into)
        self.add(holder, 1)
        us_store(target, us_load(self.word(holder)) & ~<uint64_t>(BUSY | WAITERS))

    def add(self, uint64_t holder, int64_t n):
        """``n`` references more, for holders that are elsewhere."""
        cdef uint64_t* word = self.held(holder)
        cdef uint64_t id
        cdef uint64_t moved = 0
        cdef int error
        if n < 1:
            raise ValueError("at least one reference more")
        with nogil:
            id = word_lock(word)
            error = self.map.ops.dup(self.map, &id, n, &moved)
            us_word_release(word, id << ID_SHIFT, WAITERS)
        if error == -EOVERFLOW:
            raise OverflowError(f"a swap count of {self.design} goes to {self.map.ops.count_max}")
        if error:
            raise MemoryError("no memory for a swap count")

    def sub(self, uint64_t holder, int64_t n):
        """``n`` references less, of those that are elsewhere; what is left."""
        cdef uint64_t* word = self.held(holder)
        cdef uint64_t entry = 0
        cdef uint64_t id
        cdef int64_t left = -1
        cdef bint few
        if n < 1:
            raise ValueError("at least one reference less")
        with nogil:
            id = word_lock(word)
            few = n >= self.map.ops.count(self.map, id)
            if not few:
                left = self.map.ops.put(self.map, id, n, &entry)
            us_word_release(word, id << ID_SHIFT, WAITERS)
        if few:
            raise ValueError("the holder's own reference would be gone: put it")
        return left

    def put(self, uint64_t holder):
        """The holder gives up its reference: ``(what is left, entry)``. When none is left the entry is locked and the
        holder keeps the id for ``free``; else it is empty."""
        cdef uint64_t* word = self.held(holder)
        cdef uint64_t entry = 0
        cdef int64_t left
        with nogil:
            left = self.map.ops.put(self.map, word_lock(word), 1, &entry)
            if left:
                us_word_release(word, 0, WAITERS)
        return left, entry

    def free(self, uint64_t holder):
        """Give back an id whose last reference was put."""
        cdef uint64_t* word = self.held(holder)
        with nogil:
            self.map.ops.free(self.map, holder_id(us_load(word)))
            us_word_release(word, 0, WAITERS)

    def count(self, uint64_t holder):
        """How many references an id has."""
        return self.map.ops.count(self.map, holder_id(us_load(self.held(holder))))

    def cache(self, uint64_t holder, uint64_t folio):
        """Say which folio (0: none) has the bytes of a holder's id, which the caller has locked."""
        cdef uint64_t* word = self.held(holder)
        cdef int error
        if folio >> 48:
            raise ValueError("a folio is a number below 2**48")
        if not us_load(word) & BUSY:
            raise ValueError("the swap cache changes under the lock of the entry")
        with nogil:
            error = self.map.ops.cache(self.map, holder_id(us_load(word)), folio)
        if error:
            raise MemoryError("no memory for a word of the swap cache")

    def cached(self, uint64_t holder):
        """The folio that has the bytes of a holder's id, 0 for none."""
        return self.map.ops.cached(self.map, holder_id(us_load(self.held(holder))))

    def ids(self):
        """How many ids are live."""
        return self.map.ops.ids(self.map)

    def metadata(self):
        """Bytes of memory that the map uses, as allocated: nodes, chunks, static arrays, itself."""
        return self.map.ops.metadata(self.map)

    def trace(self):
        """Ends the recording of a map of the design ``TRACED``: ``(columns, cut)``, see ``swap/traced.pxd``."""
        return traced_events(self.map)

    # ---- loops at C's speed; the caller uses its holders alone, so they are not locked ----

    def touch(self):
        """Give every holder its memory, so that the page faults of the table are not in what `run` measures."""
        cdef uint64_t i
        with nogil:
            for i in range(0, self.table.most, 512):
                # the same word again: what it holds stays, and a page of zeros becomes a page of its own
                us_add(<int64_t*>&self.table.words[i], 0)

    def run(self, str op, uint64_t[::1] holders, uint64_t entry=0, uint64_t[::1] into=None, *,
            int64_t references=1, int together=1):
        """Do ``op`` for every holder of the array, without the GIL: nanoseconds for each.

        ==============  ====================================================================================
        ``alloc``       a new id; the entry's payload goes up by one each (by the run of slots in a SLOT entry)
        ``run``         the same with runs of 16 (the number of holders, in a row, must be a multiple)
        ``fault``       lock and unlock: a read fault, the copy is kept
        ``take``        lock, unlock, put and free: a write fault, exclusive
        ``put``         put and, when none is left, free
        ``dup``         into the holders of ``into``; with lock, owner and unlock for an id that changed
        ``add``         more references (``references``), for holders that are elsewhere
        ``sub``         fewer (``references``) of those and, when none is left, free
        ``count``       ask for the count
        ``cache``       lock, say that the holder's folio is in the swap cache, unlock
        ``uncache``     lock, take it out, unlock
        ``cached``      ask the swap cache
        ``writeback``   from the side of storage: lock, and unlock with a SLOT entry (``entry``, as in ``alloc``)
        ==============  ====================================================================================

        With ``together`` threads each starts only when all of them have called `run` with that number, and has the same
        start in its time; none may call it again before all have returned.

        Raises MemoryError after doing a part; holders that got nothing stay empty. TimeoutError: the other threads did
        not come.
        """
        cdef dict kinds = {"alloc": 0, "run": 1, "fault": 2, "take": 3, "put": 4, "dup": 5, "count": 6, "cache": 7,
                           "uncache": 8, "cached": 9, "writeback": 10, "add": 11, "sub": 12}
        cdef int kind = kinds[op]
        cdef Py_ssize_t n = holders.shape[0]
        cdef Py_ssize_t i = 0
        cdef Py_ssize_t j
        cdef uint64_t[32] entries
        cdef uint64_t[32] ids
        cdef uint64_t seen = 0
        cdef uint64_t id, before, step
        cdef uint64_t* word
        cdef uint64_t* olds = NULL
        cdef uint64_t* owners = NULL
        cdef int64_t began, all_here
        cdef int failed = 0
        cdef SwapMap* m = self.map
        cdef const SwapMapOps* ops = m.ops
        cdef uint64_t* words = self.table.words
        if kind in (0, 1, 10):
            check_entry(entry)
        if kind == 5 and (into is None or into.shape[0] != n):
            raise ValueError("dup needs as many holders to put the ids into")
        if kind == 1 and n % 16:
            raise ValueError("runs are of 16 holders in a row")
        if references < 1 or together < 1 or (references > 1 and kind < 11):
            raise ValueError("at least one thread, and one reference; more for `add` and `sub` only")
        for i in range(n):
            if holders[i] >= self.table.most or (kind == 5 and into[i] >= self.table.most):
                raise ValueError("there is no such holder")
            if (words[holders[i]] == 0) != (kind < 2):
                raise ValueError(f"holder {holders[i]} has {'an' if kind < 2 else 'no'} id")
            if kind == 12 and references > ops.count(m, holder_id(words[holders[i]])):
                raise ValueError(f"the id of holder {holders[i]} has fewer references")
        i = 0
        step = <uint64_t>1 << e.ENTRY_PAYLOAD_SHIFT
        if e.entry_type(entry) == e.SLOT:
            step *= <uint64_t>e.slot_count(entry)
        elif e.entry_type(entry) == e.SAME:
            step = 0
        with nogil:
            if kind == 10 and n:
                # what storage knows: not part of the time
                olds = <uint64_t*>reserve(n * 8)
                owners = <uint64_t*>reserve(n * 8)
                for i in range(n if olds != NULL and owners != NULL else 0):
                    id = holder_id(words[holders[i]])
                    olds[i] = ops.lock(m, id)
                    ops.unlock(m, id, olds[i])
                    owners[i] = ops.owner(m, id, <uint64_t>&words[holders[i]])
                failed = olds == NULL or owners == NULL
                i = 0
            if together > 1:
                began = us_now()
                us_write(&self.started, began)
                all_here = (us_add(&self.arrived, 1) + together - 1) // together * together
                # Spinning: who let the processor go might come back when the others are done.
                while us_read(&self.arrived) < all_here and not failed:
                    us_pause()
                    if us_now() - began > PATIENCE:
                        failed = 3
            # The last to arrive started all of them, also one that gets its processor later.
            began = us_read(&self.started) if together > 1 else us_now()
            while i < n and not failed:
                word = &words[holders[i]]
                id = holder_id(word[0])
                if kind == 0:
                    id = ops.alloc(m, entry, <uint64_t>word)
                    failed = id == 0
                    word[0] = id << ID_SHIFT
                    entry += step
                elif kind == 1:
                    for j in range(16):
                        entries[j] = entry
                        entry += step
                    if ops.alloc_run(m, entries, <uint64_t>word, 16, ids):
                        for j in range(16):
                            word[j] = ids[j] << ID_SHIFT
                    else:
                        for j in range(16):
                            word[j] = ops.alloc(m, entries[j], <uint64_t>&word[j]) << ID_SHIFT
                            if word[j] == 0:
                                failed = 1
                                break
                    i += 15
                elif kind == 2:
                    word[0] = ops.unlock(m, id, ops.lock(m, id)) << ID_SHIFT
                elif kind == 3:
                    id = ops.unlock(m, id, ops.lock(m, id))
                    word[0] = 0
                    if ops.put(m, id, 1, &seen) == 0:
                        ops.free(m, id)
                elif kind == 4:
                    word[0] = 0
                    if ops.put(m, id, 1, &seen) == 0:
                        ops.free(m, id)
                elif kind == 5 or kind == 11:
                    before = id
                    failed = ops.dup(m, &id, references, &seen)
                    if id != before:
                        # Its storage has to be told: what that takes of the map is a part of the dup.
                        ops.owner(m, id, <uint64_t>word)
                    word[0] = id << ID_SHIFT
                    if kind == 5 and not failed:
                        words[into[i]] = id << ID_SHIFT
                elif kind == 6:
                    ops.count(m, id)
                elif kind == 7:
                    seen = ops.lock(m, id)
                    failed = ops.cache(m, id, <uint64_t>word)
                    word[0] = ops.unlock(m, id, seen) << ID_SHIFT
                elif kind == 8:
                    seen = ops.lock(m, id)
                    ops.cache(m, id, 0)
                    word[0] = ops.unlock(m, id, seen) << ID_SHIFT
                elif kind == 9:
                    seen += ops.cached(m, id)
                elif kind == 12:
                    if ops.put(m, id, references, &seen) == 0:
                        word[0] = 0
                        ops.free(m, id)
                elif ops.try_owner(m, owners[i], olds[i]):
                    ops.unlock_owner(m, owners[i], ops.home(m, id) if ops.bound else entry)
                    entry += step
                else:
                    failed = 2
                i += 1
            began = us_now() - began
            if olds != NULL:
                munmap(olds, n * 8)
            if owners != NULL:
                munmap(owners, n * 8)
        if failed == 3:
            raise TimeoutError("the other threads of the measurement did not come")
        if failed == 2:
            raise ValueError("another holder of the same id was written back before: give one holder of each")
        if failed:
            raise MemoryError(f"no memory to {op} at {i:,} of {n:,}")
        return <double>began / <double>n if n else 0.0

    def swapoff(self, int device=0):
        """Empty a device: ``(ids that left it, nanoseconds)``.

        Each id goes to zswap (a handle that is its owner's position). In a bound design ids can't leave: every holder
        is looked at, and who holds a slot of the device gives it up, as the kernel faults it in.
        """
        cdef SwapMap* m = self.map
        cdef const SwapMapOps* ops = m.ops
        cdef uint64_t owner = 0, entry = 0, id, seen, holder = 0
        cdef int64_t moved = 0, busy = 0
        cdef int64_t began
        with nogil:
            began = us_now()
            if ops.bound:
                while True:
                    holder = table_next(&self.table, holder, &id)
                    if holder == 0:
                        break
                    entry = ops.lock(m, id)
                    ops.unlock(m, id, entry)
                    if e.entry_type(entry) != e.SLOT or e.slot_device(entry) != device:
                        continue
                    us_store(<uint64_t*>holder, 0)
                    if ops.put(m, id, 1, &seen) == 0:
                        ops.free(m, id)
                        moved += 1
            else:
                while True:
                    owner = ops.next(m, device, owner, &entry, &busy)
                    if owner == 0:
                        break
                    moved += 1
                    ops.unlock_owner(m, owner, e.entry_make(e.ZSWAP, <uint64_t>moved))
            began = us_now() - began
        return moved, began

    def replay(self, const uint8_t[::1] kinds, const uint8_t[::1] types, const uint32_t[::1] refs,
               const int64_t[::1] values, *, str watch=None):
        """Do again what a trace says (the columns of ``swap/traced.pxd``), on a fresh map: what it took.

        One thread, in recorded order, by the rules of ``map.pxd``: holders are locked while their ids are, storage
        keeps what ``owner`` said. A ref is the number of a holder; further references of an id are held elsewhere.
        Entries in slots are those of the trace (their home in a bound design), those in zswap have numbers of their
        own. Every entry that is found must be the one that was left, and of the type that the trace has.

        ``watch`` is ``None`` to time the whole, ``"kinds"`` to time each kind of event (whenever another kind begins
        the clock is read, and what that takes is taken off), ``"memory"`` to look at the metadata after each event
        that may need some. The result is a dict: ``ns`` of the whole, ``kinds`` a list of ns, ``peak_metadata``,
        ``peak_ids``, ``metadata_at_peak`` (when ids were most), ``ids`` at the end.

        Raises:
            ValueError: the events make no sense, or the map did not do what it must; the text says at which event.
            MemoryError: no memory, or no slot for another id.
            OverflowError: a count is larger than the design can have.
        """
        cdef SwapMap* m = self.map
        cdef const SwapMapOps* ops = m.ops
        cdef Py_ssize_t n = kinds.shape[0], i = 0
        cdef uint64_t holders = 0
        cdef int64_t[EVENT_KINDS] spent
        cdef int64_t began, then, now, clock = 0, whole
        cdef int64_t peak_metadata = ops.metadata(m), peak_ids = 0, at_peak = 0, here
        cdef int kind, current = -1, run, j, watching = {None: 0, "kinds": 1, "memory": 2}[watch]
        cdef uint64_t[32] entries
        cdef uint64_t[32] ids
        cdef uint64_t id, before, seen, wanted, ref
        cdef uint64_t moved = 0
        cdef uint64_t* word
        cdef Shadow* shadow
        cdef int wrong = 0, error
        cdef bint done
        if types.shape[0] != n or refs.shape[0] != n or values.shape[0] != n:
            raise ValueError("the columns of a trace have one length")
        if self.ids() or us_load(self.table.words):
            raise ValueError("a trace is replayed on a fresh map")
        for i in range(n):
            holders = max(holders, <uint64_t>refs[i] + 1)
            if kinds[i] >= EVENT_KINDS:
                raise ValueError(f"event {i:,} is of no kind")
        if holders > self.table.most:
            raise ValueError(f"the trace has {holders:,} refs, more than there are holders")
        shadow = <Shadow*>reserve((holders + 32) * sizeof(Shadow))
        if shadow == NULL:
            raise MemoryError("no address space for what holders have")
        for j in range(EVENT_KINDS):
            spent[j] = 0
        with nogil:
            # The best of many is what the clock itself takes.
            for j in range(1000 if watching == 1 else 0):
                then = us_now()
                now = us_now()
                clock = now - then if j == 0 or now - then < clock else clock
            # What is not the map's is touched before the clock runs, not in the first events.
            for id in range(holders):
                shadow[id].count = 0
                us_store(&self.table.words[id], 0)
            i = 0
            began = then = us_now()
            while i < n:
                kind = kinds[i]
                ref = refs[i]
                word = &self.table.words[ref]
                if watching == 1 and kind != current:
                    now = us_now()
                    if current >= 0:
                        spent[current] += max(now - then - clock, 0)
                    then = now
                    current = kind
                if kind == EVENT_ALLOC or kind == EVENT_RUN:
                    run = 1
                    while i + run < n and kinds[i + run] == EVENT_MORE:
                        if run == 32 or refs[i + run] != ref + <uint64_t>run or kind == EVENT_ALLOC:
                            wrong = WRONG_RUN
                            break
                        run += 1
                    if wrong:
                        break
                    for j in range(run):
                        if shadow[ref + <uint64_t>j].count:
                            wrong = WRONG_HELD
                        if not 1 <= types[i + j] >> 4 <= e.SLOT or types[i + j] & 15:
                            wrong = WRONG_TYPE
                        entries[j] = replayed_entry(types[i + j] >> 4, values[i + j], i + j)
                        us_store(word + j, BUSY)
                    if wrong:
                        break
                    done = run > 1 and ops.alloc_run(m, entries, <uint64_t>word, run, ids)
                    for j in range(run):
                        if not done:
                            ids[j] = ops.alloc(m, entries[j], <uint64_t>(word + j))
                        if ids[j] == 0:
                            wrong = WRONG_MEMORY
                            break
                        if ops.bound and e.entry_type(entries[j]) == e.SLOT:
                            entries[j] = ops.home(m, ids[j])
                        shadow[ref + <uint64_t>j].entry = entries[j]
                        shadow[ref + <uint64_t>j].owner = ops.owner(m, ids[j], <uint64_t>(word + j))
                        shadow[ref + <uint64_t>j].count = 1
                        us_store(word + j, ids[j] << ID_SHIFT)
                    if wrong:
                        break
                    i += run
                else:
                    id = holder_id(us_load(word))
                    if shadow[ref].count == 0 or kind == EVENT_MORE:
                        wrong = WRONG_EMPTY
                        break
                    if kind <= EVENT_UNCACHE:
                        us_store(word, id << ID_SHIFT | BUSY)
                        seen = ops.lock(m, id)
                        if seen != shadow[ref].entry or e.entry_type(seen) != types[i] & 15:
                            wrong = WRONG_ENTRY
                            break
                        if kind != EVENT_FAULT:
                            if ops.cache(m, id, <uint64_t>word if kind == EVENT_CACHE else 0) != 0:
                                wrong = WRONG_MEMORY
                                break
                        if types[i] >> 4 != e.entry_type(seen) or (e.entry_type(seen) == e.SLOT and not ops.bound):
                            seen = replayed_entry(types[i] >> 4, values[i], i)
                            if e.entry_type(seen) == e.FREE or e.entry_type(seen) > e.CACHE:
                                wrong = WRONG_TYPE
                                break
                            if ops.bound and e.entry_type(seen) == e.SLOT:
                                seen = ops.home(m, id)
                            shadow[ref].entry = seen
                        before = id
                        id = ops.unlock(m, id, seen)
                        if id != before:
                            shadow[ref].owner = ops.owner(m, id, <uint64_t>word)
                        us_store(word, id << ID_SHIFT)
                    elif kind == EVENT_WRITEBACK or kind == EVENT_MOVE:
                        wanted = replayed_entry(types[i] >> 4, values[i], i)
                        if (e.entry_type(shadow[ref].entry) != types[i] & 15
                                or (kind == EVENT_WRITEBACK) != (e.entry_type(wanted) == e.SLOT)
                                or not e.SAME <= e.entry_type(wanted) <= e.SLOT):
                            wrong = WRONG_ENTRY
                            break
                        if not ops.try_owner(m, shadow[ref].owner, shadow[ref].entry):
                            wrong = WRONG_OWNER
                            break
                        if ops.bound and kind == EVENT_WRITEBACK:
                            wanted = ops.home(m, id)
                        ops.unlock_owner(m, shadow[ref].owner, wanted)
                        shadow[ref].entry = wanted
                    elif kind == EVENT_DUP:
                        if values[i] < 1:
                            wrong = WRONG_COUNT
                            break
                        before = id
                        us_store(word, id << ID_SHIFT | BUSY)
                        error = ops.dup(m, &id, values[i], &moved)
                        if error:
                            wrong = WRONG_OVERFLOW if error == -EOVERFLOW else WRONG_MEMORY
                            break
                        if id != before:
                            shadow[ref].owner = ops.owner(m, id, <uint64_t>word)
                        shadow[ref].count += values[i]
                        us_store(word, id << ID_SHIFT)
                    elif kind == EVENT_PUT:
                        if not 1 <= values[i] < shadow[ref].count:
                            wrong = WRONG_COUNT
                            break
                        shadow[ref].count -= values[i]
                        if ops.put(m, id, values[i], &seen) != shadow[ref].count:
                            wrong = WRONG_PUT
                            break
                    elif kind == EVENT_FREE:
                        if values[i] != shadow[ref].count:
                            wrong = WRONG_COUNT
                            break
                        us_store(word, id << ID_SHIFT | BUSY)
                        if ops.put(m, id, values[i], &seen) != 0 or seen != shadow[ref].entry:
                            wrong = WRONG_PUT
                            break
                        ops.free(m, id)
                        shadow[ref].count = 0
                        us_store(word, 0)
                    elif kind == EVENT_COUNT:
                        if ops.count(m, id) != shadow[ref].count:
                            wrong = WRONG_PUT
                            break
                    elif kind == EVENT_CACHED:
                        ops.cached(m, id)
                    i += 1
                if watching == 2 and (kind <= EVENT_RUN or kind == EVENT_CACHE or kind == EVENT_DUP):
                    here = ops.metadata(m)
                    peak_metadata = max(peak_metadata, here)
                    if ops.ids(m) > peak_ids:
                        peak_ids = ops.ids(m)
                        at_peak = here
            now = us_now()
            whole = now - began
            if current >= 0:
                spent[current] += max(now - then - clock, 0)
            munmap(shadow, (holders + 32) * sizeof(Shadow))
        if wrong == WRONG_MEMORY:
            raise MemoryError(f"event {i:,}: no memory or no slot")
        if wrong == WRONG_OVERFLOW:
            raise OverflowError(f"event {i:,}: a swap count of {self.design} goes to {self.map.ops.count_max}")
        if wrong:
            raise ValueError(f"event {i:,}: {REPLAY_ERRORS[wrong]}")
        return {"ns": whole, "kinds": [spent[j] for j in range(EVENT_KINDS)], "peak_metadata": peak_metadata,
                "peak_ids": peak_ids, "metadata_at_peak": at_peak, "ids": self.ids()}

    # ---- threads ----

    def stress(self, uint64_t[::1] holders, int64_t[::1] counters, uint64_t spare, uint64_t spares,
               Py_ssize_t rounds, uint64_t seed):
        """What one of several threads does to ids that all share: ``(increments, references held, faults)``.

        Holder i of this thread has the same id as holder i of every other thread. In random order: dup into one of its
        own ``spares`` holders (from ``spare`` on), put one of them; lock, add one to the id's counter without any
        atomic, change the entry, unlock; the same from the side of storage, and as a swapoff; swap cache in and out;
        allocate, use and free ids of its own, singly and in runs. The caller checks that counters grew by the
        increments.
        ``faults`` counts what was seen to be wrong on the way.
        """
        cdef SwapMap* m = self.map
        cdef const SwapMapOps* ops = m.ops
        cdef uint64_t state = seed * 0x9E3779B97F4A7C15u | 1
        cdef uint64_t[32] entries
        cdef uint64_t[32] ids
        cdef uint64_t r, word, id, mine, owner
        cdef Py_ssize_t _round, i
        cdef Py_ssize_t n = holders.shape[0]
        cdef int64_t done = 0, wrong = 0, busy = 0, left
        cdef uint64_t live = 0, k
        cdef int j, run
        if n == 0 or counters.shape[0] != n or spares < 64 or spare + spares > self.table.most:
            raise ValueError("stress needs holders, as many counters, and 64 spare holders at least")
        with nogil:
            for _round in range(rounds):
                r = next_random(&state)
                i = <Py_ssize_t>((r >> 8) % <uint64_t>n)
                r &= 255
                if r < 90:
                    # Mostly between few: there a count goes in and out of whatever a design has for more than one.
                    if live == 0 or (live < spares - 32 and (r < 40 or (r < 46 and _round & 4096))):
                        id = word_lock(&self.table.words[holders[i]])
                        if ops.dup(m, &id, 1, &word) == 0:
                            self.table.words[spare + live] = id << ID_SHIFT
                            live += 1
                        else:
                            wrong += 1
                        us_word_release(&self.table.words[holders[i]], id << ID_SHIFT, WAITERS)
                        if ops.count(m, id) < 2:
                            wrong += 1
                    else:
                        live -= 1
                        k = (next_random(&state) % (live + 1))
                        id = holder_id(self.table.words[spare + k])
                        self.table.words[spare + k] = self.table.words[spare + live]
                        self.table.words[spare + live] = 0
                        left = ops.put(m, id, 1, &word)
                        if left < 1:
                            wrong += 1
                elif r < 190:
                    id = word_lock(&self.table.words[holders[i]])
                    word = ops.lock(m, id)
                    wrong += not self.right(ops, id, i, word)
                    if r < 120:
                        us_now()
                    counters[i] += 1
                    done += 1
                    if r < 130:
                        wrong += ops.cache(m, id, <uint64_t>(i + 1)) != 0
                    elif r < 140:
                        wrong += ops.cache(m, id, 0) != 0
                    id = ops.unlock(m, id, self.other(ops, id, i, next_random(&state)))
                    us_word_release(&self.table.words[holders[i]], id << ID_SHIFT, WAITERS)
                    owner = ops.cached(m, id)
                    if owner != 0 and owner != <uint64_t>(i + 1):
                        wrong += 1
                elif r < 220:
                    # This thread has a reference, so that the id is live; the entry is a guess.
                    id = holder_id(us_load(&self.table.words[holders[i]]))
                    owner = ops.owner(m, id, <uint64_t>&self.table.words[holders[i]])
                    word = self.other(ops, id, i, next_random(&state))
                    if ops.try_owner(m, owner, word):
                        counters[i] += 1
                        done += 1
                        ops.unlock_owner(m, owner, self.other(ops, id, i, next_random(&state)))
                elif r < 222 and not ops.bound:
                    owner = 0
                    while True:
                        owner = ops.next(m, 0, owner, &word, &busy)
                        if owner == 0:
                            break
                        k = e.slot_offset(word) >> 5
                        if k >= <uint64_t>n:
                            ops.unlock_owner(m, owner, word)        # another thread's own
                            continue
                        counters[<Py_ssize_t>k] += 1
                        done += 1
                        ops.unlock_owner(m, owner, e.entry_make(e.ZSWAP, k << 2))
                else:
                    run = 2 + <int>(next_random(&state) % 15)
                    mine = spare + spares - 32
                    for j in range(run):
                        entries[j] = e.entry_make(e.ZSWAP, (<uint64_t>1 << 30) + (seed << 20) + <uint64_t>(j << 2))
                    if r & 1 or not ops.alloc_run(m, entries, <uint64_t>&self.table.words[mine], run, ids):
                        for j in range(run):
                            ids[j] = ops.alloc(m, entries[j], <uint64_t>&self.table.words[mine + j])
                            if ids[j] == 0:
                                wrong += 1
                                run = j
                                break
                    for j in range(run):
                        us_store(&self.table.words[mine + j], ids[j] << ID_SHIFT)
                    for j in range(run):
                        id = word_lock(&self.table.words[mine + j])
                        word = ops.lock(m, id)
                        if word != entries[j] or ops.count(m, id) != 1:
                            wrong += 1
                        if ops.try_owner(m, ops.owner(m, id, <uint64_t>&self.table.words[mine + j]), word):
                            wrong += 1
                        id = ops.unlock(m, id, word ^ (<uint64_t>1 << (e.ENTRY_PAYLOAD_SHIFT + 1)))
                        us_word_release(&self.table.words[mine + j], id << ID_SHIFT, WAITERS)
                    for j in range(run):
                        id = word_lock(&self.table.words[mine + j])
                        if (ops.put(m, id, 1, &word) != 0
                                or word != entries[j] ^ (<uint64_t>1 << (e.ENTRY_PAYLOAD_SHIFT + 1))):
                            wrong += 1
                        ops.free(m, id)
                        us_word_release(&self.table.words[mine + j], 0, WAITERS)
            for k in range(live):
                id = holder_id(self.table.words[spare + k])
                self.table.words[spare + k] = 0
                if ops.put(m, id, 1, &word) < 1:
                    wrong += 1
        return done, <int64_t>live, wrong

    # An entry that shared id i may have in stress(): a zswap handle, or the one slot that is its own.
    cdef uint64_t other(self, const SwapMapOps* ops, uint64_t id, Py_ssize_t i, uint64_t r) noexcept nogil:
        if r & 3 == 0:
            return ops.home(self.map, id) if ops.bound else e.slot_make(0, <uint64_t>i << 5, 16, True)
        return e.entry_make(e.ZSWAP, (<uint64_t>i << 2) | (r & 3))

    cdef bint right(self, const SwapMapOps* ops, uint64_t id, Py_ssize_t i, uint64_t entry) noexcept nogil:
        if e.entry_type(entry) == e.ZSWAP:
            return e.entry_payload(entry) >> 2 == <uint64_t>i
        return entry == self.other(ops, id, i, 0)

    def objects_for(self, uint64_t most):
        """Makes room for ``most`` objects of pretended storage, for ``program`` and ``mover``."""
        if self.objects == NULL:
            self.objects = <Object*>reserve(most * sizeof(Object))
            self.most_objects = most
        if self.objects == NULL:
            raise MemoryError("no address space for objects")

    # A free object, taken under the lock of the storage; -1: none.
    cdef int64_t object_new(self, uint64_t tag, uint64_t* state) noexcept nogil:
        cdef uint64_t at = next_random(state) % self.most_objects
        cdef uint64_t _i
        for _i in range(self.most_objects):
            if self.objects[at].entry == 0:
                self.objects[at].tag = tag
                self.objects[at].owner = 0
                self.objects[at].entry = (e.slot_make(0, at << 4, 16, True) if at & 1 and not self.map.ops.bound
                                          else e.entry_make(e.ZSWAP, at + 1))
                return <int64_t>at
            at = (at + 1) % self.most_objects
        return -1

    cdef inline Object* object_of(self, uint64_t entry) noexcept nogil:
        if e.entry_type(entry) == e.SLOT:
            return &self.objects[e.slot_offset(entry) >> 4]
        return &self.objects[e.entry_payload(entry) - 1]

    def program(self, uint64_t first, uint64_t holders, Py_ssize_t rounds, uint64_t seed, int64_t moves=0):
        """A thread of a program, above the map: ``(faults, swap-outs, wrong tags)``.

        Its holders are ``first`` .. ``first + holders - 1``. Each round picks one: if empty, it swaps out (an object
        with a new tag, an id); else it faults, and the object behind the id must have the tag that was swapped out.
        Then it keeps the id, or gives it up, or shares it with another of its holders. At the end it gives up all.
        It goes on beyond its rounds (up to 1000 times as many) until the movers have moved ``moves`` objects.
        """
        cdef SwapMap* m = self.map
        cdef const SwapMapOps* ops = m.ops
        cdef uint64_t state = seed * 0x9E3779B97F4A7C15u | 1
        cdef uint64_t* tags = <uint64_t*>reserve(holders * 8)
        cdef uint64_t h, r, id, before, entry, tag = seed << 32
        cdef uint64_t* word
        cdef Py_ssize_t turn = -1
        cdef Py_ssize_t most = 1000 * rounds
        cdef int64_t at, faults = 0, outs = 0, wrong = 0
        cdef uint64_t other
        if tags == NULL:
            raise MemoryError("no memory for tags")
        if self.objects == NULL or first + holders > self.table.most:
            raise ValueError("program needs objects and holders")
        with nogil:
            us_add(&self.begun, 1)
            while turn + 1 < rounds + <Py_ssize_t>holders:
                turn += 1
                if turn == rounds and rounds < most and us_read(&self.moves) < moves:
                    rounds += 1000
                r = next_random(&state)
                h = (r >> 8) % holders if turn < rounds else <uint64_t>(turn - rounds)
                r &= 255
                word = &self.table.words[first + h]
                if us_load(word) == 0:
                    if turn >= rounds:
                        continue
                    tag += 1
                    us_lock(&self.storage)
                    at = self.object_new(tag, &state)
                    us_unlock(&self.storage)
                    if at < 0:
                        continue
                    us_store(word, BUSY)
                    id = ops.alloc(m, self.objects[at].entry, <uint64_t>word)
                    if id == 0:
                        wrong += 1
                        us_word_release(word, 0, WAITERS)
                        continue
                    tags[h] = tag
                    us_lock(&self.storage)
                    self.objects[at].owner = ops.owner(m, id, <uint64_t>word)
                    us_unlock(&self.storage)
                    us_chaos()
                    us_word_release(word, id << ID_SHIFT, WAITERS)
                    outs += 1
                    continue
                id = word_lock(word)
                entry = ops.lock(m, id)
                us_chaos()
                if self.object_of(entry).tag != tags[h]:
                    wrong += 1
                faults += 1
                id = ops.unlock(m, id, entry)
                if r < 100 or turn >= rounds:
                    if ops.put(m, id, 1, &entry) == 0:
                        us_chaos()
                        us_lock(&self.storage)
                        if self.object_of(entry).tag != tags[h] or self.object_of(entry).owner == 0:
                            wrong += 1
                        self.object_of(entry).entry = 0
                        self.object_of(entry).owner = 0
                        self.object_of(entry).tag = 0
                        us_unlock(&self.storage)
                        ops.free(m, id)
                    id = 0
                elif r < 160:
                    other = first + next_random(&state) % holders
                    if us_load(&self.table.words[other]) == 0:
                        before = id
                        if ops.dup(m, &id, 1, &entry) != 0:
                            wrong += 1
                        else:
                            if id != before:
                                us_chaos()
                                us_lock(&self.storage)
                                self.object_of(entry).owner = ops.owner(m, id, <uint64_t>word)
                                us_unlock(&self.storage)
                            tags[other - first] = tags[h]
                            us_store(&self.table.words[other], id << ID_SHIFT)
                us_word_release(word, id << ID_SHIFT, WAITERS)
            us_add(&self.ended, 1)
        munmap(tags, holders * 8)
        return faults, outs, wrong

    def mover(self, uint64_t seed):
        """A thread of storage, below the map: ``(objects moved, wrong)``. Ends when the last program does.

        Each round finds a live object under the lock of the storage, locks its owner from there, copies the object to
        another (in zswap or in a slot, as it comes), and gives the owner the new entry: compaction and writeback.
        """
        cdef SwapMap* m = self.map
        cdef const SwapMapOps* ops = m.ops
        cdef uint64_t state = seed * 0x9E3779B97F4A7C15u | 1
        cdef uint64_t at, owner, entry
        cdef int64_t to, moved = 0, wrong = 0
        if self.objects == NULL:
            raise ValueError("mover needs objects")
        with nogil:
            while us_read(&self.begun) == 0 or us_read(&self.ended) < us_read(&self.begun):
                us_lock(&self.storage)
                at = next_random(&state) % self.most_objects
                owner = self.objects[at].owner
                entry = self.objects[at].entry
                if owner == 0 or not ops.try_owner(m, owner, entry):
                    us_unlock(&self.storage)
                    continue
                to = self.object_new(self.objects[at].tag, &state)
                us_unlock(&self.storage)
                us_chaos()
                if to < 0:
                    ops.unlock_owner(m, owner, entry)
                    continue
                if self.objects[at].owner != owner or self.objects[at].entry != entry:
                    wrong += 1          # locked, and yet somebody changed it
                us_lock(&self.storage)
                self.objects[at].entry = 0
                self.objects[at].owner = 0
                self.objects[at].tag = 0
                self.objects[to].owner = owner
                us_unlock(&self.storage)
                us_chaos()
                ops.unlock_owner(m, owner, self.objects[to].entry)
                moved += 1
                us_add(&self.moves, 1)
        return moved, wrong


cdef void* reserve(uint64_t length) noexcept nogil:
    cdef void* memory = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    return NULL if memory == MAP_FAILED else memory


cdef int check_entry(uint64_t entry) except -1:
    if e.entry_type(entry) == e.FREE or e.entry_type(entry) > e.CACHE or entry != e.entry_seen(entry):
        raise ValueError("an id has an entry until it is freed; make one with entry() or slot()")
    return 0


cdef uint64_t word_lock(uint64_t* word) noexcept nogil:
    """Locks a holder's word, waiting for whoever has it; the id."""
    cdef uint64_t seen
    while True:
        seen = us_load(word)
        us_chaos()
        if seen & BUSY:
            us_word_wait(word, seen, WAITERS)
        elif us_cas(word, seen, (seen | BUSY) & ~<uint64_t>WAITERS):
            return holder_id(seen)
