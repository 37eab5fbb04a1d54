# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Sources: what a backup reads from. A running domain by libvirt's backup job, a domain that is off or plain image
files by qemu-nbd. All have the same few methods, so that levels, catalogs and the end of a job know no difference.
"""

import contextlib
import heapq
import json
import os
import re
import tempfile
import time
from pathlib import Path

from vnb.base import processes, ssh, waiting
from vnb.base.buffers import AT_ONCE, Ordered
from vnb.base.errors import Error
from vnb.base.tempdir import temporary_directory
from vnb.format import heads
from vnb.job import domain_files
from vnb.job.state import start_of
from vnb.nbd import block_status
from vnb.nbd.connections import Connections
from vnb.nbd.endpoint import Tcp, Unix, parse_listen
from vnb.qemu import img, iothreads
from vnb.virt import domxml, export_clients
from vnb.virt.connection import dotted
from vnb.virt.domain import Domain
from vnb.virt.failures import AddressInUse, Denied, NoDomain, Unanswered, Unready

_PROTOCOL = re.compile(r"[^/]*:")  # before the name of an image that is no path, as nbd:, json:
QEMU_LISTENS = "nbd-server-start"  # a command of QEMU, which libvirt names in its error
PORT_TRIES = 16  # of ports that are chosen: that many are not taken by chance


def open_source(options):
    """The source that the options of vnb-checkpoint mean; see vnb.job.job.begin. Raises Error."""
    if options["images"]:
        return Images(options["images"])
    domain = Domain(options["uri"], options["domain"], options["user"], options["password_file"])
    domain.refuse_managed_save()
    host = ssh.Host.of_uri(domain.uri, **options["ssh"])
    if domain.is_active or options["start_paused"]:
        return Running(domain, host, start=not domain.is_active)
    return Stopped(domain)


def source_of(record):
    """The source of a job from its record, by a connection made now: the daemon may have been restarted."""
    if record["kind"] == "images":
        return Images(record["images"])
    try:
        domain = Domain(record["uri"], record["head"]["uuid"], record.get("user"), record.get("password_file"))
    except NoDomain:
        return Gone(ssh.Host.of_uri(record["uri"], **record["ssh"]))
    domain.what = domain.name  # nobody has typed its UUID
    if record["kind"] == "stopped":
        return Stopped(domain)
    return Running(domain, ssh.Host.of_uri(domain.uri, **record["ssh"]))


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
        self.started = domain.start_paused() if start else None

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
        return _abouts(self.domain)

    def images_then(self, checkpoint):
        """{disk name: what named its image when a checkpoint was made}, {} where that is not known."""
        return domxml.images_then(self.domain.checkpoint_xml(checkpoint, with_domain=True))

    def layers_now(self, disk):
        """What names a disk's image, and those below it (list of str)."""
        return disk.layers

    def head_fields(self):
        return _domain_fields(self.domain)

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
        endpoint = plan.endpoint if self.forward is None else Unix(_forwarded(plan))
        return {
            disk["name"]: (endpoint.uri(plan.export(disk["name"])), f"qemu:dirty-bitmap:backup-{disk['name']}")
            for disk in plan.disks
        }

    def start(self, plan, job):
        """Freeze, begin, thaw. Raises BrokenBitmap; nothing is left then."""
        options = plan.options
        xml = self.domain.xml()  # not while the guest is frozen: libvirt 11.0 to 11.4 may wait for QEMU
        if self.host is not None and not plan.endpoint.is_tcp and self.forward is None:
            here = _forwarded(plan)
            job.remember("sockets", here)
            self.forward = ssh.Forward(self.host, here, plan.endpoint.path)
            pid = self.forward.child.process.pid
            job.remember("servers", [pid, start_of(pid)])
        if self.domain.is_paused_by_error():
            job.intend("stuck")  # not for want of scratch, and not ours to resume
        self._make_scratch(plan, job, domxml.qemu_user(xml))  # before the guest has to wait for it
        frozen = None
        paused = False
        begun = time.monotonic()
        try:
            if options["freeze"] is not None and not self.started:
                frozen = self._freeze(options, job, xml)
                begun = time.monotonic()
            if options["pause"] and not self.domain.is_paused:
                job.intend("suspended", self.domain.id)
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

        job.intend("scratch_made")
        try:
            with Ordered(make, AT_ONCE) as work:
                for name in plan.scratch:
                    work.call(name)
                for _ in plan.scratch:
                    work.pop()
        except Error:
            _remove_scratch(job, self.host)
            job.intend("scratch_made", False)

    def _resume(self, job):
        """
        Resume a guest that we suspended, unless somebody was faster, has started it anew, or QEMU has stopped it.

        The intent is the domain's id, True in records of older versions.
        """
        suspended = job.record["suspended"]
        if (suspended is True or suspended == self.domain.id) and self.domain.is_suspended:
            self.domain.resume()
        with contextlib.suppress(Error):  # the record goes when the job is over, and until then it does no harm
            job.intend("suspended", False)

    def _begin(self, plan, job):
        """Begin the job; on another port, if we chose one that is taken."""
        for tries_left in reversed(range(PORT_TRIES)):
            try:
                self.domain.begin_backup(plan.backup_xml(), plan.checkpoint_xml(), job.record["scratch_made"])
                return
            except AddressInUse:
                if not plan.endpoint.is_tcp or plan.endpoint.is_given or not tries_left:
                    raise
            plan.endpoint.choose_port()
            job.intend("endpoint", plan.endpoint.key)

    def _freeze(self, options, job, xml):
        """How many file systems are frozen now, by us; None where it did not come to that. xml: of the domain."""
        if self.domain.is_paused:
            return self._not_frozen(options, job, "it is suspended, and its agent cannot answer")
        if not domxml.has_agent(xml):
            return self._not_frozen(options, job, "it has no channel for a guest agent")
        if domxml.is_agent_away(xml):
            # It would not answer, as one that hangs: the keeper would wait for ever to thaw what nobody froze.
            return self._not_frozen(options, job, "its guest agent is not connected")
        left = job.record["frozen"]  # by a job before, whose freeze may have come true by now
        job.intend("frozen", self.domain.id)
        try:
            frozen = self.domain.freeze(options["freeze"])
        except Unanswered as error:
            # It may freeze at any later time: the intent stays, and the keeper thaws when the agent answers.
            return self._not_frozen(options, job, error.reason)
        except Error as error:
            job.intend("frozen", left)  # refused: whoever froze it will thaw it
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
        _end_servers(record)  # an ssh that forwards clients
        with contextlib.suppress(NoDomain):  # a transient one may go with its job, or at any time
            domain.settle()
            if domain.is_active:
                ran = domain.end_backup(record["endpoint"], lambda: self._shut_out_clients(job))
                if ran and not record.get("stuck") and domain.is_active and domain.is_paused_by_error():
                    domain.resume()  # its scratch was full, now it is gone
        _remove_files(job, self.host)
        with contextlib.suppress(NoDomain):
            if record["suspended"]:
                self._resume(job)
        if record["started"]:
            self._destroy(record["started"])

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
        if not record["tcp"] or self.host.carries_libvirt or record.get("scratch_made"):
            arguments = json.dumps([record["endpoint"], record["tcp"], careful])
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
        # Of a record of older versions, which say no more than that, it is not known.
        if isinstance(started, dict) and self.domain.is_paused and self.domain.is_started(started):
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


