"""Pools and `install`: what a Python program uses. Everything that happens below is `_core`'s."""

from __future__ import annotations

import atexit
import contextlib
import errno
import importlib.util
import itertools
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from userswap import _core, numpy_hook
from userswap.backends import codec
from userswap.budget import default_budget, total_ram, watched_levels
from userswap.errors import (
    BudgetError,
    DeliveryError,
    MapDesignError,
    SwapOffError,
    SwapPathError,
    UnsupportedError,
)  # fmt: skip
from userswap.sizes import format_size, parse_size
from userswap.swap.map import BOUND, DESIGN_NAMES, TRACED
from userswap.swapfiles import (
    OpenSwapFile,
    Specs,
    SwapSpec,
    identities,
    open_spec,
    parse_swap,
    parse_swaps,
    refuse_twice,
)
from userswap.tiers import Tiers

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, DTypeLike, NDArray

    Shape = int | tuple[int, ...]

P = ParamSpec("P")
R = TypeVar("R")

__all__ = ["Installation", "Pool", "Stats", "SwapFileStats", "install", "snapshot"]

DELIVERIES = ("auto", "signal", "thread", "segv")
MOST_WORKERS = 8
LINUX_MAPPINGS = 65530
LEAST_ARRAY = 4096
MOST_WAITS = 3000  # of 10 ms, for what a swapoff can't get at
LEAST_RESIDENT = 8 << 20
BUDGET = "the budget (ram)"
# Unless it is asked for: see docs/performance.md for why.
ENCRYPT = False
_start_lock = threading.Lock()
_watched: list[bool] = []  # forks, from the first pool on
_numbers = itertools.count(1)
# Pools that may be seen and changed from outside, by number.
_reachable: weakref.WeakValueDictionary[int, Pool] = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class Stats:
    """Figures of a pool at one moment. Bytes are bytes, times are nanoseconds.

    ``resident_bytes + pool_bytes + metadata_bytes`` is what counts against ``budget_bytes``.
    """

    budget_bytes: int
    """The budget: RAM for resident folios, the compressed pool and metadata together."""
    allowed_bytes: int
    """What this process may use of it now: all, unless processes that it forked, or that forked it, use some."""
    peak_bytes: int
    """Most that was ever used of it."""
    resident_bytes: int
    """Array memory that is in place, and what is kept of freed arrays."""
    kept_bytes: int
    """The latter: frames for the next array, which leave before anything else does."""
    pool_bytes: int
    """RAM of the compressed pool (zswap)."""
    metadata_bytes: int
    """RAM of page tables, the swap map, codec contexts, slot maps and buffers."""
    virtual_bytes: int
    """Array memory that the program has, wherever it is."""
    peak_virtual_bytes: int
    """Most array memory that it had at once."""
    swapped_bytes: int
    """Array memory that is not in place."""
    stored_bytes: int
    """Compressed bytes that it takes, in the pool and in the swap file."""
    slot_bytes: int
    """Bytes in use in the swap file."""
    map_bytes: int
    """RAM of the swap map, a part of ``metadata_bytes``."""
    swap_ids: int
    """Swap ids in use."""
    regions: int
    """Arrays that live in the pool."""
    faults: int
    """Page faults that userswap resolved."""
    swap_ins: int
    """Folios brought back."""
    swap_outs: int
    """Folios compressed, or found to be same-filled, or written to a slot."""
    part_ins: int
    """Parts of folios (16 KiB) brought back by themselves, where accesses go anywhere; not in `swap_ins`."""
    part_outs: int
    """Parts of folios compressed by themselves; not in `swap_outs`."""
    part_updates: int
    """How often the compressed copy was changed in place for that, instead of being stored anew."""
    writebacks: int
    """Folios written to the swap file."""
    demotions: int
    """Folios that moved from one swap file to a slower one, because theirs was too full."""
    promotions: int
    """Folios that moved from the swap file to RAM, packed as they were, because they came back soon."""
    same_filled: int
    """Swap-outs of folios that repeat one 8-byte value: they take no storage."""
    deduped: int
    """Swap-outs of folios that were stored already, byte for byte, for another array or place: they share that copy."""
    deduped_bytes: int
    """Compressed bytes that these would have taken."""
    cache_hits: int
    """Faults on a shared folio that were served from another array that has it in place."""
    runs: int
    """Swap-outs of large folios: neighbours that left together, with swap ids in a row."""
    readahead: int
    """Folios that were made ready before the program came to them."""
    readahead_hits: int
    """How many of these it came to."""
    over_budget: int
    """Times the budget had to be exceeded."""
    fault_ns_p50: int
    """Median time of a fault, from the handler's first instruction to its last."""
    fault_ns_p99: int
    """99th percentile of the same."""
    fault_ns_total: int
    """Time of all faults together, over all threads."""

    def as_dict(self) -> dict[str, int]:
        """The figures by name, for JSON."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class SwapFileStats:
    """A swap file of a pool at one moment. Bytes are bytes."""

    name: str
    """The path that it was asked for by; in a forked process, that its parent's was."""
    tier: str
    """The tier that it belongs to: all swap files of one priority."""
    priority: int
    """Higher ones are used first, equal ones by turns."""
    limit_bytes: int
    """Most that it may take."""
    used_bytes: int
    """In use for this process's data."""
    state: str
    """"on"; "draining" while a `swapoff` empties it; "retired" when it failed and gets no new data."""
    encrypted: bool
    """Whether what is in it can't be read without a key that is in this process's memory only."""
    direct: bool
    """Whether it passes the kernel's page cache by (O_DIRECT)."""
    read_bytes: int
    """Read from it, ever."""
    written_bytes: int
    """Written to it, ever."""


