# SPDX-License-Identifier: LGPL-2.1-or-later
"""vnb-apply - write a stream onto disks

Usage:
  vnb-apply [--format FORMAT] [-o OPTIONS] [--preallocate | --compress]
            [--disk DISK]... [--debug] [DIR]
  vnb-apply --help | --version

Reads one or more segments with data, a full and what follows it, and makes
DIR/NAME.FORMAT of each disk as it was at the last of them.

Options:
  --format FORMAT  of new images, qcow2 or raw [default: qcow2]
  --disk DISK      NAME: only this disk; NAME=TARGET: write it there, to an
                   NBD URI, a block device, or [qcow2:|raw:]FILE, that exist
  -o OPTIONS       of new qcow2 images, as qemu-img create has them, instead of
                   the original's: cluster_size=1M,compat=1.1
  --preallocate    take the room for whole disks before anything is written
  --compress       compress the clusters of new qcow2 images
  --debug          show tracebacks
  --help           print this
  --version        print the version
"""

import contextlib
import json
import signal

from vnb import place, stream
from vnb.chain import Follow
from vnb.errors import Error, UsageError
from vnb.frame import MiB
from vnb.imagedir import ImageDirectory
from vnb.run import ENDING_SIGNALS, note
from vnb.stream import Data, Extents, File
from vnb.writer import Buffers, Writer

FORMATS = ("qcow2", "raw")
# Those of qemu-img's options that say how an image is made, and nothing of what is in it or below it.
OPTIONS = (
    "cluster_size", "compat", "compression_type", "data_file", "data_file_raw", "extended_l2", "lazy_refcounts",
    "refcount_bits",
)
MAX_INFO = 4 * MiB  # of what qemu-img said of the images of a segment, with their backing chains


def main(args):
    recipe = parse_recipe(args)
    chosen = parse_disks(args["--disk"])
    if args["DIR"] is None and not (chosen and all(chosen.values())):
        raise UsageError(None, "DIR is missing: new images are made there")
    buffers = Buffers()
    with Restore(args["DIR"], recipe, chosen, buffers) as restore:
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


def parse_recipe(args):
    """The vnb.place.Recipe of the options; UsageError."""
    format_ = args["--format"]
    if format_ not in FORMATS:
        raise UsageError("--format", f'"{format_}" is not qcow2 or raw')
    options = {}
    for word in (args["-o"] or "").split(",") if args["-o"] else ():
        key, equals, value = word.partition("=")
        if key not in OPTIONS or not equals or not value:
            raise UsageError("-o", f'"{word}" is not KEY=VALUE, with a KEY of {", ".join(OPTIONS)}')
        options[key] = value
    if options.get("data_file", "on") not in ("on", "off"):
        raise UsageError("-o", "data_file is on or off: the file is NAME.data, beside the image")
    for option in ("-o", "--compress"):
        if args[option] and format_ != "qcow2":
            raise UsageError(option, "is for qcow2 images")
    if args["--compress"] and options.get("data_file") == "on":
        raise UsageError("--compress", "clusters in a data file cannot be compressed")
    return place.Recipe(format_, options, args["--preallocate"], args["--compress"])


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

    directory (str or None): for new images. recipe (vnb.place.Recipe): of these.
    chosen (dict): see parse_disks; all disks if empty. buffers (Buffers): the Reader's.
    What publish() did not name is gone in the end.
    """

    def __init__(self, directory, recipe, chosen, buffers):
        self.chosen = chosen
        self.buffers = buffers
        self._directory_path = directory
        self._recipe = recipe
        self._follow = Follow("stdin")
        self._directory = None
        self._disks = {}  # name: Disk

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
        infos = Infos(segment.disks)
        numbers = None
        for frame in segment:
            kind = frame.__class__
            if kind in _OF_DISKS:
                if numbers is None:
                    numbers = self._begin(segment, infos)
                disk = numbers[frame.disk]
                if disk is not None:
                    disk.put(frame)
                    continue
                if kind is Extents:
                    continue
            elif kind is File:
                infos.add(frame)
            if frame.payload is not None:
                self.buffers.give(frame.payload)
        if numbers is None:
            self._begin(segment, infos)

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
        for disk in self._disks.values():
            disk.place.complete()

    def publish(self):
        """Give the new images their names."""
        if self._directory is not None:
            self._directory.publish([name for disk in self._disks.values() for name in disk.place.file_names])

    def _begin(self, segment, infos):
        """
        Have a Disk for each one that is in this segment and wanted, as large as it is there.

        Returns a list of them, by their numbers in the segment, with None for a disk that is not wanted.
        """
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
                self._disks[name] = Disk(new[name], disk["size"], infos.of(disk), self.buffers)
            else:
                self._disks[name].go_on(disk["level"], disk["size"], infos.of(disk))
        return [self._disks.get(disk["name"]) for disk in segment.disks]

    def _place(self, name):
        make = self.chosen.get(name)
        if make is not None:
            return make(name)
        if self._directory is None:
            self._directory = ImageDirectory(self._directory_path)
        return place.NewImage(self._directory, name, self._recipe)

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


class Infos:
    """What qemu-img said of the original images, from the files of a segment with these disks."""

    def __init__(self, disks):
        self._texts = {disk["name"]: bytearray() for disk in disks}
        self._room = MAX_INFO

    def add(self, file):
        """Take a part of a file; parts are whole and in order."""
        text = self._texts.get(file.fields["path"])
        if file.fields["role"] == "image-info" and text is not None and len(file.payload) <= self._room:
            text += file.payload
            self._room -= len(file.payload)

    def of(self, disk):
        """The information (dict) on the image of a disk (dict), or None: nothing but settings depends on it."""
        try:
            info = json.loads(self._texts[disk["name"]] or b"null")
        except (ValueError, RecursionError):
            return None
        # With a backing chain it is a list, and its first image is the one that the guest wrote to.
        if isinstance(info, list) and info:
            info = info[0]
        return info if isinstance(info, dict) else None


class Disk:
    """A disk, its place, and the writer that brings it there. size (int): bytes at the point reached."""

    def __init__(self, place_, size, info, buffers):
        self.place = place_
        self._buffers = buffers
        place_.begin(size, info)
        self._open(size)

    def _open(self, size):
        self.size = size
        self.fresh = self.place.fresh
        self.writer = Writer(self.place.open(size), self.place.name, self._buffers)

    def put(self, frame):
        """Write a Data or Extents frame."""
        self.writer.put(frame, self.fresh)

    def go_on(self, level, size, info):
        """A segment follows. level (str): full if nothing stays of what was written."""
        if level == "full" and self.place.fresh:
            self.writer.abort()
            self.place.begin(size, info)
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
