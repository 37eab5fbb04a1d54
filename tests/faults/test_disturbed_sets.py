# SPDX-License-Identifier: LGPL-2.1-or-later
"""Restore, update of a standby, prune and merge: killed at any moment, in any part, or with system calls that fail."""

import functools
import shutil

import pytest
from disturbing import Place, hidden, named
from machine import with_points

from vnb.store import pruned

DISTURBED = "a part gets a signal, a reader goes away, or a system call fails with ENOSPC, EIO, EROFS or EDQUOT"
disturbances = pytest.mark.parametrize("disturb", [Place.killed, Place.failed], ids=lambda disturb: disturb.__name__)
POINTS = 5


@pytest.fixture(scope="module")
def saved():
    """A Machine with a set of some points."""
    with Place() as place:
        yield with_points(place, POINTS)


@pytest.fixture
def work(saved):
    """A directory that does not exist."""
    path = saved.place.directory / "work"
    yield path
    shutil.rmtree(path)


@pytest.mark.fault(
    f"during a restore (vnb-cat, vnb-apply and its qemu-nbd or qemu-img), {DISTURBED}",
    holds="an image has its name only when it is complete, byte for byte; the next run removes the rest", rounds=2,
)
@pytest.mark.parametrize("format_", ["qcow2", "raw"])
@disturbances
def test_a_restore(saved, work, rounds, disturb, format_):
    script = f"vnb-cat {saved.set} | vnb-apply --format {format_} {work}"
    usual = saved.place.usual(
        script, ("vnb-cat", "vnb-apply"), before=lambda: shutil.rmtree(work, ignore_errors=True)
    )
    last = list(saved.truths)[-1]
    for chance in rounds:
        shutil.rmtree(work)
        with disturb(saved.place, script, chance, usual) as ended:
            rounds.fault(ended.hit)
            saved.check_images(named(work), last)
            if len(named(work)) < len(saved.images):
                assert ended.status != 0
                saved.place.sh(script)
                assert hidden(work) == set()
                assert len(named(work)) == len(saved.images)
                saved.check_images(named(work), last)


@pytest.mark.fault(
    f"during the update of a standby (vnb-cat, vnb-apply, qemu-nbd), {DISTURBED}",
    holds=(
        "the standby is at a restore point, or its state says that an update is not finished; the next run brings "
        "it to the last restore point"
    ),
    rounds=2,
)
@pytest.mark.parametrize("format_", ["qcow2", "raw"])
@disturbances
def test_an_update(saved, work, rounds, disturb, format_):
    points = list(saved.truths)
    update = f"vnb-apply --update --format {format_} {work}"
    script = f"vnb-cat {saved.set} | {update}"

    images = [work / f"{name}.{format_}" for name in saved.images]

    def at(number):
        """Have a copy that is at this point."""
        shutil.rmtree(work, ignore_errors=True)
        saved.place.sh(f"vnb-cat --until {points[number]} {saved.set} | {update}")

    @functools.lru_cache
    def usual(number):
        return saved.place.usual(script, ("vnb-cat", "vnb-apply"), before=lambda: at(number))

    for chance in rounds:
        number = chance.randrange(len(points) - 1)
        from_there = usual(number)
        at(number)
        with disturb(saved.place, script, chance, from_there) as ended:
            rounds.fault(ended.hit)
            state = (work / ".vnb-apply.state").read_text()
            if not (work / ".vnb-apply.spool").exists():
                reached, = (point for point in points if f'"point": "{point}"' in state)
                saved.check_images(images, reached)
                assert ended.status != 0 or reached == points[-1]
            saved.place.sh(script)
            saved.check_images(images, points[-1])
            assert hidden(work) == {".vnb-apply.state", ".vnb-apply.lock"}


@pytest.mark.fault(
    f"while vnb-prune drops and merges, {DISTURBED}",
    holds="each kept restore point restores at any time; the next run finishes the work", rounds=3,
)
@disturbances
def test_a_prune(saved, work, rounds, disturb):
    points = list(saved.truths)
    script = f"vnb-prune --keep-last 2 {work}"

    def before():
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(saved.set, work)

    usual = saved.place.usual(script, ("vnb-prune",), before=before)
    for chance in rounds:
        before()
        with disturb(saved.place, script, chance, usual) as ended:
            rounds.fault(ended.hit)
            saved.place.sh(f"vnb-verify {work}")
            for point in points[-2:]:
                saved.check_restored(work, point)
            assert ended.status != 0 or len(named(work)) == 2
            saved.place.sh(script)
            assert len(named(work)) == 2
            assert hidden(work) <= {pruned.PRUNED}
            for point in points[-2:]:
                saved.check_restored(work, point)


@pytest.mark.fault(
    f"during a merge into another set (vnb-cat, vnb-pack), {DISTURBED}",
    holds="the other set has the complete restore point, or nothing of it; the next run removes the rest", rounds=3,
)
@disturbances
def test_a_merge(saved, work, rounds, disturb):
    last = list(saved.truths)[-1]
    script = f"vnb-cat --merge {saved.set} | vnb-pack --compress zstd -o {work}"
    usual = saved.place.usual(
        script, ("vnb-cat", "vnb-pack"), before=lambda: shutil.rmtree(work, ignore_errors=True)
    )
    for chance in rounds:
        shutil.rmtree(work)
        with disturb(saved.place, script, chance, usual) as ended:
            rounds.fault(ended.hit)
            assert named(work) or ended.status != 0
            if not named(work):
                saved.place.sh(script)
            saved.place.sh(f"vnb-verify {work}")
            assert hidden(work) == set()
            saved.check_restored(work, last)
