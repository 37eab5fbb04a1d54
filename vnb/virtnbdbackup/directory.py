# SPDX-License-Identifier: LGPL-2.1-or-later
"""A directory that virtnbdbackup wrote: its files, how they belong together, and their data as segments of ours."""

from __future__ import annotations

import os
import re

from vnb.base.errors import Error, os_error
from vnb.format import frame as f
from vnb.format import heads, rules
from vnb.store import chain
from vnb.virt import domxml
from vnb.virtnbdbackup.datafile import _json, read_file
from vnb.virtnbdbackup.point import FIRST_CHECKPOINT, MAX_TEXT, Point
from vnb.virtnbdbackup.runs import Runs
from vnb.virtnbdbackup.saved_file import DataFile, Spoilt

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any


NAME = re.compile(r"([^.]+)\.(full|copy|inc|diff)(?:\.(.+))?\.data", re.DOTALL)


class Directory:
    """
    What virtnbdbackup left in a directory. points (list of Point): those that can be restored, each after its parent.

    lost: why others cannot be. notes: what a user should know. Raises Error where the
    directory has no backup of virtnbdbackup; data is not read.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.notes: list[str] = []
        self.lost: list[Error] = []
        try:
            self.names = sorted(os.listdir(path))
        except OSError as error:
            raise os_error(path, error) from None
        matches = {name: match for name in self.names if (match := NAME.fullmatch(name))}
        for name in self.names:
            if name.endswith(".data.partial"):
                self.notes.append(f"{name}: left out: a backup that was not finished")
        if not matches:
            raise Error(path, "no backup of virtnbdbackup here (no file named DISK.LEVEL.data)")
        self.domain, self.uuid = self._domain()
        self.runs = Runs(self)
        self._understood: list[Point] = []  # Points, whether they can be restored or not
        self._by_checkpoint: dict[str, Point] = {}  # those that others may start from
        self._replaced: set[str] = set()  # checkpoints whose data was overwritten
        self._unread: set[str] = set()  # checkpoints whose data cannot be understood
        self.points = self._points(matches)
        self._compare_list()

    def where(self, *names: str) -> str:
        return os.path.join(self.path, *names)

    def named(self, until: str) -> str | None:
        """The point of a name: a checkpoint's, or its own; None where no point has it. Raises Error if lost."""
        for point in self.points:
            if until in (point.checkpoint, point.head["point"]):
                return point.head["point"]
        for point in self._understood:
            if point.error is not None and until in (point.checkpoint, point.files[0].ident):
                raise point.error
        return None

    def text(self, *names: str) -> str | None:
        """The text of a file, or None if there is none. Raises Error."""
        path = self.where(*names)
        if not os.path.lexists(path):
            return None
        try:
            return read_file(path, MAX_TEXT)[1].decode()
        except UnicodeDecodeError:
            raise Error(path, "is not UTF-8") from None

    def _domain(self) -> tuple[str, str]:
        """(name, UUID) of the domain, from its XML, else from the name of the list of checkpoints."""
        for name in self.names:
            if re.fullmatch(r"vmconfig\..+\.xml", name):
                try:
                    root = domxml.parse(self.text(name) or "", self.where(name))
                except Error:
                    continue  # a point that needs it says so
                domain, uuid = root.findtext("name"), root.findtext("uuid")
                if domain and uuid and rules.is_domain_name(domain) and f.is_name(uuid):
                    return domain, uuid
        lists = [name[: -len(".cpt")] for name in self.names if name.endswith(".cpt")]
        domain = lists[0] if lists else os.path.basename(os.path.abspath(self.path))
        self.notes.append(f"no configuration of the domain here: it is taken to be {domain}")
        return domain, heads.uuid_of(domain)

    def _points(self, matches: dict[str, re.Match[str]]) -> list[Point]:
        groups: dict[str, list[Any]] = {}
        differentials: list[DataFile] = []
        spoilt: list[Spoilt] = []
        for name, match in matches.items():
            disk, level, ident = match.groups()
            # A file that cannot be understood spoils the point that it is a part of, and no other.
            try:
                file: Any = DataFile(self.where(name), disk, level, ident)
            except Error as error:
                file = Spoilt(disk, ident, error)
            if level == "diff":
                (spoilt if isinstance(file, Spoilt) else differentials).append(file)
            else:
                groups.setdefault("base" if level in ("full", "copy") else ident, []).append(file)
        points = []
        for group in [*groups.values(), *differential(differentials, spoilt)]:
            try:
                for file in group:
                    if isinstance(file, Spoilt):
                        raise file.error
                points.append(Point(self, group))
            except Error as error:
                self.lost.append(error)
                self._unread.add(group[0].ident or FIRST_CHECKPOINT)
        self._understood = points
        self._by_checkpoint = {point.checkpoint: point for point in points if point.checkpoint is not None}
        self._replaced = {point.since for point in points if point.is_of_off and point.since not in self._by_checkpoint}
        found: list[Point] = []
        for point in sorted(points, key=lambda point: point.made):
            self._place(point, found)
        return found

    def _place(self, point: Point, found: list[Point]) -> None:
        """Give a point, and first those that it starts from, a head, and append them to found; or say why not."""
        waiting = [point]
        while waiting:
            point = waiting[-1]
            parent = self._by_checkpoint.get(point.since) if point.since else None
            if point.is_open and parent is not None and parent.is_open and parent not in waiting:
                waiting.append(parent)
                continue
            if point.is_open:
                try:
                    self._accept(point, parent, parent in waiting)
                    found.append(point)
                except Error as error:
                    point.head, point.error = None, error
                    self.lost.append(error)
            waiting.pop()

    def _accept(self, point: Point, parent: Point | None, circle: bool) -> None:
        if point.since in self._replaced:
            why = "the data of that was overwritten by a backup of the domain when it was off"
            raise Error(point.name, f"starts from {point.since}: {why}")
        if circle:
            raise Error(point.name, f"circular base: it starts from {point.since}")
        if point.since and parent is None and point.since not in self._unread:
            raise Error(point.name, f"starts from {point.since}, of which nothing is here")
        if point.since and (parent is None or parent.error is not None):
            raise Error(point.name, f"starts from {point.since}, which cannot be restored")
        point.set_head(parent)
        follow = chain.Follow(point.name)
        if parent is not None:
            follow.begin(parent.head, parent.disks)
        follow.accept(point.head, point.disks)

    def _compare_list(self) -> None:
        """Tell of checkpoints that the tool's own list has, and no data: it lists them before it copies."""
        for name in self.names:
            if name.endswith(".cpt"):
                try:
                    listed = _json(self.text(name) or "")
                except Error as error:
                    self.notes.append(f"{name}: {error.reason}")
                    continue
                if not isinstance(listed, list) or not all(isinstance(entry, str) for entry in listed):
                    self.notes.append(f"{name}: is no list of checkpoints")
                    continue
                known = self._replaced.union(self._unread, self._by_checkpoint)
                missing = [entry for entry in listed if entry not in known]
                if missing:
                    self.notes.append(f"no data of {', '.join(missing)}: a backup that failed, or was moved away")


def differential(files: Sequence[Any], spoilt: Sequence[Spoilt] = ()) -> list[list[Any]]:
    """
    The files of each differential backup, as lists, oldest first.

    Each is named after the second in which its disk was begun, so those of one backup differ. A new one starts
    where a disk comes again, or where the changes are those since another checkpoint. A Spoilt file says neither
    when it was begun nor since when: it is put into the backups before and after its second that lack its disk.
    """
    groups: list[list[Any]] = []
    for file in sorted(files, key=lambda file: (file.made, file.disk)):
        last = groups[-1] if groups else []
        if not last or file.since != last[0].since or any(other.disk == file.disk for other in last):
            groups.append(last := [])
        last.append(file)
    alone = []
    for file in spoilt:
        before = [group for group in groups if group[0].second <= file.second][-1:]
        after = [group for group in groups if group[0].second > file.second][:1]
        lacking = [group for group in before + after if all(other.disk != file.disk for other in group)]
        for group in lacking:
            group.append(file)
        if not lacking:
            alone.append([file])
    return groups + alone
