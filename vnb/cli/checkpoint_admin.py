# SPDX-License-Identifier: LGPL-2.1-or-later
"""What vnb-checkpoint does beside backups: list, size, cleanup, redefine, delete."""

from __future__ import annotations

import json

from vnb.base.errors import Error
from vnb.cli.checkpoint_cleanup import tell_of_job
from vnb.cli.known_catalogs import Catalogs, open_domain, wanted
from vnb.cli.orphans import bitmaps_of, not_needed_because, remove_bitmap
from vnb.cli.runner import show
from vnb.job.keeper import stay
from vnb.job.left_behind import recover as recover_job
from vnb.job.left_behind import who_runs
from vnb.job.plan import Plan, checkpoint_xml
from vnb.job.redefining import redefine as redefine_checkpoint
from vnb.job.sources import open_source
from vnb.job.state import JobDirectory
from vnb.store.catalog import of_checkpoint
from vnb.virt import domxml

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from vnb.virt.domain import Domain



def list(args: dict[str, Any], say: Callable[[str], None]) -> None:  # noqa: A001 - the command's own word
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


def _size(domain: Domain, name: str, disks: Any) -> Any:
    """(bytes that an increment from a checkpoint would have, names of the disks that it would take in full)."""
    sizes = domxml.sizes(domain.checkpoint_xml(name, with_size=True))
    present = {disk.name for disk in domxml.disks(domain.xml())}
    full = sorted(disk for disk in disks if disk in present and disk not in sizes)
    return sum(sizes.values()) + sum(domain.call("blockInfo", disk)[1] for disk in full), full


def _whose(row: dict[str, Any], about: Any, catalogs: Catalogs) -> str:
    """Why a checkpoint is not in a catalog, in words. row: of list()."""
    if not row["ours"]:
        return "not of vnb"
    if row["orphan"]:
        catalog: Any = catalogs.of(about)
        return f"orphan: not saved {catalog.where} (never, or it was pruned)"
    return f"of {of_checkpoint(about)}"


def size(options: dict[str, Any], as_json: bool, say: Callable[[str], None], warn: Callable[[str], None]) -> Any:
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


def redefine(args: dict[str, Any], say: Callable[[str], None]) -> None:
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


def delete(args: dict[str, Any], say: Callable[[str], None]) -> None:
    """Delete all checkpoints of a chain that is no longer wanted."""
    with open_domain(args) as domain:
        force = args["--force"]
        catalog: Any = None if force and not (args["--set"] or args["--destination"]) else wanted(args, domain)
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


def _delete_bitmaps(
    domain: Domain, catalogs: Catalogs, catalog: Any, args: dict[str, Any], say: Callable[[str], None],
) -> None:
    """The bitmaps of this chain whose checkpoints libvirt has forgotten."""
    for bitmap, disks in sorted(bitmaps_of(domain).items()):
        if bitmap in catalogs.abouts or bitmap.split(".")[1] != args["--chain"]:
            continue
        place, _ = catalogs.saved.get(bitmap, (None, None))
        is_of_it = catalog is not None and place is not None and place.id == catalog.id
        if is_of_it or args["--force"] or not_needed_because(bitmap, catalogs):
            say(f"{domain.name}: {', '.join(disks)}: removing bitmap {bitmap}, whose checkpoint libvirt has forgotten")
            remove_bitmap(domain, bitmap, disks)
        else:
            say(f"{domain.name}: {', '.join(disks)}: bitmap {bitmap} has no checkpoint: left alone (see --force)")
