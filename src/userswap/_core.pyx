"""The Python face of the core: a class that owns a pool, one that pins memory. Keeps no state itself.

Errors of the rooms below are return codes; here they become exceptions.
"""
import os

from cpython.buffer cimport PyBUF_FULL_RO, PyBuffer_Release, PyObject_CheckBuffer, PyObject_GetBuffer
from libc.errno cimport EINVAL, EIO, ENOMEM
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memset

from userswap.backends.codec cimport FOLIO_BYTES, codec_metadata
from userswap.backends.swapfile cimport SwapFile, swapfile_delete, swapfile_new, swapfile_retired
from userswap.backends.zswap cimport zswap_mapping
from userswap.memory.ahead cimport ahead_may, ahead_rest
from userswap.memory.faults cimport (
    faults_install, memory_background, memory_check, memory_compact, memory_evict, memory_fit, memory_holders,
    memory_drain, memory_drain_some, memory_hold, memory_let_go, memory_loss, memory_pin, memory_pool_close,
    memory_shrink, memory_snapshot, memory_swapoff, memory_swapon, memory_unpin, memory_writeback, pool_bind,
)
from userswap.memory.frames cimport (
    BY_SEGV, BY_SIGNAL, BY_THREAD, frames_choose, frames_delivery, frames_forbid_move, frames_probe,
)
from userswap.memory.mapped cimport mapped_count
from userswap.memory.regions cimport (
    BUCKETS, MemoryPool, Region, arena_bytes, arena_open, pool_get, pool_new, region_at,
)
from userswap.memory.stage cimport STAGE_SLOTS
from userswap.memory.watcher cimport WATCHER_PIECE, watcher_rest, watcher_start
from userswap.native.descriptors cimport FIRST_FD, descriptor_up
from userswap.native.thread cimport threads_pause, threads_resume
from userswap.native.us cimport us_add, us_debug, us_max, us_read, us_write
from userswap.reclaim.reclaim cimport reclaim_ceiling, reclaim_used
from userswap.reclaim.watch cimport Watch, watch_add, watch_delete, watch_machine, watch_new
from userswap.swap.space cimport (
    MOST_DEVICES, PLACE_DRAINING, PLACE_FREE, Moved, Place, SwapSpace, space_dedupe, space_encrypt, space_left,
    space_metadata,
    space_new, space_pool_bytes, space_slot_bytes, space_stored_bytes,
)
from userswap.errors import DataLost
from userswap.swap.traced cimport traced_events

cdef extern from "Python.h":
    int Py_AddPendingCall(int (*function)(void*) noexcept, void* argument) noexcept nogil

cdef extern from "<unistd.h>" nogil:
    int getpid()

FOLIO = FOLIO_BYTES


DELIVERIES = {"signal": BY_SIGNAL, "thread": BY_THREAD, "segv": BY_SEGV}


def probe(delivery: str) -> int:
    """Whether this kernel lets this process have its faults delivered so: 0 or an errno."""
    return -frames_probe(DELIVERIES[delivery])


def delivery() -> str | None:
    """How faults are delivered in this process; ``None`` as long as there is no arena."""
    if arena_bytes() == 0:
        return None
    return next(name for name, number in DELIVERIES.items() if number == frames_delivery())


def mappings() -> int:
    """How many mappings the protections of swapped memory take just now, beside the arena's one (``segv``)."""
    return mapped_count()


def open_arena(delivery: str = "signal", move: bool = True, most_mappings: int = 0, threads: int = 2) -> None:
    """Reserve the arena, arm it, take over the signal of faults and libc's I/O functions.

    Once a process: the first call decides on everything. `move`: frames are moved, where the kernel can, and not
    copied. `most_mappings`: that ``segv`` may cause. `threads`: that ``thread`` has.

    Raises:
        OSError: the kernel refuses that delivery (``errno`` says why), or there is no address space.
    """
    cdef int error
    if arena_bytes() == 0:
        frames_choose(DELIVERIES[delivery], most_mappings)
        if not move:
            frames_forbid_move()
    error = arena_open()
    if error == 0:
        error = faults_install(threads)
    if error:
        raise OSError(-error, os.strerror(-error))


cdef int start_thread(void* nothing) noexcept:
    memory_background()         # if it can't be, the process does without
    return 0


