"""The registry of SwapMap designs, and a window for Python: ``Map``.

The rest of userswap uses a map through its SwapMapOps and never through this window. Tests drive every
design with it, the lab measures with it: one call at a time, or loops that run at C's speed without
the GIL. Touches nothing but the map it made.
"""
cimport cython
from libc.errno cimport EOVERFLOW
from libc.stdint cimport int64_t, uint8_t, uint64_t
from libc.string cimport strcmp

from userswap.native.us cimport us_debug, us_lock, us_mutex, us_now, us_unlock
from userswap.swap cimport entry as e
from userswap.swap.designs.sparse cimport sparse_design

# A new design is a line here and a file in designs/.
cdef enum:
    DESIGNS = 1

cdef const SwapMapOps* designs[DESIGNS]
designs[0] = sparse_design()


cdef const SwapMapOps* swap_map_design(const char* name) noexcept nogil:
    cdef int i
    for i in range(DESIGNS):
        if strcmp(designs[i].name, name) == 0:
            return designs[i]
    return NULL


DESIGN_NAMES = tuple([designs[i].name.decode() for i in range(DESIGNS)])
SAME, ZSWAP, SLOT = e.SAME, e.ZSWAP, e.SLOT
DEBUG = bool(us_debug())


def entry(int type, payload=0):
    """An entry word from a type (``SAME``, ``ZSWAP``, ``SLOT``) and a payload below 2**56."""
    if type not in (e.SAME, e.ZSWAP, e.SLOT):
        raise ValueError(f"{type} is not the type of an entry that an id may have")
    if not 0 <= payload < 1 << 56:
        raise ValueError(f"an entry's payload is below 2**56, {payload} is not")
    return e.entry_make(type, payload)


cdef inline uint64_t next_random(uint64_t* state) noexcept nogil:
    state[0] ^= state[0] << 13
    state[0] ^= state[0] >> 7
    state[0] ^= state[0] << 17
    return state[0] >> 11


