# SPDX-License-Identifier: LGPL-2.1-or-later
"""Images without libvirt."""

from __future__ import annotations

import os

from vnb.base.errors import Error
from vnb.format import heads
from vnb.job.source_offline import Offline
from vnb.qemu import img

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from vnb.job.record import Record



class Images(Offline):
    """
    Image files without any libvirt. images: {disk name: path}.

    Their identity is that of their paths: the same files are the same domain, and with others it would be another one.
    """

    kind = option = "images"

    def __init__(self, images: Mapping[str, str]) -> None:
        super().__init__()
        self.images = {name: os.path.realpath(path) for name, path in images.items()}
        self.name = os.path.basename(next(iter(self.images.values()))).partition(".")[0] or "images"
        self.uuid = heads.uuid_of("\n".join(f"{name}={path}" for name, path in sorted(self.images.items())))

    @classmethod
    def of_options(cls, options: Mapping[str, Any]) -> Images:
        return cls(options["images"])

    @classmethod
    def of_record(cls, record: Record) -> Images:
        return cls(record.images or {})

    def disks(self) -> list[Any]:
        return [ImageDisk(name, path) for name, path in self.images.items()]

    def have(self) -> dict[str, dict[str, str]]:
        found: dict[str, dict[str, str]] = {}
        for disk in self.disks():
            layers = self.layers_of(disk)
            for bitmap in {name for layer in layers for name in layer.bitmaps}:
                if img.holders(layers, bitmap):
                    found.setdefault(bitmap, {})[disk.name] = bitmap
        return found

    def redefine(self, checkpoint_xml: str | None) -> None:
        """There is no libvirt that could have forgotten it: its bitmaps are not there."""
        raise Error(self.name, "no image has a sound bitmap of it")

    def delete_checkpoint(self, name: str) -> None:
        for disk in self.disks():
            if disk.format == "qcow2":
                img.remove_bitmap(disk.name, disk.path, name)

class ImageDisk:
    """An image file in the place of a domain's disk; see vnb.virt.domxml.Disk."""

    type = "file"
    device = "disk"
    encrypted = readonly = empty = shareable = False
    left_out_because = None

    def __init__(self, name: str, path: str) -> None:
        self.name = name
        self.path = path
        self.format = _format_of(name, path)


def _format_of(name: str, path: str) -> str:
    """qcow2 or raw. A guest can write a qcow2 header into a raw image: this is for images without a guest."""
    try:
        with open(path, "rb") as file:
            return "qcow2" if file.read(4) == b"QFI\xfb" else "raw"
    except OSError as error:
        raise Error(name, error.strerror, path) from None