@dataclass(frozen=True)
class _Place:
    """What is known here of a swap file that the core has."""

    spec: SwapSpec
    name: str
    direct: bool
    keys: frozenset[object]


def blosc2_library() -> Path:
    """The Blosc2 library inside the ``blosc2`` wheel, found without importing the package.

    Raises:
        UnsupportedError: the wheel is not installed, or has another version of the library.
    """
    spec = importlib.util.find_spec("blosc2")
    if spec is None or spec.origin is None:
        raise UnsupportedError(
            "The blosc2 package, whose library compresses, is not installed. Install it with: pip install blosc2"
        )
    library = Path(spec.origin).parent / "lib" / codec.soname()
    if not library.exists():
        raise UnsupportedError(
            f"The installed blosc2 package has no {codec.soname()}, which this build of userswap needs. "
            "Install userswap again so that it is built for the blosc2 that is there."
        )
    return library


def choose_delivery(wish: str) -> str:
    """How faults will be delivered in this process, or are: "signal", "thread" or "segv".

    Args:
        wish: one of these, or "auto", for which USERSWAP_DELIVERY in the environment may stand in.

    Raises:
        DeliveryError: there is no such way, or the process has settled on another one.
        UnsupportedError: this machine doesn't allow it; the text says what to do.
    """
    named = "delivery"
    if wish == "auto" and os.environ.get("USERSWAP_DELIVERY"):
        wish, named = os.environ["USERSWAP_DELIVERY"], "USERSWAP_DELIVERY"
    if wish not in DELIVERIES:
        raise DeliveryError(f"There is no {named} {wish!r}, only {', '.join(DELIVERIES)}.")
    settled = _core.delivery()
    if settled is not None:
        if wish not in ("auto", settled) and named == "delivery":
            raise DeliveryError(
                f"Faults of this process are delivered by {settled} since its first pool, for good: leave out "
                f"delivery={wish!r}, or give it to the first pool (userswap run --delivery {wish})."
            )
        return settled
    refused: dict[str, int] = {}
    for way in ("signal", "segv") if wish == "auto" else (wish,):
        refused[way] = _core.probe(way)
        if refused[way] == 0:
            return way
    raise UnsupportedError(_why_not(refused))


