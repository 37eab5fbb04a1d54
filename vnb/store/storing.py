# SPDX-License-Identifier: LGPL-2.1-or-later
"""A segment on its way into a set: written aside, made durable, and only then named."""

from __future__ import annotations

import contextlib
import os
import secrets

from vnb.base import locks
from vnb.base.durable import make_private_directory
from vnb.base.errors import Error, os_error
from vnb.store import chain
from vnb.store.backupset import SUFFIX, file_name, locked, of_domain, readable
from vnb.store.direct_writer import DirectWriter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vnb.format.types import Disk, Head


PARTIAL = ".partial"


def admit(directory: str, head: Head, disks: list[Disk]) -> None:
    """Raise Error unless a set may take a segment with this head and these disks."""
    held, damaged = readable([directory])
    names = {disk["name"] for disk in disks}
    for segment in held:
        if segment.head["id"] == head["id"]:
            raise Error(directory, f'segment {head["id"]} is already here ({segment.name})')
    held, _ = of_domain(held, directory, head["uuid"], head["domain"])
    for segment in held:
        if segment.head["point"] == head["point"] and segment.head["level"] == head["level"]:
            raise Error(directory, f'restore point {head["point"]} is already here ({segment.name})')
        if segment.head["point"] == head["point"] and names != {disk["name"] for disk in segment.disks}:
            raise Error(directory, f'restore point {head["point"]} is already here with other disks ({segment.name})')
    path = os.path.join(directory, file_name(head))
    if os.path.lexists(path):  # it is damaged, or of another restore point
        advice = next((f": {file.error.reason}; {file.advice}" for file in damaged if file.name == path), "")
        raise Error(path, f"another file has the name of this segment{advice}")
    parent = head["parent"]
    if parent is not None:
        before = chain.points(held).get(parent)
        if before is None:
            where = chain.where(parent, damaged) if damaged else ""
            raise Error(directory, f'does not hold {parent}, the base of {head["point"]}{where and f", {where}"}')
        follow = chain.Follow(directory)
        for segment in chain.path(held, directory, parent, damaged):
            follow.accept(segment.head, segment.disks)
        follow.accept(head, disks)
        chain.check_files(head, [segment.head for segment in held if segment.head["point"] == parent], directory)


class Store:
    """
    A segment on its way into a set: a temporary file, that commit() makes durable and names.

        with Store(directory, head, disks) as store:
            ... write to store.writer ...
            store.commit()

    Without commit() the temporary file is removed. The constructor refuses what the set may not take, before
    any data is read; commit() asks again, since another writer may have been faster. check: False for
    a catalog of heads, which need not hold a whole chain, and for a segment that was merged. merged: it is
    such a one, see file_name().
    """

    def __init__(self, directory: str, head: Head, disks: list[Disk], check: bool = True, merged: bool = False) -> None:
        self.directory = directory
        self.head = head
        self.disks = disks
        self.check = check
        self.merged = merged
        self.name = file_name(head, merged)
        make_private_directory(directory)
        remove_abandoned(directory)
        if check:
            admit(directory, head, disks)
        self.path = os.path.join(directory, self.name)
        self._create()

    def _create(self) -> None:
        while True:
            self.partial: str | None = os.path.join(self.directory, f".{self.name}.{secrets.token_hex(4)}{PARTIAL}")
            try:
                self.fd = os.open(self.partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
            except OSError as error:
                raise os_error(self.partial, error) from None
            locks.wait_for(self.fd, self.partial)  # says that somebody still writes it, see remove_abandoned()
            if os.fstat(self.fd).st_nlink:
                self.writer = DirectWriter(self.fd, self.path)
                return
            # Another writer came between open and flock, and removed the file as one that nobody writes.
            os.close(self.fd)

    def __enter__(self) -> Store:
        return self

    def commit(self) -> str:
        """Sync, name, and sync the directory: after this the segment is in the set. Returns its path."""
        self.writer.finish()
        try:
            os.fsync(self.fd)
            with locked(self.directory) as directory_fd:
                if self.check:
                    admit(self.directory, self.head, self.disks)
                elif self.merged and os.path.lexists(self.path):
                    raise Error(self.path, "another file has the name of this segment")
                assert self.partial is not None
                os.rename(self.partial, self.path)
                self.partial = None
                os.fsync(directory_fd)
        except OSError as error:
            raise os_error(self.path, error) from None
        return self.path

    def __exit__(self, *_: object) -> None:
        self.writer.close()
        if self.partial is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.partial)
        os.close(self.fd)


def remove_abandoned(directory: str) -> None:
    """Remove temporary files whose writer was killed: the lock of a living one can't be had."""
    for name in os.listdir(directory):
        if not _is_partial(name):
            continue
        path = os.path.join(directory, name)
        try:
            # For writing: NFS locks nothing else. Not to wait for whoever may open the other end of a FIFO.
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            continue  # its writer was faster
        try:
            locks.take(fd)
            # Between open and flock its writer may have given it a final name: then it is not at path any more.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), os.lstat(path)):
                    os.unlink(path)
        except OSError:
            continue  # it is written by somebody, or nothing here can be locked: it does no harm
        finally:
            os.close(fd)


def _is_partial(name: str) -> bool:
    return name.startswith(".") and name.endswith(PARTIAL) and SUFFIX + "." in name
