# SPDX-License-Identifier: LGPL-2.1-or-later
"""
One segment out of several that follow each other: each block is read once, and the last writer wins.

    merge = Merge(path, "the chain")                the segments, oldest first
    merge.read_head()
    out = writer.segment(merge.head, merge.disks)
    merge.write(out)
    out.end()

A frame that is wanted as a whole is passed on as it is stored, its hash with it. One of which newer segments
cover a part is unpacked and held against its hash, and what is left of it gets a hash of its own:

    increment   ......[   data   ]......
    full        [ data  ][ data ][ data ]
    merged      [cut]|[   data   ]|[data ]
"""

from __future__ import annotations

import heapq
import os
import resource
import secrets

from xxhash import xxh3_64_intdigest

from vnb.base.cache import Cache
from vnb.base.errors import Error, StreamError, os_error
from vnb.format import codec, heads
from vnb.format import frame as f
from vnb.format.frame import FrameError
from vnb.format.index import ROW_WORDS
from vnb.format.runs import Joining
from vnb.format.values import Data
from vnb.store.domain_files import files_of, merged_files
from vnb.store.frame_reader import held_against_row
from vnb.store.overlay import Layers, pieces

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterator, Sequence

    from vnb.format.index import Builder, Rows
    from vnb.format.types import Bytes, Disk, Head, Row, Runs
    from vnb.format.writing import SegmentWriter
    from vnb.store.saved_segment import SavedSegment
    Place = tuple[SavedSegment, int]  # a segment, and the number of a disk in it


PLAIN_CACHE = 16 * f.MiB  # of frames that are cut: their pieces are wanted one soon after the other
INDEX_CACHE = 8 * f.MiB  # of index pages: a quarter of a million extents
WINDOW = 4096  # read for a frame that is not data: most are shorter


class Merge:
    """
    The segments of a path (oldest first, each the base of the next) as one.

    head, disks: of the merged segment. It is full if the first one is. Otherwise it has the
    first one's parent, and the level of the last. A disk is full if it is so in any of them, and one that the
    last does not have is left out. only: names of disks, the others are left out too.
    repack: compress the rest of a cut frame as the frame was; otherwise it stays plain.
    Raises Error for what can't be merged. Nothing is read: of head and disks only what chain.outline() leaves is
    here, until read_head() was called.
    """

    def __init__(
        self, path: Sequence[SavedSegment], name: str, only: Container[str] | None = None, repack: bool = False,
    ) -> None:
        self.path = path
        self.name = name
        self.repack = repack
        for segment in path:
            if segment.head["stage"] != "data":
                raise Error(segment.name, f'holds no data, but {segment.head["stage"]}')
        first, last = path[0].head, path[-1].head
        self.head: Head = {**heads.alone(last), "id": secrets.token_hex(16), "parent": first["parent"]}
        if first["parent"] is None:
            self.head["level"] = "full"
        if "files" in last:
            self.head["files"] = merged_files(path)
        self.disks: list[Disk] = []
        self._sources: list[list[Place]] = []  # of each disk: [(segment, number of the disk in it)], newest first
        for disk in path[-1].disks:
            if only is None or disk["name"] in only:
                sources = self._sources_of(disk["name"])
                segment, number = sources[-1]
                self.disks.append({**disk, "level": segment.disks[number]["level"]})
                self._sources.append(sources)
        self._compressors: dict[str, Callable[[Bytes], tuple[str, Bytes]]] = {"none": lambda plain: ("none", plain)}
        self._buffer = bytearray()  # of the frame that is passed on: always the same, it stays in the processor's cache
        self._plain = Cache(PLAIN_CACHE)
        self._codecs: dict[SavedSegment, str] = {}  # of each segment the codec of the frame that was unpacked last

    def read_head(self) -> None:
        """Have all of head and disks, as the last segment has them. Raises Error."""
        last = self.path[-1].open()
        self.path[-1].close()
        whole = {disk["name"]: disk for disk in last.disks}
        self.head = {**heads.alone(last.head), **self.head}
        self.disks = [{**whole[disk["name"]], **disk} for disk in self.disks]

    def _sources_of(self, name: str) -> list[Place]:
        found = []
        for segment in reversed(self.path):
            number = next((number for number, disk in enumerate(segment.disks) if disk["name"] == name), None)
            if number is None:
                point = segment.head["point"]
                raise Error(segment.name, f"no disk {name} at restore point {point}, but changes of it later")
            found.append((segment, number))
            if segment.disks[number]["level"] == "full":
                return found
        if self.path[0].head["parent"] is None:
            raise Error(self.path[0].name, f"changes of disk {name}, and nothing before them")
        return found

    def write(self, out: SegmentWriter, index: Builder | None = None) -> None:
        """
        Write files, extents and data into out, all but the end.

        index: is told of them. Disks come one after the other. Raises Error.
        """
        _allow_open_files()
        try:
            pages = Cache(INDEX_CACHE)
            rows = {}
            for segment in self.path:
                segment.open()  # the file is held from here on, and is still the one whose head was read
                rows[segment] = segment.rows(pages)
                _refuse_unknown(segment, rows[segment])
            for frame in files_of(self.path):
                out.frame(frame)
            for number, sources in enumerate(self._sources):
                layers = [rows[segment][disk] for segment, disk in sources]
                self._write_disk(_Disk(out, index, number), sources, layers)
        finally:
            for segment in self.path:
                segment.close()

    def _write_disk(self, disk: _Disk, sources: list[Place], layers: list[Rows]) -> None:
        described = self.disks[disk.number]
        name, size, is_full = described["name"], described["size"], described["level"] == "full"
        if is_full:
            segment, number = sources[-1]
            walk = Layers(name, layers, size, segment.disks[number]["size"]).pieces()
        else:
            walk = pieces(layers, 0, size)
        for offset, length, layer, row in walk:
            if row is None:
                if is_full:
                    disk.extent(offset, length, f.HOLE)  # in the tail of a disk that grew
            elif not row[2]:
                disk.extent(offset, length, row[3])
            elif (offset, length) == row[:2]:
                if len(self._buffer) < row[3]:
                    self._buffer = bytearray(row[3])
                data = self._read(sources[layer], name, row, self._buffer)
                codec.check(data, _what(sources[layer], name))
                disk.data(offset, length, data.codec, data.hash, data.payload)
            else:
                kind, whole = self._cut(sources[layer], name, row)
                plain = whole[offset - row[0] : offset - row[0] + length]
                compressed_as, payload = self._compressor(kind)(plain)
                disk.data(offset, length, compressed_as, xxh3_64_intdigest(plain), payload)
        disk.flush()

    def _cut(self, source: Place, name: str, row: Row) -> tuple[str, memoryview]:
        """(codec to pack the rest with, plain bytes) of a frame that is wanted in part."""
        segment, _ = source

        def load() -> memoryview:
            data = self._read(source, name, row, bytearray(row[3]))
            plain = codec.plain(data, _what(source, name))
            if data.codec != "none":
                self._codecs[segment] = data.codec
            return memoryview(plain)

        plain = self._plain.get((segment, row[2]), load)
        was_compressed = row[3] != row[1] + f.DATA_HEADER_SIZES["none"]
        return self._codecs[segment] if self.repack and was_compressed else "none", plain

    def _compressor(self, kind: str) -> Callable[[Bytes], tuple[str, Bytes]]:
        if kind not in self._compressors:
            self._compressors[kind] = codec.compressor(kind)
        return self._compressors[kind]

    def _read(self, source: Place, name: str, row: Row, buffer: bytearray) -> Data:
        """The frame that an index row points to, with a sound sum; its payload is in buffer."""
        segment, number = source
        offset, length, position, size = row
        view = memoryview(buffer)[:size]
        try:
            count = os.preadv(segment.fd, [view], segment.start + position)
        except OSError as error:
            raise os_error(_what(source, name), error, f"offset {offset}") from None
        kind, hash_, payload = held_against_row(_what(source, name), number, row, view[: f.MAX_DATA_HEADER], count)
        return Data(number, offset, length, kind, hash_, view[size - payload :])


