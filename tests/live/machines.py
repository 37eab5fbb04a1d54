# SPDX-License-Identifier: LGPL-2.1-or-later
"""Fixtures for tests on a real libvirtd and QEMU, for tests/conftest.py; lab.py has the laboratory."""

import shutil

import pytest

NEEDED = ("libvirtd", "virsh", "qemu-system-x86_64", "qemu-img", "nbdcopy")


@pytest.fixture(scope="session")
def lab():
    """The laboratory, one for all tests: a libvirtd of our own."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    from lab import Lab

    with Lab() as lab:
        yield lab


@pytest.fixture
def no_machines(lab):
    """No test before has left one: for those that back up all of the host."""
    for machine in list(lab.domains.values()):
        machine.remove()


@pytest.fixture
def vm(lab):
    """
    A running machine with vda (64 MiB, some data at 1 MiB) and vdb (64 MiB, with discard).

    After the test it is removed, and nothing else may be left.
    """
    from lab import Disk, MiB

    vm = lab.domain(Disk("vda", 64 * MiB), Disk("vdb", 64 * MiB, discard=True))
    try:
        vm.write_random("vda", 1 * MiB, 4 * MiB, seed=1)
        vm.write("vdb", 8 * MiB, 2 * MiB, pattern=0x22)
        yield vm
        assert lab.leftovers() == []
    finally:
        vm.remove()


@pytest.fixture(scope="module")
def linux(lab):
    """
    A machine that runs Linux, with vda (128 MiB) mounted at /mnt/vda; guest.py has what it can do.

    One for all tests of a module: it takes some seconds to boot.
    """
    from guest import linux
    from lab import Disk, MiB

    vm = linux(lab, Disk("vda", 128 * MiB, filesystem="ext4"))
    try:
        yield vm
        assert lab.leftovers() == []
    finally:
        vm.remove()
