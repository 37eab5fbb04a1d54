# SPDX-License-Identifier: LGPL-2.1-or-later
"""Destinations: what is saved in one place, and in no other, is what an increment to it starts from."""

import os
from pathlib import Path

import libvirt
import pytest
from backups import backup, restores
from lab import MiB, compare, run

PACK = "vnb-extents | vnb-read | vnb-pack -z"


@pytest.fixture
def directory(lab):
    return lab.new_directory("set")


class Place:
    """A destination whose backups are files in a directory, one behind the other. vm (lab.Domain)."""

    def __init__(self, lab, vm, name):
        self.lab, self.vm, self.name = lab, vm, name
        self.directory = Path(lab.new_directory("place"))
        self.count = 0

    def take(self, level="auto", options="", check=True):
        """Back up to here; the finished process."""
        file = self.directory / f"{self.count:02}.vnb"
        done = self.lab.sh(f"vnb-checkpoint run {self.vm.name} --no-freeze --level {level} --destination '{self.name}' "
                           f"{options} -- '{PACK} > {file}'", check=check)
        if done.returncode == 0:
            self.count += 1
        return done

    def restores(self, reference, since=0):
        """Hold what the files from one of them on restore against a reference (raw image by disk)."""
        target = self.lab.new_directory("restored")
        files = sorted(self.directory.iterdir())[since:self.count]
        self.lab.sh(f"cat {' '.join(map(str, files))} | vnb-apply {target}")
        for name, image in reference.items():
            compare(image, f"{target}/{name}.qcow2", "qcow2")


def change(vm, number):
    vm.write_random("vda", (4 + number) * MiB, MiB, seed=number)
    vm.zero("vdb", (8 + number) * MiB, MiB // 2)


def test_two_destinations_in_turn_both_restore(lab, vm):
    """An increment to one must not start from what only the other has."""
    places = [Place(lab, vm, name) for name in ("s3://one", "the other: a; $b")]
    for number in range(6):
        change(vm, number)
        place = places[number % 2]
        done = place.take()
        first = f"full backup: no earlier backup is saved at {place.name}\n"
        assert ("increment since vnb." if number > 1 else first) in done.stderr
        place.restores(vm.reference())
    assert len(vm.checkpoints()) == 6  # of each the full's and the newest two


def test_a_full_to_one_leaves_the_next_increment_of_the_other_right(lab, vm, directory):
    one, other = Place(lab, vm, "one"), Place(lab, vm, "other")
    change(vm, 0)
    one.take("full")
    backup(lab, vm, "full", directory)
    for number in range(1, 5):  # more fulls than checkpoints are kept
        change(vm, number)
        other.take("full")
    change(vm, 5)
    one.take("inc")
    one.restores(vm.reference())
    backup(lab, vm, "inc", directory)
    restores(lab, directory, vm.reference())
    other.take("inc")
    other.restores(vm.reference(), since=3)


def test_an_increment_to_a_new_destination_is_refused(lab, vm):
    Place(lab, vm, "one").take("full")
    before = vm.checkpoints()
    done = Place(lab, vm, "new").take("inc", check=False)
    assert (done.returncode, done.stderr) == (
        1, f"vnb-checkpoint: {vm.name}: no earlier backup is saved at new: "
        "a full backup is needed first (--level full, or auto)\n")
    assert vm.checkpoints() == before


def test_a_base_that_is_not_there_says_what_to_do(lab, vm, directory):
    done = lab.sh(f"vnb-checkpoint run {vm.name} --no-freeze --level inc --base vnb.x -- true", check=False)
    assert (done.returncode, done.stderr) == (
        1, f"vnb-checkpoint: {vm.name}: there is no checkpoint vnb.x (vnb-checkpoint redefine has libvirt know again "
        "what the images still hold): a full backup is needed first (--level full, or auto)\n")
    backup(lab, vm, "full", directory)
    done = backup(lab, vm, "inc", directory, "--base vnb.x", check=False)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        1, f"vnb-checkpoint: {directory}: does not hold vnb.x, which --base names")


def test_a_receiver_that_names_the_base_leaves_no_checkpoints_behind(lab, vm, directory):
    """Nothing is remembered of it: the base stays, and what the base started from goes."""
    backup(lab, vm, "full", directory)
    ours = vm.checkpoints()
    for number in range(4):
        change(vm, number)
        lab.sh(f"vnb-checkpoint run {vm.name} --no-freeze --level inc --base $(vnb-cat --base {directory}) -- "
               f"'{PACK} -o {directory}'")
        restores(lab, directory, vm.reference())
    assert len(vm.checkpoints()) == 3
    assert set(ours) < set(vm.checkpoints())
    assert not os.path.exists(lab.path("state", "destinations", vm.uuid))


