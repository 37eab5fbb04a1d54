# SPDX-License-Identifier: LGPL-2.1-or-later
"""vnb-checkpoint among what libvirt does: its directories, its log, its language, its ends of jobs."""

import os

import pytest
from backups import backup
from lab import Disk


@pytest.fixture
def directory(lab):
    return lab.new_directory("set")


@pytest.mark.parametrize("name", ["short", "a-name-of-more-than-twenty-characters", "vm-äöü-with-other-letters"])
def test_directories_of_domains_before(lab, directory, name):
    """A crash leaves them behind, and libvirt counts ids from 1 again when the host has started."""
    vm = lab.domain(Disk("vda"), name=name)
    ours = vm.private_directory()
    others = [os.path.join(os.path.dirname(ours), f"domain-{vm.handle.ID()}-{other}") for other in ("other", name[:3])]
    for other in others:
        os.mkdir(other)
    try:
        backup(lab, vm, "full", directory)
    finally:
        for other in others:
            os.rmdir(other)
        vm.remove()


@pytest.fixture
def log(lab):
    """A function that gives the errors that libvirtd has logged since, or since it was called (list of str)."""
    lab.libvirtd_pid()  # skips the test where libvirtd is not ours
    path = lab.path("libvirtd.log")
    seen = os.path.getsize(path)

    def errors():
        nonlocal seen
        with open(path, encoding="utf-8", errors="replace") as file:
            file.seek(seen)
            found = file.read()
            seen = file.tell()
        return [line.partition(" : ")[2] for line in found.splitlines() if ": error :" in line]

    return errors


@pytest.mark.parametrize("count", [1, 3])
def test_a_good_backup_leaves_no_error_in_the_log_of_libvirtd(lab, directory, log, count):
    """
    Nothing is asked that libvirt has no answer to: administrators read that log.

    libvirt 9.0 itself stops QEMU's NBD server once for every disk of a job, whoever ends the job.
    """
    vm = lab.domain(*[Disk(f"vd{letter}") for letter in "abc"[:count]])
    for level in ("full", "inc", "copy"):
        backup(lab, vm, level, directory, "--no-freeze")
    lab.sh(f"""
        vnb-checkpoint begin {vm.name} --level inc --no-freeze --set {directory} | wc -c
        vnb-checkpoint list {vm.name} --set {directory}; vnb-checkpoint abort {vm.name}; vnb-checkpoint abort {vm.name}
        vnb-checkpoint list {vm.name} --set {directory}; vnb-checkpoint size {vm.name} --set {directory}
        vnb-checkpoint cleanup {vm.name} --set {directory}; vnb-checkpoint delete {vm.name} --set {directory}
    """)
    vm.remove()
    own = [line for line in log() if "'nbd-server-stop'" not in line or count == 1]
    assert own == []
