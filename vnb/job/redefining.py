# SPDX-License-Identifier: LGPL-2.1-or-later
"""Checkpoints that libvirt has forgotten, made known to it again."""

from __future__ import annotations

import contextlib

from vnb.base.errors import Error
from vnb.qemu import img
from vnb.virt import domxml

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from vnb.virt.domain import Domain



def redefine(domain: Domain, checkpoint_xml: str | None) -> None:
    """
    Have libvirt know a checkpoint of a vnb.virt.domain.Domain again, with the disks that hold a sound bitmap of it.

    checkpoint_xml: as it was saved. Raises Error where no disk does; then nothing has changed.
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


def _redefine_live(domain: Domain, checkpoint_xml: str, wanted: Sequence[str], present: dict[str, domxml.Disk]) -> None:
    """QEMU is asked about the bitmaps by libvirt: of all disks, and where that fails of one after the other."""
    def ask(names: Sequence[str]) -> None:
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


def _has_sound(disk: domxml.Disk, bitmap: str) -> bool:
    """Whether a disk's image, which no guest uses, tells of all changes since a bitmap was made."""
    if disk.format != "qcow2" or not disk.path:
        return False
    return bool(img.holders(img.layers(disk.name, disk.path, disk.format), bitmap))
