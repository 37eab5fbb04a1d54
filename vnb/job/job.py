# SPDX-License-Identifier: LGPL-2.1-or-later
"""
One backup job and its checkpoint: begun, then committed or aborted.

All that is needed to end a job is on disk before it begins, so whoever finds the record can end it: the keeper
that began it, or after its death the next command.
"""

from __future__ import annotations

import contextlib
import json
import os

from vnb.base.buffers import AT_ONCE, Ordered
from vnb.base.errors import Error, Saved, os_error
from vnb.job import decisions
from vnb.job.plan import Plan
from vnb.job.record import Phase
from vnb.job.sources import source_of
from vnb.job.state import wait_for_children
from vnb.qemu import img
from vnb.store import pruned
from vnb.store.catalog import Catalog
from vnb.virt import domxml, file_elements
from vnb.virt.export_clients import clients_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from vnb.format.types import Head
    from vnb.job.record import Record
    from vnb.job.source import Source
    from vnb.job.state import JobDirectory
    from vnb.virt.export_clients import Clients


SPARE = 16  # descriptors: what qemu-img, ssh or a connection to libvirt take for a moment, twice


class BelowThreshold(Exception):
    """There is less to back up than the user wants a backup for."""


class Job:
    """
    directory: where its record is. record (Record).

    note, warn: functions for lines to the user. files: what goes into file frames.
    """

    def __init__(
        self, directory: JobDirectory, record: Record, note: Callable[[str], Any] | None,
        warn: Callable[[str], Any] | None = None,
    ) -> None:
        self.directory = directory
        self.record = record
        self.note: Any = note
        self.warn: Any = warn or note
        self.files: list[dict[str, Any]] = []
        self.is_committing = False  # its command has ended, and all is stored
        self._clients: Clients | None = None
        self._spare: list[int] = []  # descriptors, to be closed when the job is to end
        self.held: Any = None  # the source that the job was begun with, and with it a domain that was started for it

    @property
    def head(self) -> Head:
        return self.record.head

    @property
    def clients(self) -> Clients:
        """The Clients of its export, when the job has begun: until then other ports may be tried."""
        if self._clients is None:
            self._clients = clients_of(self.record.endpoint, self.record.tcp, self.record.sockets)
        return self._clients

    def reserve(self) -> None:
        """Have descriptors that whoever ends the job will need: where there are no more, it must not begin. Error."""
        try:
            for _ in range(SPARE):
                self._spare.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            raise os_error(self.head["domain"], error) from None

    def intend(self, **changes: Any) -> None:
        """Write down, before it is done, what has to be undone whatever happens: fields of the record."""
        for name, value in changes.items():
            setattr(self.record, name, value)
        self.directory.save(self.record)

    def remember(self, **additions: Any) -> None:
        """Write down one more thing that has to be undone: what is added to lists of the record."""
        for name, value in additions.items():
            getattr(self.record, name).append(value)
        self.directory.save(self.record)

    def catalog(self, set_: str | None = None) -> Catalog:
        """The catalog that the job was begun with, or that of a set (its directory)."""
        return Catalog(**self.record.catalog) if set_ is None else Catalog(set_)

    @property
    def strict(self) -> int | None:
        """How many warnings there were when it began, where that is to be no success; else None."""
        return self.record.strict

    def commit(self, set_: str | None = None, proof: bool = True) -> None:
        """
        The segment is safe: end the job, keep its checkpoint, drop others that nothing needs.

        Raises Error, and leaves the job as it is, where a set does not hold the segment: that of the job, or set_; and
        where there is none, and proof is asked for, if nobody has taken the segment to its end. Raises Saved where it
        counts, but something after that has failed.
        """
        if self.record.has_ended:
            raise Error(self.head["domain"], f'the job was ended already: {self.record.reason}')
        if self.record.phase is Phase.STARTING:
            raise Error(self.head["domain"], "the job has not begun: there is nothing to commit")
        catalog = self.catalog(set_)
        if catalog.is_set and not catalog.holds(self.head):
            raise Error(catalog.directory, f'does not hold {self.head["point"]}: not committed')
        if proof and not catalog.is_set:
            lacking = self.directory.lack(self.head["id"])
            if lacking is not None:
                raise Error(
                    self.head["domain"], f"{lacking}: not committed (where it was taken by others than the commands of "
                    "vnb on this host, --no-proof commits)"
                )
        begun_with = self.catalog()  # the checkpoint says that it is of that
        if begun_with.destination is not None and not begun_with.holds(self.head):
            begun_with.record(self.head, self.record.disks)
        self.is_committing = True
        try:
            with self._ended() as source:
                self._drop_old(source, catalog)
            self._forget()
        except Error as error:
            raise Saved(error.what, f"{error.reason}, but {self.head['point']} is saved", error.where) from None

    def abort(self, reason: str | None = None) -> bool:
        """
        End the job and delete its checkpoint, unless the catalog holds its segment: then it counts.

        reason: why, kept for whoever asks later. Returns whether its segment is known to be saved.
        """
        self.is_committing = False
        saved: bool | None = False
        if not self.record.has_ended:
            with self._ended() as source:
                saved = self._is_saved()
                checkpoint = self.head["checkpoint"]
                fate = decisions.fate(checkpoint is not None, saved)
                if fate is decisions.Fate.SAVED:
                    self.note(f"{self.head['point']} is saved {self.catalog().where}: its checkpoint stays")
                elif fate is decisions.Fate.UNKNOWN:
                    self.note(f"keeping checkpoint {self.head['checkpoint']}")
                elif fate is decisions.Fate.DELETE and checkpoint is not None:
                    source.delete_checkpoint(checkpoint)
                    if self.record.added:
                        source.remove_bitmaps(self.record.added, checkpoint)
        if reason is None:
            self._forget()
        else:
            self.record.end(reason)
            with self._over():
                self.directory.save(self.record)
                self.directory.forget_proof()
        return bool(saved)

    @contextlib.contextmanager
    def _ended(self) -> Iterator[Source]:
        """The source, by a connection made now, when the job has ended and all that it started."""
        while self._spare:
            os.close(self._spare.pop())
        if self.held is not None:
            self.held.let_go()
        wait_for_children(self.record.owner)
        with contextlib.closing(source_of(self.record)) as source:
            source.end(self, lambda: self.clients, careful=not self.is_committing)
            yield source

    def thaw(self) -> bool:
        """Thaw the guest if we may have frozen it; True when there is nothing left to thaw."""
        if self.record.frozen is None:
            return True
        with contextlib.closing(source_of(self.record)) as source:
            return source.thaw(self)

    def _forget(self) -> None:
        """Nothing is left to undo but, perhaps, a thaw that the agent has not answered."""
        if self.record.frozen is not None and not self._try_to_thaw():
            self.record.end("only a thaw was left, which the guest agent has not answered")
            self.directory.save(self.record)
            return
        with self._over():
            self.directory.remove()

    def _try_to_thaw(self) -> bool:
        """As thaw(), but what fails comes again: the job itself is over."""
        try:
            return self.thaw()
        except Error as error:
            self.note(str(error))
            return False

    @contextlib.contextmanager
    def _over(self) -> Iterator[None]:
        """
        The job is over, and only the record has to say so.

        Where that cannot be written, to try until it can would keep everybody waiting: whoever finds the old record
        ends what is over once more, which does no harm.
        """
        try:
            yield
        except Error as error:
            self.note(
                f"{error}: the job has ended, but its record could not be removed: the next vnb-checkpoint command "
                "removes it"
            )

    def _is_saved(self) -> bool | None:
        """Whether the catalog holds the segment; None where it cannot be read."""
        if self.record.phase is Phase.STARTING:
            return False  # not a byte of it is written
        try:
            return self.catalog().holds(self.head)
        except Error as error:
            self.note(str(error))
            return None

    def _drop_old(self, source: Source, catalog: Catalog) -> None:
        """Delete the checkpoints that nothing needs any more, now that the segment is saved."""
        if catalog.directory is None:
            before = decisions.grandparent(self.head, source.abouts())
            if before is not None:
                source.delete_checkpoint(before)
            return
        have, held, chain = source.have(), catalog.segments(), self.head["chain"]
        if catalog.is_set:
            dropped = pruned.pruned(catalog.directory)
            for name in decisions.pruned(dropped, chain, held, have):
                source.delete_checkpoint(name)
            mine = {name for name in dropped if decisions.is_of_chain(name, chain)}
            if mine:
                pruned.forget_pruned(catalog.directory, mine)
        for name in decisions.superseded(held, self.head, have, self.record.broken):
            source.delete_checkpoint(name)


