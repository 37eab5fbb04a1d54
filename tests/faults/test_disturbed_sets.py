# SPDX-License-Identifier: LGPL-2.1-or-later
"""Restore, update of a standby, prune and merge: killed at any moment, in any part, or with system calls that fail."""

import random
import shutil

import pytest
from disturbing import Place
from machine import Machine

from vnb import backupset

DISTURBED = "a signal to a part, or ENOSPC, EIO, EROFS or EDQUOT in a system call, of"
disturbances = pytest.mark.parametrize("disturb", [Place.killed, Place.failed], ids=lambda disturb: disturb.__name__)
POINTS = 5


@pytest.fixture(scope="module")
def saved():
    """A Machine with a set of some points."""
    with Place() as place:
        machine = Machine(place, random.Random(0))
        for _ in range(POINTS):
            machine.write()
            machine.back_up()
        yield machine


@pytest.fixture
def work(saved):
    """A directory that does not exist."""
    path = saved.place.directory / "work"
    yield path
    shutil.rmtree(path)


def hidden(directory):
    """The names (set) of what is there and has no final name."""
    return {path.name for path in directory.iterdir() if path.name.startswith(".")}


def named(directory):
    """The images, or segments, with a final name in a directory, if that is there."""
    return [path for path in directory.glob("*") if not path.name.startswith(".")]


@pytest.mark.fault(
    f"{DISTURBED} a restore: vnb-cat, vnb-apply, and the qemu-nbd or qemu-img of that",
    holds="an image has its name when it is whole, byte for byte; the next run removes the rest", rounds=2,
)
@pytest.mark.parametrize("format_", ["qcow2", "raw"])
@disturbances
def test_a_restore(saved, work, rounds, disturb, format_):
    script = f"vnb-cat {saved.set} | vnb-apply --format {format_} {work}"
    calls = saved.place.profile(script, ("vnb-cat", "vnb-apply"))
    shutil.rmtree(work)
    last = list(saved.truths)[-1]
    for chance in rounds:
        with disturb(saved.place, script, chance, calls) as ended:
            assert named(work) or ended.status != 0
            if not named(work):
                saved.place.sh(script)
                assert hidden(work) == set()
            image, = named(work)
            saved.check_image(image, last)
        shutil.rmtree(work)
    work.mkdir()


@pytest.mark.fault(
    f"{DISTURBED} an update of a standby: vnb-cat, vnb-apply, qemu-nbd",
    holds="the copy is at a point, or says that it is not finished; the next run brings it to the last point",
    rounds=2,
)
@pytest.mark.parametrize("format_", ["qcow2", "raw"])
@disturbances
def test_an_update(saved, work, rounds, disturb, format_):
    points = list(saved.truths)
    update = f"vnb-apply --update --format {format_} {work}"
    script = f"vnb-cat {saved.set} | {update}"

    def at(number):
        """Have a copy that is at this point."""
        shutil.rmtree(work, ignore_errors=True)
        saved.place.sh(f"vnb-cat --until {points[number]} {saved.set} | {update}")

    at(0)
    calls = saved.place.profile(script, ("vnb-cat", "vnb-apply"))
    for chance in rounds:
        number = chance.randrange(len(points) - 1)
        at(number)
        with disturb(saved.place, script, chance, calls) as ended:
            state = (work / ".vnb-apply.state").read_text()
            if not (work / ".vnb-apply.spool").exists():
                reached, = (point for point in points if f'"point": "{point}"' in state)
                saved.check_image(work / f"vda.{format_}", reached)
                assert ended.status != 0 or reached == points[-1]
            saved.place.sh(script)
            saved.check_image(work / f"vda.{format_}", points[-1])
            assert hidden(work) == {".vnb-apply.state", ".vnb-apply.lock"}


@pytest.mark.fault(
    f"{DISTURBED} vnb-prune, that drops and merges",
    holds="each point that is kept restores at any time; the next run finishes the work", rounds=3,
)
@disturbances
def test_a_prune(saved, work, rounds, disturb):
    points = list(saved.truths)
    script = f"vnb-prune --keep-last 2 {work}"
    shutil.copytree(saved.set, work)
    calls = saved.place.profile(script, ("vnb-prune",))
    for chance in rounds:
        shutil.rmtree(work)
        shutil.copytree(saved.set, work)
        with disturb(saved.place, script, chance, calls) as ended:
            saved.place.sh(f"vnb-verify {work}")
            for point in points[-2:]:
                saved.check_restored(work, point)
            assert ended.status != 0 or len(named(work)) == 2
            saved.place.sh(script)
            assert len(named(work)) == 2
            assert hidden(work) <= {backupset.PRUNED}
            for point in points[-2:]:
                saved.check_restored(work, point)


@pytest.mark.fault(
    f"{DISTURBED} a merge into another set: vnb-cat, vnb-pack",
    holds="the other set has the point, whole, or nothing of it; the next run removes the rest", rounds=3,
)
@disturbances
def test_a_merge(saved, work, rounds, disturb):
    last = list(saved.truths)[-1]
    script = f"vnb-cat --merge {saved.set} | vnb-pack --compress zstd -o {work}"
    calls = saved.place.profile(script, ("vnb-cat", "vnb-pack"))
    for chance in rounds:
        shutil.rmtree(work)
        with disturb(saved.place, script, chance, calls) as ended:
            assert named(work) or ended.status != 0
            if not named(work):
                saved.place.sh(script)
            saved.place.sh(f"vnb-verify {work}")
            assert hidden(work) == set()
            saved.check_restored(work, last)
