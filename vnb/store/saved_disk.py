# SPDX-License-Identifier: LGPL-2.1-or-later
"""Saved disks as they were at a point, read from the segments that lead there: any bytes, every one checked."""

from __future__ import annotations

import functools
import threading
from bisect import bisect_right

from vnb.base.cache import Cache
from vnb.base.errors import Error
from vnb.format import frame as f
from vnb.store import backupset, chain
from vnb.store.frame_reader import SavedData, Source
from vnb.store.overlay import Layers

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vnb.format.index import Rows
    from vnb.format.types import Head
    from vnb.store.overlay import Piece
    from vnb.store.saved_segment import SavedSegment


DATA_CACHE = 8 * f.MiB  # of unpacked frames: readers that go forwards have done with them soon
INDEX_CACHE = 4 * f.MiB  # of index pages: 128 thousand extents
WINDOW_CACHE = 4 * f.MiB  # of what is made of them: ten thousand pieces
WINDOW = 1 * f.MiB  # bytes of disk that are looked up at once
PIECE_SIZE = 400  # bytes that Python takes for a piece
MAX_EXTENTS = 1024  # of one answer: more would keep Python's lock for milliseconds
MAX_PIECES = 4 * MAX_EXTENTS  # looked at for one answer: neighbours with one state are one extent
_ZEROES = memoryview(bytes(f.MiB))


class Images:
    """
    The saved disks in sets and files, at all their points.

    operands: sets and files. until: the point of disks named without one.
    disks: no other disk is here. all_points: False for that point alone. cache: bytes of
    unpacked frames to keep.
    damaged: files that are left out.
    Raises Error if there is no chain to that point, or no such disk.
    All methods may be called from any thread.
    """

    def __init__(
        self, operands: Sequence[str], until: str | None = None, disks: Sequence[str] = (), all_points: bool = True,
        cache: int = DATA_CACHE,
    ) -> None:
        self.name = operands[0] if len(operands) == 1 else "the chain"
        self.segments, self.damaged = backupset.some(operands)
        self.path = chain.path(self.segments, self.name, until, self.damaged)
        self.point = self.path[-1].head["point"]
        here = [disk["name"] for disk in self.path[-1].disks]
        for disk in disks:
            if disk not in here:
                there = ", ".join(here) or "none"
                raise Error("--disk", f"no disk {disk} at restore point {self.point}, there is {there}")
        self.disks = list(dict.fromkeys(disks)) or here
        self.default = self.disks[0] if disks or len(here) == 1 else None
        self._only = set(disks)
        self._all_points = all_points
        self._images: dict[tuple[str, str], Image] = {}
        self._opened: dict[SavedSegment, list[tuple[Source, Rows]]] = {}  # SavedSegment: for each disk (Source, Rows)
        self._lock = threading.Lock()
        self._data = SavedData(cache)
        self._pages = Cache(INDEX_CACHE)
        self._windows = Cache(WINDOW_CACHE)

    def names(self) -> list[str]:
        """The names of all images: the disks at the point chosen, then those at each other point, newest first."""
        names = list(self.disks)
        if not self._all_points:
            return names
        whole = set(chain.restorable(self.segments)) - {self.point}
        others = {point: segment for point, segment in chain.points(self.segments).items() if point in whole}
        for segment in sorted(others.values(), key=lambda segment: segment.head["created"], reverse=True):
            for disk in segment.disks:
                if not self._only or disk["name"] in self._only:
                    names.append(f'{disk["name"]}@{segment.head["point"]}')
        return names

    def open(self, name: str) -> Image:
        """The Image called DISK, at the point chosen, or DISK@POINT; the default one without a name. Raises Error."""
        if not name:
            if self.default is None:
                raise Error(self.name, f"one of several disks has to be named: {', '.join(self.disks)}")
            name = self.default
        path = self.path
        disk = name
        if disk not in self.disks:
            disk, _, until = name.partition("@")
            if not (until and self._all_points) or self._only and disk not in self._only:
                raise Error(self.name, f"no disk {name} at restore point {self.point}")
            path = chain.path(self.segments, self.name, until, self.damaged)
        with self._lock:
            key = disk, path[-1].head["point"]
            if key not in self._images:
                self._images[key] = self._open(disk, path)
            return self._images[key]

    def _open(self, name: str, path: list[SavedSegment]) -> Image:
        sources = []
        rows = []
        for segment in reversed(path):
            number = next((number for number, disk in enumerate(segment.disks) if disk["name"] == name), None)
            if number is None:
                raise Error(self.name, f'no disk {name} at restore point {segment.head["point"]}')
            if segment not in self._opened:
                segment.open()  # the file is held from here on, and is still the one whose head was read
                disks = enumerate(segment.rows(self._pages))
                self._opened[segment] = [(Source(segment, disk), rows_) for disk, rows_ in disks]
            source, rows_ = self._opened[segment][number]
            sources.append(source)
            rows.append(rows_)
            if segment.disks[number]["level"] == "full":
                break
        size = rows[0].disk_size
        layers = Layers(name, rows, size, rows[-1].disk_size)
        return Image(name, path[-1].head, layers, sources, self._data, self._windows)


