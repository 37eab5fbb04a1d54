# SPDX-License-Identifier: LGPL-2.1-or-later
"""vnb-checkpoint: what it refuses before anything is frozen, started or saved, with what to do about it."""

import pytest
from backups import backup


@pytest.fixture
def directory(lab):
    return lab.new_directory("set")


@pytest.mark.parametrize("options", ["", "--start-paused"])
def test_a_saved_memory_is_not_used_up(lab, vm, directory, options):
    """To start the domain consumes it, to destroy it afterwards loses it; and the disks alone lack what is in it."""
    vm.handle.managedSave()
    done = backup(lab, vm, "full", directory, options, check=False)
    assert (done.returncode, done.stderr) == (
        1, f"vnb-checkpoint: {vm.name}: is off with its memory saved by libvirt: virsh start {vm.name} resumes it for "
        f"a backup, virsh managedsave-remove {vm.name} gives up the memory\n"
    )
    assert vm.handle.hasManagedSaveImage()
    lab.sh(f"virsh managedsave-remove {vm.name}")
    backup(lab, vm, "full", directory, options)