class Gone:
    """
    A domain that was undefined meanwhile, or was a transient one: with its QEMU the job has ended.

    host (vnb.base.ssh.Host or None): where it was.
    """

    kind = "gone"

    def __init__(self, host):
        self._host = host

    def close(self):
        """Nothing is held."""

    def have(self):
        """No checkpoint: libvirt forgot them with the domain."""
        return {}

    abouts = have

    def end(self, job):
        """End what the job started here, and remove its files."""
        _end_servers(job.record)
        _remove_files(job, self._host)

    def delete_checkpoint(self, name):
        """There is none."""

    def remove_bitmaps(self, record):
        """Whose images these are now is not known."""


class _Offline:
    """What a stopped domain and plain images have in common: images that qemu-nbd reads."""

    started = False
    runs = False
    is_local = True

    def __init__(self):
        self._layers = {}
        self._servers = []

    def refuse_if_busy(self):
        """Images that a guest uses are locked: qemu-img says so, at the first question."""

    def close(self):
        """Nothing is held."""

    def let_go(self):
        """See Running."""
        while self._servers:
            self._servers.pop().end()

    def cannot_read_because(self, disk):
        """See Running. Images that others use are locked: qemu-img says so."""
        return disk.no_job_because if disk.type == "vhostuser" else None

    def layers_of(self, disk):
        if disk.name not in self._layers:
            self._layers[disk.name] = img.layers(disk.name, disk.path, disk.format)
            for layer in self._layers[disk.name]:
                _refuse_relative_data(disk, layer)
        return self._layers[disk.name]

    def size_of(self, disk):
        return self.layers_of(disk)[0].size

    def layers_now(self, disk):
        """See Running."""
        return [layer.path for layer in self.layers_of(disk)]

    def endpoint(self, options, directory, _name):
        """What the sockets' paths start with, one a disk: the directory is that of this one job."""
        if options["listen"] is not None:
            raise Error("--nbd-listen", f"{self.name} does not run, and its images are served on unix sockets")
        return Unix(options["socket"] or os.path.join(directory, ""))

    def exports(self, plan):
        return {
            disk["name"]: (
                Unix(self._socket(plan, disk["name"])).uri(plan.export(disk["name"])),
                f"qemu:dirty-bitmap:{self._bitmap(plan, disk)}",
            )
            for disk in plan.disks
        }

    def _socket(self, plan, name):
        return f"{plan.endpoint.path}{name}.sock"

    def _bitmap(self, plan, disk):
        """The bitmap that says what changed: the parent's, or the union that start() makes of its layers."""
        wanted = img.holders(self._layers[disk["name"]], plan.parent) if plan.parent else []
        return plan.parent if len(wanted) == 1 else plan.union

    def start(self, plan, job):
        """Add the new bitmaps, then serve the images: from there on nobody else can write to them."""
        if plan.marks:
            for disk in plan.disks:
                if disk["bitmap"]:
                    job.remember("added", [disk["name"], plan.sources[disk["name"]].path])
                    img.add_bitmap(disk["name"], plan.sources[disk["name"]].path, plan.head["checkpoint"])
        for disk in plan.disks:
            image = plan.sources[disk["name"]]
            bitmap = None
            if disk["level"] == "inc":
                bitmap = self._bitmap(plan, disk)
                if bitmap == plan.union:
                    job.remember("unions", [disk["name"], image.path, bitmap])
                    wanted = img.holders(self._layers[disk["name"]], plan.parent)
                    img.add_union(disk["name"], wanted, plan.parent, bitmap)
            socket = self._socket(plan, disk["name"])
            job.remember("sockets", socket)
            server = img.serve(disk["name"], plan.export(disk["name"]), image.path, image.format, socket, bitmap)
            self._servers.append(server)  # they end with the one who started them: the keeper keeps them
            job.remember("servers", [server.process.pid, start_of(server.process.pid)])

    def end(self, job):
        _end_servers(job.record)
        for name, path, bitmap in job.record["unions"]:
            if self.runs:
                # It records nothing, so it does no harm; and nobody can remove it until the guest is off.
                job.note(f"{self.name}: {name}: bitmap {bitmap} stays in {path}, which the guest uses by now")
            else:
                img.remove_bitmap(name, path, bitmap)

    def allocated(self, disks):
        """See Running; qemu-nbd knows, which opens the images for reading."""
        return {disk.name: self._measure(disk, self.layers_of(disk)[:1]) for disk in self.disks() if disk.name in disks}

    def changed(self, checkpoint, disks):
        """See Running."""
        wanted = [disk for disk in self.disks() if disk.name in disks]
        holders = [(disk, img.holders(self.layers_of(disk), checkpoint)) for disk in wanted]
        return {disk.name: self._measure(disk, layers, checkpoint) for disk, layers in holders if layers}

    def _measure(self, disk, layers, bitmap=None):
        """How many bytes are dirty in any of the layers' bitmaps, or are data where no bitmap is given."""
        with tempfile.TemporaryDirectory(dir=temporary_directory()) as directory, contextlib.ExitStack() as stack:
            ranges = []
            connections = Connections(len(layers))
            for number, layer in enumerate(layers):
                socket = os.path.join(directory, str(number))
                server = img.serve(disk.name, "", layer.path, layer.format, socket, bitmap)
                stack.callback(server.end)
                context = block_status.Context(
                    connections, Unix(socket).uri(""), disk.name,
                    f"qemu:dirty-bitmap:{bitmap}" if bitmap else block_status.BASE_ALLOCATION, required=True,
                )
                context.open()
                stack.callback(context.close)
                ranges.append(_ranges(context, bitmap is not None))
            return _total(heapq.merge(*ranges))