class Image:
    """
    One disk at one point. size: in bytes. head: of the segment that leads there.

    sources: one a layer. data: reads them. windows: keeps a Window of each place that was read lately.
    """

    def __init__(
        self, name: str, head: Head, layers: Layers, sources: list[Source], data: SavedData, windows: Cache,
    ) -> None:
        self.name = name
        self.head = head
        self.size = layers.size
        self._layers = layers
        self._sources = sources
        self._data = data
        self._windows = windows

    def read_into(self, view: memoryview, offset: int) -> None:
        """
        Fill view with the bytes from offset on.

        Whatever is touched is held against the hash that was made at the source. Raises Error; then view has nothing
        that may be used.
        """
        end = offset + len(view)
        for at, length, layer, row in self._pieces(offset, end):
            part = view if length == len(view) else view[at - offset : at - offset + length]
            if row is None or not row[2]:
                _zero(part)
            else:
                self._data.read(part, at - row[0], self._sources[layer], row, len(view))

    def prefetch(self, offset: int, length: int) -> None:
        """Have the frames of a range in the cache, as far as half of it may be used for that."""
        for _, _, layer, row in self._pieces(offset, min(offset + min(length, self._data.cache_size // 2), self.size)):
            if row is not None and row[2]:
                self._data.plain(self._sources[layer], row)

    def extents(self, offset: int, length: int, most: int = MAX_EXTENTS) -> list[tuple[int, int, int]]:
        """
        A list of (offset, length, state) from offset on, contiguous, neighbours with one state merged.

        It may end before the range does; never beyond it. most: how many of them are wanted.
        state: see vnb.format.frame. Raises Error.
        """
        found: list[tuple[int, int, int]] = []
        current = None
        for seen, (at, size, _, row) in enumerate(self._layers.pieces(offset, offset + length)):
            state = f.HOLE if row is None else f.DATA if row[2] else row[3]
            if seen >= MAX_PIECES or state != current and len(found) == most:
                break
            if state == current:
                found[-1] = found[-1][0], found[-1][1] + size, state
            else:
                found.append((at, size, state))
                current = state
        return found

    def _pieces(self, offset: int, end: int) -> Iterator[Piece]:
        """As Layers.pieces, from the windows that are remembered."""
        while offset < end:
            number = offset // WINDOW
            window = self._windows.get((self, number), functools.partial(Window, self._layers, number))
            if offset >= window.end:
                yield from self._layers.pieces(offset, end)
                return
            pieces = window.pieces
            at = bisect_right(window.offsets, offset) - 1
            start, length, layer, row = pieces[at]
            length -= offset - start
            while offset + length < end:
                yield offset, length, layer, row
                offset += length
                at += 1
                if at == len(pieces):
                    break
                _, length, layer, row = pieces[at]
            else:
                yield offset, end - offset, layer, row
                return


class Window:
    """
    The pieces of a part of a disk, from offset number * WINDOW on.

    To look into every layer costs more than to read a few KiB, and readers come back, or are near each other.
    end: where the pieces end, in bytes; beyond the window, or before its end if there are too many.
    """

    __slots__ = ("end", "nbytes", "offsets", "pieces")

    def __init__(self, layers: Layers, number: int) -> None:
        limit = min((number + 1) * WINDOW, layers.size)
        self.pieces: list[Piece] = []
        # Up to the end of the disk: the last piece is to be whole, so that its frame is read in one go.
        for piece in layers.pieces(number * WINDOW, layers.size):
            self.pieces.append(piece)
            self.end = piece[0] + piece[1]
            if self.end >= limit or len(self.pieces) == MAX_PIECES:
                break
        self.offsets = [piece[0] for piece in self.pieces]
        self.nbytes = PIECE_SIZE * len(self.pieces)


def _zero(view: memoryview) -> None:
    for at in range(0, len(view), len(_ZEROES)):
        part = view[at : at + len(_ZEROES)]
        part[:] = _ZEROES[: len(part)]
