# SPDX-License-Identifier: LGPL-2.1-or-later
"""Segments of frames to a file descriptor, in bounded memory."""

import functools
import os
import select

from vnb.base.errors import Error, OutputClosed, os_error
from vnb.format import frame as f
from vnb.format.frame import DATA, FrameError
from vnb.format.input import wait_for_fd
from vnb.format.values import Counts, Data, Extents, File, Same

SMALL = 64 << 10  # frames are gathered up to this many bytes before they are written


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
        self._wait = wait or wait_for_fd
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
