# SPDX-License-Identifier: LGPL-2.1-or-later
"""A running machine, whose backup is killed in any part, or that something happens to in the middle of it."""

import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import libvirt
import pytest
from backups import backup, restores, tip
from disturbing import check_said
from lab import Disk, MiB, wait_for

SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT", "SIGPIPE")
VICTIMS = ("vnb-checkpoint", "vnb-extents", "vnb-read", "vnb-pack")
SIZE = 32 * MiB
# So slow that there is a middle. Each stage is there from the start.
SLOW = "vnb-extents | vnb-read | (head -c 300000; sleep 0.5; cat) | vnb-pack -z -o {set}"


class Life:
    """A machine, its set, and references: [(point, {disk: raw image})]."""

    def __init__(self, lab, chance):
        self.lab = lab
        self.chance = chance
        self.vm = lab.domain(Disk("vda", SIZE), Disk("vdb", SIZE, discard=True))
        self.set = lab.new_directory("set")
        self.points = []
        self.write()
        self.back_up()

    def write(self):
        """What a guest may do to its disks."""
        for name in self.vm.disks:
            length = self.chance.choice([4096, 65536, MiB])
            self.vm.write_random(name, self.chance.randrange(0, SIZE - length, 512), length, self.chance.random())
            self.vm.zero(name, self.chance.randrange(0, SIZE - length, 512), length, self.chance.random() < 0.5)

    def back_up(self):
        """A backup that has to work."""
        backup(self.lab, self.vm, "auto", self.set)
        self.points.append((tip(self.lab, self.set), self.vm.reference()))

    def start(self):
        """A backup in the background (Popen), when its command runs; what it is to save is taken note of."""
        self.begun = self.vm.reference()
        process = subprocess.Popen(
            ["bash", "-c", f"exec vnb-checkpoint run {self.vm.name} --level auto --ledger {self.set} -- "
             f"'{SLOW.format(set=self.set)}'"],
            env=self.lab.env, cwd=self.lab.directory, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )
        wait_for(lambda: self.pids("vnb-pack") or process.poll() is not None, "the command")
        return process

    def pids(self, program):
        return sorted(pid for pid, line in self.lab.processes().items() if f"/{program} " in f"{line} ")

    def check(self, process):
        """The end of a backup that something has happened to: nothing is left, and all goes on."""
        _, said = process.communicate(timeout=120)
        assert self.lab.leftovers(patience=60) == []
        check_said(said, "a backup")
        assert self.vm.state() == libvirt.VIR_DOMAIN_RUNNING
        found = {name.rsplit(".", 2)[0] for name in os.listdir(self.set) if not name.startswith(".")}
        new = found - {point for point, _ in self.points}
        assert len(new) == 1 if process.returncode == 0 else len(new) <= 1, said
        self.points += [(point, self.begun) for point in new]
        self.write()
        self.back_up()
        for point, reference in self.points[-2:]:
            restores(self.lab, self.set, reference, point)

    def end(self):
        """All points restore, and the machine is removed."""
        self.lab.sh(f"vnb-verify {self.set}")
        for point, reference in self.points:
            restores(self.lab, self.set, reference, point)
        self.vm.remove()


@pytest.fixture
def life(lab, request):
    """A function that makes a Life; it is ended after the test."""
    made = []

    def make(chance):
        made.append(Life(lab, chance))
        return made[-1]

    yield make
    for each in made:
        each.vm.remove()


@pytest.mark.fault(
    "SIGKILL, SIGTERM, SIGINT or SIGPIPE to a part of a backup of a running machine: `run`, its keeper, each stage",
    holds="no job, paused guest, process, socket or scratch is left; each point restores; the next increment is right",
    rounds=1, share=6,
)
def test_a_part_is_killed(life, rounds):
    for chance in rounds:
        each = life(chance)
        for _ in range(4 if rounds.is_soak else 2):
            rounds.fault()
            each.write()
            process = each.start()
            pids = each.pids(chance.choice(VICTIMS))
            time.sleep(chance.uniform(0, 0.8))
            if pids:
                kill(chance.choice(pids), chance.choice(SIGNALS))
            each.check(process)
        each.end()


