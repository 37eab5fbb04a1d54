# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a crash has left is put right, as far as it is provably ours; what is left alone is told."""

from __future__ import annotations

import glob
import os
import re
import shutil

from vnb.base.errors import Error
from vnb.cli.known_catalogs import Catalogs, open_domain
from vnb.cli.orphans import bitmaps_of, not_needed_because, remove_bitmap
from vnb.job import decisions
from vnb.job.cleanup import shut_out
from vnb.job.keeper import stay
from vnb.job.left_behind import make_way, who_runs
from vnb.job.left_behind import recover as recover_job
from vnb.job.state import JobDirectory, boot_id, is_dead, start_of
from vnb.qemu import img
from vnb.store.catalog import Catalog, of_checkpoint
from vnb.virt import domxml
from vnb.virt.export_clients import clients_of
from vnb.virt.failures import NoDomain

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from vnb.virt.domain import Domain


OUR_SOCKET = re.compile(r"vnb-(?P<pid>[0-9]+)-(?P<boot>[0-9a-f]{8})-[0-9a-f]{8}\.sock")


def cleanup(args: dict[str, Any], say: Callable[[str], None]) -> None:
    """Put right what a crash has left, as far as it is provably ours; say what is left alone."""
    try:
        domain = open_domain(args)
    except NoDomain as error:
        _cleanup_state(args, error, say)
        return
    force = args["--force"]
    with domain:
        domain.settle()
        directory = JobDirectory(args["--state-dir"], domain.uuid)
        if force:
            make_way(directory)
        try:
            with directory.locked() as got:
                if not got:
                    raise Error(domain.name, f"{who_runs(directory)}: nothing to clean up")
                if force and (record := directory.load()) is not None:
                    record.owner["boot"] = "forced"  # whoever it was, the user says that it is dead
                    directory.save(record)
                recover_job(directory, domain.name, say)
                if force and directory.load() is not None:
                    say(f"{domain.name}: nobody waits any more to thaw the guest (virsh domfsthaw does)")
                    directory.remove()
                _end_job_of_ours(domain, say)
                _recover_scratch(domain, say)
                catalogs = Catalogs(args, domain)
                _cleanup_checkpoints(domain, catalogs, force, say)
                _cleanup_bitmaps(domain, catalogs, force, say)
        finally:
            stay(directory)


def _cleanup_state(args: dict[str, Any], error: Error, say: Callable[[str], None]) -> None:
    """
    Of a domain that libvirt does not know: what the state directory has of it, which only --force removes.

    It may be a transient domain that is off, or one of another libvirt. Raises error where there is nothing.
    """
    found = _states(args["--state-dir"], args["DOMAIN"])
    if not found:
        raise error
    for uuid in sorted(found):
        directory = JobDirectory(args["--state-dir"], uuid)
        with directory.locked() as got:
            if not got:
                raise Error(args["DOMAIN"], who_runs(directory))
            recover_job(directory, args["DOMAIN"], say)
            for catalog in Catalog.destinations(args["--state-dir"], uuid):
                if args["--force"]:
                    say(f"{args['DOMAIN']}: forgetting what was committed to {catalog.destination}")
                    shutil.rmtree(str(catalog.directory))
                else:
                    say(f"{args['DOMAIN']}: {error.reason}; known is what was committed to {catalog.destination} "
                        "(--force forgets it)")
            if args["--force"]:
                shutil.rmtree(os.path.join(args["--state-dir"], "destinations", uuid), ignore_errors=True)
                directory.forget()
            elif os.path.exists(directory.log):
                say(f"{args['DOMAIN']}: {error.reason}; known is {directory.log} (--force removes it)")


def _states(state: str, name: str) -> set[str]:
    """The UUIDs of which a state directory knows anything, of the domain with this name or UUID."""
    uuids: set[str] = set()
    for kind in ("jobs", "destinations"):
        home = os.path.join(state, kind)
        uuids.update(os.listdir(home) if os.path.isdir(home) else ())
    if name in uuids:
        return {name}
    return {
        uuid for uuid in uuids
        if any(segment.head["domain"] == name
               for catalog in Catalog.destinations(state, uuid) for segment in catalog.segments())
    }


def _end_job_of_ours(domain: Domain, say: Callable[[str], None]) -> None:
    """A job of ours that no record here knows: its socket says whose it is."""
    socket, match, what = _job(domain)
    if what is None:
        return
    if match is None:
        say(f"{domain.name}: {what} of another program is active: left alone")
        return
    if domain.is_local and (not boot_id().startswith(match["boot"]) or start_of(match["pid"]) is None):
        say(f"{domain.name}: ending the backup job of process {match['pid']}, which is dead")
        domain.end_backup(socket, lambda: shut_out(domain.name, clients_of(socket, False).shut_out))
        return
    raise Error(
        domain.name, f"a backup job by process {match['pid']} is active: left alone (virsh domjobabort ends it)"
    )


