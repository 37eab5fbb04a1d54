# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Many increments in a row with everything that happens to machines in between; each saved point restores.

The course of events follows from the seed alone.
"""

import os
import signal
import subprocess

import libvirt
import pytest
from backups import STORE, restores, tip
from lab import Disk, MiB, wait_for

STEPS = 12
SIZE = 48 * MiB
MAX_SIZE = 96 * MiB
ENDLESS = "cat > /dev/null; exec tail -f /dev/null"


class Course:
    """One machine, two chains, and what happens to them. points: (set, point, {disk: raw image})."""

    def __init__(self, lab, chance):
        self.lab = lab
        self.random = chance
        self.vm = lab.domain(Disk("vda", SIZE), Disk("vdb", SIZE, discard=True))
        self.sizes = dict.fromkeys(self.vm.disks, SIZE)
        self.sets = {"a": lab.new_directory("set"), "b": lab.new_directory("set")}
        self.points = []
        self.overlays = 0
        self.log = []

    def step(self):
        for _ in range(self.random.randint(1, 4)):
            self.write()
        event = self.random.choices(
            ["nothing", "failed", "killed", "keeper", "off", "death", "disk", "grow", "snapshot"],
            [6, 2, 1, 1, 1, 1, 1, 1, 1],
        )[0]
        self.log.append(event)
        getattr(self, event)()
        self.back_up(self.random.choice("aab"))

    def write(self):
        name = self.random.choice(list(self.vm.disks))
        size = self.random.choice([512, 4096, 65536, MiB, 3 * MiB])
        offset = self.random.randrange(0, self.sizes[name] - size, 512)
        kind = self.random.choice(["random", "pattern", "zero", "unmap", "discard"])
        if kind == "random":
            self.vm.write_random(name, offset, size, seed=self.random.random())
        elif kind == "pattern":
            self.vm.write(name, offset, size, pattern=self.random.randrange(1, 256))
        elif kind == "discard":
            self.vm.discard(name, offset, size)
        else:
            self.vm.zero(name, offset, size, unmap=kind == "unmap")

    def back_up(self, chain):
        directory = self.sets[chain]
        level = self.random.choices(["auto", "full"], [9, 1])[0]
        store = STORE.format(set=directory)
        self.lab.sh(
            f"vnb-checkpoint run {self.vm.name} --level {level} --chain {chain} --set {directory} -- '{store}'"
        )
        self.points.append((directory, tip(self.lab, directory), self.vm.reference()))

    def nothing(self):
        """The usual day."""

    def failed(self):
        chain = self.random.choice("ab")
        command = self.random.choice(["false", "vnb-extents | vnb-read > /dev/full", "vnb-extents | head -c 100"])
        done = self.lab.sh(
            f"vnb-checkpoint run {self.vm.name} --level auto --chain {chain} --set {self.sets[chain]} "
            f"-- '{command} > /dev/null'", check=False,
        )
        assert done.returncode in (0, 1)

    def killed(self):
        self._kill(lambda process: process.pid)

    def keeper(self):
        self._kill(lambda process: next(
            pid for pid, line in self.lab.processes().items() if "vnb-checkpoint" in line and pid != process.pid
        ))

    def _kill(self, victim):
        chain = self.random.choice("ab")
        process = subprocess.Popen(
            ["vnb-checkpoint", "run", self.vm.name, "--level", "auto", "--chain", chain, "--set", self.sets[chain],
             "--", ENDLESS], env=self.lab.env, stderr=subprocess.DEVNULL, start_new_session=True,
            executable=self.lab.env["PATH"].partition(":")[0] + "/vnb-checkpoint",
        )
        wait_for(lambda: any(line.startswith("tail") for line in self.lab.processes().values()), "the command")
        os.kill(victim(process), signal.SIGKILL)
        process.wait(60)
        wait_for(lambda: not self.vm.has_job(), "the end of the job")
        for pid, line in self.lab.processes().items():
            if line.startswith(("tail", "bash")):
                os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not self.lab.processes(), "the end of all processes")

    def off(self):
        """The machine is shut down, backed up while it is off, and started."""
        self.vm.destroy()
        directory = self.sets["a"]
        self.lab.sh(
            f"vnb-checkpoint run {self.vm.name} --level auto --chain a --set {directory} "
            f"-- '{STORE.format(set=directory)}'"
        )
        self.vm.start()
        self.points.append((directory, tip(self.lab, directory), self.vm.reference()))

    def death(self):
        """QEMU is killed: its bitmaps are lost with it."""
        self.vm.kill()
        self.vm.start()

    def disk(self):
        """A new disk, once."""
        if "vdc" in self.vm.disks:
            return
        disk = Disk("vdc", SIZE)
        disk.create(self.vm.directory)
        os.chmod(disk.path, 0o666)  # noqa: S103 - QEMU's user, whoever that is
        self.vm.files.add(os.path.basename(disk.path))
        self.vm.handle.attachDeviceFlags(
            disk.xml(), libvirt.VIR_DOMAIN_AFFECT_LIVE | libvirt.VIR_DOMAIN_AFFECT_CONFIG
        )
        self.vm.disks["vdc"] = disk
        self.sizes["vdc"] = SIZE

    def grow(self):
        name = self.random.choice(list(self.vm.disks))
        size = min(MAX_SIZE, self.sizes[name] + 8 * MiB)
        try:
            self.vm.handle.blockResize(name, size, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)
        except libvirt.libvirtError as error:
            # QEMU refuses while a chain that was not backed up since a hard death has bitmaps in the image.
            if "inconsistent" not in str(error):
                raise
        else:
            self.sizes[name] = size

    def snapshot(self):
        """An external snapshot, some writes, and what is in the overlay committed into the image again."""
        name = self.random.choice(list(self.vm.disks))
        self.overlays += 1
        overlay = os.path.join(self.vm.directory, f"overlay{self.overlays}.qcow2")
        others = "".join(f"<disk name='{other}' snapshot='no'/>" for other in self.vm.disks if other != name)
        self.vm.handle.snapshotCreateXML(
            f"<domainsnapshot><disks><disk name='{name}' snapshot='external'><source file='{overlay}'/></disk>{others}"
            "</disks></domainsnapshot>",
            libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA,
        )
        self.vm.files.add(os.path.basename(overlay))
        self.write()
        self.back_up("a")
        self.write()
        self.vm.handle.blockCommit(
            name, None, None, 0, libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE
        )
        wait_for(lambda: self._is_ready(name), "the commit")
        self.vm.handle.blockJobAbort(name, libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT)
        wait_for(lambda: not self.vm.handle.blockJobInfo(name), "the pivot")
        os.unlink(overlay)

    def _is_ready(self, name):
        info = self.vm.handle.blockJobInfo(name)
        return info and info["cur"] == info["end"] and "ready='yes'" in self.vm.handle.XMLDesc()


@pytest.mark.fault(
    "a domain lives on through failed and killed backups, snapshots, shutdowns, a killed QEMU, and disks that "
    "grow and are added",
    holds="each restore point restores byte for byte; nothing is left behind", share=2,
)
def test_each_point_of_a_long_life_restores(lab, rounds):
    for chance in rounds:
        course = Course(lab, chance)
        try:
            for _ in range(STEPS):
                course.step()
            assert lab.leftovers() == []
            for directory, point, reference in course.points:
                restores(lab, directory, reference, point)
        except BaseException as error:
            error.add_note(", ".join(course.log))
            raise
        finally:
            course.vm.remove()
