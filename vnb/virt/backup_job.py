# SPDX-License-Identifier: LGPL-2.1-or-later
"""Backup jobs of libvirt: begun, looked at, and ended when nobody is hurt by that."""

from __future__ import annotations

import contextlib
import threading

import libvirt

from vnb.base import waiting
from vnb.base.errors import Error
from vnb.virt import domxml
from vnb.virt.connection import Patience, dotted, error_of
from vnb.virt.failures import AddressInUse, BrokenBitmap, Denied, Unready
from vnb.virt.handle import Handle

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

SETTLE_SECONDS = 90  # a guest that shuts down while a job runs stays in that state for 30 s
PRESERVE_SHUTDOWN = 1 << 1  # VIR_DOMAIN_BACKUP_BEGIN_PRESERVE_SHUTDOWN_DOMAIN: a guest stays until the job ends
PRESERVE_SHUTDOWN_SINCE = 11_010_000  # the daemon's version, not the client library's, has to know it
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


class Jobs(Handle):
    """The jobs of a domain."""

    def block_job(self, disk: str) -> str | None:
        """Why libvirt makes no backup job of a disk (name) now, for another block job of it, or None."""
        kind = (self.call("blockJobInfo", disk) or {}).get("type")
        return kind and f"has another block job ({BLOCK_JOBS.get(kind, kind)})"

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
