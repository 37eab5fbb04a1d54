# SPDX-License-Identifier: LGPL-2.1-or-later
"""Checkpoints of libvirt: listed, described, made known again, and deleted with their bitmaps."""

from __future__ import annotations

import libvirt

from vnb.qemu import img
from vnb.virt import domxml
from vnb.virt.backup_job import Jobs
from vnb.virt.connection import error_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Checkpoints(Jobs):
    """The checkpoints of a domain."""

    def checkpoints(self) -> dict[str, str]:
        """{name: XML without the domain's} of all checkpoints; a transient domain takes them along when it ends."""
        flags = libvirt.VIR_DOMAIN_CHECKPOINT_XML_NO_DOMAIN
        try:
            found = self._domain.listAllCheckpoints()
            return {checkpoint.getName(): checkpoint.getXMLDesc(flags) for checkpoint in found}
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                return {}
            raise error_of(self.what, error) from None

    def checkpoint_xml(self, name: str, with_size: bool = False, with_domain: bool = False) -> str:
        """
        A checkpoint's XML.

        with_size: and what an increment from it would have, which no job may hinder. with_domain: and the domain's
        XML of that time.
        """
        flags = 0 if with_domain else libvirt.VIR_DOMAIN_CHECKPOINT_XML_NO_DOMAIN
        if with_size:
            flags |= libvirt.VIR_DOMAIN_CHECKPOINT_XML_SIZE
        try:
            return self._domain.checkpointLookupByName(name).getXMLDesc(flags)
        except libvirt.libvirtError as error:
            raise error_of(self.what, error) from None

    def redefine_checkpoint(self, xml: str, validate: bool = False) -> None:
        """Have libvirt know a checkpoint again. validate: its bitmaps too, which needs a running domain."""
        flags = libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE
        if validate and self.is_active:
            flags |= libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE_VALIDATE
        self.call("checkpointCreateXML", xml, flags)

    def delete_checkpoint(self, name: str) -> None:
        """
        Delete a checkpoint and its bitmaps; harmless where it is gone already.

        Where the domain is off, libvirt forgets the checkpoint and qemu-img removes the bitmaps. Where one disk
        has no bitmap any more, libvirt refuses the whole: then it is done disk by disk.
        """
        self.settle()
        try:
            checkpoint = self._domain.checkpointLookupByName(name)
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN_CHECKPOINT:
                return
            raise error_of(self.what, error) from None
        try:
            if self.is_active:
                try:
                    checkpoint.delete(0)
                except libvirt.libvirtError:
                    self.settle()  # it may be going off while we ask
                    if self.is_active:
                        self._delete_by_disk(checkpoint)
                        return
                else:
                    return
            disks = domxml.bitmaps(checkpoint.getXMLDesc(libvirt.VIR_DOMAIN_CHECKPOINT_XML_NO_DOMAIN))
            checkpoint.delete(libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY)
        except libvirt.libvirtError as error:
            raise error_of(f"{self.what}: checkpoint {name}", error) from None
        for disk in domxml.disks(self.xml(inactive=True)):
            if disk.name in disks and disk.path and disk.format == "qcow2":
                img.remove_bitmap(disk.name, disk.path, disks[disk.name])

    def _delete_by_disk(self, checkpoint: Any) -> None:
        xml = checkpoint.getXMLDesc(libvirt.VIR_DOMAIN_CHECKPOINT_XML_NO_DOMAIN)
        checkpoint.delete(libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY)
        present = {disk.name for disk in domxml.disks(self.xml())}
        for disk in domxml.bitmaps(xml):
            if disk not in present:
                continue  # unplugged: its image keeps a bitmap that nobody reads
            flags = libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE
            single = self._domain.checkpointCreateXML(domxml.checkpoint_of_one(xml, disk), flags)
            try:
                single.delete(0)
            except libvirt.libvirtError:
                single.delete(libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY)
