# SPDX-License-Identifier: LGPL-2.1-or-later
"""A domain that runs: QEMU serves its disks through a backup job of libvirt."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path

from vnb.base import processes, ssh, waiting
from vnb.base.buffers import AT_ONCE, Ordered
from vnb.base.errors import Error
from vnb.job import domain_files
from vnb.job.cleanup import end_servers, forwarded, remove_files, remove_scratch, shut_out, thaw
from vnb.job.described import abouts, checkpoint_xml, domain_fields, domain_of
from vnb.job.record import Server, Started
from vnb.job.redefining import redefine
from vnb.job.source import Source
from vnb.job.state import start_of
from vnb.nbd.endpoint import Tcp, Unix, parse_listen
from vnb.qemu import img, iothreads
from vnb.virt import domxml, export_clients
from vnb.virt.connection import dotted
from vnb.virt.failures import AddressInUse, Denied, NoDomain, Unanswered

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from typing import Any

    from vnb.job.record import Record
    from vnb.job.source import Journal, Wanted, WantedDisk
    from vnb.virt.domain import Domain


QEMU_LISTENS = "nbd-server-start"  # a command of QEMU, which libvirt names in its error
PORT_TRIES = 16  # of ports that are chosen: that many are not taken by chance


class Running(Source):
    """
    A domain that runs, or is started paused for the backup and destroyed after it (start).

    domain. host: where it is, None for here.
    """

    kind = "running"
    needs_scratch = True

    def __init__(self, domain: Domain, host: ssh.Host | None = None, start: bool = False) -> None:
        self.domain = domain
        self.host = host
        self._survives: bool | None = None  # whether its QEMU does what vnb.qemu.iothreads asks, when that is known
        self.forward: ssh.Forward | None = None  # to the socket on the other host, which lasts as long as we do
        self.name = domain.name
        self.uuid = domain.uuid
        self.uri = domain.uri
        self.is_local = host is None
        self.started = Started(*domain.start_paused()) if start else None

    @classmethod
    def of_record(cls, record: Record) -> Running:
        domain = domain_of(record)
        return cls(domain, ssh.Host.of_uri(domain.uri, **record.ssh))

    def close(self) -> None:
        self.domain.close()

    def take_over(self, before: Any) -> None:
        self.forward = before.forward

    def run(self, what: str | None, *argv: str) -> bytes:
        return processes.run(what, *argv) if self.host is None else self.host.run(what, *argv)

    def guest_info(self, xml: str) -> Any:
        return self.domain.guest_info() if domxml.has_agent(xml) else None

    def is_guest_stopped(self) -> bool:
        return self.domain.is_paused_by_error()

    def let_go(self) -> None:
        if self.forward is not None:
            self.forward.child.end()
            self.forward = None

    def refuse_if_busy(self) -> None:
        running = self.domain.running_job()
        if running is not None:
            raise Error(self.name, f"a {running} job is active already")

    def disks(self) -> list[Any]:
        return domxml.disks(self.domain.xml())

    def cannot_read_because(self, disk: Any) -> str | None:
        return (
            disk.no_job_because or self.domain.block_job(disk.name) or self._shared_because(disk)
            or self._iothread_because(disk)
        )

    def _iothread_because(self, disk: Any) -> str | None:
        """Why a disk on an iothread cannot be read without a danger to the guest, or None; see vnb.qemu.iothreads."""
        if not disk.on_iothread:
            return None
        if self._survives is None:
            self._survives = self._survives_hanging_up()
        if self._survives:
            return None
        version = dotted(self.domain.call_connection("getVersion"))
        return (
            f"is on an iothread, and its QEMU ({version}) would abort, with its guest, when a client of the backup "
            "hangs up; QEMU 9.0 does not"
        )

    def _survives_hanging_up(self) -> bool:
        arguments = self.uuid, domxml.emulator(self.domain.xml())
        try:
            if self.host is None:
                return iothreads.find_out(*arguments)
            program = Path(iothreads.__file__).read_text(encoding="utf-8")
            return json.loads(self.host.run(self.host.destination, "python3", "-c", program, *arguments))
        except (Error, OSError, ValueError):
            return self.domain.call_connection("getVersion") >= iothreads.SAFE_SINCE

    def _shared_because(self, disk: Any) -> str | None:
        """
        Why a disk cannot be read that another running domain may write to, or None.

        QEMU locks it against the other's writes, and is refused; libvirtd 9.0 dies of that.
        """
        other = self.domain.sharer(disk) if disk.shareable else None
        return other and f"is shared with the domain {other}, which is running"

    def size_of(self, disk: Any) -> int:
        return self.domain.size_of(disk.name)

    def have(self) -> dict[str, dict[str, str]]:
        return {name: domxml.bitmaps(xml) for name, xml in self.domain.checkpoints().items()}

    def abouts(self) -> dict[str, Any]:
        return abouts(self.domain)

    def images_then(self, checkpoint: str) -> dict[str, str]:
        return domxml.images_then(self.domain.checkpoint_xml(checkpoint, with_domain=True))

    def layers_now(self, disk: Any) -> list[str]:
        return disk.layers

    def head_fields(self) -> dict[str, Any]:
        return domain_fields(self.domain)

    def endpoint(self, options: Mapping[str, Any], directory: str, name: str) -> Unix | Tcp:
        """Where QEMU listens: a socket in a private directory, if the options name nothing else."""
        if options["listen"] is not None:
            address, port = parse_listen(options["listen"])
            host = "localhost" if self.host is None else self.host.destination
            return Tcp(address, port, host, options["tls"], options["certificates"])
        return Unix(options["socket"] or os.path.join(self.private_directory(), name))

    def private_directory(self) -> str:
        """A directory, on its host, that only QEMU's user and root may enter."""
        return self.domain.private_directory(self.host)

    def exports(self, wanted: Wanted) -> dict[str, tuple[str, str]]:
        endpoint = wanted.endpoint if self.forward is None else Unix(forwarded(wanted.directory))
        return {
            disk.name: (endpoint.uri(disk.export), f"qemu:dirty-bitmap:backup-{disk.name}") for disk in wanted.disks
        }

    def begin(self, wanted: Wanted, journal: Journal) -> None:
        """Freeze, begin, thaw."""
        xml = self.domain.xml()  # not while the guest is frozen: libvirt 11.0 to 11.4 may wait for QEMU
        if self.host is not None and not wanted.endpoint.is_tcp and self.forward is None:
            self._forward(self.host, wanted, journal)
        if self.domain.is_paused_by_error():
            journal.intend(stuck=True)  # not for want of scratch, and not ours to resume
        self._make_scratch(wanted, journal, domxml.qemu_user(xml))  # before the guest has to wait for it
        frozen = None
        paused = False
        begun = time.monotonic()
        try:
            if wanted.freeze is not None and not self.started:
                frozen = self._freeze(wanted, wanted.freeze, journal, xml)
                begun = time.monotonic()
            if wanted.pause and not self.domain.is_paused:
                journal.intend(suspended=self.domain.id)
                paused = True
                self.domain.call("suspend")  # after the freeze: then nobody in the guest answers any more
            self._begin(wanted, journal)
        except Denied as error:
            raise _with_permission_hint(error, xml, wanted) from None
        except Error as error:
            if not wanted.endpoint.is_tcp or QEMU_LISTENS not in error.reason:
                raise
            why = "QEMU cannot listen there (is it an address of the domain's host, and a port that is free)"
            raise Error("--nbd-listen", f"{why}: {error.reason}", wanted.listen) from None
        finally:
            if paused:
                self._resume(journal)
            if frozen is not None:
                thaw(self.domain, journal)
                duration = (time.monotonic() - begun) * 1000
                journal.note(f"{self.name}: {frozen} file systems frozen for {duration:.0f} ms")

    def _forward(self, host: ssh.Host, wanted: Wanted, journal: Journal) -> None:
        """Have clients here come to the socket of QEMU on its host."""
        here = forwarded(wanted.directory)
        journal.remember(sockets=here)
        self.forward = ssh.Forward(host, here, wanted.endpoint.path)
        pid = self.forward.child.process.pid
        journal.remember(servers=Server(pid, start_of(pid)))

    def _make_scratch(self, wanted: Wanted, journal: Journal, owner: str | None) -> None:
        """
        Make the scratch files, or leave that to libvirt where we have no right to.

        libvirt would have QEMU make them. While it does, QEMU aborts, and the guest with it, when anybody asks for its
        disks' sizes or statistics, as monitoring does all the time (qcow2_get_specific_info(), QEMU 7.2).
        """
        def make(disk: WantedDisk) -> None:
            img.create(disk.name, disk.scratch, disk.size, owner, self.run)

        journal.intend(scratch_made=True)
        try:
            with Ordered(make, AT_ONCE) as work:
                for disk in wanted.disks:
                    work.call(disk)
                for _ in wanted.disks:
                    work.pop()
        except Error:
            remove_scratch(journal, self.host)
            journal.intend(scratch_made=False)

    def _resume(self, journal: Journal) -> None:
        """Resume a guest that we suspended, unless somebody was faster, has started it anew, or QEMU has stopped it."""
        if journal.record.suspended == self.domain.id and self.domain.is_suspended:
            self.domain.resume()
        with contextlib.suppress(Error):  # the record goes when the job is over, and until then it does no harm
            journal.intend(suspended=None)

    def _begin(self, wanted: Wanted, journal: Journal) -> None:
        """Begin the job; on another port, if we chose one that is taken."""
        disks = [
            (disk.name, disk.export, wanted.base if disk.is_increment else None, disk.scratch) for disk in wanted.disks
        ]
        for tries_left in reversed(range(PORT_TRIES)):
            backup = domxml.backup(wanted.endpoint.attributes(), disks, wanted.others)
            try:
                self.domain.begin_backup(backup, checkpoint_xml(wanted), journal.record.scratch_made)
                return
            except AddressInUse:
                if not wanted.endpoint.is_tcp or wanted.endpoint.is_given or not tries_left:
                    raise
            wanted.endpoint.choose_port()
            journal.intend(endpoint=wanted.endpoint.key)

    def _freeze(self, wanted: Wanted, mountpoints: Sequence[str], journal: Journal, xml: str) -> int | None:
        """How many file systems are frozen now, by us; None where it did not come to that. xml: of the domain."""
        if self.domain.is_paused:
            return self._not_frozen(wanted, journal, "it is suspended, and its agent cannot answer")
        if not domxml.has_agent(xml):
            return self._not_frozen(wanted, journal, "it has no channel for a guest agent")
        if domxml.is_agent_away(xml):
            # It would not answer, as one that hangs: the keeper would wait for ever to thaw what nobody froze.
            return self._not_frozen(wanted, journal, "its guest agent is not connected")
        left = journal.record.frozen  # by a job before, whose freeze may have come true by now
        journal.intend(frozen=self.domain.id)
        try:
            frozen = self.domain.freeze(mountpoints)
        except Unanswered as error:
            # It may freeze at any later time: the intent stays, and the keeper thaws when the agent answers.
            return self._not_frozen(wanted, journal, error.reason)
        except Error as error:
            journal.intend(frozen=left)  # refused: whoever froze it will thaw it
            return self._not_frozen(wanted, journal, error.reason)
        if not frozen:
            thaw(self.domain, journal)
            named = f"its agent knows no file system at {', '.join(mountpoints)}"
            return self._not_frozen(wanted, journal, named if mountpoints else "its agent froze no file system")
        return frozen

    def _not_frozen(self, wanted: Wanted, journal: Journal, why: str) -> Any:
        """
        Say that the guest is not frozen, or raise Error where it has to be.

        That is no warning of a guest whose processors stand still while the job starts, as its user wanted it.
        """
        if wanted.require_freeze:
            raise Error(self.name, f"cannot freeze the guest: {why}")
        say = journal.note if wanted.pause or self.domain.is_paused else journal.warn
        say(f"{self.name}: the guest is not frozen: {why}")

    def mark(self, checkpoint: str) -> str | None:
        return self.domain.checkpoint_xml(checkpoint)

    def thaw(self, journal: Journal) -> bool:
        return thaw(self.domain, journal)

    def end(self, journal: Journal, clients: Callable[[], export_clients.Clients], careful: bool) -> None:
        domain, record = self.domain, journal.record
        end_servers(record)  # an ssh that forwards clients
        with contextlib.suppress(NoDomain):  # a transient one may go with its job, or at any time
            domain.settle()
            if domain.is_active:
                ran = domain.end_backup(record.endpoint, lambda: self._shut_out(journal, clients, careful))
                if ran and not record.stuck and domain.is_active and domain.is_paused_by_error():
                    domain.resume()  # its scratch was full, now it is gone
        remove_files(journal, self.host)
        with contextlib.suppress(NoDomain):
            if record.suspended is not None:
                self._resume(journal)
        if record.started is not None:
            self._destroy(record.started)

    def _shut_out(self, journal: Journal, clients: Callable[[], export_clients.Clients], careful: bool) -> None:
        """What export_clients says; on another host, there. Raises Unready where the guest would wait for them."""
        with waiting.on("the clients of the export, which it cuts off"):
            if self.host is None:
                shut_out(self.name, lambda: clients().shut_out(careful))
            else:
                host = self.host
                shut_out(self.name, lambda: self._shut_out_there(host, journal.record, careful, journal.note))

    def _shut_out_there(self, host: ssh.Host, record: Record, careful: bool, say: Callable[[str], Any]) -> int:
        # An ssh that has not worked for anything else may not even be refused, but hang.
        if not record.tcp or host.carries_libvirt or record.scratch_made:
            arguments = json.dumps([record.endpoint, record.tcp, careful])
            try:
                program = Path(export_clients.__file__).read_text(encoding="utf-8")
                return int(host.run(host.destination, "python3", "-c", program, arguments))
            except (Error, OSError, ValueError) as error:
                say(f"{error}: not known who is connected to the export there")
        export_clients.wait_blindly(careful)
        return 0

    def _destroy(self, started: Started) -> None:
        """
        Destroy the domain if this is what the job started, and nobody has a use for it.

        libvirt does so itself when the connection that started it is closed, unless libvirt was restarted since. So a
        domain that runs may have been started by somebody else for its work; and one that was resumed has work.
        """
        if self.domain.is_paused and self.domain.is_started(*started):
            self.domain.destroy()

    def redefine(self, checkpoint_xml: str | None) -> None:
        redefine(self.domain, checkpoint_xml)

    def delete_checkpoint(self, name: str) -> None:
        with contextlib.suppress(NoDomain):  # libvirt forgot it with a transient domain
            self.domain.delete_checkpoint(name)

    def describe(self, path: str) -> tuple[int, int, str]:
        return domain_files.describe(path, self.host)

    def room(self, directory: str) -> int | None:
        if self.host is None:
            found = os.statvfs(directory)
            return found.f_bavail * found.f_frsize
        return None if self.forward is None else self.forward.room(directory)

    def allocated(self, disks: Iterable[str]) -> dict[str, int]:
        return {disk: self.domain.call("blockInfo", disk)[1] for disk in disks}

    def changed(self, checkpoint: str, disks: Iterable[str]) -> dict[str, int]:
        found = domxml.sizes(self.domain.checkpoint_xml(checkpoint, with_size=True))
        return {disk: found[disk] for disk in disks if disk in found}


def _with_permission_hint(error: Error, xml: str, wanted: Wanted) -> Error:
    """Who needs which right, where libvirt or QEMU was refused one."""
    user = domxml.qemu_user(xml)
    paths = [*([] if wanted.endpoint.is_tcp else [wanted.endpoint.path]), *(disk.scratch for disk in wanted.disks)]
    directories = sorted({os.path.dirname(path) for path in paths})
    return Error(
        error.what,
        f"{error.reason} (QEMU{f', user {user},' if user else ''} has to write in {', '.join(directories)}: "
        "look at the directory's mode, then at AppArmor or SELinux; or give --scratch-dir, --socket)",
    )
