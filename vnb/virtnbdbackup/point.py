# SPDX-License-Identifier: LGPL-2.1-or-later
"""One backup of virtnbdbackup: the files of its disks, as a segment."""

from __future__ import annotations

import datetime
import os
import re

from vnb.base.errors import Error
from vnb.format import frame as f
from vnb.format import heads, rules
from vnb.virt import domxml, file_elements
from vnb.virtnbdbackup.conversion import Copy
from vnb.virtnbdbackup.datafile import Input, read_file
from vnb.virtnbdbackup.saved_file import DataFile

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any

    from vnb.format.writing import Writer
    from vnb.virtnbdbackup.directory import Directory

CHAIN = "virtnbdbackup"
FIRST_CHECKPOINT = "virtnbdbackup.0"
MAX_FILE = 64 << 20  # of a file that is taken along: firmware and kernels are smaller
MAX_TEXT = 16 << 20  # of XML and JSON files


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
        for role, path in file_elements.files(self.head["domain_xml"]) if self.head["domain_xml"] else ():
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
