# SPDX-License-Identifier: LGPL-2.1-or-later
"""A domain that is off."""

import os
import time

from vnb.base.errors import Error
from vnb.job import domain_files
from vnb.job.described import abouts, domain_fields
from vnb.job.redefining import redefine
from vnb.job.source_offline import Offline
from vnb.qemu import img
from vnb.virt import domxml


class Stopped(Offline):
    """A domain that is off: its images, and checkpoints that are valid when it runs again."""

    kind = "stopped"

    def __init__(self, domain):
        super().__init__()
        self.domain = domain
        self.name = domain.name
        self.uuid = domain.uuid
        if not domain.is_local:
            raise Error(
                self.name, "is not running, and its images are on another host: start it for the backup "
                "(--start-paused), or run vnb-checkpoint there"
            )

    def close(self):
        self.domain.close()

    @property
    def runs(self):
        """Whether somebody has started it since."""
        return self.domain.is_active

    def disks(self):
        return domxml.disks(self.domain.xml(inactive=True))

    def size_of(self, disk):
        self._must_be_plain(disk)
        return super().size_of(disk)

    def _must_be_plain(self, disk):
        """Raise Error where qemu-nbd, which knows nothing of the XML, would read something else than the guest does."""
        what = disk.kind_of_qemu
        if what is None and not _is_chain_of(disk, self.layers_of(disk)):
            what = "a disk with other images below it in the domain's XML than in its own header"
        if what is not None:
            raise Error(disk.name, f"{what} can be read while its domain runs only (--start-paused)")

    def describe(self, path):
        """See Running."""
        return domain_files.describe(path)

    def nvram_of_libvirt(self, xml):
        """
        The path of an nvram that the domain's definition does not name, or None where there is no such file.

        libvirt names it after the domain; up to 9.0 it is only in the XML of a domain that runs.
        """
        if not domxml.leaves_nvram_to_libvirt(domxml.parse(xml, "domain XML")):
            return None
        path = os.path.join(self.domain.nvram_directory, f"{self.name}_VARS.fd")
        return path if os.path.exists(path) else None

    def have(self):
        """What libvirt knows and the images still have."""
        disks = {disk.name: disk for disk in self.disks() if disk.kind_of_qemu is None and disk.format == "qcow2"}
        found = {}
        for name, xml in self.domain.checkpoints().items():
            found[name] = {
                disk: bitmap for disk, bitmap in domxml.bitmaps(xml).items()
                if disk in disks and img.holders(self.layers_of(disks[disk]), bitmap)
            }
        return found

    def abouts(self):
        """See Running."""
        return abouts(self.domain)

    def images_then(self, checkpoint):
        """See Running."""
        return domxml.images_then(self.domain.checkpoint_xml(checkpoint, with_domain=True))

    def head_fields(self):
        return domain_fields(self.domain)

    def start(self, plan, job):
        super().start(plan, job)
        if plan.marks:
            xml = domxml.with_creation_time(plan.checkpoint_xml(), int(time.time()))
            self.domain.redefine_checkpoint(xml)

    def mark(self, plan):
        return self.domain.checkpoint_xml(plan.head["checkpoint"])

    def redefine(self, checkpoint_xml):
        """See Running."""
        redefine(self.domain, checkpoint_xml)

    def delete_checkpoint(self, name):
        self.domain.delete_checkpoint(name)

    def remove_bitmaps(self, record):
        """Bitmaps that were added before libvirt was told of their checkpoint."""
        if not self.domain.is_active:
            for name, path in record.added:
                img.remove_bitmap(name, path, record.head["checkpoint"])


def _is_chain_of(disk, chain):
    """Whether a chain (list of vnb.qemu.img.Layer) is what a disk's XML has, as far as it says anything."""
    if len(disk.layers) > len(chain) or (disk.ends and len(disk.layers) < len(chain)):
        return False
    return all(
        os.path.realpath(name) == os.path.realpath(layer.path) and format_ in (None, layer.format)
        and (data is None or os.path.realpath(data) == os.path.realpath(layer.data_file or ""))
        for name, format_, data, layer in zip(disk.layers, disk.formats, disk.data, chain)
    )
