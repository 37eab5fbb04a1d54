# SPDX-License-Identifier: LGPL-2.1-or-later
"""A domain that runs: QEMU serves its disks through a backup job of libvirt."""

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
from vnb.job.described import abouts, domain_fields
from vnb.job.record import Server, Started
from vnb.job.redefining import redefine
from vnb.job.state import start_of
from vnb.nbd.endpoint import Tcp, Unix, parse_listen
from vnb.qemu import img, iothreads
from vnb.virt import domxml, export_clients
from vnb.virt.connection import dotted
from vnb.virt.failures import AddressInUse, Denied, NoDomain, Unanswered

QEMU_LISTENS = "nbd-server-start"  # a command of QEMU, which libvirt names in its error
PORT_TRIES = 16  # of ports that are chosen: that many are not taken by chance


class Running:
    """
    A domain that runs, or is started paused for the backup and destroyed after it (start).

    domain (vnb.virt.domain.Domain). host (vnb.base.ssh.Host or None): where it is, None for here.
    """

    kind = "running"

    def __init__(self, domain, host=None, start=False):
        self.domain = domain
        self.host = host
        self._survives = None  # whether its QEMU does what vnb.qemu.iothreads asks, when that is known
        self.forward = None  # vnb.base.ssh.Forward to the socket on the other host, which lasts as long as we do
        self.name = domain.name
        self.uuid = domain.uuid
        self.started = Started(*domain.start_paused()) if start else None

    def close(self):
        self.domain.close()

    def let_go(self):
        """End what start() has begun beside the job: to end that may need what it takes, as descriptors."""
        if self.forward is not None:
            self.forward.child.end()
            self.forward = None

    def refuse_if_busy(self):
        running = self.domain.running_job()
        if running is not None:
            raise Error(self.name, f"a {running} job is active already")

    def disks(self):
        return domxml.disks(self.domain.xml())

    def cannot_read_because(self, disk):
        """Why no backup of a disk can be made (str), which is to be known before the guest is frozen, or None."""
        return (
            disk.no_job_because or self.domain.block_job(disk.name) or self._shared_because(disk)
            or self._iothread_because(disk)
        )

    def _iothread_because(self, disk):
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

    def _survives_hanging_up(self):
        arguments = self.uuid, domxml.emulator(self.domain.xml())
        try:
            if self.host is None:
                return iothreads.find_out(*arguments)
            program = Path(iothreads.__file__).read_text(encoding="utf-8")
            return json.loads(self.host.run(self.host.destination, "python3", "-c", program, *arguments))
        except (Error, OSError, ValueError):
            return self.domain.call_connection("getVersion") >= iothreads.SAFE_SINCE

    def _shared_because(self, disk):
        """
        Why a disk cannot be read that another running domain may write to, or None.

        QEMU locks it against the other's writes, and is refused; libvirtd 9.0 dies of that.
        """
        other = self.domain.sharer(disk) if disk.shareable else None
        return other and f"is shared with the domain {other}, which is running"

    def size_of(self, disk):
        return self.domain.size_of(disk.name)

    def have(self):
        """{checkpoint: {disk: bitmap}} of what an increment may start from."""
        return {name: domxml.bitmaps(xml) for name, xml in self.domain.checkpoints().items()}

    def abouts(self):
        """{checkpoint: what it says of itself}, of those of ours; see vnb.virt.domxml.about()."""
        return abouts(self.domain)

    def images_then(self, checkpoint):
        """{disk name: what named its image when a checkpoint was made}, {} where that is not known."""
        return domxml.images_then(self.domain.checkpoint_xml(checkpoint, with_domain=True))

    def layers_now(self, disk):
        """What names a disk's image, and those below it (list of str)."""
        return disk.layers

    def head_fields(self):
        return domain_fields(self.domain)

    @property
    def is_local(self):
        """Whether its paths are paths of this host."""
        return self.host is None

    def private_directory(self):
        """A directory, on its host, that only QEMU's user and root may enter."""
        return self.domain.private_directory(self.host)

    def endpoint(self, options, _directory, name):
        """Where QEMU listens: a socket in a private directory, if the options name nothing else."""
        if options["listen"] is not None:
            address, port = parse_listen(options["listen"])
            host = "localhost" if self.host is None else self.host.destination
            return Tcp(address, port, host, options["tls"], options["certificates"])
        return Unix(options["socket"] or os.path.join(self.private_directory(), name))

    def exports(self, plan):
        """{disk name: (uri, dirty meta context)}"""
        endpoint = plan.endpoint if self.forward is None else Unix(forwarded(plan))
        return {
            disk["name"]: (endpoint.uri(plan.export(disk["name"])), f"qemu:dirty-bitmap:backup-{disk['name']}")
            for disk in plan.disks
        }

    def start(self, plan, job):
        """Freeze, begin, thaw. Raises BrokenBitmap; nothing is left then."""
        options = plan.options
        xml = self.domain.xml()  # not while the guest is frozen: libvirt 11.0 to 11.4 may wait for QEMU
        if self.host is not None and not plan.endpoint.is_tcp and self.forward is None:
            here = forwarded(plan)
            job.remember(sockets=here)
            self.forward = ssh.Forward(self.host, here, plan.endpoint.path)
            pid = self.forward.child.process.pid
            job.remember(servers=Server(pid, start_of(pid)))
        if self.domain.is_paused_by_error():
            job.intend(stuck=True)  # not for want of scratch, and not ours to resume
        self._make_scratch(plan, job, domxml.qemu_user(xml))  # before the guest has to wait for it
        frozen = None
        paused = False
        begun = time.monotonic()
        try:
            if options["freeze"] is not None and not self.started:
                frozen = self._freeze(options, job, xml)
                begun = time.monotonic()
            if options["pause"] and not self.domain.is_paused:
                job.intend(suspended=self.domain.id)
                paused = True
                self.domain.call("suspend")  # after the freeze: then nobody in the guest answers any more
            self._begin(plan, job)
        except Denied as error:
            raise _with_permission_hint(error, xml, plan) from None
        except Error as error:
            if not plan.endpoint.is_tcp or QEMU_LISTENS not in error.reason:
                raise
            why = "QEMU cannot listen there (is it an address of the domain's host, and a port that is free)"
            raise Error("--nbd-listen", f"{why}: {error.reason}", options["listen"]) from None
        finally:
            if paused:
                self._resume(job)
            if frozen is not None:
                thaw(self.domain, job)
                job.note(f"{self.name}: {frozen} file systems frozen for {(time.monotonic() - begun) * 1000:.0f} ms")

    def _make_scratch(self, plan, job, owner):
        """
        Make the scratch files, or leave that to libvirt where we have no right to.

        libvirt would have QEMU make them. While it does, QEMU aborts, and the guest with it, when anybody asks for its
        disks' sizes or statistics, as monitoring does all the time (qcow2_get_specific_info(), QEMU 7.2).
        """
        sizes = {disk["name"]: disk["size"] for disk in plan.disks}
        run = processes.run if self.host is None else self.host.run

        def make(name):
            img.create(name, plan.scratch[name], sizes[name], owner, run)

        job.intend(scratch_made=True)
        try:
            with Ordered(make, AT_ONCE) as work:
                for name in plan.scratch:
                    work.call(name)
                for _ in plan.scratch:
                    work.pop()
        except Error:
            remove_scratch(job, self.host)
            job.intend(scratch_made=False)

    def _resume(self, job):
        """Resume a guest that we suspended, unless somebody was faster, has started it anew, or QEMU has stopped it."""
        if job.record.suspended == self.domain.id and self.domain.is_suspended:
            self.domain.resume()
        with contextlib.suppress(Error):  # the record goes when the job is over, and until then it does no harm
            job.intend(suspended=None)

    def _begin(self, plan, job):
        """Begin the job; on another port, if we chose one that is taken."""
        for tries_left in reversed(range(PORT_TRIES)):
            try:
                self.domain.begin_backup(plan.backup_xml(), plan.checkpoint_xml(), job.record.scratch_made)
                return
            except AddressInUse:
                if not plan.endpoint.is_tcp or plan.endpoint.is_given or not tries_left:
                    raise
            plan.endpoint.choose_port()
            job.intend(endpoint=plan.endpoint.key)

    def _freeze(self, options, job, xml):
        """How many file systems are frozen now, by us; None where it did not come to that. xml: of the domain."""
        if self.domain.is_paused:
            return self._not_frozen(options, job, "it is suspended, and its agent cannot answer")
        if not domxml.has_agent(xml):
            return self._not_frozen(options, job, "it has no channel for a guest agent")
        if domxml.is_agent_away(xml):
            # It would not answer, as one that hangs: the keeper would wait for ever to thaw what nobody froze.
            return self._not_frozen(options, job, "its guest agent is not connected")
        left = job.record.frozen  # by a job before, whose freeze may have come true by now
        job.intend(frozen=self.domain.id)
        try:
            frozen = self.domain.freeze(options["freeze"])
        except Unanswered as error:
            # It may freeze at any later time: the intent stays, and the keeper thaws when the agent answers.
            return self._not_frozen(options, job, error.reason)
        except Error as error:
            job.intend(frozen=left)  # refused: whoever froze it will thaw it
            return self._not_frozen(options, job, error.reason)
        if not frozen:
            thaw(self.domain, job)
            named = f"its agent knows no file system at {', '.join(options['freeze'])}"
            return self._not_frozen(options, job, named if options["freeze"] else "its agent froze no file system")
        return frozen

    def _not_frozen(self, options, job, why):
        """
        Say that the guest is not frozen, or raise Error where it has to be.

        That is no warning of a guest whose processors stand still while the job starts, as its user wanted it.
        """
        if options["require_freeze"]:
            raise Error(self.name, f"cannot freeze the guest: {why}")
        say = job.note if options["pause"] or self.domain.is_paused else job.warn
        say(f"{self.name}: the guest is not frozen: {why}")

    def mark(self, plan):
        """What libvirt says of the new checkpoint."""
        return self.domain.checkpoint_xml(plan.head["checkpoint"])

    def end(self, job):
        """End the job if it runs and is this one; then everything that it started."""
        domain, record = self.domain, job.record
        end_servers(record)  # an ssh that forwards clients
        with contextlib.suppress(NoDomain):  # a transient one may go with its job, or at any time
            domain.settle()
            if domain.is_active:
                ran = domain.end_backup(record.endpoint, lambda: self._shut_out_clients(job))
                if ran and not record.stuck and domain.is_active and domain.is_paused_by_error():
                    domain.resume()  # its scratch was full, now it is gone
        remove_files(job, self.host)
        with contextlib.suppress(NoDomain):
            if record.suspended is not None:
                self._resume(job)
        if record.started is not None:
            self._destroy(record.started)

    def _shut_out_clients(self, job):
        """What export_clients says; on another host, there. Raises Unready where the guest would wait for them."""
        careful = not job.is_committing  # else its command, and what that had connected, has ended
        with waiting.on("the clients of the export, which it cuts off"):
            if self.host is None:
                shut_out(self.name, lambda: job.clients.shut_out(careful))
            else:
                shut_out(self.name, lambda: self._shut_out_there(job.record, careful, job.note))

    def _shut_out_there(self, record, careful, say):
        # An ssh that has not worked for anything else may not even be refused, but hang.
        if not record.tcp or self.host.carries_libvirt or record.scratch_made:
            arguments = json.dumps([record.endpoint, record.tcp, careful])
            try:
                program = Path(export_clients.__file__).read_text(encoding="utf-8")
                return int(self.host.run(self.host.destination, "python3", "-c", program, arguments))
            except (Error, OSError, ValueError) as error:
                say(f"{error}: not known who is connected to the export there")
        export_clients.wait_blindly(careful)
        return 0

    def _destroy(self, started):
        """
        Destroy the domain if this is what the job started, and nobody has a use for it.

        libvirt does so itself when the connection that started it is closed, unless libvirt was restarted since. So a
        domain that runs may have been started by somebody else for its work; and one that was resumed has work.
        """
        if self.domain.is_paused and self.domain.is_started(*started):
            self.domain.destroy()

    def redefine(self, checkpoint_xml):
        """Have libvirt know a checkpoint again, with the disks that hold its bitmap. Raises Error where none does."""
        redefine(self.domain, checkpoint_xml)

    def delete_checkpoint(self, name):
        with contextlib.suppress(NoDomain):  # libvirt forgot it with a transient domain
            self.domain.delete_checkpoint(name)

    def describe(self, path):
        """(mode, size, SHA-256 as hexadecimal digits) of a regular file on the domain's host. Raises Error."""
        return domain_files.describe(path, self.host)

    def room(self, directory):
        """Free bytes where a directory is, or None if that is not known. Raises OSError."""
        if self.host is None:
            found = os.statvfs(directory)
            return found.f_bavail * found.f_frsize
        return None if self.forward is None else self.forward.room(directory)

    def allocated(self, disks):
        """{disk: bytes} that full backups of disks (names) would have at most."""
        return {disk: self.domain.call("blockInfo", disk)[1] for disk in disks}

    def changed(self, checkpoint, disks):
        """{disk: bytes} that have changed since a checkpoint, of those of disks (names) with a sound bitmap of it."""
        found = domxml.sizes(self.domain.checkpoint_xml(checkpoint, with_size=True))
        return {disk: found[disk] for disk in disks if disk in found}


def _with_permission_hint(error, xml, plan):
    """Who needs which right, where libvirt or QEMU was refused one."""
    user = domxml.qemu_user(xml)
    paths = [*([] if plan.endpoint.is_tcp else [plan.endpoint.path]), *plan.scratch.values()]
    directories = sorted({os.path.dirname(path) for path in paths})
    return Error(
        error.what,
        f"{error.reason} (QEMU{f', user {user},' if user else ''} has to write in {', '.join(directories)}: "
        "look at the directory's mode, then at AppArmor or SELinux; or give --scratch-dir, --socket)",
    )
