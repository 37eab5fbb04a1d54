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
