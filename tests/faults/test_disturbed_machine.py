# SPDX-License-Identifier: LGPL-2.1-or-later
"""A running machine, whose backup is killed in any part, at any time, or that something happens to meanwhile."""

import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import libvirt
import pytest
from backups import STORE, backup, restores, tip
from disturbing import check_said
from lab import Disk, MiB, wait_for

SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT")
STAGES = ("vnb-extents", "vnb-read", "vnb-pack")
SIZE = 32 * MiB
HOLDS = "no job, paused guest, process, socket or scratch is left; each point restores; the next increment is right"
# So slow that there is a middle. Each stage is there from the start.
SLOW = "vnb-extents | vnb-read | (head -c 300000; sleep 0.5; cat) | vnb-pack -z -o {set}"
CUT = "vnb-extents | vnb-read | (sleep {seconds:.3f}; head -c {bytes}) | vnb-pack -z -o {{set}}"  # its reader goes away
BEGINNING = 0.8  # seconds from the start of `run` to the end of a short backup, about


class Life:
    """A machine, a new one or vm, its set, and references: [(point, {disk: raw image})]."""

    def __init__(self, lab, chance, vm=None):
        self.lab = lab
        self.chance = chance
        self.vm = vm or lab.domain(Disk("vda", SIZE), Disk("vdb", SIZE, discard=True))
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
        self.points.append((tip(self.lab, self.set), self.reference()))

    def reference(self):
        """What the machine has now."""
        return self.vm.reference()

    def start(self, store=SLOW, at_once=False):
        """A backup in the background (Popen), when its command runs, or at once; what it is to save is noted."""
        self.begun = self.reference()
        process = subprocess.Popen(
            ["bash", "-c", f"exec vnb-checkpoint run {self.vm.name} --level auto --ledger {self.set} -- "
             f"'{store.format(set=self.set)}'"],
            env=self.lab.env, cwd=self.lab.directory, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )
        if not at_once:
            wait_for(lambda: self.pids("vnb-pack") or process.poll() is not None, "the command")
        return process

    def pids(self, program):
        return sorted(pid for pid, line in self.lab.processes().items() if f"/{program} " in f"{line} ")

    def running(self, process, *whom):
        """
        Who of these runs now, {name: process ids}: "run", its "keeper", "both", and stages.

        Who is not there yet is waited for, until the backup ends; {} then.
        """
        def found():
            own, keepers = [process.pid] if process.poll() is None else [], self.pids("vnb-checkpoint")
            keepers = [pid for pid in keepers if pid not in own]
            pids = {"run": own, "keeper": keepers, "both": own + keepers if own and keepers else []}
            pids.update({stage: self.pids(stage) for stage in STAGES if stage in whom})
            return {name: pids[name] for name in whom if pids[name]}

        wait_for(lambda: found() or process.poll() is not None, "somebody to kill")
        return found()

    def kill(self, process, names, signal_name):
        """Kill one of these by chance, or "both"; False where nobody runs any more."""
        found = self.running(process, *names)
        if not found:
            return False
        name = self.chance.choice(sorted(found))
        if name != "both":
            return kill(self.chance.choice(found[name]), signal_name)
        self.kill_both(process)
        return True

    def kill_both(self, process):
        """Kill `run`, its keeper, also one that is forked just then, and the command; then `recover` ends the job."""
        while pids := self.pids("vnb-checkpoint"):
            for pid in pids:
                kill(pid, "SIGKILL")
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # none is left of it
        process.wait()
        self.lab.sh(f"vnb-checkpoint recover {self.vm.name} --ledger {self.set}")

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
            self.restores(reference, point)

    def restores(self, reference, point):
        """A point restores to what reference() said then."""
        restores(self.lab, self.set, reference, point)

    def end(self):
        """All points restore, and the machine is removed."""
        self.lab.sh(f"vnb-verify {self.set}")
        for point, reference in self.points:
            self.restores(reference, point)
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
    "SIGKILL, SIGTERM or SIGINT to a part of a backup of a running machine, `run`, its keeper, each stage, or a reader "
    "that goes away",
    holds=HOLDS, rounds=1, share=4,
)
def test_a_part_is_killed(life, rounds):
    for chance in rounds:
        each = life(chance)
        for _ in range(4 if rounds.is_soak else 2):
            each.write()
            if chance.random() < 0.25:
                process = each.start(CUT.format(seconds=chance.uniform(0, 0.5), bytes=chance.randrange(4096)))
                rounds.fault()
            else:
                process = each.start()
                time.sleep(chance.uniform(0, BEGINNING) * chance.random())  # the first stages end soon
                rounds.fault(each.kill(process, ("run", "keeper", *STAGES), chance.choice(SIGNALS)))
            each.check(process)
        each.end()


@pytest.mark.fault(
    "SIGKILL, SIGTERM or SIGINT to `run`, its keeper, a stage, or SIGKILL to `run` and keeper, while a job of a "
    "running machine begins",
    holds=f"{HOLDS}, after `recover` where nobody else could end the job", rounds=1, share=6,
)
def test_a_begin_is_killed(life, rounds):
    for chance in rounds:
        each = life(chance)
        for _ in range(6 if rounds.is_soak else 3):
            each.write()
            process = each.start(STORE, at_once=True)
            time.sleep(chance.uniform(0.03, BEGINNING))
            whom = chance.choice([("run",), ("keeper",), ("both",), ("both",), STAGES])
            rounds.fault(each.kill(process, whom, chance.choice(SIGNALS)))
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
        rounds.fault(each.kill(process, ["both"], "SIGKILL"))
        each.check(process)
        each.end()


def kill(pid, name):
    """Send a process a signal; False where it was faster."""
    try:
        os.kill(pid, getattr(signal, name))
    except ProcessLookupError:
        return False
    return True


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
