# SPDX-License-Identifier: LGPL-2.1-or-later
"""The saved data of one disk, as virtnbdbackup left it."""

from __future__ import annotations

import dataclasses
import datetime
import re

from vnb.base.errors import Error
from vnb.format import frame as f
from vnb.format import rules
from vnb.virtnbdbackup.datafile import VERSIONS, Input

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


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
