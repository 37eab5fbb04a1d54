# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Disks on iothreads, whose guest runs: some QEMUs abort when a client of such an export hangs up.

Those that do are refused, before the guest is frozen; all others are not. What we find out about a QEMU is held against
what its guest does.
"""

import pytest
from backups import backup, deaf, record, restores
from guest import linux
from lab import Disk, MiB, wait_for

from vnb.qemu import iothreads


@pytest.fixture(scope="module")
def survives(lab):
    """What we find out about the QEMU here."""
    return iothreads.survives("/usr/bin/qemu-system-x86_64")


def test_what_is_known_of_versions(lab, survives):
    """Between these, it depends on what a distribution has brought to an older QEMU."""
    version = lab.connection.getVersion()
    if 7_002_014 <= version < 7_003_000:
        assert not survives
    if version >= iothreads.SAFE_SINCE:
        assert survives


@pytest.mark.parametrize("name, bus", [("vda", "virtio"), ("sda", "scsi")])
def test_a_guest_lives(lab, survives, name, bus):
    vm = linux(lab, Disk(name, 16 * MiB, bus=bus, iothread=True), Disk("vdb", 16 * MiB))
    try:
        for device in vm.disks:  # its driver has started: QEMU serves the disk in the iothread from then on
            vm.run(f"dd if=/dev/urandom of=/dev/{device} bs=1M count=12 conv=fsync 2> /dev/null")
        check = is_backed_up if survives else is_refused
        check(lab, vm, name)
    finally:
        vm.remove()


def is_backed_up(lab, vm, name):
    directory = lab.new_directory("set")
    for level in "full", "inc":
        backup(lab, vm, level, directory)
        vm.run(f"dd if=/dev/urandom of=/dev/{name} bs=1M count=1 conv=fsync 2> /dev/null")
    backup(lab, vm, "inc", directory)
    restores(lab, directory, vm.reference())
    lab.sh(f"vnb-checkpoint begin {vm.name} --level copy --set {directory} > {directory}.begun")
    with deaf(record(lab, vm), name):
        lab.sh(f"vnb-checkpoint abort {vm.name}")
    assert vm.run("echo alive") == "alive\n"
    assert vm.leftovers() == []


def is_refused(lab, vm, name):
    done = backup(lab, vm, "full", lab.new_directory("set"), check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"vnb-checkpoint: {vm.name}: {name}: is on an iothread, and its QEMU (")
    assert done.stderr.endswith(f": --exclude {name} leaves it out\n")
    assert not vm.has_job()
    backup(lab, vm, "full", lab.new_directory("set"), f"--exclude {name}")
    assert vm.run("echo alive") == "alive\n"
    with pytest.raises(Exception, match="nbdcopy|domain is not running"):
        vm.reference(name)
    wait_for(lambda: not vm.is_active(), "the end of QEMU")