cdef void want_thread() noexcept nogil:
    # From a fault, which interrupts a load or store and so nobody who is in there: the interpreter does it soon after.
    Py_AddPendingCall(start_thread, NULL)


cdef int64_t forking = 0        # threads that are about to fork


def before_fork() -> None:
    """Python forks: our threads end until it has. It counts the threads of the process and warns of a fork that leaves
    some behind, which the program could do nothing about."""
    if us_add(&forking, 1) == 1:
        with nogil:
            threads_pause()


def after_fork() -> None:
    """In the parent: they go on. If one can't, the process does without."""
    if us_add(&forking, -1) == 0:
        threads_resume()


def forked() -> None:
    """Python's own handlers of a fork have run in the child: it may have a thread when it first has use for one."""
    us_write(&forking, 0)
    ahead_may(want_thread)


def rest() -> None:
    """The process ends: no thread of ours does anything from now on."""
    with nogil:
        watcher_rest()
        ahead_rest()


cdef lost(int64_t error):
    """The exception for what the memory room says."""
    cdef char[768] text
    if error != -EIO:
        return OSError(-error, os.strerror(-error))
    memory_loss(text, sizeof(text))
    return DataLost(EIO, text.decode(errors="replace").strip().removeprefix("userswap: "))


def debug_build() -> bool:
    """Whether this build has assertions and injected delays."""
    return us_debug()


cdef int64_t bucket_ns(int index) noexcept:
    """Middle of a fault-time bucket, ns."""
    cdef int octave
    if index < 16:
        return index
    octave = (index >> 3) - 1
    return ((<int64_t>8 + (index & 7)) << octave) + ((<int64_t>1 << octave) >> 1)


