# SPDX-License-Identifier: LGPL-2.1-or-later
"""Many machines at once, that are written to and asked about all the time, while they are backed up again and again."""

import contextlib
import os
import random
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import libvirt
import limit
import pytest
from backups import restores
from lab import Disk, MiB
from life import SIZE, SLOW

LEAST = 3  # times that all are backed up
WRITE_SECONDS = 0.05  # between writes to a disk
ASK_SECONDS = 0.1  # between questions about the disks: monitoring asks less often, but of more machines


@pytest.mark.fault(
    "several domains are backed up at the same time, again and again, while their disks are written and queried",
    holds=(
        "all sets verify, and the last restore points restore; no process, socket, scratch or file is left; "
        "memory and descriptors of libvirtd and of each QEMU stay flat"
    ),
    rounds=1, share=26,
)
def test_many_at_once(lab, rounds):
    for chance in rounds:
        machines = [lab.domain(Disk("vda", SIZE)) for _ in range(10 if rounds.is_soak else 2)]
        sets = [lab.new_directory("set") for _ in machines]
        used = []
        try:
            with busy(lab, machines, chance):
                end = time.monotonic() + (rounds.seconds if rounds.is_soak else 0)
                while len(used) < LEAST or time.monotonic() < end:
                    limit.renew()
                    for _ in machines:
                        rounds.fault()
                    back_up(lab, machines, sets)
                    used.append(usage(lab, machines))
            limit.renew()
            back_up(lab, machines, sets)
            for vm, directory in zip(machines, sets):
                limit.renew()
                lab.sh(f"vnb-verify {directory}")
                restores(lab, directory, vm.reference())
            check_flat(used)
        finally:
            for vm in machines:
                vm.remove()


@contextlib.contextmanager
def busy(lab, machines, chance):
    """All machines are written to, and libvirt is asked about their disks, as long as this lasts."""
    over = threading.Event()

    def write(vm, seed):
        chance = random.Random(seed)
        while not over.wait(WRITE_SECONDS):
            vm.write_random("vda", chance.randrange(0, SIZE - 65536, 512), 65536, chance.random())

    def ask():
        while not over.wait(ASK_SECONDS):
            lab.connection.domainListGetStats([vm.handle for vm in machines], libvirt.VIR_DOMAIN_STATS_BLOCK)

    with ThreadPoolExecutor(len(machines) + 1) as pool:
        work = [pool.submit(write, vm, chance.random()) for vm in machines]
        work.append(pool.submit(ask))
        try:
            yield
        finally:
            over.set()
        for each in work:
            each.result()


def back_up(lab, machines, sets):
    """Back up all at once; nothing is left, and all of them run."""
    running = [
        subprocess.Popen(
            ["vnb-checkpoint", "run", vm.name, "--level", "auto", "--set", directory, "--",
             SLOW.format(set=directory)], env=lab.env, cwd=lab.directory, stderr=subprocess.PIPE, text=True,
            executable=lab.env["PATH"].partition(":")[0] + "/vnb-checkpoint",
        ) for vm, directory in zip(machines, sets)
    ]
    for process in running:
        _, said = process.communicate()
        assert process.returncode == 0, said
    assert lab.leftovers() == []
    for vm in machines:
        assert vm.state() == libvirt.VIR_DOMAIN_RUNNING


def usage(lab, machines):
    """[(descriptors, bytes of memory)] of libvirtd and of each machine's QEMU."""
    found = []
    for pid in (lab.libvirtd_pid(), *(vm.qemu_pid() for vm in machines)):
        process = Path("/proc", str(pid))
        resident_pages = int((process / "statm").read_text().split()[1])
        found.append((len(os.listdir(process / "fd")), resident_pages * os.sysconf("SC_PAGE_SIZE")))
    return found


def check_flat(used):
    """Nothing grows from the third time on: what is taken for the first time is kept, in each thread."""
    for first, second, last in zip(used[1], used[2], used[-1]):
        assert last[0] <= max(first[0], second[0]) + 8
        assert last[1] <= max(first[1], second[1]) + 32 * MiB
