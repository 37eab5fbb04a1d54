# SPDX-License-Identifier: LGPL-2.1-or-later
"""A libvirt domain that starts on a mapped point, before anything is restored: the example of vnb-map's page."""

import os
import pwd
import sys
from pathlib import Path

import pytest
from backups import backup
from lab import ROOT, Domain, MiB, compare

sys.path.insert(0, str(ROOT / "tests"))
from mapping import example  # noqa: E402 -- after the path to it


class Again(Domain):
    """The machine that the example defines."""

    def __init__(self, lab, name, disks):
        self.lab = lab
        self.name = name
        self.uuid = lab.connection.lookupByName(name).UUIDString()
        self.disks = disks
        self.directory = lab.path("again")


def qemus_user():
    for name in ("libvirt-qemu", "qemu"):
        try:
            return pwd.getpwnam(name).pw_name
        except KeyError:
            continue
    pytest.skip("QEMU has no user of its own here")


@pytest.mark.skipif(os.geteuid() != 0, reason="the example is root's")
def test_a_domain_starts_on_a_mapped_point_and_writes(lab, vm):
    set_, overlay, pid_file = lab.path("map-set"), lab.path("map.qcow2"), lab.path("map.pid")
    backup(lab, vm, "full", set_)
    vm.write("vda", 2 * MiB, MiB, pattern=0x33)
    vm.zero("vda", 4 * MiB, MiB)
    backup(lab, vm, "inc", set_)
    before = {path.name: path.read_bytes() for path in Path(set_).iterdir()}
    reference = vm.reference("vda")["vda"]
    name = f"{vm.name}-again"
    script = example("virsh start", {
        "/run/vm1.pid": pid_file, "/run/vm1.nbd": lab.path("map.nbd"), "/var/tmp/vm1.qcow2": overlay,  # noqa: S108
        "/backup/vm1": set_, "vm1-again": name, "libvirt-qemu": qemus_user(),
    })
    again = None
    try:
        done = lab.sh(script)
        again = Again(lab, name, {"vda": vm.disks["vda"]})
        assert again.is_active()
        assert f"Domain '{name}' started" in done.stdout.decode()
        again.qemu_io("vda", f"read -P 0x33 {2 * MiB} {MiB}")
        again.qemu_io("vda", f"read -P 0 {4 * MiB} {MiB}")
        again.write("vda", 8 * MiB, MiB, pattern=0x44)
    finally:
        if again is not None:
            again.destroy()
            again.handle.undefine()
        lab.sh(f"vnb-map --stop {pid_file}", check=False)
    copied = lab.path("map.raw")
    lab.sh(f"vnb-map --disk vda --overlay {overlay} {set_} --run 'nbdcopy \"$uri\" {copied}'")
    with open(reference, "r+b") as file:
        file.seek(8 * MiB)
        file.write(b"\x44" * MiB)
    compare(reference, copied, "raw")
    assert {path.name: path.read_bytes() for path in Path(set_).iterdir()} == before
    assert lab.leftovers() == []
