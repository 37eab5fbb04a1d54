# SPDX-License-Identifier: LGPL-2.1-or-later
"""
The power is cut while a set, the state of a job, an image or a standby is written, and what is left is looked at.

test_power.py follows the order of system calls; here a real file system forgets what it may. The image that is backed
up is on another one: what a guest writes is no matter of ours.
"""

import contextlib
import functools
import os
import random
import shutil
import time

import pytest
from disturbing import DEADLINE, Place, hidden, named
from filesystem import FileSystem, needs_root, private_mounts
from lab import run
from machine import with_points

from vnb.store import pruned

POINTS = 3
CHANGES = 4  # of names, after one of which the power is cut
pytestmark = [needs_root, pytest.mark.parametrize("kind", ["ext4", "xfs"])]
cuts = pytest.mark.fault(
    "the power is cut at any moment of a backup, prune, merge, restore or update (ext4 and xfs, by their shutdown)",
    holds=(
        "everything that was done before restores byte for byte; a file with its final name is complete; the next "
        "run and the next increment succeed"
    ),
)


@pytest.fixture(scope="module")
def saved():
    """A Machine with a set of some points, that is not changed; its image is the file `kept`."""
    with Place() as place:
        machine = with_points(place, POINTS)
        for path in machine.images.values():
            shutil.copyfile(path, kept(path))
        yield machine


def kept(path):
    """Where an image is as it was."""
    return path.with_suffix(".kept")


class Power:
    """
    Runs scripts on a file system, and cuts its power meanwhile.

    saved (Machine), kind (str): of the file system. disk (FileSystem): of this round.
    """

    def __init__(self, saved, kind):
        self.saved = saved
        self.place = saved.place
        self.kind = kind
        self.disk = None
        self._stack = contextlib.ExitStack()  # what ends with the round
        self._usual = None  # seconds that a script takes

    def close(self):
        self._stack.close()

    def cuts(self, rounds, prepare):
        """
        Yield for each of the rounds: its chance, what was prepared, and the Ended; the file system is mounted again.

        prepare: a function of a new file system's path and a chance; it returns the script, a directory whose names
        are watched, and what is yielded.
        """
        for chance in rounds:
            if self._usual is None:
                script, _, _ = self._prepared(prepare, random.Random(0))
                begin = time.monotonic()
                self.place.sh(script)
                self._usual = time.monotonic() - begin
            script, watched, prepared = self._prepared(prepare, chance)
            ended = self.place.meanwhile(script, functools.partial(self._cut, watched, chance))
            self.disk.again()
            yield chance, prepared, ended

    def _prepared(self, prepare, chance):
        """Have a new file system, the images as they were, and all of that safe."""
        self.close()
        for path in self.saved.images.values():
            shutil.copyfile(kept(path), path)
        self.disk = self._stack.enter_context(FileSystem(self.kind, self.place.directory))
        self.place.env["VNB_STATE_DIR"] = str(self.disk.path / "state")
        found = prepare(self.disk.path, chance)
        self.disk.sync()
        return found

    def _cut(self, watched, chance, process):
        """Cut the power at some time after a script's begin, at a change of names in a directory, or at its end."""
        when = chance.choice(["moment", "moment", "name", "end"])
        moment, count = chance.uniform(0, self._usual), chance.randint(1, CHANGES)
        before = names(watched)
        if when == "moment":
            time.sleep(moment)
        if when == "end":
            process.wait(DEADLINE)
        while when == "name" and count and process.poll() is None:
            if (after := names(watched)) != before:
                before, count = after, count - 1
        self.disk.cut()
        return "the power was cut " + {
            "moment": f"after {moment:.3f} seconds", "name": "when names had changed", "end": "at the end",
        }[when]


def names(directory):
    """What is in a directory and those below it, as far as they stay there while we look."""
    return {os.path.join(place, name) for place, below, files in os.walk(directory) for name in (*below, *files)}


@pytest.fixture
def power(saved, kind):
    with private_mounts(), contextlib.closing(Power(saved, kind)) as power:
        yield power


def test_a_cut_takes_what_was_not_synced(tmp_path, kind):
    """And nothing else: a test that cannot fail would say nothing."""
    with private_mounts(), FileSystem(kind, tmp_path) as disk:
        (disk.path / "old").write_text("synced")
        disk.sync()
        (disk.path / "new").write_text("not synced")
        (disk.path / "old").rename(disk.path / "moved")
        disk.cut()
        disk.again()
        assert [path.read_text() for path in disk.path.glob("[!l]*")] == ["synced"]
        assert (disk.path / "old").exists()


