# SPDX-License-Identifier: LGPL-2.1-or-later
"""vnb-import: backups that Debian's virtnbdbackup makes of a running machine, restored here."""

import functools
import os
import shutil

import pytest
from backups import restores
from lab import Disk, MiB, compare, run

pytestmark = pytest.mark.skipif(
    shutil.which("virtnbdbackup") is None, reason="virtnbdbackup is not installed (Debian: virtnbdbackup)"
)


@pytest.fixture(scope="module", autouse=True)
def logs(lab):
    """It leaves one of each qemu-nbd among the temporary files: there they go with the laboratory."""
    before = lab.env["TMPDIR"]
    lab.env["TMPDIR"] = lab.directory
    yield
    lab.env["TMPDIR"] = before


@functools.cache
def all_that_is_dirty():
    """The option with which an increment has what the guest zeroed; versions before 2.21 have no other way, nor it."""
    option = "--no-sparse-detection"
    return option if option in run("virtnbdbackup", "--help") else ""


class Backups:
    """
    A machine and what virtnbdbackup saved of it. directory (str): where; options (str): for it.

    references (dict): of each point a dict of raw image by disk. points (dict): what they are called here.
    """

    def __init__(self, lab, options=""):
        self.lab = lab
        self.directory = os.path.join(lab.new_directory("peer"), "backup")
        self.options = f"{options} {all_that_is_dirty()}"
        self.references = {}
        self.vm = lab.domain(Disk("vda", 128 * MiB), Disk("vdb", 48 * MiB, discard=True))

    def backup(self, level, name=None):
        self.lab.sh(f"virtnbdbackup -d {self.vm.name} -l {level} -o {self.directory} -n {self.options}")
        self.references[name or level] = self.vm.reference()

    def life(self):
        """A full backup, two increments, and a differential one."""
        vm = self.vm
        vm.write_random("vda", 1 * MiB, 6 * MiB, seed=1)
        vm.write("vda", 40 * MiB, 40 * MiB, pattern=0x22)  # longer than what it reads at once
        vm.write("vdb", 16 * MiB, 8 * MiB, pattern=0x33)
        self.backup("full")
        vm.write_random("vda", 5 * MiB, 4 * MiB, seed=2)
        vm.zero("vda", 44 * MiB, 2 * MiB)
        vm.zero("vda", 48 * MiB, 2 * MiB, unmap=True)
        vm.discard("vdb", 18 * MiB, 2 * MiB)
        self.backup("inc", "first")
        vm.write("vda", 80 * MiB, 36 * MiB, pattern=0x44)
        vm.write("vda", 127 * MiB, 1 * MiB, pattern=0x55)
        self.backup("inc", "second")
        vm.write_random("vdb", 1 * MiB, 1 * MiB, seed=3)
        self.backup("diff")
        return self


POINTS = {"full": "virtnbdbackup.0", "first": "virtnbdbackup.1", "second": "virtnbdbackup.2"}


@pytest.fixture(scope="module", params=["", "-z"], ids=["plain", "lz4"])
def backups(lab, request):
    backups = Backups(lab, request.param).life()
    yield backups
    assert lab.leftovers() == []
    backups.vm.remove()


@pytest.fixture
def target(lab):
    return lab.path(lab.new_directory("target") + ".new")


@pytest.mark.parametrize("point", POINTS)
def test_each_point_is_restored_as_it_was(lab, backups, target, point):
    lab.sh(f"vnb-import --until {POINTS[point]} {backups.directory} | vnb-apply {target}")
    for disk, image in backups.references[point].items():
        compare(image, f"{target}/{disk}.qcow2", "qcow2")


def test_all_points_go_into_a_set(lab, backups):
    """And from there they restore, map and merge as our own do."""
    set_ = lab.new_directory("set")
    lab.sh(f"vnb-import {backups.directory} | vnb-pack -z -o {set_}")
    names = sorted(os.listdir(set_))
    assert [name.split(".", 1)[1] for name in names] == [
        "virtnbdbackup.0.full.vnb", "virtnbdbackup.1.inc.vnb", "virtnbdbackup.2.inc.vnb", "diff.diff.vnb"
    ]
    for name, point in zip(names, ("full", "first", "second", "diff")):
        restores(lab, set_, backups.references[point], name.rsplit(".", 2)[0])
    merged = lab.new_directory("merged")
    lab.sh(f"vnb-cat --merge {set_} | vnb-pack -o {merged}")
    restores(lab, merged, backups.references["diff"])
    lab.sh(f"vnb-map --disk vdb --run 'nbdcopy \"$uri\" {merged}/vdb.raw' {set_}")
    compare(backups.references["diff"]["vdb"], f"{merged}/vdb.raw", "raw")
    lab.sh(f"vnb-prune --keep-last 2 {set_}")
    restores(lab, set_, backups.references["diff"])
    restores(lab, set_, backups.references["second"], names[2].rsplit(".", 2)[0])


