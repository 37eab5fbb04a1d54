# SPDX-License-Identifier: LGPL-2.1-or-later
"""
The index of a segment: where each frame of each disk is, for readers that seek.

A row is four 64-bit words, little-endian: offset, length, position, size. position is where the data frame
starts, in bytes from the start of the segment, and size is the bytes of the whole frame. For a zero or hole
extent position is 0 and size is the state. Rows of one disk ascend and do not overlap.
"""

from __future__ import annotations

import sys
from array import array
from bisect import bisect_right
from struct import Struct

from vnb.base.errors import StreamError
from vnb.format import frame as f

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Protocol

    from vnb.base.cache import Cache
    from vnb.format.types import Bytes, Row, Runs


ROW_WORDS = 4
ROW_SIZE = 8 * ROW_WORDS
_ROW = Struct(f"={ROW_WORDS}Q")
FRAME_ROWS = 4096  # rows of one index frame: 128 KiB, gathered for each disk
MAX_SIZE = f.MAX_DATA_HEADER + f.MAX_DATA  # of what a row points to
MAX_WAITING = 8 * FRAME_ROWS  # rows gathered over all disks: 1 MiB


if TYPE_CHECKING:
    class Out(Protocol):
        """Takes index frames: vnb.format.writing.SegmentWriter."""

        def index(self, disk: int, rows: int, payload: Bytes) -> None: ...


