# SPDX-License-Identifier: LGPL-2.1-or-later
"""
A running machine that is backed up again and again, whatever is done to its backups, and the truth.

    each = Life(lab, chance)
    process = each.start()                      # or start(STORE, at_once=True)
    each.kill(process, ["keeper"], "SIGKILL")
    each.check(process)                         # nothing is left, the next increment is right
    each.end()                                  # each point restores to what the machine had then
"""

import os
import re
import signal
import subprocess
import time

import libvirt
from backups import backup, restores, tip
from disturbing import check_said
from lab import Disk, MiB, wait_for

SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT")
STAGES = ("vnb-extents", "vnb-read", "vnb-pack")
SIZE = 32 * MiB
HOLDS = (
    "no job, paused guest, process, socket or scratch is left; each restore point restores; the next increment is "
    "right"
)
# So slow that there is a middle. Each stage is there from the start.
SLOW = "vnb-extents | vnb-read | (head -c 300000; sleep 0.5; cat) | vnb-pack -z -o {set}"


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
            self.write_disk(name)

    def write_disk(self, name):
        length = self.chance.choice([4096, 65536, MiB])
        self.vm.write_random(name, self.chance.randrange(0, SIZE - length, 512), length, self.chance.random())
        self.vm.zero(name, self.chance.randrange(0, SIZE - length, 512), length, self.chance.random() < 0.5)

    def back_up(self):
        """A backup that has to work; how long it took, a fault may come meanwhile."""
        begin = time.monotonic()
        backup(self.lab, self.vm, "auto", self.set)
        self.seconds = time.monotonic() - begin
        self.points.append((tip(self.lab, self.set), self.reference()))

    def reference(self):
        """What the machine has now."""
        return self.vm.reference()

    def start(self, store=SLOW, at_once=False):
        """
        A backup in the background (Popen), when its command runs, or at once; what it is to save is noted.

        That is flushed: where QEMU is killed before the backup begins, it saves what is found then.
        """
        self.vm.flush()
        self.begun = self.reference()
        process = subprocess.Popen(
            ["bash", "-c", f"exec vnb-checkpoint run {self.vm.name} --level auto --set {self.set} -- "
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
        """Kill `run`, its keeper, also one that is forked just then, and the command; then `cleanup` ends the job."""
        while pids := self.pids("vnb-checkpoint"):
            for pid in pids:
                kill(pid, "SIGKILL")
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # none is left of it
        process.wait()
        self.lab.sh(f"vnb-checkpoint cleanup {self.vm.name} --set {self.set}")

    def check(self, process):
        """The end of a backup that something has happened to: nothing is left, and all goes on."""
        _, said = process.communicate(timeout=120)
        left = self.lab.leftovers(patience=60)
        assert left == [], (left, said)
        check_said(said, "a backup")
        self.check_guest()
        names = [name for name in os.listdir(self.set) if not name.startswith(".")]
        found = {re.split(r"\.(?:full|copy|inc|diff)\.", name)[0] for name in names}
        new = found - {point for point, _ in self.points}
        assert len(new) == 1 if process.returncode == 0 else len(new) <= 1, said
        self.points += [(point, self.begun) for point in new]
        self.write()
        self.back_up()
        for point, reference in self.points[-2:]:
            self.restores(reference, point)

    def check_guest(self):
        """The guest goes on."""
        assert self.vm.state() == libvirt.VIR_DOMAIN_RUNNING

    def restores(self, reference, point):
        """A point restores to what reference() said then."""
        restores(self.lab, self.set, reference, point)

    def end(self):
        """All points restore, and the machine is removed."""
        self.check_points()
        self.vm.remove()

    def check_points(self):
        """All points restore."""
        self.lab.sh(f"vnb-verify {self.set}")
        for point, reference in self.points:
            self.restores(reference, point)


def kill(pid, name):
    """Send a process a signal; False where it was faster."""
    try:
        os.kill(pid, getattr(signal, name))
    except ProcessLookupError:
        return False
    return True
