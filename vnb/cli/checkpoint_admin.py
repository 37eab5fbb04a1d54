# SPDX-License-Identifier: LGPL-2.1-or-later
"""What vnb-checkpoint does beside backups: list, size, cleanup, redefine, delete."""

import glob
import json
import os
import re
import shutil
import time

from vnb.base import log
from vnb.base.errors import Error, UsageError
from vnb.cli.runner import show
from vnb.job import decisions
from vnb.job.cleanup import shut_out
from vnb.job.keeper import stay
from vnb.job.left_behind import make_way, who_runs
from vnb.job.left_behind import recover as recover_job
from vnb.job.plan import Plan, checkpoint_xml
from vnb.job.redefining import redefine as redefine_checkpoint
from vnb.job.source import UNION
from vnb.job.sources import open_source
from vnb.job.state import JobDirectory, boot_id, is_dead, start_of
from vnb.qemu import img
from vnb.store import pruned
from vnb.store.catalog import Catalog, of_checkpoint
from vnb.virt import domxml
from vnb.virt.domain import Domain
from vnb.virt.export_clients import clients_of
from vnb.virt.failures import NoDomain

OUR_SOCKET = re.compile(r"vnb-(?P<pid>[0-9]+)-(?P<boot>[0-9a-f]{8})-[0-9a-f]{8}\.sock")


def open_domain(args):
    """The domain that the arguments name. Raises Error."""
    return Domain(args["--connect"], args["DOMAIN"], args["--user"], args["--password-file"])


class Catalogs:
    """
    All catalogs of a domain that we can look into: the set or destination that the arguments name,
    all destinations of the state directory, and those that its checkpoints were made for, though nothing was committed.

    saved, foreign: {restore point: (its catalog, its segment)} of this domain, and of others. pruned (set of str):
    restore points that vnb-prune dropped. abouts: {checkpoint: what it says of itself, or None where it is none of
    ours}. Raises Error.
    """

    def __init__(self, args, domain):
        state = args["--state-dir"]
        self.abouts = {name: domxml.about(xml) for name, xml in domain.checkpoints().items()}
        named = Catalog.of(state, domain.uuid, args["--set"], args["--destination"])
        all_ = [*([named] if named.directory else []), *Catalog.destinations(state, domain.uuid)]
        for about in self.abouts.values():
            if about and isinstance(about.get("destination"), str):
                all_.append(Catalog.of(state, domain.uuid, None, about["destination"]))
        self._by_id = {catalog.id: catalog for catalog in all_}
        self.saved, self.foreign, self._holds = {}, {}, {}
        self.pruned = set()
        for id_, catalog in self._by_id.items():
            segments = catalog.segments()
            for file in catalog.damaged:
                log.warn(file.line)
            if catalog.is_set:
                self.pruned |= pruned.pruned(catalog.directory)
            self._holds[id_] = any(segment.head["uuid"] == domain.uuid for segment in segments)
            for segment in segments:
                found = self.saved if segment.head["uuid"] == domain.uuid else self.foreign
                found.setdefault(segment.head["point"], (catalog, segment))

    def of(self, about):
        """The catalog that a checkpoint was made for, if it is one of these, or None."""
        return self._by_id.get(about.get("catalog"))

    def is_whole(self, about):
        """Whether the catalog that a checkpoint was made for is one of these, and nothing in it is damaged."""
        catalog = self.of(about)
        return catalog is not None and not catalog.damaged

    def holds_any(self, catalog):
        """Whether anything of the domain is saved there."""
        return self._holds[catalog.id]


