# SPDX-License-Identifier: LGPL-2.1-or-later
"""Bitmaps of ours in images, whose checkpoints libvirt does not know."""

from __future__ import annotations

import time

from vnb.job import decisions
from vnb.job.source import UNION
from vnb.qemu import img
from vnb.virt import domxml

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vnb.virt.domain import Domain



def not_needed_because(bitmap: str, catalogs: Any) -> str | None:
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


def bitmaps_of(domain: Domain) -> dict[str, list[str]]:
    """
    {bitmap: disks} of our bitmaps in the domain's images, of this host.

    Of a domain that runs: of those that were there when it started, or were stored since.
    """
    found: dict[str, list[str]] = {}
    if not domain.is_local:
        return found
    for disk in domxml.disks(domain.xml()):
        if disk.left_out_because or not disk.path or disk.format != "qcow2":
            continue
        layers = img.layers(disk.name, disk.path, disk.format, shared=domain.is_active)
        for bitmap in {bitmap for layer in layers for bitmap in layer.bitmaps if bitmap.startswith("vnb.")}:
            found.setdefault(bitmap, []).append(disk.name)
    return found


def remove_bitmap(domain: Domain, bitmap: str, disks: list[str]) -> None:
    """Remove a bitmap without a checkpoint. QEMU does it for a domain that runs, when its checkpoint is deleted."""
    if domain.is_active:
        others = [disk.name for disk in domxml.disks(domain.xml()) if disk.name not in disks]
        xml = domxml.checkpoint(bitmap, "vnb {}", disks, others)
        domain.redefine_checkpoint(domxml.with_creation_time(xml, int(time.time())))
        domain.delete_checkpoint(bitmap)
        return
    for disk in domxml.disks(domain.xml()):
        if disk.name in disks and disk.path:
            img.remove_bitmap(disk.name, disk.path, bitmap)
