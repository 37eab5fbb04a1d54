# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Catalogs: what is known to be saved in a set, or at a destination that is no directory of this host.

A set is its own catalog. For a destination, the heads of what was committed to it are kept in the state directory.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import socket

from vnb.base.durable import make_directories, make_private_directory, write_file
from vnb.base.errors import Error, os_error
from vnb.store import backupset, storing

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from vnb.format.types import Disk, Head
    from vnb.store.damage import Damaged
    from vnb.store.saved_segment import SavedSegment


NAME = "name"  # a file beside the heads: the destination's name, which need be no name for a directory


class Catalog:
    """
    directory: of the set, or of the heads; None where nothing is known, as where a receiver names the
    base.

    destination: the name of the destination; None for a set.
    damaged: the files that could not be read when it was read last.
    """

    def __init__(self, directory: str | None = None, destination: str | None = None) -> None:
        self.directory = directory and os.path.abspath(directory)
        self.destination = destination
        self.damaged: list[Damaged] = []

    @classmethod
    def of(cls, state: str, uuid: str, set_: str | None, destination: str | None) -> Catalog:
        """The catalog of a set (its directory, or None) or of a destination (its name, or None) for a domain."""
        if destination is None:
            return cls(set_)
        name = hashlib.sha256(os.fsencode(destination)).hexdigest()[:32]
        return cls(os.path.join(_home(state, uuid), name), destination)

    @classmethod
    def destinations(cls, state: str, uuid: str) -> list[Catalog]:
        """The catalogs of all destinations to which something of a domain was committed, by their names."""
        home = _home(state, uuid)
        try:
            directories = [os.path.join(home, name) for name in os.listdir(home)]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise os_error(home, error) from None
        found = [cls(directory, _name_in(directory)) for directory in directories]
        named = [catalog for catalog in found if catalog.destination]
        return sorted(named, key=lambda catalog: str(catalog.destination))

    @property
    def is_set(self) -> bool:
        return self.directory is not None and self.destination is None

    @property
    def place(self) -> str | None:
        """What a user calls it."""
        return self.directory if self.destination is None else self.destination

    @property
    def where(self) -> str:
        """The same, as it stands behind "is saved"."""
        return f"in {self.directory}" if self.destination is None else f"at {self.destination}"

    @property
    def id(self) -> str | None:
        """
        What stands in a checkpoint's description, or None where nothing is known.

        The same directory on another host is another catalog; so is a destination in another state directory.
        """
        return self.directory and f"{socket.gethostname()}:{os.path.realpath(self.directory)}"

    @property
    def key(self) -> dict[str, str | None]:
        """The arguments that make this catalog again, for the record of a job."""
        return {"directory": self.directory, "destination": self.destination}

    def segments(self) -> list[SavedSegment]:
        """
        The segments in it that can be read; an empty list where the directory is not there yet.

        Raises Error if it cannot be one.
        """
        self.damaged = []
        if self.directory is None:
            return []
        try:
            os.stat(os.path.join(self.directory, ""))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise os_error(self.directory, error) from None
        found, self.damaged = backupset.readable([self.directory])
        return found

    def refuse_impossible(self) -> None:
        """Raise Error where the directory of a set is not there and can never be, as below /proc."""
        if self.directory is None or not self.is_set or os.path.isdir(self.directory):
            return
        try:
            made = make_directories(self.directory, 0o700)
        except OSError as error:
            # Whoever stores the segment may have other rights than we have, but no other names.
            if error.errno == errno.ENOENT:  # which says nothing to a user who wants to make one
                raise Error(self.directory, "no directory can be made there") from None
            if error.errno in (errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP):
                raise os_error(self.directory, error) from None
            return
        for path in reversed(made):
            with contextlib.suppress(OSError):  # somebody has put something into it meanwhile
                os.rmdir(path)

    def of_domain(self, uuid: str, domain: str) -> list[SavedSegment]:
        """The segments of this domain that can be read. Raises Error for a set of another one."""
        ours, damaged = backupset.of_domain(self.segments(), self.directory, uuid, domain)
        self.damaged += damaged
        return ours

    def holds(self, head: Head) -> bool:
        """
        Whether the restore point of this head is saved: by its segment, or by one that it was merged into.

        Raises Error where that may be so, and cannot be read.
        """
        if any(segment.head["point"] == head["point"] for segment in self.segments()):
            return True
        for file in self.damaged:
            if backupset.is_name_of(os.path.basename(file.name), head):
                raise file.error
        return False

    def lost(self) -> str:
        """The end of a message: the files that could not be read, or ""."""
        names = [os.path.basename(file.name) for file in self.damaged]
        return f"; damaged: {', '.join(names)}" if names else ""

    def record(self, head: Head, disks: list[Disk]) -> None:
        """Keep a head durably: its segment is safe at the destination."""
        assert self.directory is not None and self.destination is not None
        self._keep_name(self.directory, self.destination)
        with storing.Store(self.directory, head, disks, check=False) as store:
            store.writer.segment({**head, "stage": "disks"}, disks).end()
            store.commit()

    def _keep_name(self, directory: str, destination: str) -> None:
        """Have the destination's name beside the heads, before the first of them."""
        path = os.path.join(directory, NAME)
        if os.path.exists(path):
            return
        make_private_directory(directory)
        try:
            write_file(path, os.fsencode(destination))
        except OSError as error:
            raise os_error(path, error) from None


def _home(state: str, uuid: str) -> str:
    return os.path.join(state, "destinations", uuid)


def _name_in(directory: str) -> str | None:
    """The name of the destination whose heads a directory has, or None: it was begun, and is of no use."""
    with contextlib.suppress(OSError), open(os.path.join(directory, NAME), "rb") as file:
        return os.fsdecode(file.read())
    return None


def of_checkpoint(about: Mapping[str, Any]) -> str:
    """What a checkpoint of ours was made for, in words. about: see vnb.virt.domxml.about()."""
    if isinstance(about.get("destination"), str):
        return f"destination {about['destination']}"
    if isinstance(about.get("catalog"), str):
        return f"set {about['catalog']}"
    return "a receiver that named the base"