@cython.final
cdef class Map:
    """A swap map of the named design: swap id to entry, swap id to count.

    An instrument for tests and the lab, with the rules of ``map.pxd``: an id that is not live must not be
    used (the debug build aborts, the release build does anything), and who locks an entry unlocks it.
    Calls release the GIL, so that threads meet in the map itself.
    """

    cdef SwapMap* map
    cdef us_mutex pool          # in drain(): the lock of the pretended storage
    cdef readonly str design

    def __cinit__(self, str design="sparse"):
        name = design.encode()
        cdef const SwapMapOps* ops = swap_map_design(name)
        if ops == NULL:
            raise ValueError(f"no swap map design is called {design!r}; there are: {', '.join(DESIGN_NAMES)}")
        self.map = ops.new()
        if self.map == NULL:
            raise MemoryError("no memory for a swap map")
        self.design = design

    def __dealloc__(self):
        if self.map != NULL:
            self.map.ops.delete(self.map)

    def alloc(self, uint64_t entry):
        """A new id with count one and this entry."""
        cdef uint64_t id
        if e.entry_type(entry) == e.FREE:
            raise ValueError("an id is given with an entry; make one with entry()")
        with nogil:
            id = self.map.ops.alloc(self.map, entry)
        if id == 0:
            raise MemoryError("no memory for another swap id")
        return id

    def lock(self, uint64_t id):
        """Lock the entry, waiting for whoever has it; returns it."""
        cdef uint64_t entry
        with nogil:
            entry = self.map.ops.lock(self.map, id)
        return entry

    def trylock(self, uint64_t id):
        """Lock the entry and return it, or return ``None`` when somebody has it."""
        cdef uint64_t entry
        with nogil:
            entry = self.map.ops.trylock(self.map, id)
        return entry if entry else None

    def unlock(self, uint64_t id, uint64_t entry):
        """Unlock, with the entry as it shall be from now on."""
        if e.entry_type(entry) == e.FREE:
            raise ValueError("an id keeps an entry until it is freed; make one with entry()")
        with nogil:
            self.map.ops.unlock(self.map, id, entry)

    def dup(self, uint64_t id):
        """One reference more."""
        cdef int error
        with nogil:
            error = self.map.ops.dup(self.map, id)
        self._check(error)

    def add(self, uint64_t id, int64_t n):
        """``n`` references more at once; less, if negative, but one must be left."""
        cdef int error
        with nogil:
            error = self.map.ops.add(self.map, id, n)
        self._check(error)

    cdef int _check(self, int error) except -1:
        if error == -EOVERFLOW:
            raise OverflowError("a swap count is between 1 and 2**62")
        if error:
            raise MemoryError("no memory for a swap count")
        return 0

    def put(self, uint64_t id):
        """One reference less: ``(what is left, entry)``. When none is left the entry is locked: ``free`` it."""
        cdef uint64_t entry = 0
        cdef int64_t left
        with nogil:
            left = self.map.ops.put(self.map, id, &entry)
        return left, entry

    def free(self, uint64_t id):
        """Give back an id whose last reference was put."""
        with nogil:
            self.map.ops.free(self.map, id)

    def count(self, uint64_t id):
        """How many references an id has."""
        return self.map.ops.count(self.map, id)

    def ids(self):
        """How many ids are live."""
        return self.map.ops.ids(self.map)

    def metadata(self):
        """Bytes of memory that the map uses, as allocated: nodes, chunks, itself."""
        return self.map.ops.metadata(self.map)

    # ---- loops at C's speed ----

    def run(self, str op, uint64_t[::1] ids, uint64_t entry=0):
        """Do ``op`` for every id of the array, without the GIL: nanoseconds per id.

        ``alloc`` fills the array (and needs an entry); ``lock`` locks and unlocks; ``dup``, ``put``,
        ``count``; ``drop`` puts and, when none is left, frees. Raises MemoryError after doing a part;
        ``alloc`` leaves the rest of the array 0.
        """
        cdef dict kinds = {"alloc": 0, "lock": 1, "dup": 2, "put": 3, "count": 4, "drop": 5}
        cdef int kind = kinds[op]
        cdef Py_ssize_t i
        cdef Py_ssize_t n = ids.shape[0]
        cdef uint64_t seen = 0
        cdef int64_t began
        cdef int failed = 0
        cdef SwapMap* m = self.map
        cdef const SwapMapOps* ops = m.ops
        if kind == 0 and e.entry_type(entry) == e.FREE:
            raise ValueError("an id is given with an entry; make one with entry()")
        with nogil:
            if kind == 0:
                for i in range(n):
                    ids[i] = 0
            began = us_now()
            for i in range(n):
                if kind == 0:
                    ids[i] = ops.alloc(m, entry)
                    failed = ids[i] == 0
                elif kind == 1:
                    ops.unlock(m, ids[i], ops.lock(m, ids[i]))
                elif kind == 2:
                    failed = ops.dup(m, ids[i])
                elif kind == 3:
                    ops.put(m, ids[i], &seen)
                elif kind == 4:
                    ops.count(m, ids[i])
                elif ops.put(m, ids[i], &seen) == 0:
                    ops.free(m, ids[i])
                if failed:
                    break
            began = us_now() - began
        if failed:
            raise MemoryError(f"no memory to {op} at {i:,} of {n:,}")
        return <double>began / <double>n if n else 0.0

    def stress(self, uint64_t[::1] ids, int64_t[::1] held, Py_ssize_t rounds, uint64_t seed, int private=300):
        """What one of several threads does to ids that all share: ``(increments, faults)``.

        In random order: dup and put (``held`` says how many references of each id this thread has, and is
        kept up to date; the caller has one more, which keeps the ids live); lock, wait a little, add one to the
        payload, unlock; the same with trylock; and give, use and free up to ``private`` ids of its own. The caller
        checks that payloads grew by the increments and counts by what is held. ``faults`` counts what was seen to
        be wrong on the way.
        """
        cdef SwapMap* m = self.map
        cdef const SwapMapOps* ops = m.ops
        cdef uint64_t state = seed * 0x9E3779B97F4A7C15u | 1
        cdef uint64_t[512] own
        cdef uint64_t r, entry, mine
        cdef Py_ssize_t _round, i
        cdef int j, n
        cdef int64_t done = 0, wrong = 0, left
        if private > 512 or private < 0 or ids.shape[0] == 0 or held.shape[0] != ids.shape[0]:
            raise ValueError("stress needs ids, as many holdings, and at most 512 private ids")
        with nogil:
            for _round in range(rounds):
                r = next_random(&state)
                i = <Py_ssize_t>((r >> 8) % <uint64_t>ids.shape[0])
                r &= 255
                if r < 100:
                    # Mostly between one and two: there the count goes in and out of the second tree.
                    if held[i] == 0 or (held[i] < 3 and r < 20):
                        if ops.dup(m, ids[i]) == 0:
                            held[i] += 1
                        else:
                            wrong += 1
                        if ops.count(m, ids[i]) < 1 + held[i]:
                            wrong += 1
                    else:
                        held[i] -= 1
                        left = ops.put(m, ids[i], &entry)
                        if left < 1 + held[i]:
                            wrong += 1
                elif r < 250:
                    entry = ops.lock(m, ids[i]) if r < 200 else ops.trylock(m, ids[i])
                    if entry:
                        if entry & e.ENTRY_FLAGS or e.entry_type(entry) != e.ZSWAP:
                            wrong += 1
                        if r < 110:
                            us_now()
                        ops.unlock(m, ids[i], e.entry_make(e.ZSWAP, e.entry_payload(entry) + 1))
                        done += 1
                elif private:
                    n = 1 + <int>(next_random(&state) % <uint64_t>private)
                    mine = e.entry_make(e.SLOT, state >> 8)
                    for j in range(n):
                        own[j] = ops.alloc(m, mine ^ (<uint64_t>j << e.ENTRY_PAYLOAD_SHIFT))
                        if own[j] == 0:
                            wrong += 1
                            n = j
                            break
                    for j in range(n):
                        if (ops.lock(m, own[j]) != mine ^ (<uint64_t>j << e.ENTRY_PAYLOAD_SHIFT)
                                or ops.trylock(m, own[j]) != 0):
                            wrong += 1
                        ops.unlock(m, own[j], mine)
                    for j in range(n):
                        if ops.put(m, own[j], &entry) != 0 or entry != mine:
                            wrong += 1
                        ops.free(m, own[j])
        return done, wrong

    def drain(self, uint64_t[::1] ids, uint8_t[::1] storage, uint64_t seed):
        """What one of several threads does to give up its reference to every id: ``(freed, probes, faults)``.

        The order is random. ``storage`` has a 1 for every id, as a pool has objects: whoever puts the last reference
        gives the storage back, under the pool's lock, and then frees the id. Before every put, another
        id's entry is try-locked as the pool does to move an object: if it has storage, under the pool's lock.
        """
        cdef SwapMap* m = self.map
        cdef const SwapMapOps* ops = m.ops
        cdef uint64_t state = seed * 0x9E3779B97F4A7C15u | 1
        cdef Py_ssize_t n = ids.shape[0]
        cdef Py_ssize_t step, i, _turn, other
        cdef uint64_t entry, seen
        cdef int64_t freed = 0, probes = 0, wrong = 0
        if n == 0 or storage.shape[0] != n:
            raise ValueError("drain needs ids, and storage for each")
        with nogil:
            step = <Py_ssize_t>(next_random(&state) % <uint64_t>n) | 1
            while gcd(step, n) != 1:
                step += 2
            i = <Py_ssize_t>(next_random(&state) % <uint64_t>n)
            for _turn in range(n):
                i = (i + step) % n
                other = <Py_ssize_t>(next_random(&state) % <uint64_t>n)
                us_lock(&self.pool)
                entry = ops.trylock(m, ids[other]) if storage[other] else 0
                us_unlock(&self.pool)
                if entry:
                    probes += 1
                    if e.entry_type(entry) != e.ZSWAP:
                        wrong += 1
                    ops.unlock(m, ids[other], entry)
                entry = ops.lock(m, ids[i])
                if e.entry_type(entry) != e.ZSWAP:
                    wrong += 1
                ops.unlock(m, ids[i], entry)
                if ops.put(m, ids[i], &seen) == 0:
                    if seen != entry or ops.count(m, ids[i]) != 0:
                        wrong += 1
                    us_lock(&self.pool)
                    wrong += storage[i] == 0
                    storage[i] = 0
                    us_unlock(&self.pool)
                    ops.free(m, ids[i])
                    freed += 1
        return freed, probes, wrong


cdef Py_ssize_t gcd(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    while b:
        a, b = b, a % b
    return a