def test_the_domain_and_its_images_are_in_the_stream(lab, backups):
    text = lab.sh(f"vnb-import --until virtnbdbackup.1 {backups.directory} | vnb-dump --json").stdout.decode()
    assert backups.vm.uuid in text
    assert text.count(f"<name>{backups.vm.name}</name>") == 2
    assert text.count("image-info") == 4


def test_a_version_that_saves_all_that_is_dirty_gives_no_doubt(lab, backups):
    """1.9 does, and newer ones are told to: what the guest zeroed is in the increment. The log says so."""
    done = lab.sh(f"vnb-import {backups.directory} > /dev/null")
    assert done.stderr == ""
    copy = lab.new_directory("copy")
    lab.sh(f"cp -r {backups.directory}/. {copy} && rm {copy}/*.log")
    done = lab.sh(f"vnb-import {copy} > /dev/null")
    assert "it cannot be known" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_machine_that_is_off(lab, target):
    """An increment then has no checkpoint of its own: it is a differential one."""
    backups = Backups(lab)
    try:
        backups.vm.write("vda", 3 * MiB, 2 * MiB)
        backups.backup("full")
        backups.vm.write("vda", 4 * MiB, 2 * MiB, pattern=0x11)
        reference = backups.vm.reference()
        backups.vm.destroy()
        lab.sh(f"virtnbdbackup -d {backups.vm.name} -l inc -o {backups.directory} -n {backups.options}")
        lab.sh(f"vnb-import {backups.directory} | vnb-apply {target}")
        for disk, image in reference.items():
            compare(image, f"{target}/{disk}.qcow2", "qcow2")
        head = lab.sh(f"vnb-import {backups.directory} | vnb-dump --json | grep -c '\"diff\"'").stdout
        assert int(head) == 1
    finally:
        backups.vm.remove()


def test_a_copy(lab, target):
    """With a raw disk in it, that is saved as an image."""
    vm = lab.domain(Disk("vda", 16 * MiB), Disk("vdb", 8 * MiB, format="raw"))
    directory = os.path.join(lab.new_directory("peer"), "backup")
    try:
        vm.write("vda", 3 * MiB, 2 * MiB)
        vm.write("vdb", 5 * MiB, 1 * MiB, pattern=0x66)
        reference = vm.reference()
        lab.sh(f"virtnbdbackup -d {vm.name} -l copy --raw -o {directory} -n")
        lab.sh(f"vnb-import {directory} | vnb-apply --format raw {target}")
        for disk, image in reference.items():
            compare(image, f"{target}/{disk}.raw", "raw")
    finally:
        vm.remove()


def test_an_increment_that_was_overwritten_by_a_machine_that_was_off(lab, target):
    """It writes to the file of the increment before, whose changes are lost: what was before can be restored."""
    backups = Backups(lab)
    try:
        backups.backup("full")
        backups.vm.write("vda", 4 * MiB, 2 * MiB)
        backups.backup("inc", "first")
        backups.vm.write("vda", 4 * MiB, 2 * MiB, pattern=0x11)
        backups.backup("inc", "second")
        backups.vm.destroy()
        lab.sh(f"virtnbdbackup -d {backups.vm.name} -l inc -o {backups.directory} -n {backups.options}")
        done = lab.sh(f"vnb-import {backups.directory} | vnb-apply {target}", check=False)
        assert done.stderr.splitlines() == [
            f"vnb-import: {backups.directory}/vda.inc.virtnbdbackup.2.data: starts from virtnbdbackup.2: the data of "
            "that was overwritten by a backup of the domain when it was off: not imported"
        ]
        for disk, image in backups.references["first"].items():
            compare(image, f"{target}/{disk}.qcow2", "qcow2")
        lab.sh(f"vnb-import --until virtnbdbackup.0 {backups.directory} > /dev/null")
    finally:
        backups.vm.remove()
