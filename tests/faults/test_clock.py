# SPDX-License-Identifier: LGPL-2.1-or-later
"""A clock that was wrong: what comes later is the latest all the same, for restores and for vnb-prune."""

import json
import random

import pytest
from disturbing import Place, rewrite
from lab import run
from machine import Machine

AHEAD = "2999-01-31T12:00:00.000000Z"


@pytest.mark.parametrize("level", ["full", "copy", "inc", "diff --base full"])
def test_points_after_one_of_the_future(level):
    with Place() as place:
        machine = Machine(place, random.Random(0))
        machine.back_up()
        machine.write()
        machine.back_up()
        path = next(path for path in machine.set.iterdir() if path.name.endswith(".inc.vnb"))
        rewrite(path, created=AHEAD)
        machine.write()
        truth = machine.truth()
        place.sh(machine.script.replace("--level auto", f"--level {level}"))
        assert machine.saved(truth)
        latest = list(machine.truths)[-1]
        assert place.sh(f"vnb-cat --point {machine.set}").strip() == latest
        place.sh(f"vnb-verify {machine.set}")
        machine.check_points()
        place.sh(f"vnb-prune --keep-last 1 {machine.set}")
        assert latest in place.sh(f"vnb-dump --list {machine.set}")


def test_an_increment_of_an_export_alone():
    """All that vnb-extents knows of the parent is its name."""
    with Place() as place:
        machine = Machine(place, random.Random(0))
        image = machine.images["vda"]
        run("qemu-img", "bitmap", "--add", image, "b")
        socket, pid = place.directory / "s", place.directory / "pid"
        said = place.sh(
            f"qemu-nbd --fork --persistent --pid-file {pid} --read-only --shared 8 --socket {socket} "
            f"--bitmap b {image}\n"
            f"vnb-extents --dirty b --parent vnb.main.29990131T120000.000Z.abcdef 'nbd+unix:///?socket={socket}' | "
            f"vnb-dump --json; kill $(cat {pid})"
        )
        head = json.loads(said.splitlines()[0])
        assert json.dumps(head).partition('"created": "')[2][:27] > "2999-01-31T12:00:00.000999Z"
