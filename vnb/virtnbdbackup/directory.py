# SPDX-License-Identifier: LGPL-2.1-or-later
"""A directory that virtnbdbackup wrote: its files, how they belong together, and their data as segments of ours."""

from __future__ import annotations

import dataclasses
import datetime
import os
import re

from vnb.base.errors import Error, os_error
from vnb.format import frame as f
from vnb.format import heads, rules
from vnb.store import chain
from vnb.virt import domxml
from vnb.virtnbdbackup.conversion import Copy
from vnb.virtnbdbackup.datafile import VERSIONS, Input, _json, read_file
from vnb.virtnbdbackup.runs import Runs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any

    from vnb.format.writing import Writer


MAX_FILE = 64 << 20  # of a file that is taken along: firmware and kernels are smaller
MAX_TEXT = 16 << 20  # of XML and JSON files
NAME = re.compile(r"([^.]+)\.(full|copy|inc|diff)(?:\.(.+))?\.data", re.DOTALL)
CHAIN = "virtnbdbackup"
FIRST_CHECKPOINT = "virtnbdbackup.0"


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


@dataclasses.dataclass
class Spoilt:
    """A data file that cannot be understood. disk, ident: as its name has them. error: why."""

    disk: str
    ident: str
    error: Error

    @property
    def second(self) -> int:
        return _second(self.ident)


def _second(ident: str | None) -> int:
    """The Unix time that a differential backup's file is named after; the end of time where it is none."""
    return int(ident) if ident and re.fullmatch("[0-9]{1,11}", ident) else 10**11


class DataFile:
    """
    The saved data of one disk at one point.

    disk, level; ident: the last part of its name. is_raw: an image, no stream.
    size: bytes of the disk. made (datetime): when it was begun, in UTC. checkpoint, since: what it brings
    one to, and what its changes are counted from ("" for a full one). incremental, compressed.
    """

    def __init__(self, path: str, disk: str, level: str, ident: str | None) -> None:
        self.path = path
        self.disk = disk
        self.level = level
        self.ident = ident
        if not rules.is_safe_name(disk):
            raise Error(path, "its name has no disk that may be a part of a file name")
        if (level in ("inc", "diff")) != (ident is not None):
            raise Error(path, "its name is not that of a backup of this level")
        with Input(path) as source:
            self.is_raw = source.peek(5) != b"meta "
            if self.is_raw:
                if level in ("inc", "diff"):
                    raise Error(path, "not a stream of virtnbdbackup")
                self.size = source.size
                self.made = self._time(source.modified)
                self.checkpoint: str = ""
                self.since: str = ""
                self.incremental = self.compressed = False
                self.format: str | None = "raw"
            else:
                self._take(source.meta())

    @property
    def second(self) -> int:
        return _second(self.ident)

    def _time(self, seconds: float) -> datetime.datetime:
        """A Unix time as a datetime. Raises Error for one that no calendar has: file systems hold more."""
        try:
            return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)
        except (ValueError, OverflowError, OSError):
            raise Error(self.path, "has a modification time that is out of range") from None

    def _take(self, meta: dict[str, Any]) -> None:
        def field(name: str, kind: Any, *others: str) -> Any:
            value = meta.get(name)
            for other in others:
                value = meta.get(other) if value is None else value
            if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
                raise Error(self.path, f'the header has no sound "{name}"')
            return value

        version = field("streamVersion", int, "stream-version")
        if version not in VERSIONS:
            raise Error(self.path, f"stream version {version}, known are {', '.join(map(str, VERSIONS))}")
        self.size = field("virtualSize", int, "virtual-size")
        self.data_size = field("dataSize", int, "data-size")
        if not 0 <= self.size <= f.MAX_OFFSET:
            raise Error(self.path, f"a disk of {self.size} bytes")
        if field("diskName", str) != self.disk:
            raise Error(self.path, f'is of disk {meta["diskName"]}, not of {self.disk} as its name says')
        self.checkpoint = field("checkpointName", str)
        self.since = field("parentCheckpoint", (str, bool)) or ""
        self.incremental = bool(meta.get("incremental"))
        self.compressed = version > 1 and meta.get("compressed") not in (False, None)
        if self.compressed and meta.get("compressionMethod", "lz4") != "lz4":
            raise Error(self.path, f'compressed with {meta["compressionMethod"]}, known is lz4')
        if self.incremental and not self.since:
            raise Error(self.path, "an increment that does not say what it starts from")
        if not self.incremental:
            self.since = ""
        self.format = meta.get("diskFormat") if f.is_name(meta.get("diskFormat")) else None
        try:
            # The time of that host, which does not say of what zone: most likely our own.
            moment = datetime.datetime.fromisoformat(field("date", str))
            self.made = moment.astimezone(datetime.timezone.utc)
        except (ValueError, OverflowError):
            raise Error(self.path, 'the header has no sound "date"') from None


