# SPDX-License-Identifier: LGPL-2.1-or-later
"""A domain that is off."""

from __future__ import annotations

import os
import time

from vnb.base.errors import Error
from vnb.job import domain_files
from vnb.job.cleanup import thaw
from vnb.job.described import abouts, checkpoint_xml, domain_fields, domain_of
from vnb.job.redefining import redefine
from vnb.job.source_offline import Offline
from vnb.qemu import img
from vnb.virt import domxml, file_elements

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

    from vnb.job.record import Added, Record
    from vnb.job.source import Journal, Wanted
    from vnb.virt.domain import Domain



class Stopped(Offline):
    """A domain that is off: its images, and checkpoints that are valid when it runs again."""

    kind = "stopped"

    def __init__(self, domain: Domain) -> None:
        super().__init__()
        self.domain = domain
        self.name = domain.name
        self.uuid = domain.uuid
        self.uri = domain.uri
        if not domain.is_local:
            raise Error(
                self.name, "is not running, and its images are on another host: start it for the backup "
                "(--start-paused), or run vnb-checkpoint there"
            )

    @classmethod
    def of_record(cls, record: Record) -> Stopped:
        return cls(domain_of(record))

    def close(self) -> None:
        self.domain.close()

    @property
    def runs(self) -> bool:
        return self.domain.is_active

    def disks(self) -> list[Any]:
        return domxml.disks(self.domain.xml(inactive=True))

    def size_of(self, disk: Any) -> int:
        self._must_be_plain(disk)
        return super().size_of(disk)

    def _must_be_plain(self, disk: Any) -> None:
        """Raise Error where qemu-nbd, which knows nothing of the XML, would read something else than the guest does."""
        what = disk.kind_of_qemu
        if what is None and not _is_chain_of(disk, self.layers_of(disk)):
            what = "a disk with other images below it in the domain's XML than in its own header"
        if what is not None:
            raise Error(disk.name, f"{what} can be read while its domain runs only (--start-paused)")

    def describe(self, path: str) -> tuple[int, int, str]:
        return domain_files.describe(path)

    def more_files(self, xml: str) -> list[tuple[str, str]]:
        """The nvram, where libvirt names it after the domain: up to 9.0 that is only in the XML of one that runs."""
        if not file_elements.leaves_nvram_to_libvirt(domxml.parse(xml, "domain XML")):
            return []
        path = os.path.join(self.domain.nvram_directory, f"{self.name}_VARS.fd")
        return [("nvram", path)] if os.path.exists(path) else []

    def have(self) -> dict[str, dict[str, str]]:
        """What libvirt knows and the images still have."""
        disks = {disk.name: disk for disk in self.disks() if disk.kind_of_qemu is None and disk.format == "qcow2"}
        found = {}
        for name, xml in self.domain.checkpoints().items():
            found[name] = {
                disk: bitmap for disk, bitmap in domxml.bitmaps(xml).items()
                if disk in disks and img.holders(self.layers_of(disks[disk]), bitmap)
            }
        return found

    def abouts(self) -> dict[str, Any]:
        return abouts(self.domain)

    def images_then(self, checkpoint: str) -> dict[str, str]:
        return domxml.images_then(self.domain.checkpoint_xml(checkpoint, with_domain=True))

    def head_fields(self) -> dict[str, Any]:
        return domain_fields(self.domain)

    def begin(self, wanted: Wanted, journal: Journal) -> None:
        super().begin(wanted, journal)
        xml = checkpoint_xml(wanted)
        if xml is not None:
            self.domain.redefine_checkpoint(domxml.with_creation_time(xml, int(time.time())))

    def mark(self, checkpoint: str) -> str | None:
        return self.domain.checkpoint_xml(checkpoint)

    def thaw(self, journal: Journal) -> bool:
        return thaw(self.domain, journal)

    def redefine(self, checkpoint_xml: str | None) -> None:
        redefine(self.domain, checkpoint_xml)

    def delete_checkpoint(self, name: str) -> None:
        self.domain.delete_checkpoint(name)

    def remove_bitmaps(self, added: Iterable[Added], checkpoint: str) -> None:
        """Bitmaps that were added before libvirt was told of their checkpoint."""
        if not self.domain.is_active:
            for name, path in added:
                img.remove_bitmap(name, path, checkpoint)


def _is_chain_of(disk: domxml.Disk, chain: Sequence[img.Layer]) -> bool:
    """Whether a chain is what a disk's XML has, as far as it says anything."""
    if len(disk.layers) > len(chain) or (disk.ends and len(disk.layers) < len(chain)):
        return False
    return all(
        os.path.realpath(name) == os.path.realpath(layer.path) and format_ in (None, layer.format)
        and (data is None or os.path.realpath(data) == os.path.realpath(layer.data_file or ""))
        for name, format_, data, layer in zip(disk.layers, disk.formats, disk.data, chain)
    )
