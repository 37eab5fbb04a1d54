# SPDX-License-Identifier: LGPL-2.1-or-later
"""The Linux of the laboratory: what tests of freeze and thaw take from it has to be true."""

import libvirt
from lab import run, wait_for


def test_it_writes_to_its_file_system(linux):
    linux.run("echo hello > /mnt/vda/greeting; sync")
    reference = linux.reference()["vda"]
    assert run("debugfs", "-R", "cat /greeting", reference) == "hello\n"


def test_it_can_be_frozen_and_thawed(linux):
    assert linux.handle.fsFreeze() == 1
    assert linux.agent("guest-fsfreeze-status") == "frozen"
    assert linux.handle.fsThaw() == 1
    assert linux.agent("guest-fsfreeze-status") == "thawed"


def test_it_shuts_down_when_it_is_asked(linux):
    linux.handle.shutdownFlags(libvirt.VIR_DOMAIN_SHUTDOWN_GUEST_AGENT)
    wait_for(lambda: not linux.is_active(), "end of the guest")
    linux.start()
    assert linux.run("cat /mnt/vda/greeting") == "hello\n"
