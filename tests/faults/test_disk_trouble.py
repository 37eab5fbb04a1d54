# SPDX-License-Identifier: LGPL-2.1-or-later
"""The file system of a set, of the state of a job or of a standby has no room, or becomes read-only in the middle."""

import contextlib
import json
import re
import subprocess
import time
from pathlib import Path

import pytest
from disturbing import Place, hidden, named
from filesystem import FileSystem, filled, needs_root, private_mounts
from lab import KiB
from machine import Machine

LONGEST = 0.5  # seconds that a pipeline takes, about

pytestmark = needs_root
KINDS = ("ext4", "xfs")
full = pytest.mark.fault(
    "a file system (ext4, xfs) has little room or none, for a set, the state of a job, or a standby whose images grow",
    holds=(
        "exits with 1, and prints a line; leaves nothing partial; with more room the next run finishes, and the "
        "next increment is right"
    ),
)
read_only = pytest.mark.fault(
    "a file system becomes read-only in the middle of a backup, by a remount, or because ext4 finds an error",
    holds=(
        "exits with 1, and prints a line; leaves no job, process or partial file; after a new mount the next "
        "increment is right"
    ),
)
QUIET = {"VNB_LOG_LEVEL": "quiet"}  # only errors and warnings


@contextlib.contextmanager
def moved(kind, chance, state=True, options="loop"):
    """
    A Machine with a saved point, whose set was moved to a file system of its own, and that FileSystem.

    state (bool): the state directory is there, too.
    """
    with Place() as place:
        place.env.update(QUIET)
        machine = Machine(place, chance)
        machine.back_up()
        with private_mounts(), FileSystem(kind, place.directory, options=options) as disk:
            if state:
                place.env["VNB_STATE_DIR"] = str(disk.path / "state")
            yield machine.elsewhere(disk.path / "set", chance), disk


def check_lines(ended):
    """Who fails says why, in a line, and only that."""
    assert ended.status in (0, 1)
    lines = ended.said.splitlines()
    assert all(re.match("vnb-[a-z]+: ", line) for line in lines)
    assert bool(lines) == (ended.status != 0)
    commands = [line.partition(":")[0] for line in lines]
    assert len(set(commands)) == len(commands)


def check_job(machine):
    """No job goes on: the record says that it was ended, if there is one; and there is no bitmap of it."""
    records = Path(machine.place.env["VNB_STATE_DIR"]).glob("jobs/*/job.json")
    assert {json.loads(path.read_text())["phase"] for path in records} <= {"ended"}
    assert machine.bitmaps() <= set(machine.truths)


@full
@pytest.mark.parametrize("where", ["set", "state"])
def test_no_room_for_a_backup(rounds, where):
    for chance in rounds:
        with moved(chance.choice(KINDS), chance, state=where == "state") as (machine, disk):
            if where == "state":
                machine = machine.elsewhere(machine.place.directory / "other", chance)
            machine.write()
            truth = machine.truth()
            with filled(disk.path, chance.choice([0, chance.randrange(64 * KiB)])):
                ended = machine.place.meanwhile(machine.script, lambda _: "a full disk")
                with ended:
                    check_lines(ended)
                    assert machine.saved(truth) == (ended.status == 0)
                    assert hidden(machine.set) == set()
                    if where == "set":
                        check_job(machine)
            with ended:
                machine.check_next()


@full
@pytest.mark.parametrize("format_", ["qcow2", "raw"])
def test_no_room_for_an_update(rounds, format_):
    """What the spool takes is less than what the image grows by."""
    for chance in rounds:
        with moved(chance.choice(KINDS), chance) as (machine, disk):
            machine.write()
            machine.back_up()
            first, last = machine.truths
            copy = disk.path / "copy"
            update = f"vnb-apply --update --format {format_} {copy}"
            machine.place.sh(f"vnb-cat --until {first} {machine.set} | {update}")
            script = f"vnb-cat {machine.set} | {update}"
            images = [copy / f"{name}.{format_}" for name in machine.images]
            with filled(disk.path, max(0, chance.randrange(-64 * KiB, 512 * KiB))):
                ended = machine.place.meanwhile(script, lambda _: "a full disk")
                with ended:
                    check_lines(ended)
                    if not (copy / ".vnb-apply.spool").exists():
                        machine.check_images(images, first if ended.status else last)
                    assert named(copy) == images
            with ended:
                machine.place.sh(script)
                machine.check_images(images, last)
                assert hidden(copy) == {".vnb-apply.state", ".vnb-apply.lock"}


@read_only
def test_an_error_of_the_file_system(rounds):
    """ext4 then is read-only at once, for files that are open, too."""
    for chance in rounds:
        with moved("ext4", chance, options="loop,errors=remount-ro") as (machine, disk):
            machine.write()
            truth = machine.truth()
            moment = chance.uniform(0, LONGEST)

            def fail(_, disk=disk, moment=moment):
                time.sleep(moment)
                disk.fail()
                return f"an error after {moment:.3f} seconds"

            disk.sync()
            ended = machine.place.meanwhile(machine.script, fail)
            with ended:
                disk.again()
                check_lines(ended)
                assert machine.saved(truth) or ended.status != 0
                machine.check_next()


@read_only
@pytest.mark.parametrize("when", ["before the segment", "at a moment"])
def test_a_remount(rounds, when):
    """It is refused where a file is open for writing, and then nothing happens."""
    for chance in rounds:
        with moved(chance.choice(KINDS), chance, state=False) as (machine, disk):
            machine.write()
            truth = machine.truth()
            moment = chance.uniform(0, LONGEST)
            remount = ["mount", "-o", "remount,ro", str(disk.path)]

            def disturb(_, moment=moment, remount=remount):
                time.sleep(moment)
                status = subprocess.run(remount, capture_output=True, check=False).returncode
                return f"remount after {moment:.3f} seconds, status {status}"

            script = machine.script
            if when == "before the segment":
                script = script.replace("vnb-pack", f"{{ {' '.join(remount)}; cat; }} | vnb-pack")
                ended = machine.place.meanwhile(script, lambda _: when)
            else:
                ended = machine.place.meanwhile(script, disturb)
            with ended:
                check_lines(ended)
                assert machine.saved(truth) == (ended.status == 0)
                assert hidden(machine.set) == set()
                check_job(machine)
                assert ended.status != 0 or when == "at a moment"
                subprocess.run([*remount[:2], "remount,rw", remount[-1]], check=True)
                machine.check_next()