class Stopped(_Offline):
    """A domain that is off: its images, and checkpoints that are valid when it runs again."""

    kind = "stopped"

    def __init__(self, domain):
        super().__init__()
        self.domain = domain
        self.name = domain.name
        self.uuid = domain.uuid
        if not domain.is_local:
            raise Error(
                self.name, "is not running, and its images are on another host: start it for the backup "
                "(--start-paused), or run vnb-checkpoint there"
            )

    def close(self):
        self.domain.close()

    @property
    def runs(self):
        """Whether somebody has started it since."""
        return self.domain.is_active

    def disks(self):
        return domxml.disks(self.domain.xml(inactive=True))

    def size_of(self, disk):
        self._must_be_plain(disk)
        return super().size_of(disk)

    def _must_be_plain(self, disk):
        """Raise Error where qemu-nbd, which knows nothing of the XML, would read something else than the guest does."""
        what = disk.kind_of_qemu
        if what is None and not _is_chain_of(disk, self.layers_of(disk)):
            what = "a disk with other images below it in the domain's XML than in its own header"
        if what is not None:
            raise Error(disk.name, f"{what} can be read while its domain runs only (--start-paused)")

    def describe(self, path):
        """See Running."""
        return domain_files.describe(path)

    def nvram_of_libvirt(self, xml):
        """
        The path of an nvram that the domain's definition does not name, or None where there is no such file.

        libvirt names it after the domain; up to 9.0 it is only in the XML of a domain that runs.
        """
        if not domxml.leaves_nvram_to_libvirt(domxml.parse(xml, "domain XML")):
            return None
        path = os.path.join(self.domain.nvram_directory, f"{self.name}_VARS.fd")
        return path if os.path.exists(path) else None

    def have(self):
        """What libvirt knows and the images still have."""
        disks = {disk.name: disk for disk in self.disks() if disk.kind_of_qemu is None and disk.format == "qcow2"}
        found = {}
        for name, xml in self.domain.checkpoints().items():
            found[name] = {
                disk: bitmap for disk, bitmap in domxml.bitmaps(xml).items()
                if disk in disks and img.holders(self.layers_of(disks[disk]), bitmap)
            }
        return found

    def abouts(self):
        """See Running."""
        return _abouts(self.domain)

    def images_then(self, checkpoint):
        """See Running."""
        return domxml.images_then(self.domain.checkpoint_xml(checkpoint, with_domain=True))

    def head_fields(self):
        return _domain_fields(self.domain)

    def start(self, plan, job):
        super().start(plan, job)
        if plan.marks:
            xml = domxml.with_creation_time(plan.checkpoint_xml(), int(time.time()))
            self.domain.redefine_checkpoint(xml)

    def mark(self, plan):
        return self.domain.checkpoint_xml(plan.head["checkpoint"])

    def redefine(self, checkpoint_xml):
        """See Running."""
        redefine(self.domain, checkpoint_xml)

    def delete_checkpoint(self, name):
        self.domain.delete_checkpoint(name)

    def remove_bitmaps(self, record):
        """Bitmaps that were added before libvirt was told of their checkpoint."""
        if not self.domain.is_active:
            for name, path in record["added"]:
                img.remove_bitmap(name, path, record["head"]["checkpoint"])