class Point:
    """
    One backup: the files (list of DataFile) of its disks.

    head, disks, name: as chain wants them; head is None until set_head(). error: why it never gets
    one. checkpoint: the tool's own name for it, if later ones can start from it; since: the one it
    starts from, or "". is_of_off: an increment of a domain that was off, which has no checkpoint of its own.
    """

    def __init__(self, directory: Directory, files: Sequence[DataFile]) -> None:
        self.directory = directory
        self.files = sorted(files, key=lambda file: file.disk)
        self.name = self.files[0].path
        self.head: Any = None
        self.error: Error | None = None
        streams = [file for file in self.files if not file.is_raw] or self.files
        level = "copy" if {file.level for file in streams} == {"copy"} else streams[0].level
        names = {(file.checkpoint, file.since, file.incremental) for file in streams}
        if len(names) > 1:
            raise Error(self.name, "the disks of one backup do not agree on its checkpoint")
        ((checkpoint, self.since, incremental),) = names
        twice = {file.disk for file in self.files if [other.disk for other in self.files].count(file.disk) > 1}
        if twice:
            raise Error(self.name, f"two backups of disk {', '.join(sorted(twice))}, and both are full")
        if level == "inc" and checkpoint != self.files[0].ident:
            raise Error(self.name, f"is of {checkpoint}, not of {self.files[0].ident} as its name says")
        self.is_of_off = level == "inc" and checkpoint == self.since
        if self.is_of_off:
            level = "diff"  # what has changed since
        elif not incremental:
            level = "copy" if level == "copy" else "full"
        self.level = level
        if level == "full" and not checkpoint:
            checkpoint = FIRST_CHECKPOINT  # only raw images, that do not say it
        self.checkpoint = checkpoint if level in ("full", "inc") else None
        self.made = self._made()

    def _made(self) -> datetime.datetime:
        """When: the checkpoint's own time is of no zone, the header's is of the host's."""
        if self.checkpoint and not os.path.dirname(self.checkpoint):
            text = self.directory.text("checkpoints", f"{self.checkpoint}.xml")
            if text is not None:
                seconds = domxml.parse(text, self.checkpoint).findtext("creationTime") or ""
                if re.fullmatch(r"[0-9]{1,11}", seconds.strip()):
                    return datetime.datetime.fromtimestamp(int(seconds), datetime.timezone.utc)
        return min(file.made for file in self.files)

    @property
    def is_open(self) -> bool:
        """Whether it has neither a head nor a reason why it gets none."""
        return self.head is None and self.error is None

    @property
    def may_lack_zeroes(self) -> bool:
        """Whether the version that wrote it may have left out what became zero."""
        names = (os.path.basename(file.path) for file in self.files if file.incremental)
        return any(map(self.directory.runs.may_lose, names))

    @property
    def ident(self) -> str:
        """What the other files of this backup are named after."""
        return "copy" if self.level == "copy" else self.files[0].ident or self.checkpoint or ""

    def set_head(self, parent: Point | None) -> None:
        """Make the head and disks. parent (Point or None): has its own already."""
        if parent is not None and self.made <= parent.made:
            try:
                self.made = parent.made + datetime.timedelta(microseconds=1)
            except OverflowError:
                reason = f"nothing can come after {parent.made}, the time of {parent.checkpoint}"
                raise Error(self.name, reason) from None
        # Their names are used again after the next full backup; with the time they are not, and they sort.
        self.head = {
            **heads.new(self.directory.domain, self.directory.uuid, self.level, "data", chain=CHAIN),
            "point": f'{self.made.strftime("%Y%m%dT%H%M%S")}.{self.checkpoint or self.level}',
            "parent": parent.head["point"] if parent else None,
            "created": self.made.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "domain_xml": self._domain_xml(),
            "checkpoint_xml": None,  # nor a checkpoint: its name may mean another moment in libvirt by now
        }
        rules.checked_head(["vnb", f.VERSION, self.head], None, lambda reason: Error(self.name, reason))
        paths = {}
        if self.head["domain_xml"]:
            paths = {disk.name: disk.path for disk in domxml.disks(self.head["domain_xml"])}
            if "" in paths:  # libvirt writes none
                raise Error(self.name, "the domain's XML of this restore point has a disk without a name")
        self.disks: Any = [
            {
                "name": file.disk, "size": file.size, "level": "inc" if file.incremental else "full",
                "image": {"format": file.format, "path": paths.get(file.disk)},
            }
            for file in self.files
        ]

    def _domain_xml(self) -> str | None:
        """The XML of the domain at this point, or None."""
        name = self._beside("vmconfig.", ".xml")
        return name and self.directory.text(name)

    def _beside(self, before: str, after: str = "") -> str | None:
        """The name of a file of this point, or None; a differential backup's is named after a second, like its data."""
        names = [f"{before}{self.ident}{after}"]
        if self.level == "diff":
            begun = [file.second for file in self.files if re.fullmatch("[0-9]{1,11}", file.ident or "")]
            of_seconds = re.compile(rf"{re.escape(before)}([0-9]{{1,11}}){re.escape(after)}")
            times = [int(match[1]) for name in self.directory.names if (match := of_seconds.fullmatch(name))]
            if begun and times:
                names.append(f"{before}{min(times, key=lambda time: abs(time - max(begun)))}{after}")
        return next((name for name in names if name in self.directory.names), None)

    def write(self, out: Writer, progress: Any, after: Point | None = None) -> None:
        """
        Write the segment of this point with a vnb.format.writing.Writer.

        progress: is told of it. after (Point or None): follows in this stream.
        """
        head: Any = self.head if after is None else {**self.head, "next": after.head["point"]}
        with progress.segment(out.segment(head, self.disks)) as written:
            for fields, payload in self._extra_files():
                for offset in range(0, max(1, len(payload)), f.MAX_PAYLOAD):
                    written.file({**fields, "size": len(payload), "offset": offset}, payload[offset:][: f.MAX_PAYLOAD])
            for number, file in enumerate(self.files):
                with Input(file.path) as source:
                    Copy(file, source, written, number).run()
            written.end()

    def _extra_files(self) -> Iterator[tuple[dict[str, Any], bytes]]:
        """Yield (fields, bytes) of the files that were saved beside the disks."""
        names = self.directory.names
        for role, path in domxml.files(self.head["domain_xml"]) if self.head["domain_xml"] else ():
            for name in (f"{os.path.basename(path)}.{self.ident}", os.path.basename(path)):
                if name in names and os.path.basename(name):
                    mode, payload = read_file(self.directory.where(name), MAX_FILE)
                    yield {"role": role, "path": path, "mode": mode}, payload
                    break
        beside = self._beside("osinfo.")
        if beside:  # what the guest's agent said, from version 2.46 on
            mode, payload = read_file(self.directory.where(beside), MAX_TEXT)
            yield {"role": "guest-info", "path": "guest-info.json", "mode": mode}, payload
        for file in self.files:
            name = f"{file.disk}.{self.ident}.qcow.json"
            if name in names:
                yield {"role": "image-info", "path": file.disk, "mode": 0o600}, read_file(
                    self.directory.where(name), MAX_TEXT
                )[1]