def forget(vm):
    for checkpoint in vm.handle.listAllCheckpoints():
        checkpoint.delete(libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY)


@pytest.mark.parametrize("is_set, running, level", [
    (True, True, "auto"), (True, False, "inc"), (False, True, "inc"), (False, False, "auto"),
])
def test_checkpoints_that_libvirt_forgot_are_redefined(lab, vm, directory, is_set, running, level):
    """As with a transient domain, or one that is defined anew for each start: there is no full each time."""
    place = Place(lab, vm, "place")

    def take(wanted):
        return backup(lab, vm, wanted, directory) if is_set else place.take(wanted)

    take("full")
    for number in range(4):
        change(vm, number)
        if not running:
            vm.destroy()
        forget(vm)
        done = take(level)
        assert ": redefined: libvirt had forgotten it, and the images still hold its bitmaps\n" in done.stderr
        assert "full" not in done.stderr
        if not running:
            vm.start()
        reference = vm.reference()
        if is_set:
            restores(lab, directory, reference)
        else:
            place.restores(reference)
    assert len(vm.checkpoints()) == 3
    vm.destroy()
    for disk in vm.disks.values():
        assert run("qemu-img", "info", "--output=json", disk.path).count('"vnb.main.') == 3


def test_a_checkpoint_with_one_bitmap_missing_is_redefined_for_the_other_disk(lab, vm, directory):
    backup(lab, vm, "full", directory)
    point, = vm.checkpoints()
    vm.destroy()
    forget(vm)
    run("qemu-img", "bitmap", "--remove", "-f", "qcow2", vm.disks["vdb"].path, point)
    vm.start()
    change(vm, 0)
    done = backup(lab, vm, "auto", directory)
    assert f"{point}: redefined" in done.stderr
    assert "vdb: full in this increment" in done.stderr
    assert "vda: full" not in done.stderr
    restores(lab, directory, vm.reference())


def test_an_image_from_before_the_base_gets_no_wrong_increment(lab, vm, directory):
    """Its bitmaps are of its own past: the increment starts from the restore point that they know."""
    backup(lab, vm, "full", directory)
    first, = vm.checkpoints()
    change(vm, 0)
    vm.destroy()
    for disk in vm.disks.values():
        lab.sh(f"cp {disk.path} {disk.path}.old")
    vm.start()
    change(vm, 1)
    backup(lab, vm, "inc", directory)
    vm.destroy()
    forget(vm)
    for disk in vm.disks.values():
        os.rename(f"{disk.path}.old", disk.path)
    vm.start()
    change(vm, 2)
    done = backup(lab, vm, "auto", directory)
    assert f"{first}: redefined" in done.stderr
    assert f"increment since {first}" in done.stderr or "in full" in done.stderr
    restores(lab, directory, vm.reference())


def test_state_of_a_domain_that_was_undefined_can_be_removed(lab, vm):
    place = Place(lab, vm, "gone://away")
    place.take("full")
    name = vm.name
    assert not os.path.exists(lab.path("state", "jobs", vm.uuid))
    assert os.listdir(lab.path("state", "destinations", vm.uuid))
    vm.remove()
    done = lab.sh(f"vnb-checkpoint cleanup {name}")
    assert "known is what was committed to gone://away (--force forgets it)\n" in done.stderr
    assert os.listdir(lab.path("state", "destinations", vm.uuid))
    done = lab.sh(f"vnb-checkpoint cleanup {name} --force")
    assert done.stderr == f"vnb-checkpoint: {name}: forgetting what was committed to gone://away\n"
    assert not os.path.exists(lab.path("state", "destinations", vm.uuid))
    done = lab.sh(f"vnb-checkpoint cleanup {name}", check=False)
    assert done.returncode == 1
    assert "no such domain" in done.stderr


def test_redefine_of_a_destination(lab, vm):
    place = Place(lab, vm, "place")
    place.take("full")
    before = vm.checkpoints()
    forget(vm)
    lab.sh(f"vnb-checkpoint redefine {vm.name} --destination place")
    assert vm.checkpoints() == before
