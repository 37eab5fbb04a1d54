# SPDX-License-Identifier: LGPL-2.1-or-later
"""
The state directory: what this host knows of its running backups, and the heads of what it sent elsewhere.

    DIR/jobs/UUID/lock        held by the keeper of the domain's backup for as long as it lives
    DIR/jobs/UUID/job.json    the job, on disk before anything is asked of libvirt
    DIR/jobs/UUID/control     the keeper's socket
    DIR/jobs/UUID/keeper.log  what the keeper did on its own
    DIR/jobs/UUID/ID.taken    which stages have taken the job's segment; see vnb.job.proof
    DIR/destinations/UUID/HASH/  heads of what was committed to a destination, and its name; see vnb.store.catalog

Of a domain without a job nothing is left in DIR/jobs, unless its keeper had something to say.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time

from vnb.base import locks
from vnb.base.durable import make_private_directory, sync_directory, write_file
from vnb.base.errors import Error, os_error
from vnb.base.processes import wait_for
from vnb.job import proof, record
from vnb.job.statedir import job_directory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any


CHILDREN_SECONDS = 30  # for what a dead keeper has started: qemu-img takes a moment, ssh gives up after half a minute


def owner() -> dict[str, Any]:
    """Who we are, in terms that another process can hold against what lives: host, boot, pid, start of the process."""
    return {
        "host": socket.gethostname(),
        "boot": boot_id(),
        "pid": os.getpid(),
        "start": start_of(os.getpid()),
    }


def is_dead(owner_: Mapping[str, Any]) -> bool:
    """Whether an owner is provably dead: of this host, and of an earlier boot or without a process."""
    if owner_.get("host") != socket.gethostname():
        return False
    if owner_.get("boot") != boot_id():
        return True
    return start_of(owner_.get("pid")) != owner_.get("start")


def wait_for_children(owner_: Mapping[str, Any]) -> None:
    """
    Wait until nothing runs any more that a dead owner, a keeper, has started to change images or make files.

    A qemu-img or an ssh goes on where its keeper was killed; they are in its session, servers have one of their own.
    """
    if owner_.get("boot") != boot_id() or not is_dead(owner_):
        return  # with another boot they are gone, too
    deadline = time.monotonic() + CHILDREN_SECONDS
    while (pids := _of_session(owner_["pid"])) and (left := deadline - time.monotonic()) > 0:
        with contextlib.suppress(ProcessLookupError):
            fd = os.pidfd_open(pids[0])
            try:
                wait_for([fd], left)
            finally:
                os.close(fd)


def _of_session(session: int) -> list[int]:
    """The ids of the processes of a session that live."""
    return [pid for pid, (_, found) in process_table().items() if found == session]


def process_table() -> dict[int, tuple[int, int]]:
    """{process id: (its parent's, its session)} of all processes that live."""
    found = {}
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        fields = _stat(pid)
        if fields is not None:
            found[pid] = int(fields[1]), int(fields[3])
    return found


def boot_id() -> str:
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


def start_of(pid: Any) -> int | None:
    """When a process started, in ticks since boot, or None where none lives: pids are used again."""
    try:
        fields = _stat(int(pid))
    except (TypeError, ValueError):
        return None
    return None if fields is None else int(fields[19])


def _stat(pid: int) -> list[str] | None:
    """What proc(5) has in the stat of a process, from its state on, or None where it does not live."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields  # dead, but nobody has asked how it ended


class JobDirectory:
    """
    The directory of a domain's job. state: the state directory. uuid: the domain's.

    make: make it, where it is not there.
    """

    def __init__(self, state: str, uuid: str, make: bool = True) -> None:
        self.state = state
        self.uuid = uuid
        self.path = job_directory(state, uuid)
        if make:
            make_private_directory(self.path)
        self.log = os.path.join(self.path, "keeper.log")
        self._record = os.path.join(self.path, "job.json")

    @contextlib.contextmanager
    def locked(self, wait: bool = False) -> Iterator[bool]:
        """Hold the domain's lock; yields False where somebody else does and wait is false."""
        path = os.path.join(self.path, "lock")
        fd = self._open_lock(path, wait)
        try:
            yield fd is not None
        finally:
            if fd is not None:
                self._tidy(path)
                os.close(fd)

    def _open_lock(self, path: str, wait: bool) -> int | None:
        """A descriptor that has the lock, or None. Whoever had it may have removed the file meanwhile."""
        while True:
            make_private_directory(self.path)
            with _explained(path), contextlib.suppress(FileNotFoundError):  # it was removed: there is another, or none
                fd: int | None = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
                assert fd is not None
                try:
                    locks.wait_for(fd, path) if wait else locks.take(fd)
                    if os.path.samestat(os.fstat(fd), os.stat(path)):
                        fd, locked = None, fd
                        return locked
                except BlockingIOError:
                    return None
                finally:
                    if fd is not None:
                        os.close(fd)

    def _tidy(self, path: str) -> None:
        """Leave no directory behind where nothing is known of a job. The caller has the lock, and is about to end."""
        with contextlib.suppress(OSError):  # a directory that stays does no harm
            if set(os.listdir(self.path)) <= {"lock", "keeper.log"} and not _size(self.log):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self.log)
                os.unlink(path)
                os.rmdir(self.path)

    def load(self) -> record.Record | None:
        """The job's record (Record), or None. Raises Error where it is damaged, or of another version."""
        try:
            with open(self._record, encoding="utf-8") as file:
                text = file.read()
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise Error(self._record, f"cannot be read: {error}") from None
        return record.parse(text, self._record)

    def save(self, of_job: record.Record) -> None:
        """Write a record durably: after a crash it is the old one or the new one."""
        with _explained(self._record):
            write_file(self._record, of_job.text().encode())

    def remove(self) -> None:
        """Forget the record, and the proof."""
        with _explained(self._record), contextlib.suppress(FileNotFoundError):
            os.unlink(self._record)
            sync_directory(self.path)
        self.forget_proof()

    def forget_proof(self) -> None:
        """What stages wrote down is of no use any more. Raises Error."""
        proof.forget(self.path)

    def expect(self, segment: str) -> None:
        """Have stages write down that they took a segment (its id). Raises Error."""
        proof.expect(self.path, segment)

    def taken(self, segment: str) -> str:
        """Where stages write down that they took a segment (its id): see vnb.job.proof."""
        return os.path.join(self.path, segment + proof.SUFFIX)

    def lack(self, segment: str) -> str | None:
        """What lacks of the proof that a segment (its id) was taken whole; None where nothing lacks."""
        return proof.lack(self.path, segment)

    def forget(self) -> None:
        """Forget what keepers have said, too: then nothing is left of the domain when the lock is let go of."""
        with _explained(self.log), contextlib.suppress(FileNotFoundError):
            os.unlink(self.log)

    def listen(self) -> socket.socket:
        """The keeper's listening socket. The caller holds the lock, so what is at its path is a dead keeper's."""
        control = os.path.join(self.path, "control")
        with _explained(control):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(control)
            listener = socket.socket(socket.AF_UNIX)
            mask = os.umask(0o177)
            try:
                with self._short_path() as path:
                    listener.bind(path)
            finally:
                os.umask(mask)
            listener.listen(8)
            return listener

    def connect(self) -> socket.socket | None:
        """A connection to the keeper, or None where none lives."""
        client = socket.socket(socket.AF_UNIX)
        try:
            with self._short_path() as path:
                client.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            client.close()
            return None
        return client

    def hang_up(self) -> None:
        """Remove the keeper's socket, if that can be done: where nobody listens, the next one takes its place."""
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(self.path, "control"))

    @contextlib.contextmanager
    def _short_path(self) -> Iterator[str]:
        """A path of the socket that fits into the 108 bytes of sun_path, however long the directory's is."""
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield f"/proc/self/fd/{fd}/control"
        finally:
            os.close(fd)


def _size(path: str) -> int:
    """The size of a file; 0 where there is none."""
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0


@contextlib.contextmanager
def _explained(path: str) -> Iterator[None]:
    """An OSError is an Error about this path."""
    try:
        yield
    except OSError as error:
        raise os_error(path, error) from None
