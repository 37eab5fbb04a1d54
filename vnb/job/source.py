# SPDX-License-Identifier: LGPL-2.1-or-later
"""
The interface of sources: what a backup reads from, and what it does to begin and to end.

A source is given values and gives values back. It knows neither the plan nor the job. What has to be undone it writes
into a Journal before it does it. To add a source, write a module with a class of this interface, and name it in
vnb.job.sources.
"""

from __future__ import annotations

import abc
import dataclasses

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from typing import Any, Protocol

    from vnb.job.record import Added, Record
    from vnb.nbd.endpoint import Tcp, Unix
    from vnb.virt.export_clients import Clients

    class Journal(Protocol):
        """The record of a job, written durably with each change, and lines for the user; see vnb.job.job.Job."""

        record: Record
        note: Callable[[str], None]
        warn: Callable[[str], None]

        def intend(self, **changes: Any) -> None:
            """Set fields of the record, before what they say is done."""

        def remember(self, **additions: Any) -> None:
            """Add one more thing to lists of the record, before it is there."""


UNION = ".union"  # behind the name of a restore point: a bitmap that lasts as long as the job


@dataclasses.dataclass
class WantedDisk:
    """
    A disk that is to be read. disk: as disks() gave it. size: bytes. export: the name of its NBD export.

    is_increment: only what has changed since the base. has_bitmap: the checkpoint gets one in its image.
    scratch: the path of a file for the old data that the guest overwrites, where the source needs one, else "".
    """

    disk: Any
    size: int
    export: str
    is_increment: bool
    has_bitmap: bool
    scratch: str = ""

    @property
    def name(self) -> str:
        """The disk's name."""
        return str(self.disk.name)


@dataclasses.dataclass
class Wanted:
    """
    What a source is to begin. point: the restore point. checkpoint: its name, where there is to be one.

    description: what the checkpoint says of itself. base: the checkpoint that increments start from.
    disks: those that are read. others: the names of the rest. directory: of the job, on this host.
    freeze: mount points of the guest, none for all; None: no freeze. require_freeze: without one the backup fails.
    pause: the guest is suspended while the job begins. listen: what the user typed for the endpoint.
    """

    point: str
    checkpoint: str | None
    description: str
    base: str | None
    disks: list[WantedDisk]
    others: list[str]
    endpoint: Any  # a vnb.nbd.endpoint.Unix or Tcp
    directory: str
    freeze: Sequence[str] | None = None
    require_freeze: bool = False
    pause: bool = False
    listen: str | None = None

    @property
    def union(self) -> str:
        """The name of a bitmap that is the union of one over several layers, while the job lasts."""
        return self.point + UNION


