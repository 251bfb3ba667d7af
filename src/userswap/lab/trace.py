"""Trace files: what a program asked of the swap layer, in the order in which it can be asked again.

    userswap trace 1\n                  what it is, and the version of the format
    {"program": "sort.py", ...}\n       for people: JSON in one line
    body                                zlib: the columns one after the other, each as planes of its bytes,
                                        refs and times as differences, times in ticks
    check                               CRC-32 of everything before it, 4 bytes

Events and their columns are explained in ``swap/traced.pxd``. Touches files only where it is given a path.
"""

import json
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from userswap.errors import TraceError
from userswap.swap.map import SLOT
from userswap.swap.traced import EVENTS

__all__ = ["Trace", "find", "read", "shipped"]

VERSION = 1
MAGIC = b"userswap trace "
TICK_NS = 1000
TRACES = Path(__file__).parent / "traces"
COLUMNS = (("kinds", "<u1"), ("types", "<u1"), ("threads", "<u2"), ("refs", "<u4"), ("times", "<u4"), ("values", "<i8"))
KIND = {name: number for number, name in enumerate(EVENTS)}
BEGINS = np.isin(np.arange(256), [KIND["alloc"], KIND["run"], KIND["more"]])
LONGEST = 1 << 32  # ticks between two events: more than an hour is as long

