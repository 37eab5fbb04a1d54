# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Streams: segments of frames from and to file descriptors, in bounded memory.

    for segment in Reader(0, "stdin"):        head and disks are read and checked
        out = writer.segment(segment.head, segment.disks)
        for frame in segment:                 File, Extents, Data, Other, in stream order
            ...
        out.end()                             only when all before it succeeded

A Reader yields nothing that it did not check: sums, digest, counts, order, that extents ascend, stay
inside their disk and do not overlap, and that those of a full disk leave nothing out. What it does not
check is the hash of a data frame: that is for whoever uses the bytes (vnb.format.codec.plain).
"""

import functools
import hashlib
import os
import re
import select
import stat

from xxhash import xxh3_64

from vnb.base.errors import Error, Followed, OutputClosed, StreamError, os_error
from vnb.format import frame as f
from vnb.format.frame import DATA, HOLE, STATE_NAMES, ZERO, FrameError, Incomplete
from vnb.format.index import ROW_SIZE

AHEAD = 4096  # read beyond a payload, so that the next header costs no system call; it is copied once more
SMALL = 64 << 10  # frames are gathered up to this many bytes before they are written

# What a segment holds: disks alone, their extents, or their data. Each stage needs one and makes the next.
STAGES = ("disks", "extents", "data")
LEVELS = ("full", "copy", "inc", "diff")
DISK_LEVELS = ("full", "inc")  # all of the disk, or what changed since the parent
LONGEST_PATH = 4096  # characters of a file's path: Linux's PATH_MAX
_SHA256 = re.compile("[0-9a-f]{64}")
_CREATED = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", re.ASCII)  # so it sorts as text


FAILED, _ = f.encode([f.FAILED, None])  # what a command writes that fails before it has written anything


class Raw:
    """
    A frame as it stands in the stream. fields (list): all before the sum. start (int): its stream offset.

    header (bytes): all of it up to its payload's first byte. payload (memoryview or None): valid as long as
    that of Data is.
    """

    __slots__ = ("fields", "header", "payload", "start", "sum")

    def __init__(self, fields, sum_, start, header, payload):
        self.fields = fields
        self.sum = sum_
        self.start = start
        self.header = header
        self.payload = payload


class File:
    """A part of a file that belongs to the domain. fields: role, path, mode, size, offset."""

    __slots__ = ("fields", "payload")

    def __init__(self, fields, payload):
        self.fields = fields
        self.payload = payload


class Same:
    """A file that has not changed since the base, which has it. fields (dict): role, path, mode."""

    __slots__ = ("fields",)
    payload = None

    def __init__(self, fields):
        self.fields = fields


class Extents:
    """Extents of one disk. runs: flat list offset, length, state, offset, length, state, ... ascending."""

    __slots__ = ("disk", "runs")

    def __init__(self, disk, runs):
        self.disk = disk
        self.runs = runs

    def __iter__(self):
        return zip(self.runs[0::3], self.runs[1::3], self.runs[2::3])


class Data:
    """
    Bytes [offset, offset + length) of one disk.

    hash (int): xxh3-64 of the plain bytes, made where they were read from the source.
    payload (memoryview): the bytes as codec left them. Valid until the next frame is asked for, unless
    the Reader has a pool: then until they are given back to it.
    position (int): where the frame starts, in bytes from the start of its segment. size (int): of the frame.
    """

    __slots__ = ("codec", "disk", "hash", "length", "offset", "payload", "position", "size")

    def __init__(self, disk, offset, length, codec, hash_, payload, position=0, size=0):
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

    def __init__(self, fields, payload):
        self.fields = fields
        self.payload = payload

    @property
    def optional(self):
        """Consumers may skip it."""
        return self.fields[0].startswith("+")


class Counts:
    """What the end frame says of a segment: frames before it, bytes of each state, bytes stored of data."""

    def __init__(self):
        self.frames = 0
        self.bytes = {DATA: 0, ZERO: 0, HOLE: 0}
        self.stored = 0
        self._digest = xxh3_64()

    def add(self, sum_):
        self.frames += 1
        self._digest.update(sum_.to_bytes(8, "big"))

    def fields(self):
        counts = {STATE_NAMES[state]: count for state, count in self.bytes.items()}
        return {"frames": self.frames, **counts, "stored": self.stored, "digest": self._digest.intdigest()}


class Input:
    """
    Bytes of a file descriptor, with a small window to look ahead in. No payload is copied twice.

    name (str): for messages. offset (int): of the next byte, in the stream.
    wait (callable or None): is given fd and an event of poll(2) before each read, and returns when that has come.
    """

    def __init__(self, fd, name, wait=None):
        self.fd = fd
        self.name = name
        self._wait = wait
        self.offset = 0
        self._buffer = bytearray(2 * AHEAD)
        self._start = self._end = 0

    def fill(self, size):
        """Have at least size bytes in the window, fewer only at the end of file; the window (memoryview)."""
        while self._end - self._start < size:
            if self._start + size > len(self._buffer):
                kept = self._buffer[self._start : self._end]
                self._buffer = bytearray(max(2 * AHEAD, 2 * size))
                self._buffer[: len(kept)] = kept
                self._start, self._end = 0, len(kept)
            count = self._readv([memoryview(self._buffer)[self._end :]])
            if count == 0:
                break
            self._end += count
        return memoryview(self._buffer)[self._start : self._end]

    def skip(self, size):
        """Leave size bytes of the window behind."""
        self._start += size
        self.offset += size
        if self._start == self._end:
            self._start = self._end = 0

    def read_into(self, view):
        """Fill view; returns how many bytes were there before the end of file."""
        have = min(len(view), self._end - self._start)
        view[:have] = memoryview(self._buffer)[self._start : self._start + have]
        self.skip(have)
        while have < len(view):
            # The window is empty here: the same call fetches the header that follows the payload.
            count = self._readv([view[have:], memoryview(self._buffer)[:AHEAD]])
            if count == 0:
                break
            self._end = max(0, count - (len(view) - have))
            self.offset += count - self._end
            have += count - self._end
        return have

    def _readv(self, views):
        while True:
            if self._wait is not None:
                self._wait(self.fd, select.POLLIN)
            try:
                return os.readv(self.fd, views)
            except BlockingIOError:
                _wait(self.fd, select.POLLIN)
            except OSError as error:
                raise os_error(self.name, error, f"stream offset {self.offset}") from None


class Reader:
    """
    Iterate over the segments of a stream.

    fd (int): any file descriptor. name (str): for messages.
    stage (str or None): refuse a segment that is not at this stage, see STAGES.
    consumer (bool): refuse frames of a required type that this version does not know.
    pool (object with take(size) and give(view), or None): where payloads go; see Data.
    begun (callable or None): is given each head (dict), before anything that follows it is read.
    passed (callable or None): is given each frame (Raw), head, disks, index, end and tail too, once it was checked
    and before it is yielded: for whoever passes on the very bytes.
    wait (callable or None): see Input.
    Raises StreamError for all that is wrong with the input, Error for the operating system's failures.
    """

    def __init__(self, fd, name, stage=None, consumer=False, pool=None, passed=None, begun=None, wait=None):
        self.input = Input(fd, name, wait)
        self.stage = stage
        self.consumer = consumer
        self.pool = pool
        self.passed = passed
        self.begun = begun
        self.segment = None  # the one that is read
        self._own = bytearray()

    def __iter__(self):
        while self.more():
            segment = Segment(self)
            yield segment
            segment.finish()

    def more(self):
        """Whether a segment starts here: the end of the input is no segment, and all else a StreamError."""
        first = self.input.offset
        window = self.input.fill(len(f.HEAD_MAGIC))
        if not window:
            if first == 0:
                before = ": the command before this one has written nothing" if _is_pipe(self.input.fd) else ""
                raise StreamError(self.input.name, f"empty input, expected a stream{before}")
            head = self.segment.head if self.segment is not None else {}
            if "next" in head:  # who wrote it may have ended between two segments
                raise self.error(f'the input ends at {head["point"]}, but {head["next"]} was to follow')
            return False
        if window[: len(f.HEAD_MAGIC)] != f.HEAD_MAGIC:
            if first == 0 and self.input.fill(len(FAILED)) == FAILED:
                raise Followed(self.input.name, "the command that was to write this has failed")
            expected = "a stream" if first == 0 else "another segment"
            raise self.error(f"not {expected} of vnb (it starts with {bytes(window[:5]).hex(' ')})")
        return True

    def error(self, reason, offset=None):
        """A StreamError at a stream offset (int), by default that of the next byte."""
        return StreamError(self.input.name, reason, f"stream offset {self.input.offset if offset is None else offset}")

    def next_frame(self):
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

    def raw(self):
        """The next frame (Raw) with a sound sum. Whether it may stand here, Segment tells."""
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

    def payload(self, size, start):
        """The payload (memoryview) that comes next. start: of its frame, for messages."""
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
    One segment: head (dict), disks (list of dict) at once; iterate, once, for its frames.

    positions (list of int): of each disk, where the last extent that was read ends. counts (Counts): of all so far.
    end (dict) and length (int, bytes of the whole segment) are there after the last frame. Index frames are checked
    for their place and not passed on: a stage that keeps an index makes its own.
    """

    def __init__(self, reader):
        self.reader = reader
        reader.segment = self
        self.start = reader.input.offset
        self.counts = Counts()
        self.end = None
        self.length = None
        self.last_index = 0  # where the last index frame starts, in the stream; 0: there was none
        self._file = None  # the file of which a part was seen, and more are to come
        self._sha256 = None  # of what was seen of it, where the head says what it is
        self.head = self._read_head()
        self._described = {(file["role"], file["path"]): file for file in self.head.get("files", ())}
        self._came = set()  # of these, what was stored or named
        self.disks = []
        self._pending = self._read_disks()
        self.positions = [0] * len(self.disks)
        self._covered = [0] * len(self.disks)
        self._frames = self._iterate()

    def __iter__(self):
        return self._frames

    def _iterate(self):
        raw = self._pending
        self._pending = None
        in_files = True
        while True:
            kind = raw.fields[0]
            frame = None
            if self._file is not None and kind != "file":
                raise self.reader.error(f'file {self._file["path"]}: a part is missing', raw.start)
            if kind == "data":
                frame = self._data(raw)
            elif kind == "extent":
                frame = self._extents(raw)
            elif kind == "file":
                if not in_files:
                    raise self.reader.error('frame "file" after the first extent', raw.start)
                frame = self._part_of_file(raw)
            elif kind == "same":
                if not in_files:
                    raise self.reader.error('frame "same" after the first extent', raw.start)
                frame = self._same(raw)
            elif kind == "index":
                self._index(raw)
            elif kind == "end":
                self._check_files(raw)
                self._end(raw)
                return
            elif kind in ("vnb", "disk", "tail"):
                raise self.reader.error(f'frame "{kind}" out of order', raw.start)
            else:
                frame = Other(raw.fields, raw.payload)
                if self.reader.consumer and not frame.optional:
                    raise self.reader.error(f'unknown frame type "{kind}"', raw.start)
            self._accept(raw)
            if in_files and kind in ("extent", "data"):
                in_files = False
                self._check_files(raw)
            if frame is not None:
                yield frame
            elif raw.payload is not None and self.reader.pool is not None and self.reader.passed is None:
                self.reader.pool.give(raw.payload)  # of an index frame: nobody else sees it
            raw = self.reader.raw()

    def finish(self):
        """Read and check what was not iterated over."""
        for _ in self:
            pass

    def _accept(self, raw, counted=True):
        if counted:
            self.counts.add(raw.sum)
        if self.reader.passed is not None:
            self.reader.passed(raw)

    def _read_head(self):
        raw = self.reader.raw()
        head = checked_head(raw.fields, raw.payload, lambda reason: self.reader.error(reason, raw.start))
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
        self._accept(raw)
        return head

    def _read_disks(self):
        room = f.MAX_DISK_FRAMES
        while True:
            raw = self.reader.raw()
            if raw.fields[0] != "disk":
                return raw

            def error(reason, start=raw.start):
                return self.reader.error(reason, start)

            disk = checked_disk(raw.fields, raw.payload, self.disks, error)
            if disk["level"] == "inc" and self.head["parent"] is None:
                raise error(f'{disk["name"]}: changes only, in a segment of level {self.head["level"]}')
            if "source" in disk and self.head["stage"] == "data":
                raise error(f'{disk["name"]}: a source, in a segment that holds its data')
            room -= len(raw.header)
            if room < 0:
                raise error(f"the disks take more than {f.MAX_DISK_FRAMES} bytes")
            self.disks.append(disk)
            self._accept(raw)

    def _place(self, disk, offset, length, start):
        """Check that [offset, offset + length) of a disk is where it may be, and move that disk's cursor."""
        if not (type(disk) is type(offset) is type(length) is int and 0 <= disk < len(self.disks)):
            raise self.reader.error("an extent of no disk", start)
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

    def _data(self, raw):
        _, disk, offset, length, codec, hash_ = raw.fields
        if self.head["stage"] != "data":
            raise self.reader.error(f'frame "data" in a segment of {self.head["stage"]}', raw.start)
        self._place(disk, offset, length, raw.start)
        self.counts.bytes[DATA] += length
        self.counts.stored += len(raw.payload)
        size = len(raw.header) + len(raw.payload)
        return Data(disk, offset, length, codec, hash_, raw.payload, raw.start - self.start, size)

    def _extents(self, raw):
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

    def _part_of_file(self, raw):
        file = checked_file(raw.fields, raw.payload, lambda reason: self.reader.error(reason, raw.start))
        before = self._file
        if before is None:
            fits = file["offset"] == 0
        else:
            fits = file["offset"] == before["end"] and all(file[key] == before[key] for key in ("role", "path", "size"))
        end = file["offset"] + len(raw.payload)
        if not fits or (end < file["size"] and not raw.payload):
            raise self.reader.error(f'file {file["path"]}: a part is missing', raw.start)
        self._file = {**file, "end": end} if end < file["size"] else None
        self._check_content(file, raw)
        return File(file, raw.payload)

    def _check_content(self, file, raw):
        """Check a part of a file against what the head says of all of it."""
        described = self._described.get((file["role"], file["path"]))
        if described is None:
            return
        if file["offset"] == 0:
            self._sha256 = hashlib.sha256()
            self._comes(file, raw)
        self._sha256.update(raw.payload)
        whole = self._file is None
        differs = whole and self._sha256.hexdigest() != described["sha256"]
        if "base" in described or file["size"] != described["size"] or differs:
            raise self.reader.error(f'file {file["path"]}: is not the one that the head describes', raw.start)

    def _same(self, raw):
        same = checked_same(raw.fields, raw.payload, lambda reason: self.reader.error(reason, raw.start))
        described = self._described.get((same["role"], same["path"]), {})
        if "base" not in described:
            raise self.reader.error(f'file {same["path"]}: the head does not say that the base has it', raw.start)
        self._comes(same, raw)
        return Same(same)

    def _comes(self, file, raw):
        key = file["role"], file["path"]
        if key in self._came:
            raise self.reader.error(f'file {file["path"]}: is there twice', raw.start)
        self._came.add(key)

    def _check_files(self, raw):
        """All files have come, but where a catalog keeps the head alone: those that the head describes are there."""
        missing = set(self._described) - self._came
        if missing and self.head["stage"] != "disks":
            role, path = min(missing)
            raise self.reader.error(f"file {path}: the head describes this {role}, and the segment lacks it", raw.start)

    def _index(self, raw):
        fields, start = raw.fields, raw.start
        if len(fields) != 4 or raw.payload is None or not all(type(field) is int for field in fields[1:]):
            raise self.reader.error('malformed frame "index"', start)
        _, disk, rows, back = fields
        if not (disk < len(self.disks) and rows > 0 and rows * ROW_SIZE == len(raw.payload)):
            raise self.reader.error("an index of no disk, or of the wrong size", start)
        if back != (start - self.last_index if self.last_index else 0):
            raise self.reader.error('frame "index" does not point to the one before it', start)
        self.last_index = start

    def _end(self, raw):
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
        self._accept(raw, counted=False)
        tail = self.reader.raw()
        if tail.fields[0] != "tail":
            raise self.reader.error(f'frame "{tail.fields[0]}" where the tail must be', tail.start)
        _, length, back = tail.fields
        self.length = tail.start + f.TAIL.size - self.start
        if length != self.length or back != (tail.start - self.last_index if self.last_index else 0):
            raise self.reader.error("the tail does not fit the segment", tail.start)
        self._accept(tail, counted=False)
        self.end = end