def begin(
    directory: JobDirectory, source: Source, options: dict[str, Any], note: Callable[[str], Any],
    warn: Callable[[str], Any],
) -> Job:
    """
    Begin a backup job; returns its Job. The caller holds the lock of directory.

    source: see vnb.job.source. options: domain, images, uri, user, password_file, level, set, destination, base,
    chain, include, exclude, raw, allow_plaintext, scratch_dir, socket, listen, tls, certificates, ssh, state, freeze,
    require_freeze, pause, start_paused, sparse, threshold. Raises Error or BelowThreshold; nothing is left then.
    """
    source.refuse_if_busy()
    plan = Plan(source, options, directory.path, note, warn)
    if options["threshold"] is not None and plan.parent is not None:  # what is not saved yet is never too little
        estimate = sum(plan.estimate().values())
        if estimate < options["threshold"]:
            raise BelowThreshold(f"{source.name}: {estimate} bytes to back up, less than {options['threshold']}")
    plan.describe_files()  # before the head is stored anywhere, and before the guest is frozen
    job = Job(directory, plan.record(), note, warn)
    job.held = source
    job.reserve()
    left = directory.load()
    if left is not None:
        job.record.frozen = left.frozen  # a job before may have frozen the guest: it is for us now to thaw it
    directory.save(job.record)
    try:
        directory.expect(plan.head["id"])
        plan.start(job)
        job.intend(phase=Phase.RUNNING, head=plan.head, disks=plan.disks, broken=plan.broken)
        job.files = _files(source, plan, job)
    except BaseException:
        job.abort()
        raise
    return job