class Images(_Offline):
    """
    Image files without any libvirt. images: {disk name: path}.

    Their identity is that of their paths: the same files are the same machine.
    """

    kind = "images"

    def __init__(self, images):
        super().__init__()
        self.images = {name: os.path.realpath(path) for name, path in images.items()}
        self.name = os.path.basename(next(iter(self.images.values()))).partition(".")[0] or "images"
        self.uuid = heads.uuid_of("\n".join(f"{name}={path}" for name, path in sorted(self.images.items())))

    def disks(self):
        return [ImageDisk(name, path) for name, path in self.images.items()]

    def have(self):
        found = {}
        for disk in self.disks():
            layers = self.layers_of(disk)
            for bitmap in {name for layer in layers for name in layer.bitmaps}:
                if img.holders(layers, bitmap):
                    found.setdefault(bitmap, {})[disk.name] = bitmap
        return found

    def abouts(self):
        """Bitmaps say nothing of themselves."""
        return {}

    def images_then(self, _checkpoint):
        """Not known, and not needed: with other images it would be another machine."""
        return {}

    def head_fields(self):
        return {"domain_xml": None, "checkpoint_xml": None}

    def mark(self, _plan):
        return None

    def redefine(self, _checkpoint_xml):
        """There is no libvirt that could have forgotten it: its bitmaps are not there."""
        raise Error(self.name, "no image has a sound bitmap of it")

    def delete_checkpoint(self, name):
        for disk in self.disks():
            if disk.format == "qcow2":
                img.remove_bitmap(disk.name, disk.path, name)

    def remove_bitmaps(self, _record):
        """delete_checkpoint() has removed them all."""