Numbers = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Trace:
    """The events of one program: a column each, and what there is to say about it."""

    program: str
    """Name of the program's file."""
    budget_bytes: int
    folio_bytes: int
    cut: bool
    """The recording ended before the program did: there was no room for more."""
    kinds: Numbers
    types: Numbers
    threads: Numbers
    refs: Numbers
    times: Numbers
    """Nanoseconds since the start."""
    values: Numbers

    @cached_property
    def counts(self) -> dict[str, int]:
        """How many events there are, by kind."""
        found = np.bincount(self.kinds, minlength=len(EVENTS))
        return {name: int(found[i]) for i, name in enumerate(EVENTS) if found[i]}

    @cached_property
    def live(self) -> Numbers:
        """How many ids are live after each event."""
        return np.cumsum(BEGINS[self.kinds].astype(np.int64) - (self.kinds == KIND["free"]))

    @property
    def live_at_end(self) -> int:
        """How many ids are live at the end."""
        return int(self.live[-1]) if len(self.kinds) else 0

    @property
    def peak_ids(self) -> int:
        """How many ids were live at once, at most."""
        return int(self.live.max()) if len(self.kinds) else 0

    @property
    def slots_end(self) -> int:
        """One past the highest 4 KiB slot of a swap file that anything was in."""
        inside = (self.types >> 4) == SLOT
        offsets, lengths = self.values[inside] & (1 << 35) - 1, (self.values[inside] >> 35 & 31) + 1
        return int((offsets + lengths).max()) if len(offsets) else 0

    def encode(self) -> bytes:
        """The file, as bytes."""
        body = b""
        packer = zlib.compressobj(9)
        for name, kind in COLUMNS:
            column = getattr(self, name)
            if name == "times":
                column = np.minimum(np.diff(column // TICK_NS, prepend=0), LONGEST - 1)
            elif name == "refs":
                column = np.diff(column.astype(np.uint32), prepend=np.uint32(0))
            body += packer.compress(planes(column.astype(kind)))
        body += packer.flush()
        header = {
            "program": self.program,
            "budget_bytes": self.budget_bytes,
            "folio_bytes": self.folio_bytes,
            "cut": self.cut,
            "tick_ns": TICK_NS,
            "events": len(self.kinds),
            "counts": self.counts,
            "threads": len(np.unique(self.threads)),
            "peak_ids": self.peak_ids,
            "live_at_end": self.live_at_end,
            "bytes": len(body),
        }
        whole = MAGIC + f"{VERSION}\n{json.dumps(header)}\n".encode() + body
        return whole + zlib.crc32(whole).to_bytes(4, "little")

    @classmethod
    def recorded(cls, pool: Any, program: str) -> "Trace":
        """End the recording of a pool whose map is traced, and return what it recorded."""
        columns, cut = pool._core.trace()
        stats = pool.stats()
        return cls.of_columns(columns, cut, program, stats.budget_bytes)

    @classmethod
    def of_columns(cls, columns: tuple[bytes, ...], cut: bool, program: str, budget_bytes: int) -> "Trace":
        """What a traced map returned, as a trace."""
        from userswap._core import FOLIO

        kinds = ("<u1", "<u1", "<u2", "<u4", "<i8", "<i8")
        arrays = [np.frombuffer(column, kind) for column, kind in zip(columns, kinds, strict=True)]
        return cls(program, budget_bytes, FOLIO, cut, *arrays)


def planes(column: Numbers) -> bytes:
    """The lowest byte of each number, then the next of each, and so on: the high ones compress to nothing."""
    return column.view(np.uint8).reshape(-1, column.itemsize).T.tobytes()


def read(path: Path) -> Trace:
    """Read a trace file.

    Raises:
        TraceError: it can't be read, is no trace, of another version, cut off or damaged; the text says which.
    """
    try:
        whole = path.read_bytes()
    except OSError as error:
        raise TraceError(f"The trace {str(path)!r} cannot be read ({error.strerror}).") from None
    return decode(whole, str(path))


def decode(whole: bytes, name: str) -> Trace:
    """Read a trace from bytes; `name` is for messages. Raises TraceError."""
    cut_off = TraceError(f"The trace {name!r} is cut off: copy it again, or record it again.")
    damaged = TraceError(f"The trace {name!r} is damaged: copy it again, or record it again.")
    if not whole.startswith(MAGIC):
        raise (
            cut_off
            if whole and MAGIC.startswith(whole)
            else TraceError(f"{name!r} is no trace: userswap run --trace FILE makes one.")
        )
    version, newline, rest = whole[len(MAGIC) :].partition(b"\n")
    if version != b"%d" % VERSION:
        if not newline and (not version or version.isdigit()):
            raise cut_off
        found = version[:20].decode("ascii", "replace")
        raise TraceError(
            f"The trace {name!r} is of version {found}, this userswap reads version {VERSION}: record it again."
        )
    line, newline, rest = rest.partition(b"\n")
    if not newline:
        raise cut_off
    try:
        header: Any = json.loads(line)
        length, events = header["bytes"], header["events"]
        if len(rest) < length + 4:
            raise cut_off
        if len(rest) != length + 4 or zlib.crc32(whole[:-4]) != int.from_bytes(whole[-4:], "little"):
            raise damaged
        body = zlib.decompress(rest[:-4])
        trace = unpack(header, body, events)
    except (ValueError, KeyError, TypeError, OverflowError, zlib.error):
        raise damaged from None
    told = (trace.counts, trace.live_at_end, trace.peak_ids)
    if told != (header.get("counts"), header.get("live_at_end"), header.get("peak_ids")):
        raise damaged
    return trace


def unpack(header: Any, body: bytes, events: int) -> Trace:
    """The trace of a header and a body that was decompressed. ValueError where they don't fit each other."""
    if len(body) != events * sum(np.dtype(kind).itemsize for _, kind in COLUMNS):
        raise ValueError("another number of events")
    at = 0
    columns: dict[str, Numbers] = {}
    for name, kind in COLUMNS:
        size = np.dtype(kind).itemsize
        plane = np.frombuffer(body, np.uint8, events * size, at).reshape(size, events)
        columns[name] = np.ascontiguousarray(plane.T).view(kind).reshape(events)
        at += events * size
    columns["refs"] = np.cumsum(columns["refs"], dtype=np.uint32)
    columns["times"] = np.cumsum(columns["times"], dtype=np.int64) * int(header["tick_ns"])
    if events and (int(columns["kinds"].max()) >= len(EVENTS) or int(columns["refs"].max()) >= events):
        raise ValueError("events of no kind, or for no holder")
    return Trace(
        str(header["program"]), int(header["budget_bytes"]), int(header["folio_bytes"]), bool(header["cut"]), **columns
    )


def shipped() -> dict[str, Path]:
    """The traces that userswap comes with, by name."""
    return {path.stem: path for path in sorted(TRACES.glob("*.trace"))}


def find(name: str) -> Trace:
    """Read a trace: a file, or one that userswap comes with. Raises TraceError."""
    path = Path(name)
    if not path.exists() and name in shipped():
        return read(shipped()[name])
    if not path.exists():
        raise TraceError(f"There is no trace {name!r}: name a file, or one of {', '.join(shipped())}.")
    return read(path)
