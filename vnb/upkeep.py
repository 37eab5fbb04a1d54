# SPDX-License-Identifier: LGPL-2.1-or-later
"""What vnb-checkpoint does beside backups: list, size, cleanup, redefine, delete."""

import glob
import json
import os
import re

from vnb import chain, domxml, qemuimg
from vnb.clients import clients_of
from vnb.errors import Error, UsageError
from vnb.keeper import make_way, stay, who_runs
from vnb.keeper import recover as recover_job
from vnb.ledger import Ledger
from vnb.run import show
from vnb.state import JobDirectory, boot_id, is_dead, start_of
from vnb.virt import Domain

OUR_SOCKET = re.compile(r"vnb-(?P<pid>[0-9]+)-(?P<boot>[0-9a-f]{8})-[0-9a-f]{8}\.sock")


def open_domain(args):
    """The domain that the arguments name. Raises Error."""
    return Domain(args["--connect"], args["DOMAIN"], args["--user"], args["--password-file"])


def list(args, say):  # noqa: A001 - the command's own word
    """Print the domain's checkpoints, one a line: name, disks, size of an increment from it, where it is saved."""
    with open_domain(args) as domain:
        found = domain.checkpoints()
        job = domain.running_job() if domain.is_active else None
        _tell_of_jobs(domain, args, job, say)
        measurable = domain.is_active and job is None
        ledger = Ledger.of(args["--state-dir"], domain.uuid, args["--set"])
        saved = {segment.head["checkpoint"]: segment for segment in ledger.segments()}
        for name in sorted(found):
            about = domxml.about(found[name])
            segment = saved.get(name)
            size = None
            if measurable:
                size = sum(domxml.sizes(domain.checkpoint_xml(name, with_size=True)).values())
            row = {
                "checkpoint": name,
                "ours": about is not None,
                "chain": (about or {}).get("chain"),
                "disks": sorted(domxml.bitmaps(found[name])),
                "increment": size,
                "ledger": (about or {}).get("ledger"),
                "saved": segment.name if segment else None,
                "orphan": about is not None and segment is None and about.get("ledger") == ledger.name,
            }
            if args["--json"]:
                show(f"{json.dumps(row)}\n")
            else:
                words = [name, ",".join(row["disks"]), "-" if size is None else str(size)]
                show(f"{'  '.join([*words, row['saved'] or _whose(row, ledger)])}\n")


def _tell_of_jobs(domain, args, job, say):
    """Say whose job a domain has. job: of Domain.running_job()."""
    directory = JobDirectory(args["--state-dir"], domain.uuid, make=False)
    if directory.load() is not None:
        say(f"{domain.name}: {who_runs(directory)}")
    elif job is not None:
        say(f"{domain.name}: a {job} job is active that is not of vnb, or not of this host")


def _whose(row, ledger):
    """Why a checkpoint is not in a ledger, in words. row: of list()."""
    if not row["ours"]:
        return "not of vnb"
    if row["orphan"]:
        return f"orphan: not in {ledger.directory} (never saved, or pruned)"
    return f"of {row['ledger']}"


def size(args, say):
    """Print how many bytes the next increment would have, a line a disk and one for all."""
    with open_domain(args) as domain:
        ledger = Ledger.of(args["--state-dir"], domain.uuid, args["--set"])
        ours = [
            segment for segment in ledger.of_domain(domain.uuid, domain.name)
            if segment.head.get("chain") == args["--chain"]
        ]
        checkpoints = domain.checkpoints()
        tip = chain.tip(ours, checkpoints)
        if tip is None:
            abouts = [domxml.about(xml) for xml in checkpoints.values()]
            others = sorted({about["ledger"] for about in abouts if about and isinstance(about.get("ledger"), str)})
            there = f"there are those of {', '.join(others)} (see --set)"
            why = there if others else "the next one is a full backup"
            raise Error(domain.name, f"libvirt has no checkpoint of {ledger.directory}: {why}")
        sizes = domxml.sizes(domain.checkpoint_xml(tip.head["checkpoint"], with_size=True))
        total = sum(sizes.values())
        if args["--json"]:
            show(json.dumps({"since": tip.head["checkpoint"], "disks": sizes, "bytes": total}) + "\n")
            return
        for disk in sorted(sizes):
            show(f"{disk}  {sizes[disk]}\n")
        show(f"total  {total}\n")