class _Disk:
    """Writes what is found of one disk, neighbours with one state as one extent."""

    def __init__(self, out: SegmentWriter, index: Builder | None, number: int) -> None:
        self.out = out
        self.index = index
        self.number = number
        runs = Joining(self._put)
        self.extent, self.flush = runs.add, runs.flush

    def data(self, offset: int, length: int, compressed_as: str, hash_: int, payload: Bytes) -> None:
        self.flush()
        place = self.out.data(self.number, offset, length, compressed_as, hash_, payload)
        if self.index is not None:
            self.index.data(self.number, offset, length, *place)

    def _put(self, runs: Runs) -> None:
        self.out.extents(self.number, runs)
        if self.index is not None:
            self.index.extents(self.number, runs)


def _refuse_unknown(segment: SavedSegment, rows: list[Rows]) -> None:
    """
    Raise an error if a saved segment has frames that its index does not tell of, and that must not be left out.

    Those are data, and frames of a required type that this version does not know. Only what stands between the
    data frames is read.
    """
    places = [_places(each) for each in rows]
    at = 0
    for position, size in places[0] if len(places) == 1 else heapq.merge(*places):
        if position < at:
            raise _unsound(segment, "the index is not sound", position)
        if position > at:
            _check_between(segment, at, position)
        at = position + size
    _check_between(segment, at, segment.length - f.TAIL.size)


def _places(rows: Rows) -> Iterator[tuple[int, int]]:
    """Yield (position, size) of the data frames that the rows of one disk point to."""
    for number in range(len(rows.firsts)):
        words = rows.page(number).rows.cast("Q")
        for position, size in zip(words[2::ROW_WORDS], words[3::ROW_WORDS]):
            if position:
                yield position, size


def _check_between(segment: SavedSegment, at: int, end: int) -> None:
    while at < end:
        want = WINDOW
        while True:
            window = memoryview(segment.frame_at(at, min(want, end - at)))
            try:
                fields, _, size, payload = f.decode(window)
                break
            except f.Incomplete:
                if len(window) < want:
                    raise _unsound(segment, "the index is not sound", at) from None
                want *= 2
            except FrameError as error:
                raise _unsound(segment, error, at) from None
        kind = fields[0]
        if kind == "data":
            raise _unsound(segment, "the index leaves out a frame", at)
        if kind not in ("vnb", "disk", "file", "same", "extent", "index", "end") and not kind.startswith("+"):
            raise _unsound(segment, f'unknown frame type "{kind}"', at)
        at += size + (payload or 0)


def _unsound(segment: SavedSegment, reason: object, position: int) -> StreamError:
    return StreamError(segment.name, reason, f"stream offset {segment.start + position}")


def _allow_open_files() -> None:
    """Each segment is an open file, and a chain may be longer than the usual 1024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _what(source: Place, name: str) -> str:
    return f"{source[0].name}: {name}"
