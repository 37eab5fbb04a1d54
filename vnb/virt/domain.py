# SPDX-License-Identifier: LGPL-2.1-or-later
"""Domains of libvirt: their state, their backup jobs, their agents and their checkpoints."""

from __future__ import annotations

import contextlib
import os
import re
import threading

import libvirt

from vnb.base import waiting
from vnb.base.errors import Error
from vnb.qemu import img
from vnb.virt import domxml
from vnb.virt.connection import Patience, default_uri, dotted, error_of, is_local_uri, open_connection
from vnb.virt.failures import AddressInUse, BrokenBitmap, Denied, NoDomain, Unanswered, Unready

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any

    from vnb.base.ssh import Host


_UUID = re.compile(r"[0-9A-Fa-f]{8}(-?[0-9A-Fa-f]{4}){3}-?[0-9A-Fa-f]{12}")
SETTLE_SECONDS = 90  # a guest that shuts down while a job runs stays in that state for 30 s
PRESERVE_SHUTDOWN = 1 << 1  # VIR_DOMAIN_BACKUP_BEGIN_PRESERVE_SHUTDOWN_DOMAIN: a guest stays until the job ends
PRESERVE_SHUTDOWN_SINCE = 11_010_000  # the daemon's version, not the client library's, has to know it
SYSTEM_ROOT = "/var/lib/libvirt/qemu"  # of the directories that the system's daemon makes for domains
SHORT_NAME = 20  # characters of a domain's name in these
# libvirt's codes for what it cannot read from a QEMU that has ended: it says them in the language of its locale.
MONITOR_GONE = (libvirt.VIR_ERR_INTERNAL_ERROR, libvirt.VIR_ERR_OPERATION_FAILED, libvirt.VIR_ERR_SYSTEM_ERROR)
JOBS = {
    libvirt.VIR_DOMAIN_JOB_OPERATION_BACKUP: "backup",
    libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT: "migration",
    libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_IN: "migration",
    libvirt.VIR_DOMAIN_JOB_OPERATION_SAVE: "save",
    libvirt.VIR_DOMAIN_JOB_OPERATION_DUMP: "dump",
    libvirt.VIR_DOMAIN_JOB_OPERATION_SNAPSHOT: "snapshot",
}
BLOCK_JOBS = {
    libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_PULL: "pull",
    libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_COPY: "copy",
    libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_COMMIT: "commit",
    libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_ACTIVE_COMMIT: "active-commit",
}
JOB_END_SECONDS = 60  # ending a pull job takes milliseconds; a guest that is shutting down keeps it for 30 s
STILL_THERE = f"the backup job is still there after {JOB_END_SECONDS} seconds"
UNKNOWN = f"{STILL_THERE}, and libvirt knows nothing about it, as after a crash: it ends when the domain is shut down"
MARK = "urn:vnb:started"  # the namespace of what we write into the live XML of a domain that we start
# For the guest agent to answer; libvirt itself would wait for ever. A freeze writes back all that is dirty, and Windows
# gives its writers a minute; no job runs yet that somebody would have to watch over. Thawing and asking is quick.
FREEZE_SECONDS, THAW_SECONDS, INFO_SECONDS = 60, 5, 5
AGENT_COMMAND_TIMEOUT = 112  # VIR_ERR_AGENT_COMMAND_TIMEOUT, which the binding may be too old for
WAITS = {  # what libvirt's functions wait for
    "backupBegin": "libvirt and QEMU to begin the job", "abortJob": "libvirt and QEMU to end the job",
    "fsFreeze": "the guest agent to freeze the file systems", "fsThaw": "the guest agent to thaw the file systems",
    "guestInfo": "the guest agent to describe the guest",
}


def short_names(name: str) -> set[bytes]:
    """
    What libvirt may put of a domain's name into paths: virDomainDefGetShortName() takes 20 characters.

    In the locale C characters are bytes.
    """
    return {os.fsencode(name[:SHORT_NAME]), os.fsencode(name)[:SHORT_NAME]}


