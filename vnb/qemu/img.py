# SPDX-License-Identifier: LGPL-2.1-or-later
"""Images that no guest uses: what qemu-img says of them, their bitmaps, and qemu-nbd to read them."""

from __future__ import annotations

import json
import os
import socket

from vnb.base.errors import Error, os_error
from vnb.base.processes import START_SECONDS, run
from vnb.nbd.connections import Connections
from vnb.nbd.endpoint import Unix
from vnb.qemu.qemu_nbd import QemuNbd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any


QCOW2_MAGIC = b"QFI\xfb"


class Layer:
    """
    An image of a backing chain.

    bitmaps: {name: set of flags}. "in-use": it was not closed properly. "auto": it records what is written.
    data_file: the file that has its data, as its header names it.
    """

    def __init__(self, info: dict[str, Any]) -> None:
        self.path = info["filename"]
        self.format = info["format"]
        self.size = info["virtual-size"]
        data = info.get("format-specific", {}).get("data", {})
        self.bitmaps = {bitmap["name"]: set(bitmap["flags"]) for bitmap in data.get("bitmaps", ())}
        self.data_file = data.get("data-file")
        self.is_v2 = self.format == "qcow2" and data.get("compat") == "0.10"

    def is_sound(self, bitmap: str) -> bool:
        """Whether a bitmap has all that was written since it was made; libvirt asks for the same of one in use."""
        flags = self.bitmaps.get(bitmap, ())
        return "auto" in flags and "in-use" not in flags


def info(name: str, path: str, format_: str, shared: bool = False, run: Callable[..., bytes] = run) -> str:
    """
    What qemu-img says of an image and its backing chain, as text (JSON).

    shared: a guest may use it. run: a function like run(), of the host where it is.
    """
    return run(
        name, "qemu-img", "info", *(["-U"] if shared else []), "--backing-chain", "--output=json", "-f", format_, path
    ).decode()


def layers(name: str, path: str, format_: str, shared: bool = False) -> list[Layer]:
    """The backing chain of an image from the top; Error where it is in use, unless shared."""
    return [Layer(found) for found in json.loads(info(name, path, format_, shared))]


def no_bitmap_because(path: str | None, format_: str, is_local: bool) -> str | None:
    """Why an image cannot hold a persistent bitmap, or None (also where that is for libvirt to find out)."""
    if format_ != "qcow2":
        return f"a {format_} image cannot hold a bitmap"
    if not is_local or path is None:
        return None
    try:
        with open(path, "rb") as file:
            start = file.read(8)
    except OSError:
        return None
    if start[:4] == QCOW2_MAGIC and int.from_bytes(start[4:], "big") < 3:
        return "a qcow2 image of version 2 cannot hold a bitmap (qemu-img amend -o compat=1.1 makes it version 3)"
    return None


def holders(chain: Sequence[Layer], bitmap: str) -> list[Layer]:
    """
    The layers whose bitmaps together tell what changed since a bitmap was made, from the top; [] if they don't.

    After a snapshot a bitmap goes on in the layer above, so all layers down to the lowest that has it count.
    """
    have = [bitmap in layer.bitmaps for layer in chain]
    if True not in have:
        return []
    lowest = len(have) - 1 - have[::-1].index(True)
    wanted = list(chain[: lowest + 1])
    if all(layer.is_sound(bitmap) and layer.size == wanted[0].size for layer in wanted):
        return wanted
    return []


# In a shell, since it may be one of another host. $1: path, $2: size, $3: owner or nothing.
_CREATE = 'umask 077; qemu-img create -q -f qcow2 -- "$1" "$2" && { test -z "$3" || chown -- "$3" "$1"; }'


def create(name: str, path: str, size: int, owner: str | None, run: Callable[..., bytes] = run) -> None:
    """Make an empty qcow2 image. owner: as chown(1) has it. run: see info(). Raises Error."""
    run(name, "sh", "-c", _CREATE, "sh", path, str(size), owner or "")


def add_bitmap(name: str, path: str, bitmap: str) -> None:
    """Add a persistent bitmap that records from now on."""
    run(name, "qemu-img", "bitmap", "--add", "-f", "qcow2", path, bitmap)


def add_union(name: str, wanted: Sequence[Layer], bitmap: str, union: str) -> None:
    """Add a bitmap to the top layer that is the union of one bitmap over several layers; it records nothing."""
    top = wanted[0].path
    run(name, "qemu-img", "bitmap", "--add", "--disable", "-f", "qcow2", top, union)
    for layer in wanted:
        # An image that is named twice would be locked against itself.
        source = [] if layer.path == top else ["-b", layer.path, "-F", "qcow2"]
        run(name, "qemu-img", "bitmap", "--merge", bitmap, *source, "-f", "qcow2", top, union)


def remove_bitmap(name: str, path: str, bitmap: str) -> None:
    """Remove a bitmap from an image and all layers below it that have it."""
    for layer in layers(name, path, "qcow2"):
        if bitmap in layer.bitmaps:
            run(name, "qemu-img", "bitmap", "--remove", "-f", "qcow2", layer.path, bitmap)


def serve(name: str, export_name: str, path: str, format_: str, socket_path: str, bitmap: str | None = None) -> QemuNbd:
    """
    Start a read-only qemu-nbd with one export, of the disk called name; returns it (QemuNbd) when it answers.

    It ends with the process that started it, even by SIGKILL: one left behind would keep the domain from starting.
    """
    listener = socket.socket(socket.AF_UNIX)
    try:
        if os.path.lexists(socket_path):
            os.unlink(socket_path)
        listener.bind(socket_path)
        os.chmod(socket_path, 0o600)
        listener.listen(64)
    except OSError as error:
        raise os_error(socket_path, error) from None
    options = ["--read-only", "--persistent", "--shared=64", f"--export-name={export_name}"]
    with listener:
        child = QemuNbd(path, format_, [*options, *([f"--bitmap={bitmap}"] if bitmap else [])], listener)
    try:
        Connections(1, START_SECONDS, alone=True).open(Unix(socket_path).uri(export_name), name).close()
    except Error as error:
        # Who closes the connection is about to end, and then has said why.
        reason = child.failure().reason if child.wait(1) else error.reason
        child.end()
        raise Error(name, reason) from None
    return child
