# SPDX-License-Identifier: LGPL-2.1-or-later
"""Segments of frames to a file descriptor, in bounded memory."""

from __future__ import annotations

import functools
import os
import select

from vnb.base.errors import Error, OutputClosed, os_error
from vnb.format import frame as f
from vnb.format.frame import DATA, FrameError
from vnb.format.input import wait_for_fd
from vnb.format.values import Counts, Data, Extents, File, Other, Same

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vnb.format.types import Bytes, Disk, Fields, FileFields, Frame, Head, Runs, SameFields, Taken, Wait


SMALL = 64 << 10  # frames are gathered up to this many bytes before they are written


class Writer:
    """
    Write segments to a file descriptor.

    name: for messages. stdout: its reader may close it, which raises OutputClosed.
    report: is given each head, returns an object with taken(): see vnb.job.proof.Report.
    wait: see vnb.cli.output.stdout().
    put: writes some of a list of bytes-like, as os.writev() does to fd, and gives their count.
    """

    report: Callable[[Head], Taken] | None = None

    def __init__(
        self, fd: int, name: str = "stdout", wait: Wait | None = None,
        put: Callable[[list[memoryview]], int] | None = None,
    ) -> None:
        self.fd = fd
        self.name = name
        self.stdout = fd == 1
        self._wait = wait or wait_for_fd
        self._put = put or functools.partial(os.writev, fd)
        self.offset = 0
        self._small = bytearray()

    def segment(self, head: Head, disks: list[Disk]) -> SegmentWriter:
        """Begin a segment: write head and disks (dicts); returns its SegmentWriter."""
        return SegmentWriter(self, head, disks)

    def write(self, header: Bytes, payload: Bytes | None = None) -> None:
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

    def flush(self) -> None:
        """Let whoever reads them have all bytes that wait."""
        if self._small:
            parts = [memoryview(self._small)]
            self._small = bytearray()
            self._writev(parts)

    def finish(self) -> None:
        """Have all bytes with the operating system; more may follow. Raises Error."""
        self.flush()

    def wait(self) -> None:
        """Wait until more can be written, where the descriptor does not do that itself."""
        self._wait(self.fd, select.POLLOUT)

    def _writev(self, parts: list[memoryview]) -> None:
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

    positions: {disk number: where the last extent that was written ends}. counts: of all so far.
    """

    def __init__(self, writer: Writer, head: Head, disks: list[Disk]) -> None:
        self.writer = writer
        self.disks = disks
        self.positions = dict.fromkeys(range(len(disks)), 0)
        self.start = writer.offset
        self.counts = Counts()
        self.last_index: int | None = None
        self._report = None if writer.report is None else writer.report(head)
        self._frame(["vnb", f.VERSION, head])
        for number, disk in enumerate(disks):
            self._frame(["disk", number, disk])
        writer.flush()

    def file(self, fields: FileFields, payload: Bytes) -> None:
        """A part of a file, at most MAX_PAYLOAD bytes of it. fields: role, path, mode, size, offset."""
        self._frame(["file", fields], payload)

    def same(self, fields: SameFields) -> None:
        """A file that the base has, as the head says. fields: role, path, mode."""
        self._frame(["same", fields])

    def extents(self, disk: int, runs: Runs) -> None:
        """Extents of a disk, at most MAX_EXTENTS. runs: flat list of offset, length, state."""
        for length, state in zip(runs[1::3], runs[2::3]):
            self.counts.bytes[state] += length
        self.positions[disk] = sum(runs[-3:-1])
        self._frame(["extent", disk, runs])

    def data(self, disk: int, offset: int, length: int, codec: str, hash_: int, payload: Bytes) -> tuple[int, int]:
        """A data frame; returns (position in the segment, size) in bytes. payload may be reused afterwards."""
        position = self.writer.offset - self.start
        header, sum_ = f.encode_data(disk, offset, length, codec, hash_, len(payload))
        self.writer.write(header, payload)
        self.positions[disk] = offset + length
        self.counts.add(sum_)
        self.counts.bytes[DATA] += length
        self.counts.stored += len(payload)
        return position, len(header) + len(payload)

    def index(self, disk: int, rows: int, payload: Bytes) -> None:
        """An index frame of rows entries of one disk; see vnb.format.index."""
        start = self.writer.offset
        self._frame(["index", disk, rows, start - self.last_index if self.last_index else 0], payload)
        self.last_index = start

    def frame(self, frame: Frame) -> None:
        """Pass on a frame that a Reader gave."""
        if type(frame) is Data:
            self.data(frame.disk, frame.offset, frame.length, frame.codec, frame.hash, frame.payload)
        elif type(frame) is Extents:
            self.extents(frame.disk, frame.runs)
        elif type(frame) is File:
            self.file(frame.fields, frame.payload)
        elif type(frame) is Same:
            self.same(frame.fields)
        elif type(frame) is Other:
            self._frame(frame.fields, frame.payload)

    def end(self) -> None:
        """All went well: write end and tail, and finish."""
        header, _sum = f.encode(["end", self.counts.fields()])
        self.writer.write(header)
        tail_at = self.writer.offset
        length = tail_at + f.TAIL.size - self.start
        self.writer.write(f.encode_tail(length, tail_at - self.last_index if self.last_index else 0))
        self.writer.finish()
        if self._report is not None:
            self._report.taken()

    def _frame(self, fields: Fields, payload: Bytes | None = None) -> None:
        try:
            header, sum_ = f.encode(fields, payload)
        except FrameError as error:
            raise Error(self.writer.name, error) from None
        self.writer.write(header, payload)
        self.counts.add(sum_)
