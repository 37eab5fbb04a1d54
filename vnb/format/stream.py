# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Streams: segments of frames from and to file descriptors, in bounded memory.

    for segment in Reader(0, "stdin"):        head and disks are read and checked
        out = writer.segment(segment.head, segment.disks)
        for frame in segment:                 File, Extents, Data, Other, in stream order
            ...
        out.end()                             only when all before it succeeded

    for raw in reader.raws():                 every frame of the stream, for whoever shows or passes on its bytes

A Reader yields nothing that it did not check: sums, digest, counts, order, that extents ascend, stay
inside their disk and do not overlap, and that those of a full disk leave nothing out. What it does not
check is the hash of a data frame: whoever uses the bytes does that, by vnb.format.codec.plain().
"""

from __future__ import annotations

import functools

from vnb.base.errors import Followed, StreamError
from vnb.format import frame as f
from vnb.format.domain_files import DomainFiles
from vnb.format.frame import DATA, FrameError, Incomplete
from vnb.format.index import ROW_SIZE
from vnb.format.input import Input, is_pipe
from vnb.format.rules import STAGES, checked_disk, checked_head
from vnb.format.values import FAILED, Counts, Data, Extents, Other, Raw

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vnb.format.types import Buffers, Disk, Fields, Frame, Head, Wait



class Reader:
    """
    Iterate over the segments of a stream.

    fd: any file descriptor. name: for messages.
    stage: refuse a segment that is not at this stage, see STAGES.
    consumer: refuse frames of a required type that this version does not know.
    pool: where payloads go; see Data.
    begun: is given each head, before anything that follows it is read.
    wait: see Input.
    Raises StreamError for all that is wrong with the input, Error for the operating system's failures.
    """

    def __init__(
        self, fd: int, name: str, stage: str | None = None, consumer: bool = False, pool: Buffers | None = None,
        begun: Callable[[Head], None] | None = None,
        wait: Wait | None = None,
    ) -> None:
        self.input = Input(fd, name, wait)
        self.stage = stage
        self.consumer = consumer
        self.pool = pool
        self.begun = begun
        self.segment: Segment | None = None  # the one that is read
        self._own = bytearray()

    def __iter__(self) -> Iterator[Segment]:
        while self.more():
            segment = Segment(self)
            segment.front.extend(segment.begin())
            yield segment
            segment.finish()

    def raws(self) -> Iterator[Raw]:
        """Yield all frames of all segments, head and tail too, each when it was checked: segment is the one."""
        while self.more():
            segment = Segment(self)
            yield from segment.begin()
            yield from segment.raws()

    def more(self) -> bool:
        """Whether a segment starts here: the end of the input is no segment, and all else a StreamError."""
        first = self.input.offset
        window = self.input.fill(len(f.HEAD_MAGIC))
        if not window:
            if first == 0:
                before = ": the command before this one has written nothing" if is_pipe(self.input.fd) else ""
                raise StreamError(self.input.name, f"empty input, expected a stream{before}")
            head = self.segment.head if self.segment is not None else None
            if head is not None and "next" in head:  # who wrote it may have ended between two segments
                raise self.error(f'the input ends at {head["point"]}, but {head["next"]} was to follow')
            return False
        if window[: len(f.HEAD_MAGIC)] != f.HEAD_MAGIC:
            if first == 0 and self.input.fill(len(FAILED)) == FAILED:
                raise Followed(self.input.name, "the command that was to write this has failed")
            expected = "a stream" if first == 0 else "another segment"
            raise self.error(f"not {expected} of vnb (it starts with {bytes(window[:5]).hex(' ')})")
        return True

    def error(self, reason: object, offset: int | None = None) -> StreamError:
        """A StreamError at a stream offset, by default that of the next byte."""
        return StreamError(self.input.name, reason, f"stream offset {self.input.offset if offset is None else offset}")

    def next_frame(self) -> tuple[Fields, int, int, int | None, bytes]:
        """(fields, sum, size, payload size or None, header bytes): the next frame up to its payload."""
        want = f.MAX_DATA_HEADER
        while True:
            window = self.input.fill(want)
            try:
                fields, sum_, size, payload = f.decode(window)
            except Incomplete:
                if len(window) < want:
                    raise self.error(
                        f"short record: the input ends after {len(window)} bytes of it" if window else
                        "the input ends before the end of the segment"
                    ) from None
                want = min(2 * len(window), f.MAX_HEAD)
                continue
            except FrameError as error:
                raise self.error(error) from None
            header = bytes(window[:size])
            window.release()
            self.input.skip(size)
            return fields, sum_, size, payload, header

    def raw(self) -> Raw:
        """The next frame with a sound sum. Whether it may stand here, Segment tells."""
        start = self.input.offset
        fields, sum_, _size, payload_size, header = self.next_frame()
        payload = None
        if payload_size is not None:
            payload = self.payload(payload_size, start)
            if fields[0] != "data":
                try:
                    f.check_payload_sum(fields[0], header, sum_, payload)
                except FrameError as error:
                    raise self.error(error, start) from None
        return Raw(fields, sum_, start, header, payload)

    def payload(self, size: int, start: int) -> memoryview:
        """The payload that comes next. start: of its frame, for messages."""
        if self.pool is not None:
            view = self.pool.take(size)
        else:
            if len(self._own) < size:
                self._own = bytearray(size)
            view = memoryview(self._own)[:size]
        have = self.input.read_into(view)
        if have < size:
            raise self.error(f"short record: expected {size} bytes, got {have}", start)
        return view


class Segment:
    """
    One segment: head and disks are there at once; iterate, once, for its frames.

    front: the frames of head and disks. positions: of each disk, where the last extent that was read ends.
    counts: of all so far. end and length, in bytes of the whole segment, are there after the last frame. Index frames
    are checked for their place and not yielded as frames: a stage that keeps an index makes its own.
    """

    head: Head
    positions: list[int]
    _pending: Raw  # the first frame behind the disks

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        reader.segment = self
        self.start = reader.input.offset
        self.counts = Counts()
        self.end: dict[str, int] | None = None
        self.length: int | None = None
        self.last_index = 0  # where the last index frame starts, in the stream; 0: there was none
        self.disks: list[Disk] = []
        self.front: list[Raw] = []
        self._raws = self._iterate()

    def __iter__(self) -> Iterator[Frame]:
        pool = self.reader.pool
        for raw in self._raws:
            if raw.frame is not None:
                yield raw.frame
            elif raw.payload is not None and pool is not None:
                pool.give(raw.payload)  # of an index frame: nobody else sees it

    def raws(self) -> Iterator[Raw]:
        """Iterate, once, for all frames behind the disks, index, end and tail too."""
        return self._raws

    def begin(self) -> Iterator[Raw]:
        """Read the head and the disks; yield their frames."""
        yield self._read_head()
        self._files = DomainFiles(self.head)
        yield from self._read_disks()
        self.positions = [0] * len(self.disks)
        self._covered = [0] * len(self.disks)

    def _iterate(self) -> Iterator[Raw]:
        raw = self._pending
        in_files = True
        while True:
            kind = raw.fields[0]
            if kind != "file":
                self._files.check_whole(self._error_at(raw))
            if kind == "data":
                raw.frame = self._data(raw)
            elif kind == "extent":
                raw.frame = self._extents(raw)
            elif kind == "file":
                if not in_files:
                    raise self.reader.error('frame "file" after the first extent', raw.start)
                raw.frame = self._files.part(raw.fields, raw.payload, self._error_at(raw))
            elif kind == "same":
                if not in_files:
                    raise self.reader.error('frame "same" after the first extent', raw.start)
                raw.frame = self._files.same(raw.fields, raw.payload, self._error_at(raw))
            elif kind == "index":
                self._index(raw)
            elif kind == "end":
                self._files.check_all(self._error_at(raw))
                yield from self._read_end(raw)
                return
            elif kind in ("vnb", "disk", "tail"):
                raise self.reader.error(f'frame "{kind}" out of order', raw.start)
            else:
                raw.frame = other = Other(raw.fields, raw.payload)
                if self.reader.consumer and not other.optional:
                    raise self.reader.error(f'unknown frame type "{kind}"', raw.start)
            self.counts.add(raw.sum)
            if in_files and kind in ("extent", "data"):
                in_files = False
                self._files.check_all(self._error_at(raw))
            yield raw
            raw = self.reader.raw()

    def finish(self) -> None:
        """Read and check what was not iterated over."""
        for _ in self:
            pass

    def _error_at(self, raw: Raw) -> Callable[[object], StreamError]:
        """A function that makes the error of a reason, at a frame."""
        return functools.partial(self.reader.error, offset=raw.start)

    def _read_head(self) -> Raw:
        raw = self.reader.raw()
        self.head = head = checked_head(raw.fields, raw.payload, self._error_at(raw))
        if self.reader.begun is not None:
            self.reader.begun(head)
        stage = self.reader.stage
        if stage is not None and head["stage"] != stage:
            needed = {"disks": "vnb-checkpoint", "extents": "vnb-extents", "data": "vnb-read"}[stage]
            raise self.reader.error(
                f'the segment holds {head["stage"]} where {stage} are needed: is {needed} missing before this stage'
                if STAGES.index(head["stage"]) < STAGES.index(stage)
                else f'the segment holds {head["stage"]} already, where {stage} are needed',
                raw.start,
            )
        self.counts.add(raw.sum)
        return raw

    def _read_disks(self) -> Iterator[Raw]:
        room = f.MAX_DISK_FRAMES
        while True:
            raw = self.reader.raw()
            if raw.fields[0] != "disk":
                self._pending = raw
                return
            error = self._error_at(raw)
            disk = checked_disk(raw.fields, raw.payload, self.disks, error)
            if disk["level"] == "inc" and self.head["parent"] is None:
                raise error(f'{disk["name"]}: its level is inc, in a segment of level {self.head["level"]}')
            if "source" in disk and self.head["stage"] == "data":
                raise error(f'{disk["name"]}: a source, in a segment that holds its data')
            room -= len(raw.header)
            if room < 0:
                raise error(f"the disks take more than {f.MAX_DISK_FRAMES} bytes")
            self.disks.append(disk)
            self.counts.add(raw.sum)
            yield raw

    def _place(self, disk: int, offset: int, length: int, start: int) -> None:
        """Check that [offset, offset + length) of a disk is where it may be, and move that disk's cursor."""
        if not (type(disk) is type(offset) is type(length) is int and 0 <= disk < len(self.disks)):
            raise self.reader.error("the extent is of a disk that the segment does not have", start)
        size = self.disks[disk]["size"]
        if not (0 <= offset <= size and 0 < length <= size - offset):
            raise self.reader.error(
                f'{self.disks[disk]["name"]}: extent at offset {offset} of {length} bytes '
                f"is not in the disk of {size} bytes",
                start,
            )
        if offset < self.positions[disk]:
            raise self.reader.error(
                f'{self.disks[disk]["name"]}: extent at offset {offset} comes after offset {self.positions[disk]}',
                start,
            )
        self.positions[disk] = offset + length
        self._covered[disk] += length

    def _data(self, raw: Raw) -> Data:
        _, disk, offset, length, codec, hash_ = raw.fields
        if self.head["stage"] != "data":
            raise self.reader.error(f'frame "data" in a segment of {self.head["stage"]}', raw.start)
        self._place(disk, offset, length, raw.start)
        self.counts.bytes[DATA] += length
        assert raw.payload is not None
        self.counts.stored += len(raw.payload)
        size = len(raw.header) + len(raw.payload)
        return Data(disk, offset, length, codec, hash_, raw.payload, raw.start - self.start, size)

    def _extents(self, raw: Raw) -> Extents:
        fields, start = raw.fields, raw.start
        if len(fields) != 3 or raw.payload is not None or not isinstance(fields[2], list):
            raise self.reader.error('malformed frame "extent"', start)
        if not fields[2] or len(fields[2]) % 3:
            raise self.reader.error('malformed frame "extent"', start)
        if self.head["stage"] == "disks":
            raise self.reader.error('frame "extent" in a segment of disks', start)
        frame = Extents(fields[1], fields[2])
        totals = self.counts.bytes
        for offset, length, state in frame:
            if state.__class__ is not int or state not in totals:
                raise self.reader.error("unknown state of an extent", start)
            if state == DATA and self.head["stage"] == "data":
                raise self.reader.error(f"offset {offset}: {length} bytes of data were never read", start)
            self._place(frame.disk, offset, length, start)
            totals[state] += length
        return frame

    def _index(self, raw: Raw) -> None:
        fields, start = raw.fields, raw.start
        if len(fields) != 4 or raw.payload is None or not all(type(field) is int for field in fields[1:]):
            raise self.reader.error('malformed frame "index"', start)
        _, disk, rows, back = fields
        if not (disk < len(self.disks) and rows > 0 and rows * ROW_SIZE == len(raw.payload)):
            raise self.reader.error("an index of no disk, or of the wrong size", start)
        if back != (start - self.last_index if self.last_index else 0):
            raise self.reader.error('frame "index" does not point to the one before it', start)
        self.last_index = start

    def _read_end(self, raw: Raw) -> Iterator[Raw]:
        fields, start = raw.fields, raw.start
        if len(fields) != 2 or raw.payload is not None or not isinstance(fields[1], dict):
            raise self.reader.error('malformed frame "end"', start)
        end = fields[1]
        for key, value in self.counts.fields().items():
            if type(end.get(key)) is not int:
                raise self.reader.error(f'malformed frame "end": "{key}"', start)
            if end[key] != value:
                raise self.reader.error(
                    "frames are missing, doubled, swapped or replaced: the digest differs" if key == "digest" else
                    f"the end frame says {end[key]} {key}, there were {value}",
                    start,
                )
        if self.head["stage"] != "disks":
            for disk, covered in zip(self.disks, self._covered):
                if disk["level"] == "full" and covered != disk["size"]:
                    missing = disk["size"] - covered
                    raise self.reader.error(f'{disk["name"]}: {missing} bytes of a full disk are missing', start)
        yield raw
        tail = self.reader.raw()
        if tail.fields[0] != "tail":
            raise self.reader.error(f'frame "{tail.fields[0]}" where the tail must be', tail.start)
        _, length, back = tail.fields
        self.length = tail.start + f.TAIL.size - self.start
        if length != self.length or back != (tail.start - self.last_index if self.last_index else 0):
            raise self.reader.error("the tail does not fit the segment", tail.start)
        self.end = end
        yield tail