def list(args, say):  # noqa: A001 - the command's own word
    """Print the domain's checkpoints, one a line: name, disks, size of an increment from it, where it is saved."""
    with open_domain(args) as domain:
        catalogs = Catalogs(args, domain)
        measurable = domain.is_active and domain.running_job() is None
        directory = JobDirectory(args["--state-dir"], domain.uuid, make=False)
        if directory.load() is not None:
            say(f"{domain.name}: {who_runs(directory)}")
        elif domain.is_active and not measurable:
            tell_of_job(domain, say)
        for name in sorted(catalogs.abouts):
            about = catalogs.abouts[name]
            catalog, segment = catalogs.saved.get(name, (None, None))
            disks = domxml.bitmaps(domain.checkpoint_xml(name))
            increment, full = _size(domain, name, disks) if measurable else (None, [])
            row = {
                "checkpoint": name,
                "ours": about is not None,
                "chain": (about or {}).get("chain"),
                "disks": sorted(disks),
                "increment": increment,
                "full": full,
                "catalog": (about or {}).get("catalog"),
                "destination": (about or {}).get("destination"),
                "saved": None if catalog is None else segment.name if catalog.is_set else catalog.destination,
                "orphan": about is not None and catalog is None and catalogs.is_whole(about),
            }
            if args["--json"]:
                show(f"{json.dumps(row)}\n")
                continue
            shown = [f"{disk} (in full)" if disk in full else disk for disk in row["disks"]]
            words = [name, ",".join(shown), "-" if increment is None else str(increment)]
            show(f"{'  '.join([*words, row['saved'] or _whose(row, about, catalogs)])}\n")


def _size(domain, name, disks):
    """(bytes that an increment from a checkpoint would have, names of the disks that it would take in full)."""
    sizes = domxml.sizes(domain.checkpoint_xml(name, with_size=True))
    present = {disk.name for disk in domxml.disks(domain.xml())}
    full = sorted(disk for disk in disks if disk in present and disk not in sizes)
    return sum(sizes.values()) + sum(domain.call("blockInfo", disk)[1] for disk in full), full


def _whose(row, about, catalogs):
    """Why a checkpoint is not in a catalog, in words. row: of list()."""
    if not row["ours"]:
        return "not of vnb"
    if row["orphan"]:
        return f"orphan: not saved {catalogs.of(about).where} (never, or it was pruned)"
    return f"of {of_checkpoint(about)}"


def size(options, as_json, say, warn):
    """Print how many bytes the next backup would have, a line a disk and one for all; options: as for begin()."""
    source = open_source({**options, "start_paused": False})
    try:
        source.refuse_if_busy()
        directory = JobDirectory(options["state"], source.uuid)
        with directory.locked() as got:
            if not got:
                raise Error(source.name, who_runs(directory))
            plan = Plan(source, options, directory.path, say, warn)
            sizes = plan.estimate()
    finally:
        source.close()
    total = sum(sizes.values())
    if as_json:
        show(json.dumps({"level": plan.level, "base": plan.parent, "disks": sizes, "bytes": total}) + "\n")
        return
    for disk in sorted(sizes):
        show(f"{disk}  {sizes[disk]}\n")
    show(f"total  {total}\n")


def cleanup(args, say):
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


def _cleanup_state(args, error, say):
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
                    shutil.rmtree(catalog.directory)
                else:
                    say(f"{args['DOMAIN']}: {error.reason}; known is what was committed to {catalog.destination} "
                        "(--force forgets it)")
            if args["--force"]:
                shutil.rmtree(os.path.join(args["--state-dir"], "destinations", uuid), ignore_errors=True)
                directory.forget()
            elif os.path.exists(directory.log):
                say(f"{args['DOMAIN']}: {error.reason}; known is {directory.log} (--force removes it)")


def _states(state, name):
    """The UUIDs (set of str) of which a state directory knows anything, of the domain with this name or UUID."""
    uuids = set()
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


def _end_job_of_ours(domain, say):
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


def _job(domain):
    """(where it listens, match of OUR_SOCKET, what it is in words) of the job that runs; None for what is not."""
    what = domain.running_job() if domain.is_active else None
    if what is None:
        return None, None, None
    socket = domain.backup_endpoint() if what == "backup" else None
    return socket, OUR_SOCKET.fullmatch(os.path.basename(socket or "")), f"a {what} job"


