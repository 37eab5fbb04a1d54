# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is in a stream: frames as values, and the counts of a segment."""

from __future__ import annotations

from xxhash import xxh3_64

from vnb.format import frame as f
from vnb.format.frame import DATA, HOLE, STATE_NAMES, ZERO

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from vnb.format.types import Bytes, Fields, FileFields, Frame, Runs, SameFields


FAILED = f.encode([f.FAILED, None])[0]  # what a command writes that fails before it has written anything


class Raw:
    """
    A frame as it stands in the stream. fields: all before the sum. start: its stream offset.

    header: all of it up to its payload's first byte. payload: valid as long as that of Data is.
    frame: what it says, where that is for whoever takes the segment: None for head, disks, index, end and tail.
    """

    __slots__ = ("fields", "frame", "header", "payload", "start", "sum")

    def __init__(self, fields: Fields, sum_: int, start: int, header: bytes, payload: memoryview | None) -> None:
        self.fields = fields
        self.frame: Frame | None = None
        self.sum = sum_
        self.start = start
        self.header = header
        self.payload = payload


class File:
    """A part of a file that belongs to the domain. fields: role, path, mode, size, offset."""

    __slots__ = ("fields", "payload")

    def __init__(self, fields: FileFields, payload: memoryview) -> None:
        self.fields = fields
        self.payload = payload


class Same:
    """A file that has not changed since the base, which has it. fields: role, path, mode."""

    __slots__ = ("fields",)
    payload = None

    def __init__(self, fields: SameFields) -> None:
        self.fields = fields


class Extents:
    """Extents of one disk. runs: flat list offset, length, state, offset, length, state, ... ascending."""

    __slots__ = ("disk", "runs")

    def __init__(self, disk: int, runs: Runs) -> None:
        self.disk = disk
        self.runs = runs

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        return zip(self.runs[0::3], self.runs[1::3], self.runs[2::3])


class Data:
    """
    Bytes [offset, offset + length) of one disk.

    hash: xxh3-64 of the plain bytes, made where they were read from the source.
    payload: the bytes as codec left them. Valid until the next frame is asked for, unless
    the Reader has a pool: then until they are given back to it.
    position: where the frame starts, in bytes from the start of its segment. size: of the frame.
    """

    __slots__ = ("codec", "disk", "hash", "length", "offset", "payload", "position", "size")

    def __init__(
        self, disk: int, offset: int, length: int, codec: str, hash_: int, payload: Bytes, position: int = 0,
        size: int = 0,
    ) -> None:
        self.disk = disk
        self.offset = offset
        self.length = length
        self.codec = codec
        self.hash = hash_
        self.payload = payload
        self.position = position
        self.size = size


class Other:
    """A frame of a type that this version does not know: passed on by filters, refused by consumers."""

    __slots__ = ("fields", "payload")

    def __init__(self, fields: Fields, payload: memoryview | None) -> None:
        self.fields = fields
        self.payload = payload

    @property
    def optional(self) -> bool:
        """Consumers may skip it."""
        kind: str = self.fields[0]
        return kind.startswith("+")


class Counts:
    """What the end frame says of a segment: frames before it, bytes of each state, bytes stored of data."""

    def __init__(self) -> None:
        self.frames = 0
        self.bytes = {DATA: 0, ZERO: 0, HOLE: 0}
        self.stored = 0
        self._digest = xxh3_64()

    def add(self, sum_: int) -> None:
        self.frames += 1
        self._digest.update(sum_.to_bytes(8, "big"))

    def fields(self) -> dict[str, int]:
        counts = {STATE_NAMES[state]: count for state, count in self.bytes.items()}
        return {"frames": self.frames, **counts, "stored": self.stored, "digest": self._digest.intdigest()}