class Builder:
    """Gathers rows and writes them as index frames into out as it goes."""

    def __init__(self, out: Out) -> None:
        self.out = out
        self._rows: dict[int, array[int]] = {}
        self._waiting = 0

    def data(self, disk: int, offset: int, length: int, position: int, size: int) -> None:
        """A data frame was written at position."""
        self._add(disk, offset, length, position, size)

    def extents(self, disk: int, runs: Runs) -> None:
        """Extents were written: flat list of offset, length, state. Neighbours with one state share a row."""
        rows = self._rows.setdefault(disk, array("Q"))
        for offset, length, state in zip(runs[0::3], runs[1::3], runs[2::3]):
            if rows and rows[-1] == state and rows[-2] == 0 and rows[-4] + rows[-3] == offset:
                rows[-3] += length
            else:
                self._add(disk, offset, length, 0, state)
                rows = self._rows.setdefault(disk, array("Q"))

    def finish(self) -> None:
        """Write the rows that are still here."""
        for disk in sorted(self._rows):
            self._write(disk)

    def _add(self, disk: int, offset: int, length: int, position: int, size: int) -> None:
        rows = self._rows.setdefault(disk, array("Q"))
        if len(rows) >= FRAME_ROWS * ROW_WORDS:
            self._write(disk)
            rows = self._rows.setdefault(disk, array("Q"))
        elif self._waiting >= MAX_WAITING:
            self.finish()
            rows = self._rows.setdefault(disk, array("Q"))
        rows.extend((offset, length, position, size))
        self._waiting += 1

    def _write(self, disk: int) -> None:
        rows = self._rows.get(disk)
        if rows:
            self._waiting -= len(rows) // ROW_WORDS
            self._rows[disk] = array("Q")
            if sys.byteorder == "big":
                rows.byteswap()
            self.out.index(disk, len(rows) // ROW_WORDS, rows.tobytes())


class Rows:
    """
    The rows of one disk in one segment, ascending: what this segment says of any range.

    They come in pages, one an index frame, and a page is fetched when it is needed: a disk of ten million
    extents takes no more memory than the pages that its readers are at, and those that the cache may keep.

    name: of the segment, for messages. firsts: the offset of the first row of each page.
    load: function (page number) -> its rows as they are stored; it may be called from any thread.
    cache: keeps pages; without one they are fetched for each lookup.
    Raises StreamError for a row that overlaps, descends or points outside, when a reader comes to it.
    """

    def __init__(
        self, name: str, disk_size: int, segment_length: int, firsts: Sequence[int], load: Callable[[int], Bytes],
        cache: Cache | None = None,
    ) -> None:
        self.name = name
        self.disk_size = disk_size
        self.segment_length = segment_length
        self.firsts = firsts
        self._load = load
        self._cache = cache
        self._latest: Page | None = None  # most look-ups are near the one before

    def cursor(self) -> Cursor:
        """A Cursor, to look up ascending offsets."""
        return Cursor(self)

    def lookup(self, offset: int, end: int) -> Iterator[Row]:
        """Yield (offset, length, position, size) of all rows that meet [offset, end), ascending and whole."""
        cursor = Cursor(self)
        row = cursor.at(offset)
        while row is not None and row[0] < end:
            yield row
            row = cursor.at(row[0] + row[1])

    def page(self, number: int) -> Page:
        """A Page, that any number of readers may share."""
        page = self._latest
        if page is None or page.number != number:
            if self._cache is None:
                page = self._fetch(number)
            else:
                page = self._cache.get((self, number), lambda: self._fetch(number))
            self._latest = page
        return page

    def _fetch(self, number: int) -> Page:
        return Page(number, self._load(number))


class Page:
    """The rows of one index frame. rows: bytes in the machine's own order. offsets: the first word of each."""

    __slots__ = ("nbytes", "number", "offsets", "rows")

    def __init__(self, number: int, payload: Bytes) -> None:
        self.number = number
        self.rows = memoryview(_native(payload)).cast("B")
        self.offsets = self.rows.cast("Q")[::ROW_WORDS]
        self.nbytes = len(self.rows)


class Cursor:
    """
    Where in the rows of one disk in one segment a reader is that goes forwards.

    at() costs little when the next offset is in this row or the next one, and a bisection when it is not.
    """

    __slots__ = ("_at", "_end", "_page", "_row", "_rows")

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._page: Page | None = None
        self._at = 0  # bytes into the page
        self._row: Row | None = None
        self._end = -1  # where the row ends, in the disk

    def at(self, offset: int) -> Row | None:
        """
        The first row that ends after offset, as (offset, length, position, size), or None if there is none.

        offset must not be less than it was the last time.
        """
        if offset < self._end:
            return self._row
        if self._row is not None:
            self._step()
        if offset >= self._end:
            self._seek(offset)
            while offset >= self._end:
                self._step()
        return self._row

    def _seek(self, offset: int) -> None:
        number = bisect_right(self._rows.firsts, offset) - 1
        if self._page is None or number > self._page.number:
            if not self._open(max(0, number)):
                return
        elif number < self._page.number:
            return  # the page's first row comes after offset
        assert self._page is not None
        at = max(0, ROW_SIZE * (bisect_right(self._page.offsets, offset) - 1))
        if at > self._at:
            self._at = at
            self._take()

    def _step(self) -> None:
        assert self._page is not None
        self._at += ROW_SIZE
        if self._at >= self._page.nbytes:
            if not self._open(self._page.number + 1):
                return
            self._at = 0
        self._take()

    def _open(self, number: int) -> bool:
        """Go to before the first row of a page; False if there is no such page."""
        if number < len(self._rows.firsts):
            self._page = self._rows.page(number)
            self._at = -1
            return True
        self._row = None
        self._end = f.MAX_OFFSET + 1  # nothing is sought after this
        return False

    def _take(self) -> None:
        assert self._page is not None
        offset, length, position, size = row = _ROW.unpack_from(self._page.rows, self._at)
        end = offset + length
        if (
            offset < self._end
            or length == 0
            or end > self._rows.disk_size
            or size > MAX_SIZE
            or not (position + size < self._rows.segment_length if position else size in (f.ZERO, f.HOLE))
        ):
            raise StreamError(self._rows.name, "the index is not sound", f"offset {offset}")
        self._row = row
        self._end = end


def in_memory(name: str, disk_size: int, segment_length: int, payloads: Sequence[Bytes]) -> Rows:
    """Rows of one disk from the payloads, in stream order, of its index frames, all of them here."""
    firsts = [_ROW.unpack_from(_native(payload))[0] for payload in payloads]
    return Rows(name, disk_size, segment_length, firsts, payloads.__getitem__)


def _native(payload: Bytes) -> Bytes | array[int]:
    """Rows in the machine's own byte order."""
    if sys.byteorder == "little":
        return payload
    words = array("Q")
    words.frombytes(payload)
    words.byteswap()
    return words
