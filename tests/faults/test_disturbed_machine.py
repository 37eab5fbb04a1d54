# SPDX-License-Identifier: LGPL-2.1-or-later
"""A running machine, whose backup is killed in any part, at any time, or that something happens to meanwhile."""

import re
import time

import libvirt
import pytest
from backups import STORE
from lab import MiB, wait_for
from life import HOLDS, SIGNALS, SIZE, SLOW, STAGES, Life

CUT = "vnb-extents | vnb-read | (sleep {seconds:.3f}; head -c {bytes}) | vnb-pack -z -o {{set}}"  # its reader goes away


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
    "during the backup of a running domain, a part of it (`run`, its keeper, each stage) gets SIGKILL, SIGTERM or "
    "SIGINT, or a reader goes away",
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
                time.sleep(chance.uniform(0, each.seconds) * chance.random())  # the first stages end soon
                rounds.fault(each.kill(process, ("run", "keeper", *STAGES), chance.choice(SIGNALS)))
            each.check(process)
        each.end()


@pytest.mark.fault(
    "while a job of a running domain begins, `run`, its keeper or a stage gets SIGKILL, SIGTERM or SIGINT, or "
    "`run` and keeper get SIGKILL",
    holds=f"{HOLDS}, after `cleanup` where nobody else could end the job", rounds=1, share=6,
)
def test_a_begin_is_killed(life, rounds):
    for chance in rounds:
        each = life(chance)
        for _ in range(6 if rounds.is_soak else 3):
            each.write()
            process = each.start(STORE, at_once=True)
            time.sleep(chance.uniform(0.03, each.seconds))
            whom = chance.choice([("run",), ("keeper",), ("both",), ("both",), STAGES])
            rounds.fault(each.kill(process, whom, chance.choice(SIGNALS)))
            each.check(process)
        each.end()


@pytest.mark.fault(
    "`run` and its keeper both get SIGKILL",
    holds="`cleanup` ends the job; each restore point restores, and the next increment is right", rounds=1, share=2,
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


def reset(each):
    """The guest is reset: its disks stay as they are."""
    each.vm.handle.reset()


def resize(each):
    """A disk grows."""
    each.vm.handle.blockResize("vda", SIZE + 8 * MiB, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)


def detach(each):
    """A disk is pulled out; without a guest that lets it go it stays, where it is not refused."""
    each.vm.handle.detachDeviceFlags(each.vm.disks["vdb"].xml(), libvirt.VIR_DOMAIN_AFFECT_LIVE)


def restart_libvirtd(each):
    """libvirtd dies and comes back; QEMU goes on."""
    each.lab.restart_libvirtd()


def pause(each):
    """The guest is paused and resumed by somebody else."""
    each.vm.pause()
    each.vm.resume()


def crash(each):
    """QEMU dies."""
    each.vm.kill()


def at_the_begin(each):
    process = each.start(SLOW, at_once=True)
    time.sleep(each.chance.uniform(0.03, each.seconds))
    return process


def in_the_middle(each):
    process = each.start()
    time.sleep(each.chance.uniform(0, 0.5))
    return process


def at_the_commit(each):
    """Just before it, or in it."""
    process = each.start()
    wait_for(lambda: not each.pids("vnb-pack"), "the end of the command")
    time.sleep(each.chance.uniform(0, 0.1))
    return process


@pytest.mark.fault(
    "while a backup begins, in its middle, or while it is committed, the guest is reset or paused, a disk grows "
    "or is detached, or libvirtd or QEMU is killed",
    holds=(
        "the backup is right, or fails as a whole; the guest runs; each restore point restores, and the next "
        "increment is right"
    ),
    share=0.5,
)
@pytest.mark.parametrize(
    "event", [reset, resize, detach, restart_libvirtd, pause, crash], ids=lambda event: event.__name__,
)
def test_something_happens(life, rounds, event):
    moments = [in_the_middle, at_the_commit]
    if event is not resize:  # how large the disk is at the point would depend on who is first
        moments.append(at_the_begin)
    for chance in rounds:
        each = life(chance)
        each.write()
        process = chance.choice(moments)(each)
        rounds.fault(process.poll() is None)
        try:
            event(each)
        except libvirt.libvirtError as error:
            # A disk that is backed up may be QEMU's to refuse.
            assert re.search("in use|in active block job|is busy", str(error)), str(error)
        if not each.vm.is_active():
            assert each.lab.leftovers(patience=60) == []
            each.vm.start()
        each.check(process)
        each.end()