def _job(domain: Domain) -> Any:
    """(where it listens, match of OUR_SOCKET, what it is in words) of the job that runs; None for what is not."""
    what = domain.running_job() if domain.is_active else None
    if what is None:
        return None, None, None
    socket = domain.backup_endpoint() if what == "backup" else None
    return socket, OUR_SOCKET.fullmatch(os.path.basename(socket or "")), f"a {what} job"


def tell_of_job(domain: Domain, say: Callable[[str], None]) -> None:
    """Say whose job runs, if one does, where the state directory knows of none."""
    _, match, what = _job(domain)
    if match is not None:
        say(f"{domain.name}: a backup job by process {match['pid']} is active, which another state directory knows: "
            "left alone (vnb-checkpoint cleanup ends it if that process is dead)")
    elif what is not None:
        say(f"{domain.name}: {what} of another program is active: left alone (virsh domjobabort ends it)")


def _recover_scratch(domain: Domain, say: Callable[[str], None]) -> None:
    """Scratch files that no job uses: libvirt removes them, but not after a crash of its own."""
    if not domain.is_local or (domain.is_active and domain.running_job() is not None):
        return
    for disk in domxml.disks(domain.xml()):
        if disk.type == "file" and disk.path:
            pattern = f"vnb-{'[0-9a-f]' * 12}-{glob.escape(disk.name)}.scratch"
            for path in glob.glob(os.path.join(glob.escape(os.path.dirname(disk.path)), pattern)):
                if not _in_use(path):
                    say(f"{path}: removing a scratch file that was left behind")
                    os.unlink(path)


def _in_use(path: str) -> bool:
    """Whether another domain's QEMU has this image open: it holds a lock then."""
    try:
        img.info(path, path, "qcow2")
    except Error as error:
        return "lock" in error.reason
    return False


def _cleanup_checkpoints(domain: Domain, catalogs: Catalogs, force: bool, say: Callable[[str], None]) -> None:
    """Checkpoints of ours that were never saved, or whose restore points were pruned."""
    unsaved = {
        name: about for name, about in catalogs.abouts.items() if about is not None and name not in catalogs.saved
    }
    for name, about in unsaved.items():
        catalog: Any = catalogs.of(about)
        is_known = catalog is not None
        fate = decisions.unsaved(
            force, is_known, is_dead(about.get("owner") or {}), is_known and bool(catalog.damaged),
            is_known and catalogs.holds_any(catalog),
            [other for other in unsaved.values() if other.get("catalog") == about.get("catalog")] == [about],
        )
        checkpoint = f"{domain.name}: checkpoint {name}"
        if fate is decisions.Unsaved.DELETE:
            where = catalog.where if catalog is not None else f"anywhere that is known, of {of_checkpoint(about)}"
            say(f"{domain.name}: deleting checkpoint {name}, which is not saved {where}")
            domain.delete_checkpoint(name)
        elif fate is decisions.Unsaved.DAMAGED:
            say(f"{checkpoint}: left alone: {catalog.damaged[0].name} is damaged, and may have it")
        elif fate is decisions.Unsaved.EMPTY:
            say(f"{checkpoint}: left alone: nothing is saved {catalog.where} (see --force)")
        else:
            say(f"{checkpoint} is of {of_checkpoint(about)}: left alone (--force deletes it)")


def _cleanup_bitmaps(domain: Domain, catalogs: Catalogs, force: bool, say: Callable[[str], None]) -> None:
    """Bitmaps of ours without a checkpoint: those that nothing needs go, the others are named."""
    for bitmap, disks in sorted(bitmaps_of(domain).items()):
        if bitmap in catalogs.abouts:
            continue
        where = f"{domain.name}: {', '.join(disks)}"
        why = not_needed_because(bitmap, catalogs)
        if why or force:
            say(f"{where}: removing bitmap {bitmap}, {why or 'which has no checkpoint'}")
            remove_bitmap(domain, bitmap, disks)
        elif bitmap in catalogs.saved:
            say(f"{where}: libvirt has forgotten checkpoint {bitmap}: the next increment, or vnb-checkpoint redefine, "
                "has it known again")
        else:
            say(f"{where}: bitmap {bitmap} has no checkpoint, and is of no catalog that is known here: left alone "
                "(--set names another one; --force removes it)")