def cleanup(args, say):
    """Put right what a crash has left, as far as it is provably ours; say what is left alone."""
    force = args["--force"]
    with open_domain(args) as domain:
        domain.settle()
        directory = JobDirectory(args["--state-dir"], domain.uuid)
        if force:
            make_way(directory)
        try:
            with directory.locked() as got:
                if not got:
                    raise Error(domain.name, f"{who_runs(directory)}: nothing to clean up")
                if force and (record := directory.load()) is not None:
                    record["owner"]["boot"] = "forced"  # whoever it was, the user says that it is dead
                    directory.save(record)
                recover_job(directory, domain.name, say)
                if force and directory.load() is not None:
                    say(f"{domain.name}: nobody waits any more to thaw the guest (virsh domfsthaw does)")
                    directory.remove()
                _end_job_of_ours(domain, say)
                _recover_scratch(domain, say)
                _recover_checkpoints(domain, args, say)
                _recover_bitmaps(domain, args, say)
        finally:
            stay(directory)


def _end_job_of_ours(domain, say):
    """A job of ours that no record here knows: its socket says whose it is."""
    if not domain.is_active:
        return
    socket = domain.backup_endpoint()
    if socket is None:
        return
    match = OUR_SOCKET.fullmatch(os.path.basename(socket))
    if match is None:
        say(f"{domain.name}: a backup job that is not of vnb is active: left alone")
        return
    if domain.is_local and (not boot_id().startswith(match["boot"]) or start_of(match["pid"]) is None):
        say(f"{domain.name}: ending the backup job of process {match['pid']}, which is dead")
        domain.end_backup(socket, clients_of(socket, False).shut_out)
        return
    raise Error(
        domain.name, f"a backup job by process {match['pid']} is active: left alone (virsh domjobabort ends it)"
    )


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
        qemuimg.info(path, path, "qcow2")
    except Error as error:
        return "lock" in error.reason
    return False


def _recover_checkpoints(domain, args, say):
    """Checkpoints of ours that were never saved, or whose points were pruned."""
    ledger = Ledger.of(args["--state-dir"], domain.uuid, args["--set"])
    saved = {segment.head["checkpoint"] for segment in ledger.segments()}
    found = {name: domxml.about(xml) for name, xml in domain.checkpoints().items()}
    found = {name: about for name, about in found.items() if about is not None and name not in saved}
    mine = [name for name, about in found.items()
            if about.get("ledger") == ledger.name and is_dead(about.get("owner") or {})]
    for name, about in found.items():
        if args["--force"] or (name in mine and (saved or len(mine) == 1)):
            say(f"{domain.name}: deleting checkpoint {name}, which {ledger.directory} does not hold")
            domain.delete_checkpoint(name)
        elif name in mine:
            # One is what the first backup leaves that crashed. More: the set is away, its file system not mounted.
            say(f"{domain.name}: checkpoint {name}: left alone: {ledger.directory} holds no segment (see --force)")
        else:
            say(f"{domain.name}: checkpoint {name} is of ledger {about.get('ledger')}: left alone (--force deletes it)")