class Writer:
    """
    Write segments to a file descriptor.

    name (str): for messages. stdout (bool): its reader may close it, which raises OutputClosed.
    report (callable or None): is given each head (dict), returns an object with taken(): see vnb.job.proof.Report.
    wait (callable or None): see vnb.cli.output.stdout().
    put (callable or None): writes some of a list of bytes-like, as os.writev() does to fd, and gives their count.
    """

    report = None

    def __init__(self, fd, name="stdout", wait=None, put=None):
        self.fd = fd
        self.name = name
        self.stdout = fd == 1
        self._wait = wait or _wait
        self._put = put or functools.partial(os.writev, fd)
        self.offset = 0
        self._small = bytearray()

    def segment(self, head, disks):
        """Begin a segment: write head and disks (dicts); returns its SegmentWriter."""
        return SegmentWriter(self, head, disks)

    def write(self, header, payload=None):
        """Write a frame's bytes; small ones may wait for flush()."""
        self._small += header
        self.offset += len(header)
        if payload is not None:
            self.offset += len(payload)
            if len(payload) < SMALL:
                self._small += payload
            else:
                parts = [memoryview(self._small), memoryview(payload)]
                self._small = bytearray()
                self._writev(parts)
        if len(self._small) >= SMALL:
            self.flush()

    def flush(self):
        """Let whoever reads them have all bytes that wait."""
        if self._small:
            parts = [memoryview(self._small)]
            self._small = bytearray()
            self._writev(parts)

    def finish(self):
        """Have all bytes with the operating system; more may follow. Raises Error."""
        self.flush()

    def wait(self):
        """Wait until more can be written, where the descriptor does not do that itself."""
        self._wait(self.fd, select.POLLOUT)

    def _writev(self, parts):
        try:
            while parts:
                try:
                    count = self._put(parts)
                except BlockingIOError:
                    self.wait()
                    continue
                while parts and count >= len(parts[0]):
                    count -= len(parts.pop(0))
                if parts:
                    parts[0] = parts[0][count:]
        except BrokenPipeError as error:
            if self.stdout:
                raise OutputClosed from None
            raise os_error(self.name, error) from None
        except OSError as error:
            raise os_error(self.name, error) from None


