# SPDX-License-Identifier: LGPL-2.1-or-later
"""A restore: the segments of a stream, in order, onto the places of their disks."""

import contextlib
import json
import signal

from vnb.base import log, signals
from vnb.base.errors import Error
from vnb.format.frame import ZERO, MiB
from vnb.format.values import Data, Extents, File
from vnb.restore import targets
from vnb.restore.imagedir import ImageDirectory
from vnb.restore.writer import Writer
from vnb.store.chain import Follow

MAX_INFO = 4 * MiB  # of what qemu-img said of the images of a segment, with their backing chains
_OF_DISKS = (Data, Extents)


@contextlib.contextmanager
def undisturbed(last=True):
    """
    Signals that ask us to end wait.

    last (bool): if this succeeds they come too late, since all that they could stop is done.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, signals.SIGNALS)
    try:
        yield
        if last:
            for signum in signals.SIGNALS:
                signal.signal(signum, signal.SIG_IGN)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.SIGNALS)


class Restore:
    """
    Disks on their way from a stream to their places.

    directory (str or None): for new images. recipe (vnb.restore.targets.Recipe): of these.
    chosen (dict): {name: function (name) -> place, or None for a new image}; all disks, to new images, if empty.
    buffers (Buffers): the Reader's. force (bool): apply segments that do not follow each other.
    What publish() did not name is gone in the end.
    """

    def __init__(self, directory, recipe, chosen, buffers, force=False):
        self.chosen = chosen
        self.buffers = buffers
        self.follow = Follow("stdin")
        self.disks = {}  # name: Disk
        self._force = force
        self._most = {}  # disk: the most bytes that it has, where that is more than in the first segment
        self._dropped = {}  # disk that the point before had: (point without it, what becomes of its place)
        self._directory_path = directory
        self._recipe = recipe
        self._directory = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            self.close()
        except BaseException:
            self.close()  # a signal; there is no second one
            raise

    def close(self):
        """Stop all that goes on. May be called again."""
        for disk in self.disks.values():
            disk.writer.abort()
        if self._directory is not None:
            self._directory.close()

    def apply(self, segment):
        """Write one segment. When this returns, the segment was read and checked to its end."""
        before = self.follow.disks
        if self.follow.head is None:
            self._most = segment.head.get("grows", {})
        self._accept(segment)
        infos = Infos(segment.disks)
        numbers = None
        for frame in segment:
            kind = frame.__class__
            if kind in _OF_DISKS:
                if numbers is None:
                    numbers = self._begin(segment, before, infos)
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
            self._begin(segment, before, infos)

    def _accept(self, segment):
        try:
            self.follow.accept(segment.head, segment.disks)
        except Error as error:
            if not self._force:
                raise
            self.follow.force = True
            self.follow.accept(segment.head, segment.disks)  # raises what nobody knows better
            self.follow.force = False
            log.warn(f"--force-sequence: {error.reason}: applied because of --force-sequence")

    def finish(self):
        """All segments are there: make what was written durable."""
        self.buffers.check()
        for name, (point, what) in self._dropped.items():
            if name not in self.disks:  # else a later segment has brought it back
                log.note(f"{name}: not part of restore point {point}: {what}")
        for name in self.chosen:
            if name not in self.disks:
                there = ", ".join(self.follow.disks) or "no disk"
                raise Error("--disk", f"no disk {name} at restore point {self.follow.head['point']}, there is {there}")
        for disk in self.disks.values():
            disk.writer.start_finish()
        for disk in self.disks.values():
            disk.writer.finish()
        for disk in self.disks.values():
            disk.place.complete()

    def publish(self):
        """Give the new images their names."""
        if self._directory is not None:
            self._directory.publish(self.file_names())

    def file_names(self):
        """Of the new images."""
        return [name for disk in self.disks.values() for name in disk.place.file_names]

    def _begin(self, segment, before, infos):
        """
        Have a Disk for each one that is in this segment and wanted, as large as it is there.

        before (dict): the disks at the point before, by name. Returns a list of Disks, by their numbers in the
        segment, with None for those that are not wanted.
        """
        disks = {disk["name"]: disk for disk in segment.disks if not self.chosen or disk["name"] in self.chosen}
        for name in [name for name in self.disks if name not in disks]:
            self._drop(name, segment.head["point"])
        # All that is new is looked at before anything is written.
        new = {name: self._place(name) for name in disks if name not in self.disks}
        if not before:
            for name in self._most.keys() - disks.keys():  # these come later
                if self.chosen.get(name) is not None:
                    self.chosen[name](name).open(self._most[name]).close()
        for name, disk in disks.items():
            if name in new and disk["level"] == "inc" and name not in before and new[name].fresh:
                raise Error("stdin", f'{segment.head["point"]} has changes of disk {name}, and there is no image of it')
        for name, disk in disks.items():
            if name in new:
                most = self._most.get(name, 0)
                self.disks[name] = Disk(new[name], before.get(name), disk, most, infos.of(disk), self.buffers)
            else:
                self.disks[name].go_on(disk, infos.of(disk))
        return [self.disks.get(disk["name"]) for disk in segment.disks]

    def _place(self, name):
        make = self.chosen.get(name)
        if make is not None:
            return make(name)
        if self._directory is None:
            self._directory = ImageDirectory(self._directory_path)
        return self.make_place(name)

    def make_place(self, name):
        """A place for a disk in the directory."""
        return targets.NewImage(self._directory, name, self._recipe)

    def _drop(self, name, point):
        disk = self.disks.pop(name)
        if disk.place.fresh:
            disk.writer.abort()
            what = "no image is made of it"
        else:
            disk.finish()
            what = f"{disk.place} is left as it was at the restore point before"
        self._dropped[name] = point, what


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
    """
    A disk, its place, and the writer that brings it there.

    before (dict or None): the disk as its place has it. disk (dict): as it is in the first segment for it.
    most (int): bytes that it will have, as far as that is known. size (int): bytes at the point reached.
    """

    def __init__(self, place_, before, disk, most, info, buffers):
        self.place = place_
        self._most = most
        self._buffers = buffers
        if disk["level"] == "full":
            place_.begin(disk["size"], info)
        elif before is None or disk["size"] > before["size"]:
            place_.grow(disk["size"])
        self._open(disk)
        if disk["level"] != "full" and before is not None:
            self._zero_tail(before["size"])

    def _open(self, disk):
        self.size = disk["size"]
        self.fresh = disk["level"] == "full" and self.place.fresh
        self.writer = Writer(self.place.open(max(disk["size"], self._most)), self.place.name, self._buffers)

    def _zero_tail(self, before):
        """
        Have zeroes where the disk grew: an increment says nothing of them, as long as nobody wrote to them.

        What exists may be larger than the disk was, and have anything there. before (int): its size then.
        """
        if self.size > before and not self.place.fresh:
            self.writer.put(Extents(None, [before, self.size - before, ZERO]), False)
            self.writer.fence()

    def put(self, frame):
        """Write a Data or Extents frame."""
        self.writer.put(frame, self.fresh)

    def go_on(self, disk, info):
        """A segment follows in which the disk is like this."""
        if disk["level"] == "full" and self.place.fresh:
            self.writer.abort()  # nothing stays of what was written
            self.place.begin(disk["size"], info)
            self._open(disk)
            return
        before = self.size
        if disk["size"] > before:
            self.finish()
            self.place.grow(disk["size"])
            self._open(disk)
            if disk["level"] != "full":
                self._zero_tail(before)
        self.size = disk["size"]
        self.fresh = False
        self.writer.fence()

    def finish(self):
        """Wait until all is durable."""
        self.writer.start_finish()
        self.writer.finish()
