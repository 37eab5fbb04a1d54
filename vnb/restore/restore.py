# SPDX-License-Identifier: LGPL-2.1-or-later
"""A restore: the segments of a stream, in order, onto the places of their disks."""

from __future__ import annotations

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

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from typing import Any

    from vnb.format import types
    from vnb.format.stream import Segment
    from vnb.restore.writer import Buffers


MAX_INFO = 4 * MiB  # of what qemu-img said of the images of a segment, with their backing chains


@contextlib.contextmanager
def undisturbed(last: bool = True) -> Iterator[None]:
    """
    Signals that ask us to end wait.

    last: if this succeeds they come too late, since all that they could stop is done.
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

    directory: for new images. recipe: of these.
    chosen: {name: function (name) -> place, or None for a new image}; all disks, to new images, if empty.
    buffers: the Reader's. force: apply segments that do not follow each other.
    What publish() did not name is gone in the end.
    """

    def __init__(
        self, directory: str | None, recipe: targets.Recipe, chosen: dict[str, Callable[[str], Any] | None],
        buffers: Buffers, force: bool = False,
    ) -> None:
        self.chosen = chosen
        self.buffers = buffers
        self.follow = Follow("stdin")
        self.disks: dict[str, Disk] = {}  # name: Disk
        self._force = force
        self._most: dict[str, int] = {}  # bytes, where a disk has more later than in the first segment
        # disk that the point before had: (point without it, what becomes of its place)
        self._dropped: dict[str, tuple[str, str]] = {}
        self._directory_path = directory
        self._recipe = recipe
        self._directory: ImageDirectory | None = None

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.close()
        except BaseException:
            self.close()  # a signal; there is no second one
            raise

    def close(self) -> None:
        """Stop all that goes on. May be called again."""
        for disk in self.disks.values():
            disk.writer.abort()
        if self._directory is not None:
            self._directory.close()

    def apply(self, segment: Segment) -> None:
        """Write one segment. When this returns, the segment was read and checked to its end."""
        before = self.follow.disks
        if self.follow.head is None:
            self._most = segment.head.get("grows", {})
        self._accept(segment)
        infos = Infos(segment.disks)
        numbers = None
        for frame in segment:
            if type(frame) is Data or type(frame) is Extents:
                if numbers is None:
                    numbers = self._begin(segment, before, infos)
                disk = numbers[frame.disk]
                if disk is not None:
                    disk.put(frame)
                    continue
            elif type(frame) is File:
                infos.add(frame)
            payload = getattr(frame, "payload", None)
            if payload is not None:
                self.buffers.give(payload)
        if numbers is None:
            self._begin(segment, before, infos)

    def _accept(self, segment: Segment) -> None:
        try:
            self.follow.accept(segment.head, segment.disks)
        except Error as error:
            if not self._force:
                raise
            self.follow.force = True
            self.follow.accept(segment.head, segment.disks)  # raises what nobody knows better
            self.follow.force = False
            log.warn(f"--force-sequence: {error.reason}: applied because of --force-sequence")

    def finish(self) -> None:
        """All segments are there: make what was written durable."""
        self.buffers.check()
        for name, (point, what) in self._dropped.items():
            if name not in self.disks:  # else a later segment has brought it back
                log.note(f"{name}: not part of restore point {point}: {what}")
        for name in self.chosen:
            if name not in self.disks and self.follow.head is not None:
                there = ", ".join(self.follow.disks) or "no disk"
                raise Error("--disk", f"no disk {name} at restore point {self.follow.head['point']}, there is {there}")
        for disk in self.disks.values():
            disk.writer.start_finish()
        for disk in self.disks.values():
            disk.writer.finish()
        for disk in self.disks.values():
            disk.place.complete()

    def publish(self) -> None:
        """Give the new images their names."""
        if self._directory is not None:
            self._directory.publish(self.file_names())

    def file_names(self) -> list[str]:
        """Of the new images."""
        return [name for disk in self.disks.values() for name in disk.place.file_names]

    def _begin(self, segment: Segment, before: Mapping[str, types.Disk], infos: Infos) -> list[Disk | None]:
        """
        Have a Disk for each one that is in this segment and wanted, as large as it is there.

        before: the disks at the point before, by name. Returns a list of Disks, by their numbers in the
        segment, with None for those that are not wanted.
        """
        disks = {disk["name"]: disk for disk in segment.disks if not self.chosen or disk["name"] in self.chosen}
        for name in [name for name in self.disks if name not in disks]:
            self._drop(name, segment.head["point"])
        # All that is new is looked at before anything is written.
        new = {name: self._place(name) for name in disks if name not in self.disks}
        if not before:
            for name in self._most.keys() - disks.keys():  # these come later
                make = self.chosen.get(name)
                if make is not None:
                    make(name).open(self._most[name]).close()
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

    def _place(self, name: str) -> Any:
        make = self.chosen.get(name)
        if make is not None:
            return make(name)
        if self._directory is None:
            assert self._directory_path is not None  # whoever chose no place for a disk gave one
            self._directory = ImageDirectory(self._directory_path)
        return self.make_place(self._directory, name)

    def make_place(self, directory: ImageDirectory, name: str) -> Any:
        """A place for a disk in the directory."""
        return targets.NewImage(directory, name, self._recipe)

    def _drop(self, name: str, point: str) -> None:
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

    def __init__(self, disks: Sequence[types.Disk]) -> None:
        self._texts = {disk["name"]: bytearray() for disk in disks}
        self._room = MAX_INFO

    def add(self, file: File) -> None:
        """Take a part of a file; parts are whole and in order."""
        text = self._texts.get(file.fields["path"])
        if file.fields["role"] == "image-info" and text is not None and len(file.payload) <= self._room:
            text += file.payload
            self._room -= len(file.payload)

    def of(self, disk: types.Disk) -> dict[str, Any] | None:
        """The information on the image of a disk, or None: nothing but settings depends on it."""
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

    before: the disk as its place has it. disk: as it is in the first segment for it.
    most: bytes that it will have, as far as that is known. size: bytes at the point reached.
    """

    def __init__(
        self, place_: Any, before: types.Disk | None, disk: types.Disk, most: int, info: Any, buffers: Buffers,
    ) -> None:
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

    def _open(self, disk: types.Disk) -> None:
        self.size = disk["size"]
        self.fresh = disk["level"] == "full" and self.place.fresh
        self.writer = Writer(self.place.open(max(disk["size"], self._most)), self.place.name, self._buffers)

    def _zero_tail(self, before: int) -> None:
        """
        Have zeroes where the disk grew: an increment says nothing of them, as long as nobody wrote to them.

        What exists may be larger than the disk was, and have anything there. before: its size then.
        """
        if self.size > before and not self.place.fresh:
            self.writer.put(Extents(0, [before, self.size - before, ZERO]), False)
            self.writer.fence()

    def put(self, frame: Data | Extents) -> None:
        """Write a Data or Extents frame."""
        self.writer.put(frame, self.fresh)

    def go_on(self, disk: types.Disk, info: Any) -> None:
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

    def finish(self) -> None:
        """Wait until all is durable."""
        self.writer.start_finish()
        self.writer.finish()