class SegmentWriter:
    """
    The frames of one segment, in order; end() makes it whole.

    positions (dict): {disk number: where the last extent that was written ends}. counts (Counts): of all so far.
    """

    def __init__(self, writer, head, disks):
        self.writer = writer
        self.disks = disks
        self.positions = dict.fromkeys(range(len(disks)), 0)
        self.start = writer.offset
        self.counts = Counts()
        self.last_index = None
        self._report = None if writer.report is None else writer.report(head)
        self._frame(["vnb", f.VERSION, head])
        for number, disk in enumerate(disks):
            self._frame(["disk", number, disk])
        writer.flush()

    def file(self, fields, payload):
        """A part of a file, at most MAX_PAYLOAD bytes of it. fields: role, path, mode, size, offset."""
        self._frame(["file", fields], payload)

    def same(self, fields):
        """A file that the base has, as the head says. fields: role, path, mode."""
        self._frame(["same", fields])

    def extents(self, disk, runs):
        """Extents of a disk, at most MAX_EXTENTS. runs: flat list of offset, length, state."""
        for length, state in zip(runs[1::3], runs[2::3]):
            self.counts.bytes[state] += length
        self.positions[disk] = sum(runs[-3:-1])
        self._frame(["extent", disk, runs])

    def data(self, disk, offset, length, codec, hash_, payload):
        """A data frame; returns (position in the segment, size) in bytes. payload may be reused afterwards."""
        position = self.writer.offset - self.start
        header, sum_ = f.encode_data(disk, offset, length, codec, hash_, len(payload))
        self.writer.write(header, payload)
        self.positions[disk] = offset + length
        self.counts.add(sum_)
        self.counts.bytes[DATA] += length
        self.counts.stored += len(payload)
        return position, len(header) + len(payload)

    def index(self, disk, rows, payload):
        """An index frame of rows (int) entries of one disk; see vnb.format.index."""
        start = self.writer.offset
        self._frame(["index", disk, rows, start - self.last_index if self.last_index else 0], payload)
        self.last_index = start

    def frame(self, frame):
        """Pass on a frame that a Reader gave."""
        if frame.__class__ is Data:
            self.data(frame.disk, frame.offset, frame.length, frame.codec, frame.hash, frame.payload)
        elif frame.__class__ is Extents:
            self.extents(frame.disk, frame.runs)
        else:
            kind = {File: ["file"], Same: ["same"]}.get(frame.__class__)
            self._frame([*kind, frame.fields] if kind else frame.fields, frame.payload)

    def end(self):
        """All went well: write end and tail, and finish."""
        header, _sum = f.encode(["end", self.counts.fields()])
        self.writer.write(header)
        tail_at = self.writer.offset
        length = tail_at + f.TAIL.size - self.start
        self.writer.write(f.encode_tail(length, tail_at - self.last_index if self.last_index else 0))
        self.writer.finish()
        if self._report is not None:
            self._report.taken()

    def _frame(self, fields, payload=None):
        try:
            header, sum_ = f.encode(fields, payload)
        except FrameError as error:
            raise Error(self.writer.name, error) from None
        self.writer.write(header, payload)
        self.counts.add(sum_)