def tell_of_job(domain, say):
    """Say whose job runs, if one does, where the state directory knows of none."""
    _, match, what = _job(domain)
    if match is not None:
        say(f"{domain.name}: a backup job by process {match['pid']} is active, which another state directory knows: "
            "left alone (vnb-checkpoint cleanup ends it if that process is dead)")
    elif what is not None:
        say(f"{domain.name}: {what} of another program is active: left alone (virsh domjobabort ends it)")


def _recover_scratch(domain, say):
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


def _in_use(path):
    """Whether another domain's QEMU has this image open: it holds a lock then."""
    try:
        img.info(path, path, "qcow2")
    except Error as error:
        return "lock" in error.reason
    return False


def _cleanup_checkpoints(domain, catalogs, force, say):
    """Checkpoints of ours that were never saved, or whose restore points were pruned."""
    unsaved = {
        name: about for name, about in catalogs.abouts.items() if about is not None and name not in catalogs.saved
    }
    for name, about in unsaved.items():
        catalog = catalogs.of(about)
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


def _cleanup_bitmaps(domain, catalogs, force, say):
    """Bitmaps of ours without a checkpoint: those that nothing needs go, the others are named."""
    for bitmap, disks in sorted(_bitmaps(domain).items()):
        if bitmap in catalogs.abouts:
            continue
        where = f"{domain.name}: {', '.join(disks)}"
        why = _not_needed_because(bitmap, catalogs)
        if why or force:
            say(f"{where}: removing bitmap {bitmap}, {why or 'which has no checkpoint'}")
            _remove_bitmap(domain, bitmap, disks)
        elif bitmap in catalogs.saved:
            say(f"{where}: libvirt has forgotten checkpoint {bitmap}: the next increment, or vnb-checkpoint redefine, "
                "has it known again")
        else:
            say(f"{where}: bitmap {bitmap} has no checkpoint, and is of no catalog that is known here: left alone "
                "(--set names another one; --force removes it)")


def _not_needed_because(bitmap, catalogs):
    """Why a bitmap is provably of no use to any catalog, or None."""
    if bitmap.endswith(UNION):
        return "which a job that was cut off has left"
    if bitmap in catalogs.foreign:
        catalog, segment = catalogs.foreign[bitmap]
        return f"which is of domain {segment.head['domain']}, saved {catalog.where}"
    if bitmap in catalogs.pruned:
        return "whose restore point was pruned"
    catalog, segment = catalogs.saved.get(bitmap, (None, None))
    if segment is None:
        return None
    of_catalog = [other for place, other in catalogs.saved.values() if place is catalog]
    if decisions.is_stale(segment, of_catalog, catalogs.abouts):
        return f"since the next increment {catalog.where} starts from a later one"
    return None


def _bitmaps(domain):
    """
    {bitmap: disks (list of str)} of our bitmaps in the domain's images, of this host.

    Of a domain that runs: of those that were there when it started, or were stored since.
    """
    found = {}
    if not domain.is_local:
        return found
    for disk in domxml.disks(domain.xml()):
        if disk.left_out_because or not disk.path or disk.format != "qcow2":
            continue
        layers = img.layers(disk.name, disk.path, disk.format, shared=domain.is_active)
        for bitmap in {bitmap for layer in layers for bitmap in layer.bitmaps if bitmap.startswith("vnb.")}:
            found.setdefault(bitmap, []).append(disk.name)
    return found


def _remove_bitmap(domain, bitmap, disks):
    """Remove a bitmap without a checkpoint. QEMU does it for a domain that runs, when its checkpoint is deleted."""
    if domain.is_active:
        others = [disk.name for disk in domxml.disks(domain.xml()) if disk.name not in disks]
        xml = domxml.checkpoint(bitmap, "vnb {}", disks, others)
        domain.redefine_checkpoint(domxml.with_creation_time(xml, int(time.time())))
        domain.delete_checkpoint(bitmap)
        return
    for disk in domxml.disks(domain.xml()):
        if disk.name in disks:
            img.remove_bitmap(disk.name, disk.path, bitmap)