@pytest.mark.fault(
    "SIGKILL to `run` and to its keeper, both",
    holds="`recover` ends the job; each point restores, the next increment is right", rounds=1, share=2,
)
def test_run_and_keeper_are_killed(life, rounds):
    for chance in rounds:
        each = life(chance)
        each.write()
        process = each.start()
        time.sleep(chance.uniform(0, 0.4))
        for pid in each.pids("vnb-checkpoint"):
            kill(pid, "SIGKILL")
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        each.lab.sh(f"vnb-checkpoint recover {each.vm.name} --ledger {each.set}")
        each.check(process)
        each.end()


def kill(pid, name):
    try:
        os.kill(pid, getattr(signal, name))
    except ProcessLookupError:
        return  # it was faster


def reset(each):
    """The guest is reset: its disks stay as they are."""
    each.vm.handle.reset()


def resize(each):
    """A disk grows while it is read."""
    each.vm.handle.blockResize("vda", SIZE + 8 * MiB, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)


def detach(each):
    """A disk is pulled out."""
    each.vm.handle.detachDeviceFlags(each.vm.disks["vdb"].xml(), libvirt.VIR_DOMAIN_AFFECT_LIVE)


def restart_libvirtd(each):
    """libvirtd dies and comes back; QEMU goes on."""
    each.lab.restart_libvirtd()


def pause(each):
    """The guest is paused and resumed by somebody else."""
    each.vm.pause()
    each.vm.resume()


@pytest.mark.fault(
    "in the middle of a backup the guest is reset, a disk grows or is detached, libvirtd is killed, somebody pauses",
    holds="the backup is right, or fails as a whole; the guest runs; each point restores, the next increment is right",
)
@pytest.mark.parametrize("event", [reset, resize, detach, restart_libvirtd, pause], ids=lambda event: event.__name__)
def test_something_happens(life, event):
    each = life(random.Random(event.__name__))
    each.write()
    process = each.start()
    try:
        event(each)
    except libvirt.libvirtError as error:
        assert re.search("in use|in active block job", str(error))  # a disk that is backed up may be QEMU's to refuse
    each.check(process)
    each.end()


@pytest.mark.fault(
    "machines backed up at once, again and again, while their disks are written",
    holds="all sets verify; no process, socket, scratch or file is left; memory and descriptors of libvirtd stay flat",
    rounds=1, share=6,
)
def test_many_at_once(lab, rounds):
    for chance in rounds:
        machines = [lab.domain(Disk("vda", SIZE)) for _ in range(10 if rounds.is_soak else 2)]
        sets = [lab.new_directory("set") for _ in machines]
        try:
            used = []
            end = time.monotonic() + (rounds.seconds if rounds.is_soak else 0)
            while len(used) < 3 or time.monotonic() < end:
                rounds.fault()
                used.append(all_at_once(lab, machines, sets, chance))
            for directory in sets:
                lab.sh(f"vnb-verify {directory}")
            # What libvirtd takes for the first time it keeps, in each of its threads.
            descriptors, memory = zip(*used[1:])
            assert descriptors[-1] <= max(descriptors[:2]) + 8
            assert memory[-1] <= max(memory[:2]) + 64 * MiB
        finally:
            for vm in machines:
                vm.remove()


def all_at_once(lab, machines, sets, chance):
    """Back up all while they are written to; how many descriptors, and bytes of memory, libvirtd has afterwards."""
    running = [
        subprocess.Popen(
            ["vnb-checkpoint", "run", vm.name, "--level", "auto", "--ledger", directory, "--",
             SLOW.format(set=directory)], env=lab.env, cwd=lab.directory, stderr=subprocess.PIPE, text=True,
            executable=lab.env["PATH"].partition(":")[0] + "/vnb-checkpoint",
        ) for vm, directory in zip(machines, sets)
    ]
    while any(process.poll() is None for process in running):
        chance.choice(machines).write_random("vda", chance.randrange(0, SIZE - 65536, 512), 65536, chance.random())
    for process in running:
        _, said = process.communicate()
        assert process.returncode == 0, said
    assert lab.leftovers() == []
    for vm in machines:
        assert vm.state() == libvirt.VIR_DOMAIN_RUNNING
    process = Path("/proc", str(lab.libvirtd_pid()))
    resident_pages = int((process / "statm").read_text().split()[1])
    return len(os.listdir(process / "fd")), resident_pages * os.sysconf("SC_PAGE_SIZE")
