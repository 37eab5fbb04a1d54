# SPDX-License-Identifier: LGPL-2.1-or-later
"""vnb-apply - write a stream onto disks

Usage:
  vnb-apply [--format FORMAT] [--disk DISK]... [--debug] [DIR]
  vnb-apply --help | --version

Reads one or more segments with data, a full and what follows it, and makes
DIR/NAME.FORMAT of each disk as it was at the last of them.

Options:
  --format FORMAT  of new images, qcow2 or raw [default: qcow2]
  --disk DISK      NAME: only this disk; NAME=TARGET: write it there, to an
                   NBD URI, a block device, or [qcow2:|raw:]FILE, that exist
  --debug          show tracebacks
  --help           print this
  --version        print the version
"""

import contextlib
import signal

from vnb import place, stream
from vnb.chain import Follow
from vnb.errors import Error, UsageError
from vnb.imagedir import ImageDirectory
from vnb.run import ENDING_SIGNALS, note
from vnb.stream import Data, Extents
from vnb.writer import Buffers, Writer

FORMATS = ("qcow2", "raw")


def main(args):
    if args["--format"] not in FORMATS:
        raise UsageError("--format", f'"{args["--format"]}" is not qcow2 or raw')
    chosen = parse_disks(args["--disk"])
    if args["DIR"] is None and not (chosen and all(chosen.values())):
        raise UsageError(None, "DIR is missing: new images are made there")
    buffers = Buffers()
    with Restore(args["DIR"], args["--format"], chosen, buffers) as restore:
        for segment in stream.stdin(stage="data", consumer=True, pool=buffers):
            restore.apply(segment)
        restore.finish()
        with undisturbed():
            restore.publish()


@contextlib.contextmanager
def undisturbed():
    """Signals that ask us to end wait, and when this succeeds they come too late: what they would stop is done."""
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS)
    try:
        yield
        for signum in ENDING_SIGNALS:
            signal.signal(signum, signal.SIG_IGN)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING_SIGNALS)


def parse_disks(values):
    """{name: function (name) -> place, or None for a new image} of all --disk options; UsageError."""
    chosen = {}
    targets = set()
    for value in values:
        name, equals, text = value.partition("=")
        if not stream.is_safe_name(name):
            raise UsageError("--disk", f'"{value}" names no disk')
        if name in chosen or (equals and text in targets):
            raise UsageError("--disk", f'"{value}": {"the disk" if name in chosen else "the target"} is there twice')
        chosen[name] = place.parse(text) if equals else None
        targets.add(text)
    return chosen


class Restore:
    """
    Disks on their way from a stream to their places.

    directory (str or None): for new images. format_ (str): of these. chosen (dict): see parse_disks; all disks if
    empty. buffers (Buffers): the Reader's. Unless finish() is reached, no new image is left.
    """

    def __init__(self, directory, format_, chosen, buffers):
        self.chosen = chosen
        self.buffers = buffers
        self._directory_path = directory
        self._format = format_
        self._follow = Follow("stdin")
        self._directory = None
        self._disks = {}  # name: Disk
        self._numbers = []  # number in the segment: Disk or None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            self._close()
        except BaseException:
            self._close()  # a signal; there is no second one
            raise

    def _close(self):
        for disk in self._disks.values():
            disk.writer.abort()
        if self._directory is not None:
            self._directory.close()

    def apply(self, segment):
        """Write one segment. When this returns, the segment was read and checked to its end."""
        self._follow.accept(segment.head, segment.disks)
        self._begin(segment)
        buffers, numbers = self.buffers, self._numbers
        for frame in segment:
            disk = numbers[frame.disk] if frame.__class__ in _OF_DISKS else None
            if disk is not None:
                disk.put(frame)
            elif getattr(frame, "payload", None) is not None:
                buffers.give(frame.payload)

    def finish(self):
        """All segments are there: make what was written durable."""
        self.buffers.check()
        for name in self.chosen:
            if name not in self._disks:
                raise Error("--disk", f"no disk {name} at point {self._follow.head['point']}")
        for disk in self._disks.values():
            disk.writer.start_finish()
        for disk in self._disks.values():
            disk.writer.finish()

    def publish(self):
        """Give the new images their names."""
        if self._directory is not None:
            self._directory.publish([disk.place.file_name for disk in self._disks.values() if disk.place.fresh])

    def _begin(self, segment):
        """Have a Disk for each one that is in this segment and wanted, as large as it is there."""
        first = not self._disks
        disks = {disk["name"]: disk for disk in segment.disks if not self.chosen or disk["name"] in self.chosen}
        for name in [name for name in self._disks if name not in disks]:
            self._drop(name, segment.head["point"])
        for name in self.chosen:
            if first and name not in disks:
                note("vnb-apply", f'{name}: not in the stream at point {segment.head["point"]}')
        # All that is new is looked at before anything is written.
        new = {name: self._place(name) for name in disks if name not in self._disks}
        for name, disk in disks.items():
            if name in new:
                self._disks[name] = Disk(new[name], disk["size"], self.buffers)
            else:
                self._disks[name].go_on(disk["level"], disk["size"])
        self._numbers = [self._disks.get(disk["name"]) for disk in segment.disks]

    def _place(self, name):
        make = self.chosen.get(name)
        if make is not None:
            return make(name)
        if self._directory is None:
            self._directory = ImageDirectory(self._directory_path)
        return place.NewImage(self._directory, name, self._format)

    def _drop(self, name, point):
        disk = self._disks.pop(name)
        if disk.place.fresh:
            disk.writer.abort()
            what = "no image is made of it"
        else:
            disk.finish()
            what = f"{disk.place} is left as it was at the point before"
        note("vnb-apply", f"{name}: not part of point {point}: {what}")


_OF_DISKS = (Data, Extents)


class Disk:
    """A disk, its place, and the writer that brings it there. size (int): bytes at the point reached."""

    def __init__(self, place_, size, buffers):
        self.place = place_
        self._buffers = buffers
        place_.begin(size)
        self._open(size)

    def _open(self, size):
        self.size = size
        self.fresh = self.place.fresh
        self.writer = Writer(self.place.open(size), self.place.name, self._buffers)

    def put(self, frame):
        """Write a Data or Extents frame."""
        self.writer.put(frame, self.fresh)

    def go_on(self, level, size):
        """A segment follows. level (str): full if nothing stays of what was written."""
        if level == "full" and self.place.fresh:
            self.writer.abort()
            self.place.begin(size)
            self._open(size)
            return
        if size > self.size:
            self.finish()
            self.place.grow(size)
            self._open(size)
        self.size = size
        self.fresh = False
        self.writer.fence()

    def finish(self):
        """Wait until all is durable."""
        self.writer.start_finish()
        self.writer.finish()
