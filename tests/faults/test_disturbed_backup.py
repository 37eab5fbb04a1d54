# SPDX-License-Identifier: LGPL-2.1-or-later
"""A backup of an image that is killed at any moment, in any part, or whose system calls fail there."""

import datetime
import random

import pytest
from disturbing import Place
from machine import Machine

from vnb import stream

STAGES = (("vnb-checkpoint",), ("vnb-extents", "vnb-read", "vnb-pack", "qemu-nbd", "qemu-img"))
HOLDS = "each saved point restores byte for byte, the next increment is right; no partial file, bitmap, server or job"
FAULTS = 4


@pytest.fixture(scope="module")
def calls():
    """The system calls of a backup's parts, see Place.profile()."""
    with Place() as place:
        machine = Machine(place, random.Random(0))
        machine.back_up()
        machine.write()
        return place.profile(machine.script, *STAGES)


@pytest.mark.fault(
    "SIGKILL, SIGTERM, SIGINT or SIGPIPE to a part of a backup of an image: `run`, keeper, a stage, qemu-nbd, qemu-img",
    holds=HOLDS, share=4,
)
def test_a_backup_that_is_killed(rounds, calls):
    disturbed(rounds, calls, Place.killed)


@pytest.mark.fault(
    "ENOSPC, EIO, EROFS or EDQUOT in a write, fsync, rename, unlink ... of a part of a backup of an image",
    holds=HOLDS, share=3,
)
def test_a_backup_whose_system_calls_fail(rounds, calls):
    ours = {key: count for key, count in calls.items() if not key[0].startswith("qemu-")}
    disturbed(rounds, ours, Place.failed)


@pytest.mark.fault(
    "few file descriptors or little memory for all of a backup of an image: ulimit -n, -v", holds=HOLDS,
)
def test_a_backup_with_limits(rounds):
    disturbed(rounds, None, Place.limited)


@pytest.mark.fault(
    "the clock goes back: the last point that was saved is of next year",
    holds="the next increment starts from it, is the latest point, and restores byte for byte",
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


def rewrite(path, **changes):
    """Change fields of the head of a segment in a file."""
    with open(path, "rb") as old, open(path.with_suffix(".new"), "wb") as new:
        for segment in stream.Reader(old.fileno(), str(path)):
            writer = stream.Writer(new.fileno(), str(path))
            out = writer.segment({**segment.head, **changes}, segment.disks)
            for frame in segment:
                out.frame(frame)
            out.end()
            writer.flush()
    path.with_suffix(".new").rename(path)


def state_of(place):
    """
    The paths that a job's state has.

    The source is no one's to break: where qemu-img cannot write to a qcow2 image, that itself may be lost.
    """
    job, = place.directory.glob("state/jobs/*")
    return [job, *(job / name for name in ("job.json", "job.json.new", "lock", "control", "keeper.log"))]


def disturbed(rounds, calls, disturb):
    """Back up again and again; disturb: a function of Place that runs a backup, and does something to it."""
    for chance in rounds:
        with Place() as place:
            machine = Machine(place, chance)
            machine.back_up()
            place.only["vnb-checkpoint"] = state_of(place)
            for _ in range(FAULTS if rounds.is_soak else 2):
                rounds.fault()
                machine.write()
                truth = machine.truth()
                with disturb(place, machine.script, chance, calls) as ended:
                    assert machine.saved(truth) or ended.status != 0
                    machine.write()
                    machine.back_up()
                    machine.check_points(list(machine.truths)[-2:])
            machine.check_points()