def _recover_bitmaps(domain, args, say):
    """Bitmaps of ours without a checkpoint: only of a domain that is off, whose images can be looked into."""
    if domain.is_active or not domain.is_local:
        return
    known = domain.checkpoints()
    ledger = Ledger.of(args["--state-dir"], domain.uuid, args["--set"])
    saved = {segment.head["checkpoint"] for segment in ledger.segments()}
    for disk in domxml.disks(domain.xml()):
        if disk.left_out_because or not disk.path or disk.format != "qcow2":
            continue
        bitmaps = {bitmap for layer in qemuimg.layers(disk.name, disk.path, disk.format) for bitmap in layer.bitmaps}
        for bitmap in sorted(bitmaps):
            if not bitmap.startswith("vnb.") or bitmap in known:
                continue
            if bitmap in saved:
                say(f"{domain.name}: {disk.name}: libvirt has lost checkpoint {bitmap}: vnb-checkpoint redefine")
            elif args["--force"]:
                say(f"{domain.name}: {disk.name}: removing bitmap {bitmap}, which has no checkpoint")
                qemuimg.remove_bitmap(disk.name, disk.path, bitmap)
            else:
                say(f"{domain.name}: {disk.name}: bitmap {bitmap} has no checkpoint (--force removes it)")


def redefine(args, say):
    """Have libvirt know the checkpoints of a ledger again, as far as the bitmaps are still there."""
    if args["--set"] is None:
        raise UsageError("--set", "is needed: the set whose checkpoints are to be redefined")
    with open_domain(args) as domain:
        ledger = Ledger(args["--set"])
        segments = [
            segment for segment in ledger.of_domain(domain.uuid, domain.name)
            if segment.head["checkpoint"] and _checkpoint_xml(segment)
        ]
        if not segments:
            raise Error(ledger.directory, "holds no checkpoint")
        have = domain.checkpoints()
        broken = []
        parent = None
        for segment in sorted(segments, key=lambda segment: segment.head["created"]):
            name = segment.head["checkpoint"]
            if name not in have:
                # libvirt wants a parent that it knows; which one does not matter to a backup.
                try:
                    saved = _checkpoint_xml(segment)
                    xml = domxml.with_parent(saved, parent)
                    _check_bitmaps(domain, saved)
                    domain.redefine_checkpoint(xml, validate=True)
                except Error as error:
                    broken.append(name)
                    say(f"{name}: not redefined: {error.reason}")
                    continue
                say(f"{name}: redefined")
            parent = name
        if parent is None:
            raise Error(domain.name, "no checkpoint is usable: the next backup must be a full one (--level auto)")


def _checkpoint_xml(segment):
    """The XML (str or None) of a saved segment's checkpoint: there may be many, and it is not kept in memory."""
    xml = segment.open().head.get("checkpoint_xml")
    segment.close()
    return xml


def _check_bitmaps(domain, checkpoint_xml):
    """Where the domain is off libvirt does not look into the images: we do."""
    if domain.is_active or not domain.is_local:
        return
    disks = {disk.name: disk for disk in domxml.disks(domain.xml(inactive=True))}
    for name, bitmap in domxml.bitmaps(checkpoint_xml).items():
        disk = disks.get(name)
        if disk is None or not disk.path:
            raise Error(name, f"{name}: the domain has no such disk any more")
        if not qemuimg.holders(qemuimg.layers(name, disk.path, disk.format), bitmap):
            raise Error(name, f"{name}: no sound bitmap {bitmap} in {disk.path}")


def delete(args, say):
    """Delete all checkpoints of a chain that is no longer wanted."""
    with open_domain(args) as domain:
        ledger = Ledger.of(args["--state-dir"], domain.uuid, args["--set"])
        directory = JobDirectory(args["--state-dir"], domain.uuid)
        try:
            with directory.locked() as got:
                if not got:
                    raise Error(domain.name, who_runs(directory))
                recover_job(directory, domain.name, say)  # no checkpoint goes while a job of it is left
                count = 0
                for name, xml in domain.checkpoints().items():
                    about = domxml.about(xml)
                    if about is None or about.get("chain") != args["--chain"]:
                        continue
                    if about.get("ledger") != ledger.name and not args["--force"]:
                        say(f"{domain.name}: checkpoint {name} is of {about.get('ledger')}: left alone (see --force)")
                        continue
                    domain.delete_checkpoint(name)
                    count += 1
        finally:
            stay(directory)
        say(f"{domain.name}: checkpoints of chain {args['--chain']} deleted: {count}")