class Source(abc.ABC):
    """
    kind: its name in records. option: which one of vnb.job.job.begin() means it, see of_options(); None for domains of
    libvirt, of which vnb.job.sources knows whether they run. is_gone: libvirt does not know the domain any more.
    name, uuid: of the domain. uri: libvirt's, None without libvirt. is_local: its paths are paths of this host.
    needs_scratch: while it is read, a guest may write to it. started: what was started for the job, for the record,
    or None. All methods raise Error.
    """

    kind: str
    option: str | None = None
    is_gone = False
    name: str
    uuid: str
    uri: str | None = None
    is_local = True
    needs_scratch = False
    started: Any = None

    @classmethod
    def of_options(cls, options: Mapping[str, Any]) -> Source:
        """The source that its option names."""
        raise NotImplementedError

    @classmethod
    def of_record(cls, record: Record) -> Source:
        """The source of a job, by a connection made now. Raises NoDomain where the domain is gone."""
        raise NotImplementedError

    # What there is.

    @abc.abstractmethod
    def disks(self) -> list[Any]:
        """Its disks, as vnb.virt.domxml.Disk, those that cannot be backed up, too."""

    def refuse_if_busy(self) -> None:
        """Raise Error where another job is in the way: images that a guest uses are locked, and need no question."""

    def cannot_read_because(self, disk: Any) -> str | None:
        """Why no backup of a disk can be made, found out before the guest is frozen; or None."""
        return None

    @abc.abstractmethod
    def size_of(self, disk: Any) -> int:
        """Bytes of a disk, as the guest has it."""

    @abc.abstractmethod
    def have(self) -> dict[str, dict[str, str]]:
        """{checkpoint: {disk: bitmap}} of all checkpoints that are known, each with its sound bitmaps."""

    def abouts(self) -> dict[str, Any]:
        """{checkpoint: what it says of itself}, of those of ours; see vnb.virt.domxml.about()."""
        return {}

    def images_then(self, checkpoint: str) -> dict[str, str]:
        """{disk: what named its image when a checkpoint was made}; {} where that is not known."""
        return {}

    @abc.abstractmethod
    def layers_now(self, disk: Any) -> list[str]:
        """What names a disk's image, and those below it."""

    def head_fields(self) -> dict[str, Any]:
        """What the source has to say in the head of the segment."""
        return {"domain_xml": None, "checkpoint_xml": None}

    def describe(self, path: str) -> tuple[int, int, str]:
        """(mode, size, SHA-256 as hexadecimal digits) of a regular file on its host."""
        raise NotImplementedError

    def more_files(self, xml: str) -> list[tuple[str, str]]:
        """[(role, path)] of files of the domain that its XML does not name."""
        return []

    def guest_info(self, xml: str) -> Any:
        """What the guest's agent says of the guest; None where there is none."""
        return None

    def run(self, what: str | None, *argv: str) -> bytes:
        """Run a program where its images are; see vnb.base.processes.run()."""
        raise NotImplementedError

    @abc.abstractmethod
    def allocated(self, disks: Iterable[str]) -> dict[str, int]:
        """{disk: bytes} that full backups of disks would have at most."""

    @abc.abstractmethod
    def changed(self, checkpoint: str, disks: Iterable[str]) -> dict[str, int]:
        """{disk: bytes} that have changed since a checkpoint, of those of disks with a sound bitmap of it."""

    def room(self, directory: str) -> int | None:
        """Free bytes where a directory is, or None if that is not known. Raises OSError."""
        return None

    # What it does.

    @abc.abstractmethod
    def endpoint(self, options: Mapping[str, Any], directory: str, name: str) -> Unix | Tcp:
        """
        Where it will listen. options: listen, socket, tls, certificates. directory: of the job. name: for a socket.
        """

    def private_directory(self) -> str:
        """A directory, on its host, that only QEMU's user and root may enter. Of one that needs scratch."""
        raise NotImplementedError

    @abc.abstractmethod
    def begin(self, wanted: Wanted, journal: Journal) -> None:
        """
        Have the disks served as they are at one moment, and the checkpoint made at that moment.

        Raises BrokenBitmap where a bitmap turns out to be of no use; then nothing is left, and it may be called again.
        """

    @abc.abstractmethod
    def exports(self, wanted: Wanted) -> dict[str, tuple[str, str]]:
        """{disk: (NBD URI, meta context of what is dirty)}, when begin() has returned."""

    def mark(self, checkpoint: str) -> str | None:
        """The XML of a checkpoint that begin() has made."""
        return None

    def redefine(self, checkpoint_xml: str | None) -> None:
        """Have libvirt know a checkpoint again, with the disks that hold its bitmap. Raises Error where none does."""
        raise NotImplementedError

    def is_guest_stopped(self) -> bool:
        """Whether QEMU has stopped the guest because it could not write."""
        return False

    def take_over(self, before: Source) -> None:
        """Take what another source of the same job has begun, and it has lost its connection."""

    def let_go(self) -> None:
        """End what begin() has begun beside the job: to end the job may need what that takes, as descriptors."""

    @abc.abstractmethod
    def end(self, journal: Journal, clients: Callable[[], Clients], careful: bool) -> None:
        """
        End the job if it runs and is this one, and all that the record says was started; harmless when it is over.

        clients: gives those of its export, where it listens on this host. careful: somebody may be about to connect.
        """

    def thaw(self, journal: Journal) -> bool:
        """Thaw the guest that the record says we froze; whether there is nothing left to thaw."""
        journal.intend(frozen=None)
        return True

    @abc.abstractmethod
    def delete_checkpoint(self, name: str) -> None:
        """Delete a checkpoint and its bitmaps; harmless where it is gone."""

    def remove_bitmaps(self, added: Iterable[Added], checkpoint: str) -> None:
        """Remove bitmaps of a checkpoint that libvirt was not told of any more."""

    def close(self) -> None:
        """Let go of the connection."""