cdef class Core:
    """A pool: its budget, its swap space, its regions. Lives on behind its regions after `close`."""

    def __cinit__(self, *, limit: int, design: str, address_space: int, slots_bytes: int, hard: bool, dedupe: bool,
                  background: bool, apart: bool, encrypt: bool):
        """`limit`: bytes. `slots_bytes`: of the swap file, for a design whose ids are its slots. `dedupe`: store
        identical folios once. `background`: let a thread of ours work while the program computes. `apart`: forked
        children have a whole budget each. `encrypt`: swap files; the cipher has been found."""
        cdef SwapSpace* space = NULL
        cdef int64_t bounce = min(1 << 20, max(128 << 10, limit // 64)) // 4096 * 4096
        chosen = design.encode()
        self.pool = pool_new(limit)
        if self.pool != NULL:
            space = space_new(chosen, address_space, slots_bytes, bounce, memory_holders(), self.pool)
        if space == NULL:
            raise MemoryError("no memory for a pool, or no address space for the compressed one")
        pool_bind(self.pool, space)
        if encrypt and space_encrypt(space) != 0:
            raise MemoryError("no memory for the keys of swap files, or no cipher")
        if dedupe and space_dedupe(space, limit) != 0:
            raise MemoryError("no memory for the index of identical folios")
        self.pool.reclaim.hard = hard
        self.pool.reclaim.family.apart = apart
        if background:
            memory_background()     # without it, every fault does its own work
        self.pool.reclaim.overhead = codec_metadata() + sizeof(MemoryPool)
        self.pool.reclaim.peak = reclaim_used(&self.pool.reclaim)

    def swapon(self, fd: int, limit: int, name: str, directory: str, priority: int, tier: int) -> int:
        """Use one more swap file, of `limit` bytes, from now on; returns the number of its place.

        `fd`: open; owned from now on, whatever happens. `directory`: where forked children may make one of their own.
        `tier`: which bit of a policy stands for it.

        Raises:
            MemoryError: no memory for its slot map or buffers.
            OSError: EMFILE: a pool has as many as it can have. EINVAL: the design of the swap map has one only.
        """
        cdef SwapFile* device = NULL
        cdef MemoryPool* p
        cdef uint64_t bytes = limit
        cdef int rank = priority, place
        cdef uint32_t bit = tier
        fd = descriptor_up(fd, FIRST_FD)
        try:
            p = self.alive()
            named = name.encode(errors="replace")
            beside = directory.encode(errors="surrogateescape")
            device = swapfile_new(fd, bytes, named)
            if device == NULL:
                raise MemoryError("no memory for the swap file's slot map")
        except BaseException:
            os.close(fd)
            raise
        pool_get(p)             # another thread may close it meanwhile
        cdef const char* at = beside
        with nogil:
            place = memory_swapon(p, device, bytes, rank, bit, at)
            memory_pool_close(p)
        if place < 0:
            swapfile_delete(device, True)
            if place == -ENOMEM:
                raise MemoryError("no memory for the buffers of a swap file")
            raise OSError(-place, os.strerror(-place))
        return place

    def swaps(self) -> list[tuple[int, int, int, int, int, int]]:
        """Of each place: its number, its state, whether it is encrypted, and bytes: limit, in use, read, written."""
        cdef MemoryPool* p = self.alive()
        cdef Place* place
        cdef int i
        cdef int64_t device
        found = []
        memory_hold()
        for i in range(MOST_DEVICES):
            place = &p.swap.places[i]
            if place.state != PLACE_FREE:
                device = us_read(&place.device)
                found.append((
                    i, "draining" if place.state == PLACE_DRAINING else
                    "retired" if device >= 0 and swapfile_retired(p.swap.devices[device]) else "on",
                    p.swap.encrypted[device] if device >= 0 else p.swap.encrypt, place.limit, space_left(p.swap, i),
                    us_read(&p.swap.bytes_read[device]) if device >= 0 else 0,
                    us_read(&p.swap.bytes_written[device]) if device >= 0 else 0,
                ))
        memory_let_go()
        return found

    def set_tiers(self, tiers: int) -> None:
        """Where the data of new regions may be, a bit each: the compressed pool (the lowest), tiers of swap files."""
        self.alive().tiers = tiers

    def watch(self, levels, proc: str, least: int) -> None:
        """Have the budget follow what the machine leaves: of `levels`, pairs of version and directory of a cgroup, and
        of what is told in `proc`; but never below `least` bytes.

        Raises:
            OSError: that can't be read, or there is no thread to be had.
        """
        cdef MemoryPool* p = self.alive()
        cdef Watch* fresh = watch_new()
        cdef int error
        if fresh == NULL:
            raise MemoryError("no memory for a watch")
        for version, directory in levels:
            watch_add(fresh, version, os.fsencode(directory))
        error = watch_machine(fresh, os.fsencode(proc), os.fsencode(proc + "/pressure"))
        if error == 0 and p.watch == NULL:
            p.watch = fresh
            p.watch_least = least
            us_write(&p.watched, 1)
            error = watcher_start()
        else:
            watch_delete(fresh)
        if error:
            raise OSError(-error, os.strerror(-error))

    def set_limit(self, limit: int) -> None:
        """Another budget, bytes, from now on, whatever the machine leaves. What is too much has yet to be reclaimed, by
        `shrink`."""
        cdef MemoryPool* p = self.alive()
        cdef int64_t size = limit
        pool_get(p)             # another thread may close it meanwhile
        with nogil:
            us_write(&p.given, size)
            us_write(&p.watched, 0)
            memory_fit(p, size)
            memory_pool_close(p)

    @property
    def hard(self) -> bool:
        """Whether the program ends rather than exceed the budget."""
        return self.alive().reclaim.hard

    @hard.setter
    def hard(self, bint hard) -> None:
        self.alive().reclaim.hard = hard

    def shrink(self) -> bool:
        """Reclaim a piece of what is beyond the budget; whether that did something, and there is more to do."""
        cdef MemoryPool* p = self.alive()
        cdef bint more
        pool_get(p)
        with nogil:
            more = memory_shrink(p, WATCHER_PIECE)
            memory_pool_close(p)
        return more

    def __dealloc__(self):
        if self.pool != NULL:
            memory_pool_close(self.pool)

    def close(self) -> None:
        """Drop this object's hold; the pool ends with its last region."""
        if self.pool != NULL:
            memory_pool_close(self.pool)
            self.pool = NULL

    cdef MemoryPool* alive(self) except NULL:
        if self.pool == NULL:
            raise ValueError("this pool is closed")
        return self.pool

    def stats(self) -> dict[str, int]:
        """Figures of the pool now; names as in ``userswap.Stats``."""
        cdef MemoryPool* p = self.alive()
        cdef int64_t total = 0, seen = 0, p50 = -1, p99 = -1
        cdef int64_t resident, packed, metadata, slots
        cdef int i
        memory_hold()           # no swap file goes meanwhile
        resident = us_read(&p.reclaim.resident)
        packed = space_pool_bytes(p.swap)
        metadata = space_metadata(p.swap) + us_read(&p.reclaim.overhead)
        slots = space_slot_bytes(p.swap)
        memory_let_go()
        for i in range(BUCKETS):
            total += us_read(&p.fault_times[i])
        for i in range(BUCKETS):
            seen += us_read(&p.fault_times[i])
            if p50 < 0 and total and seen * 2 >= total:
                p50 = bucket_ns(i)
            if p99 < 0 and total and seen * 100 >= total * 99:
                p99 = bucket_ns(i)
        # Charges look at the sum; in between the background thread may be half way through a swap-out.
        us_max(&p.reclaim.peak, resident + packed + metadata)
        return {
            "budget_bytes": p.reclaim.limit,
            "allowed_bytes": reclaim_ceiling(&p.reclaim),
            "peak_bytes": us_read(&p.reclaim.peak),
            "resident_bytes": resident,
            "kept_bytes": us_read(&p.reclaim.kept),
            "pool_bytes": packed,
            "metadata_bytes": metadata,
            "virtual_bytes": us_read(&p.virtual_bytes),
            "peak_virtual_bytes": us_read(&p.peak_virtual),
            "swapped_bytes": us_read(&p.swapped_bytes),
            "stored_bytes": space_stored_bytes(p.swap),
            "slot_bytes": slots,
            "map_bytes": p.swap.map.ops.metadata(p.swap.map),
            "swap_ids": p.swap.map.ops.ids(p.swap.map),
            "regions": us_read(&p.region_count),
            "faults": us_read(&p.faults),
            "swap_ins": us_read(&p.swap.swap_ins),
            "swap_outs": us_read(&p.swap.swap_outs),
            "part_ins": us_read(&p.swap.part_ins),
            "part_outs": us_read(&p.swap.part_outs),
            "part_updates": us_read(&p.swap.part_updates),
            "writebacks": us_read(&p.swap.writebacks),
            "promotions": us_read(&p.swap.promotions),
            "demotions": us_read(&p.swap.demotions),
            "same_filled": us_read(&p.swap.same_filled),
            "deduped": us_read(&p.swap.dedupe.shared),
            "deduped_bytes": us_read(&p.swap.dedupe.bytes_saved),
            "cache_hits": us_read(&p.swap.cache_hits),
            "runs": us_read(&p.swap.runs),
            "readahead": us_read(&p.readahead) * STAGE_SLOTS,
            "readahead_hits": us_read(&p.readahead_hits) * STAGE_SLOTS,
            "over_budget": us_read(&p.reclaim.failures),
            "fault_ns_p50": max(p50, 0),
            "fault_ns_p99": max(p99, 0),
            "fault_ns_total": us_read(&p.fault_ns),
        }

    def evict(self, want: int) -> int:
        """Push about `want` bytes of resident folios out; returns the bytes that left."""
        cdef MemoryPool* p = self.alive()
        cdef int64_t goal = want, done
        pool_get(p)             # another thread may close it meanwhile
        with nogil:
            done = memory_evict(p, goal)
            memory_pool_close(p)
        return done

    def writeback(self, want: int) -> int:
        """Move about `want` packed bytes from zswap to the swap file; returns the bytes moved, or -errno."""
        cdef MemoryPool* p = self.alive()
        cdef int64_t goal = want, done
        pool_get(p)             # another thread may close it meanwhile
        with nogil:
            done = memory_writeback(p, goal)
            memory_pool_close(p)
        return done

    def compressed(self) -> tuple[int, int]:
        """Address and length of zswap's mapping as far as it was ever used; for tests, which damage it."""
        cdef uint64_t length = 0
        cdef char* start = zswap_mapping(self.alive().swap.zswap, &length)
        return <uint64_t>start, length

    def key_page(self) -> int:
        """Address of the page with the keys of swap files, 0 if there is none; for tests."""
        return <uint64_t>self.alive().swap.keys

    def snapshot(self, source: int, target: int) -> None:
        """Give the region that starts at `target`, which is fresh, the content of the one at `source`.

        Raises:
            ValueError: they are not two regions of this pool, of the same size.
            DataLost: part of the source can't be had.
            OSError: there is no memory.
        """
        cdef MemoryPool* p = self.alive()
        cdef uint64_t start = source, copy = target
        cdef int error
        pool_get(p)
        with nogil:
            error = memory_snapshot(p, <void*>start, <void*>copy)
            memory_pool_close(p)
        if error == -EINVAL:
            raise ValueError("a snapshot is of a region of this pool, into a fresh one of the same size")
        if error:
            raise lost(error)

    def region(self, address: int) -> tuple[int, int] | None:
        """Start and length, bytes, of the region of this pool that the byte at `address` is in."""
        cdef uint64_t at = address
        cdef Region* region
        if not self.owns(address):
            return None
        region = region_at(<void*>at)
        return <uint64_t>region.base, region.bytes

    def compact(self) -> int:
        """Give back all pool memory that holds nothing; returns the bytes given back."""
        cdef MemoryPool* p = self.alive()
        cdef int64_t done
        pool_get(p)             # another thread may close it meanwhile
        with nogil:
            done = memory_compact(p)
            memory_pool_close(p)
        return done

    def trace(self):
        """Ends the recording of a pool whose swap map is traced: see ``traced_events``; ``None`` for any other."""
        return traced_events(self.alive().swap.map)

    def check(self) -> dict[str, int]:
        """Folios by state, with the whole process held still; ``partial``: of the clean ones, those of which only parts
        are in place; ``wrong``: words, counts and sums that don't agree."""
        cdef MemoryPool* p = self.alive()
        cdef int64_t[6] states = [0, 0, 0, 0, 0, 0]
        cdef int64_t wrong
        pool_get(p)
        with nogil:
            wrong = memory_check(p, states)
            memory_pool_close(p)
        return {"empty": states[0], "dirty": states[1], "clean": states[2], "swapped": states[3], "ids": states[4],
                "partial": states[5], "wrong": wrong}

    def owns(self, address: int) -> bool:
        """Whether the byte at `address` is in a region of this pool."""
        cdef uint64_t at = address
        return self.pool != NULL and region_at(<void*>at) != NULL and region_at(<void*>at).pool == self.pool


cdef class Draining:
    """A swapoff: nothing new goes to the place from its start on; `step` until nothing is left, then `finish`. If it
    ends otherwise the place is as before, but for what has moved."""
    cdef MemoryPool* pool
    cdef int place
    cdef int pid
    cdef uint32_t cluster
    cdef uint32_t at
    cdef bint active

    def __cinit__(self, Core core, int place):
        """
        Raises:
            OSError: ENOENT: there is no such place. EALREADY: it is being emptied. EINVAL: the design of the swap map
                has one only.
        """
        cdef MemoryPool* p = core.alive()
        cdef int error
        pool_get(p)
        self.pool = p
        self.place = place
        self.pid = getpid()
        with nogil:
            error = memory_drain(p, place, True)
        if error:
            raise OSError(-error, os.strerror(-error))
        self.active = True

    cdef bint lives(self) noexcept:
        # In a child that was forked meanwhile there is nothing to empty: the file is its parent's.
        return self.active and self.pid == getpid()

    @property
    def left(self) -> int:
        """Bytes in the file that are the pool's."""
        cdef int64_t left = 0
        if self.lives():
            memory_hold()
            left = space_left(self.pool.swap, self.place)
            memory_let_go()
        return left

    def step(self, bint to_zswap):
        """Move a piece to other files, or what has no room there to zswap: (bytes moved, runs that somebody was at,
        bytes without room, errno, whether that was the end of the file)."""
        cdef Moved moved
        cdef bint more = False
        memset(&moved, 0, sizeof(moved))
        if self.lives():
            with nogil:
                more = memory_drain_some(self.pool, self.place, &self.cluster, &self.at, to_zswap, &moved)
        return moved.files + moved.zswap, moved.busy, moved.stuck, -moved.error, not more

    def finish(self) -> bool:
        """The place ends, if nothing is left there: whether it does."""
        cdef int error = -EINVAL
        if self.lives():
            with nogil:
                error = memory_swapoff(self.pool, self.place)
            self.active = error != 0
        return error == 0

    def undo(self) -> None:
        """New data may go there again."""
        if self.lives():
            with nogil:
                memory_drain(self.pool, self.place, False)
        self.active = False

    def __dealloc__(self):
        if self.pool != NULL:
            if self.lives():
                memory_drain(self.pool, self.place, False)
            memory_pool_close(self.pool)


class TooMuch(Exception):  # noqa: N818 - never leaves the package
    """More would be pinned than a pool may have: what was asked, what is left of that, the budget; bytes."""


cdef class Span:
    """The memory of one array, from its first byte to its last. Pinned once at most; the array lives as long."""
    cdef Py_buffer view
    cdef bint viewed            # the array gave one
    cdef object array
    cdef char* start
    cdef int64_t length         # bytes
    cdef bint writing
    cdef int pid                # of the process in which it is pinned; 0: it is not

    def __cinit__(self, array):
        """`array`: a buffer, or what has ``__array_interface__`` (NumPy has no buffers of dates).

        Raises:
            TypeError: it is neither.
        """
        cdef int64_t first = 0, last = 0, i, reach, items = 1
        cdef uint64_t start
        if PyObject_CheckBuffer(array):
            try:
                PyObject_GetBuffer(array, &self.view, PyBUF_FULL_RO)
                self.viewed = True
            except (ValueError, BufferError):
                pass
        if self.viewed:
            start = <uint64_t>self.view.buf
            self.writing = not self.view.readonly
            size = self.view.itemsize
            shape = [self.view.shape[i] for i in range(self.view.ndim)]
            strides = [self.view.strides[i] for i in range(self.view.ndim)]
        else:
            try:
                told = array.__array_interface__
            except AttributeError:
                raise TypeError(
                    f"Only arrays and buffers can be pinned, not {type(array).__name__!r}: pass what holds the memory, "
                    "for example tensor.numpy() or series.to_numpy()."
                ) from None
            start, readonly = told["data"]
            self.writing = not readonly
            size = int("".join(c for c in told["typestr"][2:] if c.isdigit()))
            shape, strides = told["shape"], told.get("strides")
            if strides is None:
                strides, reach = [], size
                for length in reversed(shape):
                    strides.insert(0, reach)
                    reach *= length
        self.array = array
        for length, stride in zip(shape, strides, strict=True):
            items *= length
            reach = (length - 1) * stride
            first += min(reach, 0)
            last += max(reach, 0)
        self.start = <char*><uint64_t>(start + first)
        self.length = last - first + size if items else 0

    def __dealloc__(self):
        self.release()
        if self.viewed:
            PyBuffer_Release(&self.view)

    @property
    def bytes(self) -> int:
        """Bytes of swapped memory that are pinned."""
        return self.length if self.pid else 0

    cdef int64_t hold(self) noexcept nogil:
        """Pins all of it: 0, or -errno and nothing is."""
        cdef int64_t done = 0, got
        while done < self.length:
            got = memory_pin(self.start + done, <size_t>(self.length - done), self.writing)
            if got < 0:
                memory_unpin(self.start, <size_t>done)
                return got
            done += got
        return 0

    def pin(self) -> None:
        """Bring it in and keep it there; nothing happens if it is not swapped memory.

        Raises:
            TooMuch: of the pool's budget too much would be pinned.
            DataLost: swapped data can't be had.
        """
        cdef Region* region = region_at(self.start)
        cdef int64_t error, most
        if region == NULL or self.length == 0:
            return
        # The rest is for what is packed, and for the folios that come and go meanwhile.
        most = region.pool.reclaim.limit // 4 * 3
        if us_add(&region.pool.pinned, self.length) > most:
            us_add(&region.pool.pinned, -self.length)
            raise TooMuch(self.length, max(0, most - us_read(&region.pool.pinned)), region.pool.reclaim.limit)
        with nogil:
            error = self.hold()
        if error:
            us_add(&region.pool.pinned, -self.length)
            raise lost(error)
        self.pid = getpid()

    def unpin(self) -> None:
        """Let it go, if it is pinned."""
        self.release()

    cdef void release(self) noexcept:
        if self.pid:
            # In a child that was forked behind Python's back nothing is pinned (see `renew`).
            if self.pid == getpid():
                memory_unpin(self.start, <size_t>self.length)
            us_add(&region_at(self.start).pool.pinned, -self.length)
            self.pid = 0

    def renew(self) -> None:
        """In a child of fork, where words have lost their pins: pin it again. It is still in place."""
        if self.pid and self.pid != getpid():
            self.pid = getpid() if self.hold() == 0 else -1
