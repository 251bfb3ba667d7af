"""`pin`: memory that stays in place for a while, for what userswap can't see. Speaks to `_core` only.

System calls that libc makes are pinned by themselves. What works on memory behind libc's back has to be told: raw
system calls, io_uring with registered buffers, devices that read and write RAM (GPUs, RDMA), a debugger.
"""

from __future__ import annotations

import os
import threading
import weakref
from types import TracebackType

from userswap import _core
from userswap.errors import BudgetError
from userswap.sizes import format_size

__all__ = ["Pin", "pin"]

_held: weakref.WeakSet[Pin] = weakref.WeakSet()
_lock = threading.RLock()  # held over a fork; again, if a signal handler forks while its thread has it


class Pin:
    """What `pin` returns: the memory of some arrays, in place from `__enter__` to `__exit__`. Can be used again."""

    def __init__(self, *arrays: object) -> None:
        self._arrays = arrays
        self._spans: list[_core.Span] = []

    @property
    def bytes(self) -> int:
        """Bytes of swapped memory that this holds in place now."""
        return sum(span.bytes for span in self._spans)

    def __enter__(self) -> Pin:
        if self._spans:
            raise ValueError("This pin is in use already: make one for each `with` block.")
        spans: list[_core.Span] = []
        try:
            for array in self._arrays:
                span = _core.Span(array)
                span.pin()
                spans.append(span)
        except BaseException as error:
            for span in spans:
                span.unpin()
            if isinstance(error, _core.TooMuch):
                size, room, budget = error.args
                raise BudgetError(
                    f"{format_size(size)} can't be pinned: of a budget of {format_size(budget)} another "
                    f"{format_size(room)} may stay in place. Pin less at a time, or give it more ram."
                ) from None
            raise
        self._spans = spans
        with _lock:
            _held.add(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _lock:
            _held.discard(self)
        spans, self._spans = self._spans, []
        for span in spans:
            span.unpin()

    def _renew(self) -> None:
        for span in self._spans:
            span.renew()


def _after_fork_in_child() -> None:
    # The pins of a word were the parent's: of all its threads, also of those that are not here.
    _lock.release()
    for held in list(_held):
        held._renew()


os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_after_fork_in_child)


def pin(*arrays: object) -> Pin:
    """Keep the memory of arrays in place, all of it, for the time of a `with` block.

    Inside, the kernel and devices can read it (and write it, unless it is read-only) by any way: raw system calls,
    io_uring, ``process_vm_readv``. Outside of such a block they get EFAULT for what is not in place. libc's own
    functions need no pin. Memory that is not userswap's is left as it is.

    The arrays may be resized or freed only after the block. A child that ``os.fork`` makes inside has them pinned, too.

    Args:
        arrays: anything with ``__array_interface__`` or the buffer protocol; also strided views, of which all that is
            between the first byte and the last stays in place.

    Raises:
        TypeError: something that is neither.
        BudgetError: three quarters of a pool's budget would be exceeded by what is pinned (raised by the `with`).
        DataLost: swapped data can't be had.

    Example:
        >>> with userswap.pin(x):
        ...     ring.register_buffers([x])
    """
    return Pin(*arrays)
