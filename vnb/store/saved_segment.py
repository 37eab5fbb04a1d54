# SPDX-License-Identifier: LGPL-2.1-or-later
"""A segment in a file of a set, read from any place in it."""

from __future__ import annotations

import functools
import os

from vnb.base.errors import Error, StreamError, os_error
from vnb.format import frame as f
from vnb.format import index, stream
from vnb.format.frame import FrameError
from vnb.store import chain

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from vnb.base.cache import Cache
    from vnb.format.types import Bytes, Fields


_INDEX_HEADER = 64  # an index frame's header is shorter
_INDEX_FRAME = _INDEX_HEADER + index.ROW_SIZE * index.FRAME_ROWS  # as long as those that vnb writes are


class SavedSegment:
    """
    A segment in a file. head, disks: as chain.outline() leaves them, open() has all of them.

    name: the file's path.

    start, length: where it is in the file, in bytes. fd: opened when first needed, see close().
    """

    def __init__(self, path: str, fd: int, start: int, length: int, last_index: int) -> None:
        self.name = path
        self.start = start
        self.length = length
        self._last_index = last_index
        self._fd: int | None = None
        segment = self._read(fd)
        self.head, self.disks = chain.outline(segment.head, segment.disks)

    @property
    def fd(self) -> int:
        """The file, open for reading. Raises Error."""
        if self._fd is None:
            self._fd = open_file(self.name)
        return self._fd

    def close(self) -> None:
        """Close the file; it is opened again when needed."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def open(self) -> stream.Segment:
        """This segment as vnb.format.stream.Reader gives it, from its first byte. Raises Error if it was replaced."""
        segment = self._read(self.fd)
        if chain.outline(segment.head, segment.disks) != (self.head, self.disks):
            raise Error(self.name, "the file has changed since it was opened")
        return segment

    def _read(self, fd: int) -> stream.Segment:
        try:
            os.lseek(fd, self.start, os.SEEK_SET)
        except OSError as error:
            raise os_error(self.name, error) from None
        reader = stream.Reader(fd, self.name)
        reader.input.offset = self.start
        segment = next(iter(reader), None)
        if segment is None:
            raise self._error("the file was cut short", 0)
        return segment

    def rows(self, cache: Cache | None = None) -> list[index.Rows]:
        """
        A list of vnb.format.index.Rows, one a disk: from the index, or from the frames where there is none.

        cache: keeps pages of the index; without one each look-up fetches its own.
        """
        if not self._last_index:
            return [
                index.in_memory(self.name, disk["size"], self.length, payloads)
                for disk, payloads in zip(self.disks, self._scan())
            ]
        return [
            index.Rows(
                self.name,
                disk["size"],
                self.length,
                [first for first, _, _ in pages],
                functools.partial(self._page, pages),
                cache,
            )
            for disk, pages in zip(self.disks, self._index_pages())
        ]

    def _page(self, pages: list[tuple[int, int, int]], number: int) -> memoryview:
        _, position, size = pages[number]
        return self._index_frame(position, size)[1]

    def frame_at(self, position: int, size: int) -> bytearray:
        """The bytes of the frame at a position in this segment, size bytes of it. Any thread."""
        frame = bytearray(size)
        try:
            have = os.preadv(self.fd, [frame], self.start + position)
        except OSError as error:
            raise os_error(self.name, error, f"stream offset {self.start + position}") from None
        if have != size:
            raise self._error("short record", position)
        return frame

    def _index_pages(self) -> list[list[tuple[int, int, int]]]:
        """
        For each disk a list of (first offset, position, size) of its index frames, in order.

        Every frame is read and checked, so that one that is damaged, and with it the link to those before
        it, is found now and not taken for an empty range later. None is kept.
        """
        pages: list[list[tuple[int, int, int]]] = [[] for _ in self.disks]
        position = self._last_index
        while True:
            fields, rows, size = self._index_frame(position)
            _, disk, _, back = fields
            pages[disk].append((int.from_bytes(rows[:8], "little"), position, size))
            if back == 0:
                break
            if not 0 < back < position:
                raise self._error("an index that points outside", position)
            position -= back
        for list_ in pages:
            list_.reverse()
            if any(first >= after for (first, *_), (after, *_) in zip(list_, list_[1:])):
                raise self._error("an index that descends", self._last_index)
        return pages

    def _index_frame(self, position: int, size: int = _INDEX_FRAME) -> tuple[Fields, memoryview, int]:
        """(fields, rows, size) of the index frame at a position, checked. size: how much to read first."""
        whole = memoryview(self.frame_at(position, min(size, self.length - position)))
        try:
            fields, sum_, header, payload = f.decode(whole[:_INDEX_HEADER])
            if fields[0] != "index" or payload is None or len(fields) != 4:
                raise FrameError("there is no index frame at the place that the tail names")
            _, disk, rows, back = fields
            if not (type(disk) is type(rows) is type(back) is int and 0 <= disk < len(self.disks)):
                raise FrameError("an index of no disk")
            size = header + payload
            if rows == 0 or payload != rows * index.ROW_SIZE or size > self.length - position:
                raise FrameError("an index of the wrong size")
            if size > len(whole):
                whole = memoryview(self.frame_at(position, size))
            f.check_payload_sum("index", whole[:header], sum_, whole[header:size])
        except (FrameError, f.Incomplete) as error:
            raise self._error(error or "short record", position) from None
        return fields, whole[header:size], size

    def _scan(self) -> list[list[Bytes]]:
        """Index payloads made from the headers of the frames; payloads are passed over, not read."""
        collected = _Collected(len(self.disks))
        builder = index.Builder(collected)
        position = 0
        tail = self.length - f.TAIL.size
        while position < tail:
            want = f.MAX_DATA_HEADER
            while True:
                window = memoryview(self.frame_at(position, min(want, self.length - position)))
                try:
                    fields, _sum, size, payload = f.decode(window)
                    break
                except f.Incomplete:
                    if len(window) < want:
                        raise self._error("short record", position) from None
                    want = min(2 * want, f.MAX_HEAD)
                except FrameError as error:
                    raise self._error(error, position) from None
            whole = size + (payload or 0)
            if position + whole > tail:
                raise self._error("a frame that is longer than the segment", position)
            if fields[0] == "data":
                if fields[1] >= len(self.disks):
                    raise self._error("the extent is of a disk that the segment does not have", position)
                builder.data(fields[1], fields[2], fields[3], position, whole)
            elif fields[0] == "extent":
                self._check_runs(fields, position)
                builder.extents(fields[1], fields[2])
            position += whole
        if fields[0] != "end":
            raise self._error('no frame "end" before the tail', position)
        builder.finish()
        return collected.payloads

    def _check_runs(self, fields: Fields, position: int) -> None:
        runs = fields[2] if len(fields) == 3 else None
        if not (
            type(fields[1]) is int and 0 <= fields[1] < len(self.disks) and isinstance(runs, list)
            and len(runs) % 3 == 0 and all(type(word) is int and 0 <= word <= f.MAX_OFFSET for word in runs)
        ):
            raise self._error('malformed frame "extent"', position)

    def _error(self, reason: object, position: int) -> StreamError:
        return StreamError(self.name, reason, f"stream offset {self.start + position}")


class _Collected:
    """Takes index frames in the place of a SegmentWriter, in memory."""

    def __init__(self, disks: int) -> None:
        self.payloads: list[list[Bytes]] = [[] for _ in range(disks)]

    def index(self, disk: int, _rows: int, payload: Bytes) -> None:
        self.payloads[disk].append(payload)


def segments_in_file(path: str) -> list[SavedSegment]:
    """The segments of one file, first to last, found from their tails. Raises Error."""
    fd = open_file(path)
    try:
        return [SavedSegment(path, fd, *place) for place in reversed(list(places(path, fd)))]
    finally:
        os.close(fd)


def open_file(path: str) -> int:
    """A descriptor of a file with segments, for reading. Raises Error."""
    try:
        # Not to wait for whoever may open the other end of a FIFO: it can't be sought in, and is refused.
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise os_error(path, error) from None


def places(path: str, fd: int) -> Iterator[tuple[int, int, int]]:
    """
    Yield (start, length, position of the last index frame or 0) of each segment in a file, last to first.

    Found from the tails alone. Raises Error where there is none.
    """
    try:
        end = os.lseek(fd, 0, os.SEEK_END)
    except OSError as error:
        raise os_error(path, error) from None
    if end == 0:
        raise StreamError(path, "empty file, expected a stream")
    while end > 0:
        size = min(end, f.TAIL.size)
        try:
            tail = os.pread(fd, size, end - size)
            length, back = f.decode_tail(memoryview(tail))
        except OSError as error:
            raise os_error(path, error) from None
        except FrameError as error:
            raise StreamError(path, f"cut short or not a stream ({error})", f"stream offset {end}") from None
        if not f.TAIL.size < length <= end or back > length - f.TAIL.size:
            raise StreamError(path, "the tail points outside", f"stream offset {end}")
        yield end - length, length, length - f.TAIL.size - back if back else 0
        end -= length