def checked_head(fields, payload, error):
    """The head of a "vnb" frame's fields, or raise error(reason)."""
    if fields[0] != "vnb" or len(fields) != 3 or payload is not None or not isinstance(fields[2], dict):
        raise error("malformed head")
    if type(fields[1]) is not int:
        raise error("malformed head: version")
    if fields[1] != f.VERSION:
        newer = error(f"format version {fields[1]}, this vnb knows version {f.VERSION}: a newer vnb is needed")
        newer.is_damage = False
        raise newer
    head = fields[2]
    for key in ("id", "point", "uuid"):
        if not f.is_name(head.get(key)):
            raise error(f'malformed head: "{key}" is no name of 1 to 255 printable characters')
    if not is_domain_name(head.get("domain")):
        raise error('malformed head: "domain" is no name of 1 to 255 characters without NUL and line feed')
    for key in ("parent", "checkpoint"):
        if key not in head or not (head[key] is None or f.is_name(head[key])):
            raise error(f'malformed head: "{key}" is neither a name nor nil')
    for key in ("chain", "run", "next"):
        if key in head and not f.is_name(head[key]):
            raise error(f'malformed head: "{key}" is no name of 1 to 255 printable characters')
    for key in ("domain_xml", "checkpoint_xml"):
        if not isinstance(head.get(key), (str, type(None))):
            raise error(f'malformed head: "{key}" is neither text nor nil')
    grows = head.get("grows", {})
    if not isinstance(grows, dict) or not all(
        is_safe_name(name) and type(size) is int and 0 <= size <= f.MAX_OFFSET for name, size in grows.items()
    ):
        raise error('malformed head: "grows"')
    if not isinstance(head.get("created"), str) or not _CREATED.fullmatch(head["created"]):
        raise error('malformed head: "created" is no time such as 2026-01-31T12:00:00.000000Z')
    if head.get("stage") not in STAGES or head.get("level") not in LEVELS:
        stages, levels = ", ".join(STAGES), ", ".join(LEVELS)
        raise error(f"malformed head: a stage is one of {stages}, a level one of {levels}")
    if (head["level"] in ("inc", "diff")) != (head["parent"] is not None):
        raise error(f'malformed head: level {head["level"]} and parent {head["parent"]}')
    if not is_list_of_files(head.get("files", []), head["parent"]):
        raise error('malformed head: "files"')
    if head["parent"] == head["point"]:
        raise error("malformed head: the segment is its own parent")
    return head


