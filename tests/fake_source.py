# SPDX-License-Identifier: LGPL-2.1-or-later
"""A source whose hypervisor is a file: what it has begun lasts when its process is killed, as QEMU and libvirt do."""

import json
import os
from types import SimpleNamespace

from vnb.base.errors import Error
from vnb.job.cleanup import remove_scratch
from vnb.job.source import Source
from vnb.nbd.endpoint import Unix

DOMAIN = 7  # its number
QCOW2 = b"QFI\xfb\0\0\0\3"
SIZE = 1 << 20
NOTHING = {"job": None, "frozen": False, "suspended": False, "checkpoints": []}


class World:
    """What the hypervisor does: job (where it listens), frozen, suspended, and the checkpoints that it has."""

    def __init__(self, directory):
        self.directory = str(directory)
        self._path = f"{directory}/world.json"

    @classmethod
    def made(cls, directory):
        """A new one, with an image."""
        with open(f"{directory}/vda.qcow2", "wb") as file:
            file.write(QCOW2)
        world = cls(directory)
        world.change(**NOTHING)
        return world

    def look(self):
        with open(self._path, encoding="utf-8") as file:
            return json.load(file)

    def change(self, **changes):
        """All at once, or not at all."""
        found = {**(self.look() if os.path.exists(self._path) else {}), **changes}
        with open(f"{self._path}.new", "w", encoding="utf-8") as file:
            json.dump(found, file)
        os.rename(f"{self._path}.new", self._path)

    def scratch(self):
        return [name for name in os.listdir(self.directory) if name.endswith(".scratch")]


class Fake(Source):
    kind = "fake"
    name = uuid = "fake"
    needs_scratch = True

    def __init__(self, directory):
        self.world = World(directory)

    @classmethod
    def of_record(cls, record):
        return cls(record.images["vda"])

    def disks(self):
        path = f"{self.world.directory}/vda.qcow2"
        return [SimpleNamespace(
            name="vda", path=path, format="qcow2", type="file", encrypted=False, left_out_because=None)]

    def refuse_if_busy(self):
        if self.world.look()["job"] is not None:
            raise Error(self.name, "a backup job is active already")

    def size_of(self, disk):
        return SIZE

    def have(self):
        return {name: {"vda": name} for name in self.world.look()["checkpoints"]}

    def layers_now(self, disk):
        return [disk.path]

    def run(self, what, *_):
        raise Error(what, "there is no image information of a fake")

    def allocated(self, disks):
        return dict.fromkeys(disks, SIZE)

    def changed(self, _checkpoint, disks):
        return dict.fromkeys(disks, 0)

    def endpoint(self, _options, _directory, name):
        return Unix(f"/run/fake/{name}")

    def begin(self, wanted, journal):
        journal.intend(scratch_made=True)
        for disk in wanted.disks:
            os.close(os.open(disk.scratch, os.O_CREAT | os.O_WRONLY, 0o600))
        journal.intend(frozen=DOMAIN)
        self.world.change(frozen=True)
        journal.intend(suspended=DOMAIN)
        self.world.change(suspended=True)
        checkpoints = self.world.look()["checkpoints"]
        new = [] if wanted.checkpoint is None else [wanted.checkpoint]
        self.world.change(job=wanted.endpoint.key, checkpoints=checkpoints + new)
        self._resume(journal)
        self.thaw(journal)

    def exports(self, wanted):
        return {disk.name: (wanted.endpoint.uri(disk.export), "qemu:dirty-bitmap:fake") for disk in wanted.disks}

    def _resume(self, journal):
        self.world.change(suspended=False)
        journal.intend(suspended=None)

    def thaw(self, journal):
        self.world.change(frozen=False)
        journal.intend(frozen=None)
        return True

    def end(self, journal, clients, careful):
        if self.world.look()["job"] == journal.record.endpoint:
            self.world.change(job=None)
        remove_scratch(journal, None)
        if journal.record.suspended is not None:
            self._resume(journal)

    def delete_checkpoint(self, name):
        self.world.change(checkpoints=[other for other in self.world.look()["checkpoints"] if other != name])