class Domain:
    """
    A domain, looked up anew: the daemon may have been restarted since the last time.

    uri: None for the default. name: a name or a UUID. user, password_file:
    what libvirt's authentication asks for. Raises Error, as all methods do.
    """

    def __init__(self, uri: str | None, name: str, user: str | None = None, password_file: str | None = None) -> None:
        self.uri = uri or default_uri()
        self.what = name
        try:
            with waiting.on(f"libvirt at {self.uri} to answer"):
                self._connection = open_connection(self.uri, user, password_file)
        except libvirt.libvirtError as error:
            raise error_of(self.uri, error) from None
        try:
            with waiting.on(f"libvirt at {self.uri} to answer"):
                self._domain: Any = waiting.Told(self._look_up(name), WAITS, "libvirt to answer")
            self.name = self._domain.name()
            self.uuid = self._domain.UUIDString()
        except libvirt.libvirtError as error:
            raise error_of(name, error) from None

    def _look_up(self, name: str) -> Any:
        """libvirt's domain of a name or a UUID; NoDomain only where libvirt says so: it may be away."""
        looks = [self._connection.lookupByName]
        if _UUID.fullmatch(name):
            looks.append(self._connection.lookupByUUIDString)
        for look in looks:
            try:
                return look(name)
            except libvirt.libvirtError as error:
                if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
                    raise
        raise NoDomain(name, f"no such domain at {self.uri} (virsh -c {self.uri} list --all shows those that are)")

    def close(self) -> None:
        """Let go of the connection, which the domain holds, too."""
        self._domain = None
        with contextlib.suppress(libvirt.libvirtError):  # the daemon was faster
            self._connection.close()

    def __enter__(self) -> Domain:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, function: str, *args: Any) -> Any:
        """function(*args) of libvirt's domain object, its error as an Error."""
        try:
            return getattr(self._domain, function)(*args)
        except libvirt.libvirtError as error:
            raise error_of(self.what, error) from None

    @property
    def is_active(self) -> bool:
        """Whether it runs; a transient one is not even known when it does not."""
        try:
            return bool(self.call("isActive"))
        except NoDomain:
            return False

    @property
    def id(self) -> int:
        """libvirt's number of this run of the domain, as it was when the domain was looked up; -1 where it was off."""
        return self.call("ID")

    def refuse_managed_save(self) -> None:
        """
        Raise Error where the domain is off, and its memory is saved.

        The disks alone are those of a domain after a power cut, and a start would use the saved memory up.
        """
        if not self.is_active and self.call("hasManagedSaveImage"):
            raise Error(
                self.name, f"is off with its memory saved by libvirt: virsh start {self.name} resumes it for a backup, "
                f"virsh managedsave-remove {self.name} gives up the memory"
            )

    @property
    def is_persistent(self) -> bool:
        return bool(self.call("isPersistent"))

    def xml(self, inactive: bool = False) -> str:
        """The domain's XML, live or as it will be at the next start, without its secrets."""
        return self.call("XMLDesc", libvirt.VIR_DOMAIN_XML_INACTIVE if inactive else 0)

    def size_of(self, disk: str) -> int:
        """The size in bytes of a disk (name) as the guest sees it."""
        return self.call("blockInfo", disk)[0]

    def block_job(self, disk: str) -> str | None:
        """Why libvirt makes no backup job of a disk (name) now, for another block job of it, or None."""
        kind = (self.call("blockJobInfo", disk) or {}).get("type")
        return kind and f"has another block job ({BLOCK_JOBS.get(kind, kind)})"

    def sharer(self, disk: domxml.Disk) -> str | None:
        """
        The name of another domain that runs and has a disk of the same source, or None.

        libvirt 11.0 to 11.4 asks QEMU before it describes a domain. If QEMU hangs, this takes half a minute.
        """
        ours = self._source_of(disk)
        for other in self.call_connection("listAllDomains", libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE):
            try:
                if other.UUIDString() == self.uuid:
                    continue
                with waiting.on(f"libvirt to describe the domain {other.name()}"):
                    xml = other.XMLDesc()
            except libvirt.libvirtError as error:
                if error.get_error_code() in (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_OPERATION_INVALID):
                    continue  # it has gone
                raise error_of(self.what, error) from None
            if any(ours == self._source_of(disk) for disk in domxml.disks(xml) if disk.shareable):
                return other.name()
        return None

    def _source_of(self, disk: domxml.Disk) -> object:
        """What tells the source of a disk from others, whatever it is called, as far as that can be known here."""
        path = disk.path or self._volume_path(disk)
        if path is None or not self.is_local:
            return path or disk.layers[:1]
        try:
            found = os.stat(path)
        except OSError:
            return path
        return found.st_rdev or (found.st_dev, found.st_ino)

    def _volume_path(self, disk: domxml.Disk) -> str | None:
        """The path of a volume of a storage pool, or None for other disks."""
        if disk.volume is None:
            return None
        try:
            pool = self._connection.storagePoolLookupByName(disk.volume[0])
            return pool.storageVolLookupByName(disk.volume[1]).path()
        except libvirt.libvirtError:
            return None  # a domain that runs may have outlived it

    def private_directory(self, host: Host | None = None) -> str:
        """
        The directory that libvirt made for this running domain, which only QEMU's user and root can enter.

        host: where it is.
        """
        import glob

        session = self.uri.partition("?")[0].endswith("/session")
        name = f"domain-{self.id}-*"
        if host is not None:
            root = '"${XDG_CONFIG_HOME:-$HOME/.config}"/libvirt/qemu/lib' if session else SYSTEM_ROOT
            found = host.glob(self.what, f"{root}/{name}")
        else:
            root = SYSTEM_ROOT
            if session:
                config = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
                root = os.path.join(config, "libvirt/qemu/lib")
            found = [path for path in glob.glob(f"{glob.escape(root)}/{name}") if os.path.isdir(path)]
        # A crash leaves the directories of other domains behind, and libvirt counts ids from 1 again.
        names = short_names(self.name)
        found = [path for path in found if os.fsencode(os.path.basename(path)).split(b"-", 2)[2] in names]
        if len(found) != 1:
            raise Error(self.what, f"no directory of this domain below {root}: name a socket with --socket")
        return found[0]

    def running_job(self) -> str | None:
        """What kind of job runs, in words, or None. Never waits."""
        return self._job()[0]

    def _job(self) -> tuple[str | None, bool]:
        """(kind of the job that runs, or None; whether libvirt knows anything about it)."""
        try:
            stats = self._domain.jobStats()
        except libvirt.libvirtError as error:
            # "backup job data missing": a backup job is beginning or ending at this moment, or libvirtd died then.
            if error.get_error_code() == libvirt.VIR_ERR_INTERNAL_ERROR:
                return "backup", False
            raise error_of(self.what, error) from None
        if stats["type"] == libvirt.VIR_DOMAIN_JOB_NONE:
            return None, True
        return JOBS.get(stats.get("operation"), "job"), True

    def backup_endpoint(self) -> str | None:
        """Where the running pull-mode backup job listens (see domxml), or None where there is no backup job."""
        # What is not asked for in vain is no error in libvirtd's log.
        if self._job() != ("backup", True):
            return None
        try:
            return domxml.backup_endpoint(self._domain.backupGetXMLDesc())
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN_BACKUP:
                return None
            raise error_of(self.what, error) from None

    def begin_backup(self, backup_xml: str, checkpoint_xml: str | None, reuse: bool = False) -> None:
        """
        Start a backup job. Raises BrokenBitmap where a bitmap is missing or inconsistent; nothing is left then.

        reuse: the scratch files are there already, empty images as large as the disks.
        """
        flags = libvirt.VIR_DOMAIN_BACKUP_BEGIN_REUSE_EXTERNAL if reuse else 0
        flags |= PRESERVE_SHUTDOWN if self.call_connection("getLibVersion") >= PRESERVE_SHUTDOWN_SINCE else 0
        try:
            self._domain.backupBegin(backup_xml, checkpoint_xml, flags)
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_CHECKPOINT_INCONSISTENT:
                raise BrokenBitmap(self.what, error.get_error_message()) from None
            if error.get_error_code() in (libvirt.VIR_ERR_NO_SUPPORT, libvirt.VIR_ERR_OPERATION_UNSUPPORTED):
                raise Error(self.what, f"{error.get_error_message()} ({self._versions()})") from None
            for kind in (Denied, AddressInUse):
                if kind.is_meant(error):
                    raise kind(self.what, error.get_error_message()) from None
            raise error_of(self.what, error) from None

    def _versions(self) -> str:
        version, qemu = self.call_connection("getLibVersion"), self.call_connection("getVersion")
        return f"libvirt {dotted(version)}, QEMU {dotted(qemu)}; incremental backup needs libvirt 7.6 and QEMU 5.2"

    def call_connection(self, function: str, *args: Any) -> Any:
        """function(*args) of libvirt's connection object, its error as an Error."""
        try:
            return getattr(self._connection, function)(*args)
        except libvirt.libvirtError as error:
            raise error_of(self.uri, error) from None

    @property
    def nvram_directory(self) -> str:
        """Where libvirt keeps what UEFI remembers, unless a domain's XML says so itself."""
        if not self.uri.partition("?")[0].endswith("/session"):
            return "/var/lib/libvirt/qemu/nvram"
        return os.path.join(os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config"), "libvirt/qemu/nvram")

    @property
    def is_local(self) -> bool:
        """Whether paths in the domain's XML are paths of this host."""
        return is_local_uri(self.uri)

    def end_backup(self, endpoint: str, get_ready: Callable[[], Any]) -> bool:
        """
        End the backup job that listens at endpoint, and come back when it is gone. Returns whether it was there.

        get_ready: a function to be called before it is ended, which may take its time. It raises Unready where the job
        must not be ended now.

        A pull job has no other end than abort. Another one may begin the moment that ours is gone: it is not ours to
        end. A guest that is shutting down is waited for: libvirt answers nothing about its job until it is off.
        """
        ready = asked = False
        with self._changes() as wait:
            patience = Patience(JOB_END_SECONDS)
            while True:
                try:
                    kind, is_known = self._job() if self.is_active else (None, True)
                    if kind != "backup":
                        return ready
                    found = self.backup_endpoint() if is_known else None
                    # None while a job begins or ends: which one, is not known yet.
                    if found not in (None, endpoint):
                        return ready
                    if found == endpoint and not ready:
                        get_ready()
                        ready = True
                        patience = Patience(JOB_END_SECONDS)
                        continue  # meanwhile it may have ended, and another one begun
                    if found == endpoint and not asked:
                        self.call("abortJob")
                        asked = True
                    failure = Error(self.what, STILL_THERE if is_known else UNKNOWN)
                except Unready:
                    raise
                except Error as error:
                    failure = error
                if patience.is_over or not self._connection.isAlive():
                    raise failure
                with waiting.on("libvirt and QEMU to end the job"):
                    wait(patience.next_pause())  # the abort is answered before the block jobs are gone

    @contextlib.contextmanager
    def _changes(self) -> Iterator[Callable[[float], None]]:
        """
        A function that waits for some seconds, or until a job of this domain has ended or its state has changed.

        What happens between two calls of it is not missed. It is for a poll, which may be rare then.
        """
        changed = threading.Event()
        events = []
        for event in (libvirt.VIR_DOMAIN_EVENT_ID_JOB_COMPLETED, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE):
            with contextlib.suppress(libvirt.libvirtError):  # the poll has to do, where libvirt has no events
                events.append(
                    self._connection.domainEventRegisterAny(self._domain, event, lambda *_: changed.set(), None)
                )

        def wait(seconds: float) -> None:
            changed.wait(seconds)
            changed.clear()

        try:
            yield wait
        finally:
            for event in events:
                with contextlib.suppress(libvirt.libvirtError):  # the daemon has gone
                    self._connection.domainEventDeregisterAny(event)

    def settle(self) -> None:
        """Wait until a guest that is shutting down is off: libvirt says so a moment after QEMU's monitor is gone."""
        if not self._is_going():
            return
        with self._changes() as wait, waiting.on("the guest, which is shutting down"):
            patience = Patience(SETTLE_SECONDS)
            while self._is_going():
                if patience.is_over:
                    raise Error(self.what, f"is still shutting down after {SETTLE_SECONDS} seconds")
                wait(patience.next_pause())

    def _is_going(self) -> bool:
        if not self.is_active:
            return False
        if self.call("state")[0] == libvirt.VIR_DOMAIN_SHUTDOWN:
            return True
        try:
            self._domain.ioThreadInfo()  # any question to QEMU's monitor that every domain can answer will do
        except libvirt.libvirtError as error:
            return error.get_error_domain() == libvirt.VIR_FROM_QEMU and error.get_error_code() in MONITOR_GONE
        return False

    def is_paused_by_error(self) -> bool:
        """Whether QEMU stopped the guest because it could not write."""
        state, reason = self.call("state")
        return state == libvirt.VIR_DOMAIN_PAUSED and reason == libvirt.VIR_DOMAIN_PAUSED_IOERROR

    @property
    def is_paused(self) -> bool:
        return self.call("state")[0] == libvirt.VIR_DOMAIN_PAUSED

    @property
    def is_suspended(self) -> bool:
        """Whether somebody, as we, has paused it: not QEMU, and no snapshot or migration."""
        state, reason = self.call("state")
        return state == libvirt.VIR_DOMAIN_PAUSED and reason == libvirt.VIR_DOMAIN_PAUSED_USER

    def resume(self) -> None:
        """Have a paused guest run; harmless where somebody was faster."""
        try:
            self.call("resume")
        except Error:
            if self.is_paused:
                raise

    def start_paused(self) -> tuple[int, str]:
        """
        Start the domain, paused, for as long as this connection lasts; returns what is_started() knows it by.

        libvirt counts ids from 1 again when the host has booted. So a mark goes into the live XML, where it lasts as
        long as this QEMU and longer than libvirtd.
        """
        self.call("createWithFlags", libvirt.VIR_DOMAIN_START_PAUSED | libvirt.VIR_DOMAIN_START_AUTODESTROY)
        mark = os.urandom(16).hex()
        self.call(
            "setMetadata", libvirt.VIR_DOMAIN_METADATA_ELEMENT, f'<started mark="{mark}"/>', "vnb", MARK,
            libvirt.VIR_DOMAIN_AFFECT_LIVE,
        )
        return self.id, mark

    def is_started(self, id_: int, mark: str) -> bool:
        """Whether it runs in the very QEMU for which start_paused() returned these."""
        try:
            found = self._domain.metadata(
                libvirt.VIR_DOMAIN_METADATA_ELEMENT, MARK, libvirt.VIR_DOMAIN_AFFECT_LIVE
            )
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN_METADATA or not self.is_active:
                return False
            raise error_of(self.what, error) from None
        return self.id == id_ and mark in found

    def destroy(self) -> None:
        """Pull the plug; harmless where somebody was faster."""
        try:
            self.call("destroy")
        except Error:
            if self.is_active:
                raise

    @contextlib.contextmanager
    def _agent_within(self, seconds: int) -> Iterator[None]:
        """
        Have the guest agent answer each question within some seconds. Raises libvirtError.

        libvirt keeps that for all who ask the agent of this domain, and tells nobody what it was before: afterwards
        it is libvirt's default again. A trim that others ask for may take its time.
        """
        self._domain.agentSetResponseTimeout(seconds)
        try:
            yield
        finally:
            with contextlib.suppress(libvirt.libvirtError):
                self._domain.agentSetResponseTimeout(libvirt.VIR_DOMAIN_AGENT_RESPONSE_TIMEOUT_BLOCK)

    def freeze(self, mountpoints: Sequence[str]) -> int:
        """
        Freeze all file systems of the guest, or those at mountpoints; returns how many.

        Raises Unanswered where the agent may do it later, Error where it was refused: then nothing is frozen by us.
        """
        return self._ask_agent(FREEZE_SECONDS, "fsFreeze", mountpoints or None)

    def thaw(self) -> int:
        """Thaw the guest's file systems; returns how many. Raises Unanswered or Error."""
        return self._ask_agent(THAW_SECONDS, "fsThaw", None)

    def _ask_agent(self, seconds: int, function: str, *args: Any) -> Any:
        try:
            with self._agent_within(seconds):
                return getattr(self._domain, function)(*args)
        except libvirt.libvirtError as error:
            if _may_still_happen(error):
                raise Unanswered(self.what, error.get_error_message()) from None
            raise error_of(self.what, error) from None

    def guest_info(self) -> dict[str, Any] | None:
        """What the guest agent says of the guest, or None where there is no agent that answers."""
        try:
            with self._agent_within(INFO_SECONDS):
                return self._domain.guestInfo(0)
        except libvirt.libvirtError:
            return None

    def checkpoints(self) -> dict[str, str]:
        """{name: XML without the domain's} of all checkpoints; a transient domain takes them along when it ends."""
        flags = libvirt.VIR_DOMAIN_CHECKPOINT_XML_NO_DOMAIN
        try:
            found = self._domain.listAllCheckpoints()
            return {checkpoint.getName(): checkpoint.getXMLDesc(flags) for checkpoint in found}
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                return {}
            raise error_of(self.what, error) from None

    def checkpoint_xml(self, name: str, with_size: bool = False, with_domain: bool = False) -> str:
        """
        A checkpoint's XML.

        with_size: and what an increment from it would have, which no job may hinder. with_domain: and the domain's
        XML of that time.
        """
        flags = 0 if with_domain else libvirt.VIR_DOMAIN_CHECKPOINT_XML_NO_DOMAIN
        if with_size:
            flags |= libvirt.VIR_DOMAIN_CHECKPOINT_XML_SIZE
        try:
            return self._domain.checkpointLookupByName(name).getXMLDesc(flags)
        except libvirt.libvirtError as error:
            raise error_of(self.what, error) from None

    def redefine_checkpoint(self, xml: str, validate: bool = False) -> None:
        """Have libvirt know a checkpoint again. validate: its bitmaps too, which needs a running domain."""
        flags = libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE
        if validate and self.is_active:
            flags |= libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE_VALIDATE
        self.call("checkpointCreateXML", xml, flags)

    def delete_checkpoint(self, name: str) -> None:
        """
        Delete a checkpoint and its bitmaps; harmless where it is gone already.

        Where the domain is off, libvirt forgets the checkpoint and qemu-img removes the bitmaps. Where one disk
        has no bitmap any more, libvirt refuses the whole: then it is done disk by disk.
        """
        self.settle()
        try:
            checkpoint = self._domain.checkpointLookupByName(name)
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN_CHECKPOINT:
                return
            raise error_of(self.what, error) from None
        try:
            if self.is_active:
                try:
                    checkpoint.delete(0)
                except libvirt.libvirtError:
                    self.settle()  # it may be going off while we ask
                    if self.is_active:
                        self._delete_by_disk(checkpoint)
                        return
                else:
                    return
            disks = domxml.bitmaps(checkpoint.getXMLDesc(libvirt.VIR_DOMAIN_CHECKPOINT_XML_NO_DOMAIN))
            checkpoint.delete(libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY)
        except libvirt.libvirtError as error:
            raise error_of(f"{self.what}: checkpoint {name}", error) from None
        for disk in domxml.disks(self.xml(inactive=True)):
            if disk.name in disks and disk.path and disk.format == "qcow2":
                img.remove_bitmap(disk.name, disk.path, disks[disk.name])

    def _delete_by_disk(self, checkpoint: Any) -> None:
        xml = checkpoint.getXMLDesc(libvirt.VIR_DOMAIN_CHECKPOINT_XML_NO_DOMAIN)
        checkpoint.delete(libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY)
        present = {disk.name for disk in domxml.disks(self.xml())}
        for disk in domxml.bitmaps(xml):
            if disk not in present:
                continue  # unplugged: its image keeps a bitmap that nobody reads
            flags = libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE
            single = self._domain.checkpointCreateXML(domxml.checkpoint_of_one(xml, disk), flags)
            try:
                single.delete(0)
            except libvirt.libvirtError:
                single.delete(libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY)


def _may_still_happen(error: libvirt.libvirtError) -> bool:
    """
    Whether the agent may have been asked, or still be: also by a libvirtd that we have lost.

    Not where libvirt says that others kept the agent busy: it was not asked, and who froze the guest is to thaw it.
    """
    return error.get_error_domain() == libvirt.VIR_FROM_RPC or error.get_error_code() in (
        libvirt.VIR_ERR_AGENT_UNRESPONSIVE, libvirt.VIR_ERR_AGENT_UNSYNCED, AGENT_COMMAND_TIMEOUT
    )