def checked_disk(fields, payload, before, error):
    """The disk of a "disk" frame's fields, or raise error(reason). before: the disks of earlier frames."""
    if len(fields) != 3 or payload is not None or not isinstance(fields[2], dict):
        raise error('malformed frame "disk"')
    if type(fields[1]) is not int or fields[1] != len(before):
        raise error(f'malformed frame "disk": its number is not {len(before)}, which is next')
    if len(before) >= f.MAX_DISKS:
        raise error(f"more than {f.MAX_DISKS} disks")
    disk = fields[2]
    name = disk.get("name")
    if not is_safe_name(name):
        raise error("a disk without a name that may be a part of a file name")
    if any(other["name"] == name for other in before):
        raise error(f"two disks are named {name}")
    size = disk.get("size")
    if type(size) is not int or not 0 <= size <= f.MAX_OFFSET or disk.get("level") not in DISK_LEVELS:
        raise error(f"{name}: malformed size, or a level that is not one of {', '.join(DISK_LEVELS)}")
    if not all(isinstance(disk.get(key, {}), dict) for key in ("image", "source")):
        raise error(f"{name}: malformed image or source")
    return disk


def checked_file(fields, payload, error):
    """The fields of a "file" frame, or raise error(reason)."""
    if len(fields) != 2 or payload is None or not isinstance(fields[1], dict):
        raise error('malformed frame "file"')
    file = fields[1]
    path = file.get("path")
    if not _names_a_file(file):
        raise error('malformed frame "file"')
    numbers = [file.get(key) for key in ("size", "offset", "mode")]
    if any(type(number) is not int for number in numbers) or file["offset"] + len(payload) > file["size"]:
        raise error(f'malformed frame "file": {path}')
    return file


