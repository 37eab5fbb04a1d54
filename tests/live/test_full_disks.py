# SPDX-License-Identifier: LGPL-2.1-or-later
"""A running machine is backed up where there is no room, for the set or for the state of the job; and then there is."""

from pathlib import Path

import libvirt
import pytest
from applied import mounted
from backups import backup, levels, restores, tip
from filesystem import filled, needs_root
from lab import KiB, MiB

pytestmark = needs_root
PAGE = 4 * KiB  # what a file takes at least


def fails_until_there_is_room(lab, vm, set_, full, room, options=""):
    """
    An increment on a full disk, the next one with room.

    full (Path): a directory on a small file system; room (int): bytes that are left there.
    """
    backup(lab, vm, "full", set_, options)
    point, before = tip(lab, set_), vm.checkpoints()
    vm.write_random("vda", 16 * MiB, MiB, seed=2)
    vm.zero("vdb", 8 * MiB, MiB)
    with filled(full, room):
        done = backup(lab, vm, "inc", set_, f"{options} -q --no-freeze", check=False)
        assert lab.leftovers(patience=60) == []
        assert vm.state() == libvirt.VIR_DOMAIN_RUNNING
        assert (done.returncode, tip(lab, set_), vm.checkpoints()) == (1, point, before)
        lines = done.stderr.splitlines()
        assert lines[0].endswith(": No space left on device") and len(lines) <= 2, lines
    vm.write("vda", 32 * MiB, MiB)
    backup(lab, vm, "inc", set_, options)
    assert tip(lab, set_) != point
    restores(lab, set_, vm.reference())


@pytest.mark.parametrize("room", [0, 300 * KiB])
def test_a_set(lab, vm, room):
    place = Path(lab.new_directory("small"), "fs")
    with mounted(place, "size=16m"):
        fails_until_there_is_room(lab, vm, place / "set", place, room)
        assert [path.suffix for path in (place / "set").iterdir()] == [".vnb"] * 2


@pytest.mark.parametrize("pages", [0, 1, 3])
def test_the_state_of_a_job(lab, vm, pages):
    """The record is written several times, so that any of these may fail."""
    place = Path(lab.new_directory("small"), "fs")
    with mounted(place, "size=1m"):
        set_ = lab.new_directory("set")
        fails_until_there_is_room(lab, vm, set_, place, pages * PAGE, f"--state-dir {place / 'state'}")


def test_the_state_of_a_job_that_runs(lab, vm):
    """The disk gets full after the job was begun: what is left to write down is no reason for a backup to fail."""
    place = Path(lab.new_directory("small"), "fs")
    with mounted(place, "size=1m"):
        set_, options = lab.new_directory("set"), f"--state-dir {place / 'state'}"
        backup(lab, vm, "full", set_, options)
        vm.write_random("vda", 16 * MiB, MiB, seed=2)
        reference = vm.reference()
        fill = f"(cat /dev/zero > {place}/filler; cat) 2> /dev/null"
        backup(lab, vm, "inc", set_, options, store=f"vnb-extents | {fill} | vnb-read | vnb-pack -o {{set}}")
        assert (place / "filler").exists()
        assert lab.leftovers(patience=60) == []
        restores(lab, set_, reference)
        (place / "filler").unlink()
        vm.write("vda", 32 * MiB, MiB)
        backup(lab, vm, "inc", set_, options)
        assert levels(set_) == ["full", "inc", "inc"]
        restores(lab, set_, vm.reference())