def redefine(args, say):
    """Have libvirt know the checkpoints of a catalog again, as far as the bitmaps are still there."""
    with open_domain(args) as domain:
        catalog = wanted(args, domain)
        segments = [segment for segment in catalog.of_domain(domain.uuid, domain.name) if segment.head["checkpoint"]]
        if not segments:
            raise Error(catalog.place, "holds no checkpoint")
        usable = set(domain.checkpoints())
        for segment in sorted(segments, key=lambda segment: segment.head["created"]):
            name = segment.head["checkpoint"]
            if name in usable:
                continue
            try:
                redefine_checkpoint(domain, checkpoint_xml(segment))
            except Error as error:
                say(f"{name}: not redefined: {error.reason}")
            else:
                say(f"{name}: redefined")
                usable.add(name)
        if not usable & {segment.head["checkpoint"] for segment in segments}:
            raise Error(domain.name, "no checkpoint is usable: the next backup must be a full one (--level auto)")


def delete(args, say):
    """Delete all checkpoints of a chain that is no longer wanted."""
    with open_domain(args) as domain:
        force = args["--force"]
        catalog = None if force and not (args["--set"] or args["--destination"]) else wanted(args, domain)
        directory = JobDirectory(args["--state-dir"], domain.uuid)
        try:
            with directory.locked() as got:
                if not got:
                    raise Error(domain.name, who_runs(directory))
                recover_job(directory, domain.name, say)  # no checkpoint goes while a job of it is left
                catalogs = Catalogs(args, domain)
                count = 0
                for name, about in catalogs.abouts.items():
                    if about is None or about.get("chain") != args["--chain"]:
                        continue
                    if not force and about.get("catalog") != catalog.id:
                        say(f"{domain.name}: checkpoint {name} is of {of_checkpoint(about)}: left alone (see --force)")
                        continue
                    domain.delete_checkpoint(name)
                    count += 1
                _delete_bitmaps(domain, catalogs, catalog, args, say)
        finally:
            stay(directory)
        say(f"{domain.name}: checkpoints of chain {args['--chain']} deleted: {count}")


def _delete_bitmaps(domain, catalogs, catalog, args, say):
    """The bitmaps of this chain whose checkpoints libvirt has forgotten."""
    for bitmap, disks in sorted(_bitmaps(domain).items()):
        if bitmap in catalogs.abouts or bitmap.split(".")[1] != args["--chain"]:
            continue
        place, _ = catalogs.saved.get(bitmap, (None, None))
        is_of_it = catalog is not None and place is not None and place.id == catalog.id
        if is_of_it or args["--force"] or _not_needed_because(bitmap, catalogs):
            say(f"{domain.name}: {', '.join(disks)}: removing bitmap {bitmap}, whose checkpoint libvirt has forgotten")
            _remove_bitmap(domain, bitmap, disks)
        else:
            say(f"{domain.name}: {', '.join(disks)}: bitmap {bitmap} has no checkpoint: left alone (see --force)")


def wanted(args, domain):
    """The catalog that the arguments name; UsageError, with those that the domain has checkpoints of, where none is."""
    if not args["--set"] and not args["--destination"]:
        abouts = [domxml.about(xml) for xml in domain.checkpoints().values()]
        others = sorted({of_checkpoint(about) for about in abouts if about})
        there = f"there are checkpoints of {', '.join(others)}" if others else "there is no checkpoint of vnb"
        raise UsageError("--set", f"is needed, or --destination: {there}")
    return Catalog.of(args["--state-dir"], domain.uuid, args["--set"], args["--destination"])