def checked_same(fields, payload, error):
    """The fields of a "same" frame, or raise error(reason)."""
    if len(fields) != 2 or payload is not None or not isinstance(fields[1], dict):
        raise error('malformed frame "same"')
    same = fields[1]
    if not _names_a_file(same) or type(same.get("mode")) is not int:
        raise error('malformed frame "same"')
    return same


def is_list_of_files(files, parent):
    """Whether a value may be "files" of a head whose base is parent (str or None)."""
    if not (isinstance(files, list) and all(isinstance(file, dict) and _names_a_file(file) for file in files)):
        return False
    for file in files:
        sha256 = file.get("sha256")
        if type(file.get("size")) is not int or not (isinstance(sha256, str) and _SHA256.fullmatch(sha256)):
            return False
        if "base" in file and (file["base"] is not True or parent is None):
            return False
    return len({(file["role"], file["path"]) for file in files}) == len(files)


def _names_a_file(fields):
    path = fields.get("path")
    return f.is_name(fields.get("role")) and isinstance(path, str) and len(path) <= LONGEST_PATH


def is_domain_name(name):
    """Whether a value may be the name of a domain: libvirt takes tabs and joiners, which are not printable."""
    return isinstance(name, str) and 0 < len(name) <= f.MAX_NAME and "\0" not in name and "\n" not in name


def is_safe_name(name):
    """Whether a name from a stream may become a part of a file name: nothing that leaves a directory or hides."""
    return f.is_name(name) and "/" not in name and not name.startswith(".")


def _is_pipe(fd):
    try:
        return stat.S_ISFIFO(os.fstat(fd).st_mode)
    except (OSError, TypeError):
        return False


def _wait(fd, event):
    # ssh makes its standard streams non-blocking, and whoever shares them with it gets the same.
    poll = select.poll()
    poll.register(fd, event)
    poll.poll()
