# SPDX-License-Identifier: LGPL-2.1-or-later
"""Disks that no guest uses, served by qemu-nbd: those of a domain that is off, or images."""

from __future__ import annotations

import contextlib
import heapq
import os
import re
import tempfile

from vnb.base import processes
from vnb.base.errors import Error
from vnb.base.tempdir import temporary_directory
from vnb.job.cleanup import end_servers
from vnb.job.record import Added, Server, Union
from vnb.job.source import Source
from vnb.job.state import start_of
from vnb.nbd import block_status
from vnb.nbd.connections import Connections
from vnb.nbd.endpoint import Unix
from vnb.qemu import img

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from typing import Any

    from vnb.job.source import Journal, Wanted, WantedDisk
    from vnb.qemu.qemu_nbd import QemuNbd
    from vnb.virt.export_clients import Clients


PROTOCOL = re.compile(r"[^/]*:")  # before the name of an image that is no path, as nbd:, json:


class Offline(Source):
    """What a stopped domain and plain images have in common: images that qemu-nbd reads."""

    @property
    def runs(self) -> bool:
        """Whether somebody has started the domain since."""
        return False

    def __init__(self) -> None:
        self._layers: dict[str, list[img.Layer]] = {}
        self._servers: list[QemuNbd] = []

    def let_go(self) -> None:
        while self._servers:
            self._servers.pop().end()

    def run(self, what: str | None, *argv: str) -> bytes:
        return processes.run(what, *argv)

    def cannot_read_because(self, disk: Any) -> str | None:
        return disk.no_job_because if disk.type == "vhostuser" else None

    def layers_of(self, disk: Any) -> list[img.Layer]:
        if disk.name not in self._layers:
            self._layers[disk.name] = img.layers(disk.name, disk.path, disk.format)
            for layer in self._layers[disk.name]:
                _refuse_relative_data(disk, layer)
        return self._layers[disk.name]

    def size_of(self, disk: Any) -> int:
        return self.layers_of(disk)[0].size

    def layers_now(self, disk: Any) -> list[str]:
        return [layer.path for layer in self.layers_of(disk)]

    def endpoint(self, options: Mapping[str, Any], directory: str, _name: str) -> Unix:
        """What the sockets' paths start with, one a disk: the directory is that of this one job."""
        if options["listen"] is not None:
            raise Error("--nbd-listen", f"{self.name} does not run, and its images are served on unix sockets")
        return Unix(options["socket"] or os.path.join(directory, ""))

    def exports(self, wanted: Wanted) -> dict[str, tuple[str, str]]:
        return {
            disk.name: (
                Unix(self._socket(wanted, disk.name)).uri(disk.export),
                f"qemu:dirty-bitmap:{self._bitmap(wanted, disk)}",
            )
            for disk in wanted.disks
        }

    def _socket(self, wanted: Wanted, name: str) -> str:
        return f"{wanted.endpoint.path}{name}.sock"

    def _bitmap(self, wanted: Wanted, disk: WantedDisk) -> str:
        """The bitmap that says what changed: the base's, or the union that begin() makes of its layers."""
        if wanted.base and len(img.holders(self._layers[disk.name], wanted.base)) == 1:
            return wanted.base
        return wanted.union

    def begin(self, wanted: Wanted, journal: Journal) -> None:
        """Add the new bitmaps, then serve the images: from there on nobody else can write to them."""
        if wanted.checkpoint is not None:
            for disk in wanted.disks:
                if disk.has_bitmap:
                    journal.remember(added=Added(disk.name, disk.disk.path))
                    img.add_bitmap(disk.name, disk.disk.path, wanted.checkpoint)
        for disk in wanted.disks:
            bitmap = None
            if disk.is_increment:
                bitmap = self._bitmap(wanted, disk)
                if bitmap == wanted.union and wanted.base is not None:
                    journal.remember(unions=Union(disk.name, disk.disk.path, bitmap))
                    img.add_union(disk.name, img.holders(self._layers[disk.name], wanted.base), wanted.base, bitmap)
            socket = self._socket(wanted, disk.name)
            journal.remember(sockets=socket)
            server = img.serve(disk.name, disk.export, disk.disk.path, disk.disk.format, socket, bitmap)
            self._servers.append(server)  # they end with the one who started them: the keeper keeps them
            journal.remember(servers=Server(server.process.pid, start_of(server.process.pid)))

    def end(self, journal: Journal, clients: Callable[[], Clients], careful: bool) -> None:
        end_servers(journal.record)
        for name, path, bitmap in journal.record.unions:
            if self.runs:
                # It records nothing, so it does no harm; and nobody can remove it until the guest is off.
                journal.note(f"{self.name}: {name}: bitmap {bitmap} stays in {path}, which the guest uses by now")
            else:
                img.remove_bitmap(name, path, bitmap)

    def allocated(self, disks: Iterable[str]) -> dict[str, int]:
        return {disk.name: self._measure(disk, self.layers_of(disk)[:1]) for disk in self.disks() if disk.name in disks}

    def changed(self, checkpoint: str, disks: Iterable[str]) -> dict[str, int]:
        wanted = [disk for disk in self.disks() if disk.name in disks]
        holders = [(disk, img.holders(self.layers_of(disk), checkpoint)) for disk in wanted]
        return {disk.name: self._measure(disk, layers, checkpoint) for disk, layers in holders if layers}

    def _measure(self, disk: Any, layers: Sequence[img.Layer], bitmap: str | None = None) -> int:
        """How many bytes are dirty in any of the layers' bitmaps, or are data where no bitmap is given."""
        with tempfile.TemporaryDirectory(dir=temporary_directory()) as directory, contextlib.ExitStack() as stack:
            ranges = []
            connections = Connections(len(layers))
            for number, layer in enumerate(layers):
                socket = os.path.join(directory, str(number))
                server = img.serve(disk.name, "", layer.path, layer.format, socket, bitmap)
                stack.callback(server.end)
                context = block_status.Context(
                    connections, Unix(socket).uri(""), disk.name,
                    f"qemu:dirty-bitmap:{bitmap}" if bitmap else block_status.BASE_ALLOCATION, required=True,
                )
                context.open()
                stack.callback(context.close)
                ranges.append(_ranges(context, bitmap is not None))
            return _total(heapq.merge(*ranges))


def _refuse_relative_data(disk: Any, layer: img.Layer) -> None:
    """
    Raise Error where QEMU looks for the data of a layer wherever it was started.

    Another QEMU than ours has written it, and we may find another file of that name.
    """
    name = layer.data_file
    if name and not os.path.isabs(name) and not PROTOCOL.match(name):
        raise Error(
            disk.name, f"{layer.path} names its data file {name}, which QEMU looks for in the directory where it is "
            f"started: there, qemu-img amend -f qcow2 -o data_file=\"$PWD/{name}\" {layer.path} makes the name absolute"
        )


def _ranges(context: block_status.Context, is_bitmap: bool) -> Iterator[tuple[int, int]]:
    """Yield (offset, end) of what is dirty, or of what is data, in an export."""
    assert context.size is not None  # it is open
    for offset, length, flags in block_status.Walk(context, unknown=0).within(0, context.size, context.size):
        if flags & block_status.DIRTY if is_bitmap else not flags & block_status.READS_ZERO:
            yield offset, offset + length


def _total(ranges: Iterable[tuple[int, int]]) -> int:
    """The bytes that ascending ranges of (offset, end), which may overlap, cover."""
    total = done = 0
    for offset, end in ranges:
        if end > done:
            total += end - max(offset, done)
            done = end
    return total