class ImageDisk:
    """An image file in the place of a domain's disk; see vnb.virt.domxml.Disk."""

    type = "file"
    device = "disk"
    encrypted = readonly = empty = shareable = False
    left_out_because = None

    def __init__(self, name, path):
        self.name = name
        self.path = path
        self.format = _format_of(name, path)


def _refuse_relative_data(disk, layer):
    """
    Raise Error where QEMU looks for the data of a layer (vnb.qemu.img.Layer) wherever it was started.

    Another QEMU than ours has written it, and we may find another file of that name.
    """
    name = layer.data_file
    if name and not os.path.isabs(name) and not _PROTOCOL.match(name):
        raise Error(
            disk.name, f"{layer.path} names its data file {name}, which QEMU looks for in the directory where it is "
            f"started: there, qemu-img amend -f qcow2 -o data_file=\"$PWD/{name}\" {layer.path} makes the name absolute"
        )


def shut_out(name, cut):
    """cut(), which returns what Clients.shut_out() does. Raises Unready where the guest would wait."""
    stalled = cut()
    if stalled:
        raise Unready(
            name, f"the job cannot be ended: clients of its export do not read ({stalled}), and this user may not cut "
            "them off: the guest would wait for them. End them, or run vnb-checkpoint abort as root"
        )


def _is_chain_of(disk, chain):
    """Whether a chain (list of vnb.qemu.img.Layer) is what a disk's XML has, as far as it says anything."""
    if len(disk.layers) > len(chain) or (disk.ends and len(disk.layers) < len(chain)):
        return False
    return all(
        os.path.realpath(name) == os.path.realpath(layer.path) and format_ in (None, layer.format)
        and (data is None or os.path.realpath(data) == os.path.realpath(layer.data_file or ""))
        for name, format_, data, layer in zip(disk.layers, disk.formats, disk.data, chain)
    )


def _format_of(name, path):
    """qcow2 or raw. A guest can write a qcow2 header into a raw image: this is for images without a guest."""
    try:
        with open(path, "rb") as file:
            return "qcow2" if file.read(4) == b"QFI\xfb" else "raw"
    except OSError as error:
        raise Error(name, error.strerror, path) from None


def _ranges(context, is_bitmap):
    """Yield (offset, end) of what is dirty, or of what is data, in an export."""
    for offset, length, flags in block_status.Walk(context, unknown=0).within(0, context.size, context.size):
        if flags & block_status.DIRTY if is_bitmap else not flags & block_status.READS_ZERO:
            yield offset, offset + length


def _total(ranges):
    """The bytes that ascending ranges of (offset, end), which may overlap, cover."""
    total = done = 0
    for offset, end in ranges:
        if end > done:
            total += end - max(offset, done)
            done = end
    return total