def _most_mappings() -> int:
    """How many of the process's mappings ours may be. The program has some, too."""
    if os.environ.get("USERSWAP_MAPPINGS"):
        return int(os.environ["USERSWAP_MAPPINGS"])
    try:
        most = int(Path("/proc/sys/vm/max_map_count").read_text())
    except (OSError, ValueError):
        most = LINUX_MAPPINGS
    return max(most // 4 * 3, 64)


def start(delivery: str = "auto") -> None:
    """Make the process ready for pools: codec, arena, fault handler. Does nothing the second time.

    Raises:
        DeliveryError: there is no such way to deliver faults, or the process has settled on another one.
        UnsupportedError: this machine can't run userswap; the text says what to do.
    """
    # A thread that has the signal of faults blocked would be killed by its first one.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGBUS, signal.SIGSEGV})
    with _start_lock:
        way = choose_delivery(delivery)
        library = blosc2_library()
        workers = min(MOST_WORKERS, (os.cpu_count() or 1) + 1)
        try:
            codec.start(str(library), workers)
        except OSError as error:
            raise UnsupportedError(
                f"The compression library {library} can't be loaded: {error}. Install blosc2 again."
            ) from None
        try:
            # USERSWAP_FRAMES=copy: as on kernels before 6.8, for tests and to tell the two apart.
            move = os.environ.get("USERSWAP_FRAMES") != "copy"
            _core.open_arena(way, move=move, most_mappings=_most_mappings(), threads=max(workers, 2))
        except OSError as error:
            raise UnsupportedError(_why_not({way: error.errno or 0})) from None
        # Libraries that the thread uses take themselves apart after this. Only the last of several counts.
        atexit.unregister(_core.rest)
        atexit.register(_core.rest)
        if not _watched:
            os.register_at_fork(
                before=_core.before_fork, after_in_parent=_core.after_fork, after_in_child=_core.forked
            )  # fmt: skip
            _watched.append(True)


def least_budget() -> int:
    """The smallest budget that works; after `start`."""
    return LEAST_RESIDENT + codec.metadata_bytes()


def check_budget(limit: int) -> None:
    """Raise BudgetError if that is too small a budget."""
    least = least_budget()
    if limit < least:
        raise BudgetError(
            f"A budget of {format_size(limit)} is too small to run: the least that works is "
            f"{format_size(-(-least // (1 << 20)) << 20)}. Give it more ram."
        )


def _open_all(specs: list[SwapSpec]) -> list[tuple[SwapSpec, OpenSwapFile]]:
    """Open them all, or none."""
    files: list[tuple[SwapSpec, OpenSwapFile]] = []
    try:
        for spec in specs:
            files.append((spec, open_spec(spec)))
    except BaseException:
        for _, file in files:
            os.close(file.fd)
        raise
    return files


def _directory(name: str) -> str:
    """Where a forked child may make a swap file of its own: beside its parent's."""
    path = Path(name).absolute()
    return str(path if path.is_dir() else path.parent)


def _check_design(name: str, specs: list[SwapSpec]) -> None:
    if name not in (*DESIGN_NAMES, TRACED):
        raise MapDesignError(f"There is no design {name!r} of the swap map, only {', '.join(DESIGN_NAMES)}.")
    if name in BOUND and len(specs) != 1:
        many = "leave out swap none" if not specs else "name one"
        raise MapDesignError(
            f"In the design {name} swap ids are slots of a swap file, so it needs one, and no more: {many}, "
            f"or choose {', '.join(design for design in DESIGN_NAMES if design not in BOUND)}."
        )


def _one_swap_file(design: str) -> MapDesignError:
    return MapDesignError(
        f"In the design {design} swap ids are slots of its one swap file: it can't have another, nor lose that."
    )


def _why_not(refused: dict[str, int]) -> str:
    """A sentence about ways to deliver faults, and why the kernel refuses each (errno)."""
    forbidden = (errno.EPERM, errno.EACCES)
    if errno.ENOMEM in refused.values():
        text = "The process may not reserve the address space that userswap needs: raise `ulimit -v`"
    elif "segv" in refused:
        text = (
            "A process can't write to its own memory through /proc/self/mem here "
            f"({os.strerror(refused['segv'])}), which delivery by segv needs"
        )
        if "signal" in refused:
            text = f"userfaultfd can't be had ({os.strerror(refused['signal'])}), and what stands in for it " + (
                f"can't either: {text[0].lower()}{text[1:]}. Allow the userfaultfd system call, or run the container "
                "with --security-opt seccomp=unconfined"
            )
    elif refused.get("thread") in forbidden:
        text = (
            f"userfaultfd for faults of the kernel is forbidden here ({os.strerror(refused['thread'])}): delivery by "
            "thread needs CAP_SYS_PTRACE, vm.unprivileged_userfaultfd=1 or access to /dev/userfaultfd. "
            "Leave out the delivery"
        )
    elif refused.get("signal") in forbidden:
        text = (
            f"userfaultfd is forbidden here ({os.strerror(refused['signal'])}), most often by a container's seccomp "
            "profile: leave out the delivery, and another one is used"
        )
    elif errno.ENOSYS in refused.values():
        text = "This kernel was built without userfaultfd, or a seccomp profile hides it: leave out the delivery"
    elif errno.EINVAL in refused.values():
        text = "This kernel's userfaultfd lacks signal delivery or write protection: Linux 5.11 or newer has them"
    else:
        reasons = ", ".join(os.strerror(number) for number in refused.values())
        text = f"The kernel refused to set userswap up ({reasons})"
    return f"{text}. `userswap doctor` says more."


def live_pools() -> dict[int, Pool]:
    """Pools that may be seen and changed from outside, by number, oldest first; those that were closed left out."""
    return {number: pool for number, pool in sorted(_reachable.items()) if not pool.closed}


def _listen() -> None:
    """Let `userswap ps` and its like reach this process, where that can be."""
    # No place for a socket, or no descriptor: the program goes on without.
    with contextlib.suppress(OSError):
        from userswap.control import listener

        listener.listen()


class Pool:
    """Array memory with a budget of RAM: what is cold is compressed, and past that goes to a swap file.

    Args:
        ram: the budget, bytes or text such as ``"512MiB"``; None takes what the container's limit or the
            machine leaves, and follows that while the program runs.
        swap: a swap file ``"[NAME=]PATH[:SIZE[:PRIO]]"``, where PATH may be a directory for an unlinked one, or several
            of these; ``"none"`` for none; None makes an unlinked temporary file, used only when the budget does not
            hold what is compressed. Files of a higher priority (PRIO, 0 by default) are used first, those of an equal
            one by turns. All files of one priority are a tier, which has a NAME if one of them gives it, else "file"
            or, for priority 10, "file10".
        tiers: which tiers arrays may be swapped out to, for example ``"zswap"``, ``"zswap,ssd"`` or ``"ssd"``; zswap is
            compressed memory in RAM. None: to all that there are.
        min_array: from which size on `install` lets arrays live here.
        hard: end the program rather than exceed the budget when nothing is left to do.
        encrypt: what goes to swap files is encrypted (AES-256-GCM, by libcrypto), with keys that are in this process's
            memory only. By default it is not: see docs/performance.md for what it costs.
        dedupe: store identical folios once; costs a hash of what is swapped out, and 8 bytes for each 16 KiB of budget.
        map_design: which design of the swap map to use, one of ``userswap.swap.map.DESIGN_NAMES``.
        children: "share": this process and those that are forked from it keep to the budget together; "own": each has
            a whole one for itself.
        delivery: how page faults reach userswap: "signal" (userfaultfd, SIGBUS), "thread" (userfaultfd, served by
            threads, so that raw system calls on swapped memory work; needs privilege) or "segv" (without userfaultfd:
            protected mappings, SIGSEGV). "auto" is "signal" where that is allowed, else "segv". The process's first
            pool decides for all of them, and for forked children.
        control: let `userswap ps`, `set`, `swapon` and `swapoff` of the same user see and change this pool, through a
            socket. USERSWAP_CONTROL=0 in the environment says no for all pools.

    Raises:
        BadSize: a size that can't be read.
        BudgetError: the budget is too small; the text says the least that works.
        DeliveryError: no such delivery, or the process has settled on another one.
        MapDesignError: no such design, or one whose ids are slots of a swap file, without a swap file.
        SwapPathError: a swap file can't be used.
        TierError: `tiers` names one that there is not, or swap files disagree about theirs.
        UnsupportedError: this machine can't run userswap.

    Example:
        >>> pool = Pool(ram="256MiB")
        >>> x = pool.zeros((1_000_000, 64), dtype="f4")   # an ordinary ndarray
        >>> pool.stats().resident_bytes
    """

    def __init__(
        self,
        ram: int | str | None = None,
        swap: Specs = None,
        *,
        tiers: str | None = None,
        min_array: int | str = "1MiB",
        hard: bool = False,
        dedupe: bool = True,
        encrypt: bool | None = None,
        map_design: str = "on_demand",
        children: str = "share",
        delivery: str = "auto",
        control: bool = True,
    ) -> None:
        if children not in ("share", "own"):
            raise ValueError(f'children is {children!r}: write "share" (one budget for all) or "own" (one for each).')
        self.budget_reason: str | None = None
        """Where the budget came from at first, when it was not given."""
        if ram is None:
            budget = default_budget()
            limit, self.budget_reason = budget.bytes, budget.reason
        else:
            limit = parse_size(ram, BUDGET)
        self.min_array = max(parse_size(min_array, "the smallest array (min_array)"), LEAST_ARRAY)
        specs = parse_swaps(swap)
        _check_design(map_design, specs)
        self._tiers = Tiers()
        self._tiers.add(specs)
        policy = self._tiers.policy(tiers)
        start(delivery)
        check_budget(limit)
        self._bound = map_design in BOUND
        self._places: dict[int, _Place] = {}
        files = _open_all(specs)
        try:
            self._core = _core.Core(
                limit=limit,
                design=map_design,
                address_space=max(2 * total_ram(), 2 * limit, 1 << 30),
                slots_bytes=files[0][1].limit if self._bound else 0,
                hard=hard,
                dedupe=dedupe,
                encrypt=_encrypts(encrypt, bool(specs)),
                # USERSWAP_READAHEAD=0: no thread of ours, to see what it does.
                apart=children == "own",
                background=len(os.sched_getaffinity(0)) > 1 and os.environ.get("USERSWAP_READAHEAD") != "0",
            )
            self._core.set_tiers(policy)
            while files:
                self._use(*files.pop(0))
        finally:
            for _, file in files:
                os.close(file.fd)
        self._handler = numpy_hook.new_handler(self._core)
        self._last: Stats | None = None
        # USERSWAP_WATCH=0: the budget stays what it was at first, to see what that does.
        if ram is None and os.environ.get("USERSWAP_WATCH") != "0":
            # Where no thread can be had, or no file is left to open, it stays so, too.
            with contextlib.suppress(OSError):
                self._core.watch(watched_levels(), "/proc", least_budget())
        if control and os.environ.get("USERSWAP_CONTROL") != "0":
            _reachable[next(_numbers)] = self
            _listen()

    @property
    def ram(self) -> int:
        """The budget in bytes. Set it, as ``ram`` above, while the program runs: what is too much leaves at once, and
        from then on the budget is what was said, whatever the machine leaves.

        What was made for the first budget stays: the index of identical folios, which only finds fewer of them when a
        pool has grown, and the buffer of writeback, 1 MiB at most.

        Raises, when set:
            BadSize: a size that can't be read.
            BudgetError: it is too small, and nothing has changed; the text says the least that works.
            ValueError: the pool is closed.
        """
        return self.stats().budget_bytes

    @ram.setter
    def ram(self, size: int | str) -> None:
        limit = parse_size(size, BUDGET)
        check_budget(limit)
        self._core.set_limit(limit)
        self.budget_reason = None
        # Piece by piece, so that Ctrl-C is heeded.
        while self._core.shrink():
            pass

    @property
    def hard(self) -> bool:
        """Whether the program ends rather than exceed the budget when nothing is left to do. May be set."""
        return self._core.hard

    @hard.setter
    def hard(self, hard: bool) -> None:
        self._core.hard = hard

    def _use(self, spec: SwapSpec, file: OpenSwapFile) -> int:
        """Give an open swap file to the core; the number of its place."""
        try:
            place = self._core.swapon(
                file.fd, file.limit, file.name, _directory(file.name), spec.priority, self._tiers.bit(spec.priority)
            )
        except OSError as error:
            if error.errno == errno.EINVAL:
                raise _one_swap_file("of this pool") from None
            raise SwapPathError(
                f"{file.name} would be one swap file too many: a pool and the processes that it was forked from have "
                "16 at most. Take one away before (swapoff), or make one of them larger."
            ) from None
        named = identities(SwapSpec(file.name, None))
        self._places[place] = _Place(spec, file.name, file.direct, frozenset(named))
        if file.network:
            print(
                f"userswap: {file.name} is on a network file system ({file.network}): swap there may be slow, and a "
                "server that goes away stops the program. A local disk is better.",
                file=sys.stderr,
            )
        return place

    def swapon(self, spec: str | os.PathLike[str]) -> SwapFileStats:
        """Use one more swap file from now on, ``"[NAME=]PATH[:SIZE[:PRIO]]"``, while the program runs.

        Raises:
            BadSize: a size that can't be read.
            MapDesignError: the pool's design has one swap file for good.
            SwapPathError: it can't be used, or is used already, or there are as many as there can be.
            TierError: its priority has another name, or its name another priority.
            ValueError: the pool is closed.
        """
        self._open_or_raise()
        if self._bound:
            raise _one_swap_file("of this pool")
        wanted = parse_swap(spec)
        if wanted is None:
            raise SwapPathError("swapon of none is nothing to do: name a directory or a file, for example /var/tmp:8G.")
        refuse_twice(wanted, {key: place.name for place in self._places.values() for key in place.keys})
        self._tiers.add([wanted])
        place = self._use(wanted, open_spec(wanted))
        return next(file for file in self._files() if file[0] == place)[1]

    def swapoff(self, path: str | os.PathLike[str], progress: Callable[[int, int], None] | None = None) -> None:
        """Empty a swap file and do without it, while the program runs; other threads are not held up.

        What is in it moves to other swap files, by priority, and what finds no room there to the compressed pool, as
        far as the budget has room. It costs time for what is in use, not for the size of the file. If it can't be done,
        or is interrupted (Ctrl-C, an exception in `progress`), the file is in use again, and what has moved stays where
        it is.

        What forked processes have in the file they keep: it is given back to the disk when the last of them is done
        with it. A process that is forked meanwhile gets no file of its own in this place.

        Args:
            path: as it was given, or another name of the same place.
            progress: called from this thread, with the bytes that are done and all of them.

        Raises:
            MapDesignError: the pool's design has one swap file for good.
            SwapOffError: there is no room elsewhere, or something in it can't be read; `missing_bytes` says how much.
            SwapPathError: that is no swap file of this pool, or it is being emptied already.
            ValueError: the pool is closed.
        """
        self._open_or_raise()
        place, name = self._place(path)
        try:
            draining = _core.Draining(self._core, place)
        except OSError as error:
            if error.errno == errno.EINVAL:
                raise _one_swap_file("of this pool") from None
            if error.errno == errno.EALREADY:
                raise SwapPathError(f"{name} is being emptied already: wait for that to end.") from None
            raise SwapPathError(f"{name} is no swap file of this program any more.") from None
        try:
            self._drain(draining, place, name, progress)
        finally:
            draining.undo()

    def _finish(self, draining: _core.Draining, place: int) -> bool:
        # Before its number is free: from then on a swapon in another thread may have it.
        file = self._places.pop(place)
        try:
            done = draining.finish()
        except BaseException:
            self._places[place] = file
            raise
        if not done:
            self._places[place] = file
        return done

    def _drain(
        self, draining: _core.Draining, place: int, name: str, progress: Callable[[int, int], None] | None
    ) -> None:
        total = most = draining.left
        full = False
        moved = busy = stuck = unread = waited = 0
        while True:
            done, met, without, error, end = draining.step(full)
            moved, busy, stuck = moved + done, busy + met, stuck + without
            unread = error or unread
            full = full or without > 0
            if not end:
                left = draining.left
                total = max(total, left)
                if progress is not None:
                    progress(total - left, total)
                continue
            left = draining.left
            total = max(total, left)
            if progress is not None:
                progress(total - left, total)
            if left == 0 and self._finish(draining, place):
                return
            if unread and not moved:
                raise SwapOffError(
                    f"{name} can't be emptied: {format_size(left)} in it can't be read ({os.strerror(unread)}). "
                    "It is in use as before.",
                    left,
                )
            if stuck and not moved and not busy:
                raise SwapOffError(
                    f"{name} can't be emptied: {format_size(stuck)} of {format_size(most)} in it find no room in other "
                    "swap files or in the budget. It is in use as before. Add a swap file (swapon), or give it more "
                    "ram.",
                    stuck,
                )
            # Somebody was at it, or it was on its way to the file: soon it is not.
            waited = 0 if moved else waited + 1
            if waited > MOST_WAITS:
                raise SwapOffError(
                    f"{name} can't be emptied: {format_size(left)} in it are in use all the time. It is in use as "
                    "before; try it again later.",
                    left,
                )
            time.sleep(min(waited, 10) / 1000)
            moved = busy = stuck = unread = 0

    def swaps(self) -> list[SwapFileStats]:
        """The pool's swap files, those that are used first at the top."""
        return [file for _, file in self._files()]

    def _files(self) -> list[tuple[int, SwapFileStats]]:
        self._open_or_raise()
        files = []
        for number, state, encrypted, limit, used, read, written in self._core.swaps():
            place = self._places.get(number)
            if place is None:
                continue
            priority = place.spec.priority
            files.append((
                number,
                SwapFileStats(
                    place.name, self._tiers.name(priority), priority, limit, used, state, encrypted, place.direct,
                    read, written,
                ),
            ))  # fmt: skip
        return sorted(files, key=lambda file: (-file[1].priority, file[0]))

    def _place(self, path: str | os.PathLike[str]) -> tuple[int, str]:
        """The number of a swap file's place, and its name."""
        text = os.fspath(path)
        keys = identities(SwapSpec(text, None))
        for number, place in list(self._places.items()):
            if place.name == text or keys & place.keys:
                return number, place.name
        known = ", ".join(file.name for _, file in self._files()) or "none"
        raise SwapPathError(f"{text} is no swap file of this program. It has: {known}.")

    def _open_or_raise(self) -> None:
        if self._last is not None:
            raise ValueError("This pool is closed: make a new one.")

    def _make(self, tiers: str | None, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        self._open_or_raise()
        policy = 0 if tiers is None else self._tiers.policy(tiers)
        return numpy_hook.call_with_handler(self._handler, policy, function, *args, **kwargs)

    def empty(
        self, shape: Shape, dtype: DTypeLike = float, order: Any = "C", *, tiers: str | None = None
    ) -> NDArray[Any]:
        """An array in this pool, not set to anything: it may read as what was freed before. As `numpy.empty`.

        Args:
            tiers: which tiers it may be swapped out to, as for `Pool`; None: those of the pool. A snapshot keeps
                to those of its array.

        Raises:
            MemoryError: no address space.
            TierError: `tiers` names one that there is not.
            ValueError: the pool is closed.
        """
        import numpy as np

        return self._make(tiers, np.empty, shape, dtype, order)

    def zeros(
        self, shape: Shape, dtype: DTypeLike = float, order: Any = "C", *, tiers: str | None = None
    ) -> NDArray[Any]:
        """An array of zeros in this pool; takes no RAM until it is touched. Arguments as `numpy.zeros`."""
        import numpy as np

        return self._make(tiers, np.zeros, shape, dtype, order)

    def full(
        self, shape: Shape, value: Any, dtype: DTypeLike | None = None, order: Any = "C", *, tiers: str | None = None
    ) -> NDArray[Any]:
        """An array filled with one value, in this pool. Arguments as `numpy.full`."""
        import numpy as np

        return self._make(tiers, np.full, shape, value, dtype, order)

    def array(self, data: ArrayLike, dtype: DTypeLike | None = None, *, tiers: str | None = None) -> NDArray[Any]:
        """A copy of `data` in this pool. Arguments as `numpy.array`."""
        import numpy as np

        return self._make(tiers, np.array, data, dtype)

    def snapshot(self, array: np.ndarray[Any, Any]) -> NDArray[Any]:
        """A second array with the content that `array` has now; from here on each goes its own way.

        Nothing is copied but a word for each 64 KiB: both arrays share what is swapped out, folio by folio, until one
        of them writes to it. What is resident and was written to since it came in is compressed first, and stays
        in place. So a snapshot costs time for what is in place (once: the next one finds it clean), and memory for
        what changes.

        Other threads may go on: what they write meanwhile is in the snapshot or not, folio by folio.

        Args:
            array: an array of this pool, or a view of one. The snapshot has its shape, dtype and strides.

        Raises:
            ValueError: the array does not live in this pool, or holds Python objects; or the pool is closed.
            MemoryError: no address space.
            DataLost: swapped data can't be had; the array itself is as it was.

        Example:
            >>> before = pool.snapshot(x)
            >>> x[mask] = 0                        # before[mask] keeps the old values
        """
        import numpy as np

        if array.dtype.hasobject:
            raise ValueError("An array of Python objects can't be shared: they would be counted once and freed twice.")
        address = array.__array_interface__["data"][0]
        region = self._core.region(address) if self._last is None else None
        if region is None:
            raise ValueError(
                "This array does not live in this pool, or the pool is closed: make it with pool.empty, "
                f"pool.array or under install(), with at least {LEAST_ARRAY} bytes."
            )
        start, length = region
        memory = self._make(None, np.empty, length, np.uint8)
        self._core.snapshot(start, memory.__array_interface__["data"][0])
        return np.ndarray(array.shape, array.dtype, memory, address - start, array.strides)

    def owns(self, array: np.ndarray[Any, Any]) -> bool:
        """Whether the array's first byte lives in this pool."""
        return self._last is None and self._core.owns(array.__array_interface__["data"][0])

    def stats(self) -> Stats:
        """Figures now; after `close`, those of that moment."""
        return self._last if self._last is not None else Stats(**self._core.stats())

    def evict(self, bytes: int | str | None = None) -> int:
        """Push cold arrays out of place, all by default; returns the bytes that left."""
        return self._core.evict(1 << 62 if bytes is None else parse_size(bytes))

    def writeback(self, bytes: int | str | None = None) -> int:
        """Move cold data from the compressed pool to the swap file; returns the compressed bytes moved.

        Raises:
            OSError: the swap file can't take it (nothing is lost), or there is none.
        """
        moved = self._core.writeback(1 << 62 if bytes is None else parse_size(bytes))
        if moved < 0:
            raise OSError(-moved, os.strerror(-moved))
        return moved

    def close(self) -> None:
        """No new arrays from here on. What live arrays hold stays valid, and is freed with the last of them."""
        if self._last is None:
            self._last = self.stats()
            self._handler = None
            self._core.close()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._last is not None

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        stats = self.stats()
        state = "closed" if self.closed else f"{format_size(stats.virtual_bytes)} of arrays"
        return f"<userswap.Pool ram={format_size(stats.budget_bytes)}, {state}>"


_installed: list[Installation] = []


def _encrypts(wanted: bool | None, files: bool) -> bool:
    """Whether swap files are encrypted; UnsupportedError if they shall be and can't."""
    if not (ENCRYPT if wanted is None else wanted):
        return False
    from userswap.backends import cipher

    if cipher.start() is not None:
        return True
    if wanted is None:
        return False
    raise UnsupportedError(
        "Swap files can't be encrypted here: there is no libcrypto of OpenSSL 3. Install it (apt-get install libssl3), "
        "or go without (encrypt=False, --no-encrypt)."
    )


class Installation:
    """What `install` returns: ends with a ``with`` block or `uninstall`. Nested ones: the innermost counts."""

    def __init__(self, pool: Pool, least_bytes: int) -> None:
        self.pool = pool
        """Where the arrays live."""
        self.min_array = least_bytes
        _installed.append(self)
        self._activate()

    @staticmethod
    def _activate() -> None:
        if _installed:
            numpy_hook.install(_installed[-1].pool._core, _installed[-1].min_array)
        else:
            numpy_hook.install(None, 0)

    def uninstall(self) -> None:
        """New arrays are ordinary ones again (or the enclosing installation's). Live arrays stay as they are."""
        if self in _installed:
            _installed.remove(self)
            self._activate()
            self.pool.close()

    def __enter__(self) -> Installation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.uninstall()


def install(
    ram: int | str | None = None,
    swap: Specs = None,
    *,
    tiers: str | None = None,
    min_array: int | str = "1MiB",
    hard: bool = False,
    dedupe: bool = True,
    encrypt: bool | None = None,
    map_design: str = "on_demand",
    children: str = "share",
    delivery: str = "auto",
    control: bool = True,
) -> Installation:
    """From here on every NumPy array of `min_array` bytes and more lives in swap, whichever thread makes it.

    Use it as ``with userswap.install(ram="512MiB"):`` or keep what it returns and call ``uninstall()``. Arrays
    that were made inside stay valid after the end.

    Args and errors are those of `Pool`.
    """
    pool = Pool(
        ram, swap, tiers=tiers, min_array=min_array, hard=hard, dedupe=dedupe, encrypt=encrypt, map_design=map_design,
        children=children, delivery=delivery, control=control,
    )  # fmt: skip
    return Installation(pool, pool.min_array)


def snapshot(array: np.ndarray[Any, Any]) -> NDArray[Any]:
    """`Pool.snapshot` in the pool that is installed: by `install`, or by ``userswap run``.

    Raises:
        ValueError: nothing is installed, or the array does not live in its pool.
    """
    if not _installed:
        raise ValueError("No pool is installed: use userswap.install(), `userswap run`, or a pool's own snapshot().")
    return _installed[-1].pool.snapshot(array)