def with_domain(error: Error, source: Source | None) -> Error:
    """An Error about a disk of a domain as one that says which domain it is: there may be others' lines beside it."""
    if source is None or source.uri is None:
        return error
    with contextlib.suppress(Error):
        if error.what in [disk.name for disk in source.disks()]:
            return Error(source.name, error.reason, f"{error.what}: {error.where}" if error.where else error.what)
    return error


def _files(source: Source, plan: Plan, job: Job) -> list[dict[str, Any]]:
    """
    What goes into file frames, [{role, path}] or [{role, path, text}], and into frames "same": [{role, path, same}].

    Guest information and what qemu-img says are made here; other files are read by whoever writes the stream. same is
    the mode of a file that the base has. sha256, where a file has it, is what the head says of its content.
    """
    found = []
    xml = plan.head["domain_xml"]
    if xml is not None:
        of_head = {(file["role"], file["path"]): file for file in plan.head.get("files", ())}
        for role, path in file_elements.files(xml):
            file = of_head.get((role, path))
            more: dict[str, Any] = {}
            if file is not None:
                more = {"same": plan.modes[role, path]} if "base" in file else {"sha256": file["sha256"]}
            found.append({"role": role, "path": path, **more})
        found += [{"role": role, "path": path} for role, path in source.more_files(xml)]
        for what in file_elements.remote_firmware(xml):
            job.warn(f"{source.name}: {what}, is not in the backup")
        if domxml.has_tpm(xml):
            job.warn(f"{source.name}: the state of its TPM is not in the backup")
        # Not while an agent hangs that was asked to freeze: nobody watches over the job yet.
        if job.record.frozen is None:
            info = source.guest_info(xml)
            if info:
                found.append({"role": "guest-info", "path": "guest-info.json", "text": json.dumps(info)})
    def described(disk: Any) -> str | Error:
        try:
            return img.info(disk.name, disk.path, disk.format, shared=True, run=source.run)
        except Error as error:
            return error

    disks = [disk for disk in plan.sources.values() if disk.path is not None]
    with Ordered(described, AT_ONCE) as work:
        for disk in disks:
            work.call(disk)
        for disk in disks:
            text = work.pop()
            if isinstance(text, Error):
                job.warn(f"{text}: no information about this image in the backup")
            else:
                found.append({"role": "image-info", "path": disk.name, "text": text})
    return found