def redefine(domain, checkpoint_xml):
    """
    Have libvirt know a checkpoint of a vnb.virt.domain.Domain again, with the disks that hold a sound bitmap of it.

    checkpoint_xml (str or None): as it was saved. Raises Error where no disk does; then nothing has changed.
    """
    if not checkpoint_xml:
        raise Error(domain.name, "the catalog has no XML of it")
    present = {disk.name: disk for disk in domxml.disks(domain.xml(inactive=not domain.is_active))}
    wanted = [name for name in domxml.bitmaps(checkpoint_xml) if name in present]
    if not wanted:
        raise Error(domain.name, "the domain has none of its disks any more")
    if domain.is_active:
        _redefine_live(domain, checkpoint_xml, wanted, present)
        return
    if not domain.is_local:
        raise Error(domain.name, "is off, and its images are on another host")
    bitmaps = domxml.bitmaps(checkpoint_xml)
    sound = [name for name in wanted if _has_sound(present[name], bitmaps[name])]
    if not sound:
        raise Error(domain.name, f"no image has a sound bitmap {bitmaps[wanted[0]]}")
    domain.redefine_checkpoint(domxml.checkpoint_of(checkpoint_xml, sound, present))


def _redefine_live(domain, checkpoint_xml, wanted, present):
    """QEMU is asked about the bitmaps by libvirt: of all disks, and where that fails of one after the other."""
    def ask(names):
        domain.redefine_checkpoint(domxml.checkpoint_of(checkpoint_xml, names, present), validate=True)

    try:
        ask(wanted)
        return
    except Error as error:
        if len(wanted) == 1:
            raise
        failure = error
    sound = []
    for name in wanted:
        with contextlib.suppress(Error):  # the first failure says it all
            ask([name])
            sound.append(name)
    if not sound:
        raise failure
    ask(sound)


def _has_sound(disk, bitmap):
    """Whether a disk's image, which no guest uses, tells of all changes since a bitmap was made."""
    return disk.format == "qcow2" and bool(disk.path) and bool(
        img.holders(img.layers(disk.name, disk.path, disk.format), bitmap))


def _forwarded(plan):
    """The socket here that ssh forwards to the one of QEMU on its host."""
    return os.path.join(plan.directory, "nbd.sock")


def _end_servers(record):
    """End the programs that a job has started, by their ids, and remove the sockets."""
    for pid, start in record["servers"]:
        if start is not None and start_of(pid) == start:
            processes.end(pid)
    for socket in record["sockets"]:
        with contextlib.suppress(OSError):  # one that stays does no harm: the next job takes its place
            os.unlink(socket)


def _remove_files(job, host):
    """Remove socket and scratch files: those that libvirt made it does itself, but not after a crash of its own."""
    if host is None and not job.record["tcp"]:
        with contextlib.suppress(OSError):
            os.unlink(job.record["endpoint"])
    if host is None or job.record.get("scratch_made"):
        _remove_scratch(job, host)


def _remove_scratch(job, host):
    """Remove the scratch files. What stays on another host is said: the backup itself is over."""
    paths = job.record["scratch"]
    if host is not None:
        try:
            host.run(host.destination, "rm", "-f", "--", *paths)
        except Error as error:
            job.note(f"{error}: left behind there: {', '.join(paths)}")
        return
    for path in paths:
        with contextlib.suppress(OSError):
            os.unlink(path)


def _abouts(domain):
    found = {name: domxml.about(xml) for name, xml in domain.checkpoints().items()}
    return {name: about for name, about in found.items() if about is not None}


def _domain_fields(domain):
    fields = {"domain_xml": domain.xml(), "checkpoint_xml": None}
    if domain.is_persistent:
        fields["inactive_xml"] = domain.xml(inactive=True)
        fields["autostart"] = bool(domain.call("autostart"))
    return fields


def thaw(domain, job):
    """
    Thaw a guest that we froze; True when it is done. The intent stays where the agent does not answer.

    It is the domain's id, True in records of older versions: a guest that was started anew is not the one we froze.
    """
    if job.record["frozen"] is not True and job.record["frozen"] != domain.id:
        job.intend("frozen", False)
        return True
    try:
        domain.thaw()
    except Unanswered as error:
        job.note(f"{domain.name}: cannot thaw the guest yet: {error.reason}")
        return False
    except Error as error:
        if domain.is_active:
            job.note(f"{domain.name}: cannot thaw the guest: {error.reason}")
            return False
    job.intend("frozen", False)
    return True


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