@cuts
def test_a_backup(power, rounds):
    """Into the set that is there, or into one that is not, whose directories and state are new then."""
    def prepare(path, chance):
        machine = power.saved.elsewhere(path / "set", chance)
        if chance.random() < 0.3:
            for image in machine.images.values():
                run("qemu-img", "convert", "-O", "qcow2", kept(image), image)  # no bitmaps
            shutil.rmtree(machine.set)
            machine.truths = {}
        machine.write()
        return machine.script, path, (machine, machine.truth())

    for _, (machine, truth), ended in power.cuts(rounds, prepare):
        with ended:
            assert set(machine.truths) <= set(machine.points())
            assert machine.saved(truth) or ended.status != 0
            machine.check_next()


@cuts
def test_a_prune(power, rounds):
    def prepare(path, chance):
        machine = power.saved.elsewhere(path / "set", chance)
        return f"vnb-prune --keep-last 2 {machine.set}", machine.set, machine

    for _, machine, ended in power.cuts(rounds, prepare):
        with ended:
            last = list(machine.truths)[-2:]
            assert set(last) <= set(machine.points())
            assert ended.status != 0 or len(named(machine.set)) == 2
            machine.check_points(last)
            power.place.sh(f"vnb-prune --keep-last 2 {machine.set}")
            assert len(named(machine.set)) == 2
            assert hidden(machine.set) <= {pruned.PRUNED}
            machine.truths = {point: machine.truths[point] for point in last}
            machine.check_next()


@cuts
def test_a_merge(power, rounds):
    """Into another set, whose directory is new."""
    last = list(power.saved.truths)[-1]

    def prepare(path, _):
        other = path / "sets" / "other"
        return f"vnb-cat --merge {power.saved.set} | vnb-pack --compress zstd -o {other}", path, other

    for _, other, ended in power.cuts(rounds, prepare):
        with ended:
            assert named(other) or ended.status != 0
            if not named(other):
                power.place.sh(f"vnb-cat --merge {power.saved.set} | vnb-pack --compress zstd -o {other}")
            power.place.sh(f"vnb-verify {other}")
            assert hidden(other) == set()
            power.saved.check_restored(other, last)


@cuts
def test_a_restore(power, rounds):
    """Into directories that are new."""
    last = list(power.saved.truths)[-1]

    def prepare(path, chance):
        target = path / "a" / "b"
        format_ = chance.choice(["qcow2", "raw"])
        return f"vnb-cat {power.saved.set} | vnb-apply --format {format_} {target}", path, (target, format_)

    for _, (target, format_), ended in power.cuts(rounds, prepare):
        with ended:
            images = [target / f"{name}.{format_}" for name in power.saved.images]
            power.saved.check_images(named(target), last)
            assert named(target) == images or ended.status != 0
            if named(target) != images:
                power.place.sh(f"vnb-cat {power.saved.set} | vnb-apply --format {format_} {target}")
                assert hidden(target) == set()
                power.saved.check_images(images, last)
                assert named(target) == images


@cuts
def test_an_update(power, rounds):
    """Of a copy that is at a point, or of one that is to be made."""
    points = list(power.saved.truths)

    def prepare(path, chance):
        target = path / "copy"
        update = f"vnb-apply --update --format {chance.choice(['qcow2', 'raw'])} {target}"
        if number := chance.randrange(len(points)):
            power.place.sh(f"vnb-cat --until {points[number - 1]} {power.saved.set} | {update}")
        script = f"vnb-cat {power.saved.set} | {update}"
        return script, path, (target, script)

    for _, (target, script), ended in power.cuts(rounds, prepare):
        with ended:
            reached = point_of(target, points)
            if not (target / ".vnb-apply.spool").exists():
                # Where they have their names, and the state says no point yet, it is the first.
                power.saved.check_images(named(target), reached or points[0])
            assert ended.status != 0 or reached == points[-1]
            power.place.sh(script)
            assert len(named(target)) == len(power.saved.images)
            power.saved.check_images(named(target), points[-1])
            assert hidden(target) == {".vnb-apply.state", ".vnb-apply.lock"}


def point_of(target, points):
    """The point that a copy says it is at; None where there is none, or one that is not finished."""
    state = target / ".vnb-apply.state"
    if not state.exists() or (target / ".vnb-apply.spool").exists():
        return None
    text = state.read_text()
    return next((point for point in points if f'"point": "{point}"' in text), None)
