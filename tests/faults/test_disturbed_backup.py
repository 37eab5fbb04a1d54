# SPDX-License-Identifier: LGPL-2.1-or-later
"""A backup of an image that is killed at any moment, in any part, or whose system calls fail there."""

import datetime
import random
import shutil

import pytest
from disturbing import LIMITS, Place, rewrite
from lab import KiB
from machine import Machine

from vnb.job.source_images import Images

STAGES = (("vnb-checkpoint",), ("vnb-extents", "vnb-read", "vnb-pack", "qemu-nbd", "qemu-img"))
HOLDS = (
    "each restore point restores byte for byte, and the next increment is right; no partial file, bitmap, server "
    "or job is left"
)
FAULTS = 4
NEEDS = {"-n": 29, "-v": 112 * KiB}  # of a backup, about; a soak measures it


@pytest.fixture
def usual():
    """A function that says what is Usual for an increment; is_ours: whose state alone counts, see state_of()."""
    def measured(*stages, is_ours=False):
        with Place() as place:
            machine = Machine(place, random.Random(0))
            machine.back_up()
            only = {"vnb-checkpoint": state_of(place)} if is_ours else None
            return place.usual(machine.script, *stages, before=machine.write, times=2, only=only)

    return measured


@pytest.mark.fault(
    "during the backup of an image, a part of it (`run`, keeper, a stage, qemu-nbd, qemu-img) gets SIGKILL, "
    "SIGTERM or SIGINT, or a reader goes away",
    holds=HOLDS, share=4,
)
def test_a_backup_that_is_killed(rounds, usual):
    found = usual(*STAGES)
    disturbed(rounds, lambda place, script, chance: place.killed(script, chance, found))


@pytest.mark.fault(
    "during the backup of an image, a write, fsync, rename, unlink or the like of a part of it fails with ENOSPC, "
    "EIO, EROFS or EDQUOT",
    holds=HOLDS, share=3,
)
def test_a_backup_whose_system_calls_fail(rounds, usual):
    found = usual(("vnb-checkpoint",), ("vnb-extents", "vnb-read", "vnb-pack"), is_ours=True)

    def fail(place, script, chance):
        return place.failed(script, chance, found, {"vnb-checkpoint": state_of(place)})

    disturbed(rounds, fail)


@pytest.mark.fault(
    "all parts of the backup of an image have few file descriptors or little memory (ulimit -n, -v)", holds=HOLDS,
)
def test_a_backup_with_limits(rounds):
    needs = needs_of_a_backup() if rounds.is_soak else NEEDS
    disturbed(rounds, lambda place, script, chance: place.limited(script, chance, needs))


def needs_of_a_backup():
    """The least that was enough for some: it depends on what there is to save."""
    found = []
    for seed in range(3):
        with Place() as place:
            machine = Machine(place, random.Random(seed))
            machine.back_up()
            found.append(place.needs(machine.script, machine.write))
    return {option: min(needs[option] for needs in found) for option in LIMITS}


@pytest.mark.fault(
    "the clock goes back: the last restore point is of next year",
    holds="the next increment starts from it, is the latest restore point, and restores byte for byte",
)
def test_a_clock_that_goes_back():
    with Place() as place:
        machine = Machine(place, random.Random(0))
        machine.back_up()
        path, = machine.set.iterdir()
        year = datetime.datetime.now(datetime.timezone.utc).year + 1
        rewrite(path, created=f"{year}-01-31T12:00:00.000000Z")
        assert f"{year}-01-31T12:00:00" in place.sh(f"vnb-dump --list {machine.set}")
        for _ in range(2):
            machine.write()
            machine.back_up()
        assert [path.name.split(".")[-2] for path in sorted(machine.set.iterdir())] == ["full", "inc", "inc"]
        assert place.sh(f"vnb-cat --point {machine.set}").strip() == list(machine.truths)[-1]
        machine.check_points()


@pytest.mark.skipif(shutil.which("faketime") is None, reason="faketime is not installed")
@pytest.mark.fault(
    "the clock is set back by an hour to a year, between two backups, and in the middle of one",
    holds=(
        "the next increment starts from the last restore point, and is the latest; each restore point restores "
        "byte for byte"
    ),
)
def test_a_clock_that_is_set_back(rounds):
    for chance in rounds:
        with Place() as place:
            clock = place.directory / "clock"
            place.env.update({
                "LD_PRELOAD": place.sh("faketime -m -f +0 printenv LD_PRELOAD").strip(),
                "FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_NO_CACHE": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            })

            def seconds(place=place):
                return int(place.sh("date +%s"))

            def change(by, clock=clock):
                """A shell command that sets the clock. At no time is the file empty: some would have no time then."""
                return f"echo {by} > {clock}.new && mv {clock}.new {clock}"

            back = chance.choice([3600, 86400, 365 * 86400])
            place.sh(change("+0"))
            machine = Machine(place, chance)
            machine.back_up()
            usual = machine.script
            midway = usual.replace("vnb-read |", f"vnb-read | ({change(-2 * back)}; cat) |")
            for script in (usual, midway, usual):
                machine.write()
                if script == usual:
                    place.sh(change(-back))
                before = seconds()
                machine.script = script
                machine.back_up()
                assert script == usual or seconds() < before  # else this tests nothing
                assert place.sh(f"vnb-cat --point {machine.set}").strip() == list(machine.truths)[-1]
            assert [line.split()[0] for line in listed(machine)] == list(machine.truths)
            assert [line.split()[1] for line in listed(machine)] == ["full", "inc", "inc", "inc"]
            created = [line.split()[2] for line in listed(machine)]
            assert created == sorted(set(created))
            machine.check_points()


def listed(machine):
    """What vnb-dump says of each point."""
    _, *lines = machine.place.sh(f"vnb-dump --list {machine.set}").partition("\n\n")[0].splitlines()
    return lines


def state_of(place):
    """
    The paths that a job's state has.

    The source is no one's to break: where qemu-img cannot write to a qcow2 image, that itself may be lost.
    """
    images = Images({path.stem: str(path) for path in place.directory.glob("*.qcow2")})
    job = place.directory / "state" / "jobs" / images.uuid  # while it runs
    return [job, *(job / name for name in ("job.json", "job.json.new", "lock", "control", "keeper.log"))]


def disturbed(rounds, disturb):
    """Back up again and again; disturb: is told place, script and chance, runs a backup and does something to it."""
    for chance in rounds:
        with Place() as place:
            machine = Machine(place, chance)
            machine.back_up()
            for _ in range(FAULTS if rounds.is_soak else 2):
                machine.write()
                truth = machine.truth()
                with disturb(place, machine.script, chance) as ended:
                    rounds.fault(ended.hit)
                    assert machine.saved(truth) or ended.status != 0
                    machine.write()
                    machine.back_up()
                    machine.check_points(list(machine.truths)[-2:])
            machine.check_points()
