# SPDX-License-Identifier: LGPL-2.1-or-later
"""vnb-from-virtnbdbackup(7): what it says to type, typed; and the way over, from a machine that virtnbdbackup knows."""

import os
import re
import shutil

import libvirt
import pytest
from backups import levels, restores
from lab import ROOT, Disk, MiB, run

PAGE = (ROOT / "man" / "vnb-from-virtnbdbackup.7").read_text().replace("\\(dq", '"')
LINES = re.findall(r"(?m)^\.Dl (vnb-.*)$", PAGE.partition(".Sh OPTIONS OF VIRTNBDBACKUP")[2])
# What a line has that needs more than a machine: test_remote.py, test_examples.py and test_map_ways.py try these.
ELSEWHERE = ("hv/", "ssh hv", "/dev/nbd0", "--listen")


def test_each_command_of_the_page_does_what_it_says(lab):
    """In the order of the page, on one machine; nothing of it fails, and what was restored is there."""
    vm = lab.domain(Disk("vda", 16 * MiB), Disk("vdb", 8 * MiB))
    here = lab.new_directory("page")
    os.chmod(here, 0o711)  # noqa: S103 - QEMU has its scratch files below it
    names = ("backup", "restore", "scratch")
    for name in names:
        os.mkdir(os.path.join(here, name))
        os.chmod(os.path.join(here, name), 0o777)  # noqa: S103 - QEMU's user writes to one of them
    tried = 0
    try:
        for line in LINES:
            if any(word in line for word in ELSEWHERE):
                continue
            vm.write("vda", tried * 4096, 4096)
            line = re.sub(r"(?<![\w/-])vm1(?![\w.-])", vm.name, line)
            line = re.sub(r"(?<![\w/-])vm2(?![\w.-])", f"{vm.name}-2", line)
            line = re.sub(rf"(?<!\S)/({'|'.join(names)})(?![\w-])", rf"{here}/\1", line)
            done = lab.sh(line, check=False)
            # A guest without an agent cannot be frozen, which is a warning.
            expected = (0, 3) if "--strict" in line else (0,)
            assert done.returncode in expected, (line, done.stderr)
            assert "Traceback" not in done.stderr
            tried += 1
        assert tried > 45
        vm.destroy()
        run("qemu-img", "compare", vm.disks["vdb"].path, f"{here}/restore/vm1/vdb.qcow2")
        assert sorted(os.listdir(f"{here}/restore")) == sorted([
            "allocated", "compressed", "config", "log", "raw", "raw2", "sequence", "until", "vda", "verbose", "vm1",
            "vm1.xml", "vm2",
        ])
        assert sorted(os.listdir(f"{here}/restore/vda")) == ["domain.xml", "vda.qcow2"]
        assert lab.leftovers() == []
    finally:
        for domain in lab.connection.listAllDomains():
            if domain.name() == f"{vm.name}-2":
                domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA)
        vm.remove()


@pytest.mark.skipif(shutil.which("virtnbdbackup") is None, reason="virtnbdbackup is not installed")
def test_the_way_over(lab):
    """Its directory is imported, its checkpoints and bitmaps are removed, and the increments of vnb go on."""
    commands = re.findall(r"(?ms)^\.Bd -literal.*?\n(.*?)^\.Ed", PAGE.partition(".Sh CHANGING OVER")[2])
    vm = lab.domain(Disk("vda", 16 * MiB), Disk("vdb", 8 * MiB))
    old, new, imported = os.path.join(lab.new_directory("peer"), "vm1"), lab.path("way-over"), lab.path("imported")
    try:
        for level in ("full", "inc", "inc"):
            vm.write("vda", MiB, MiB)
            lab.sh(f"virtnbdbackup -d {vm.name} -l {level} -o {old} -n")
        lab.sh(f"vnb-import {old} | vnb-pack -z -o {imported}")
        assert levels(imported) == ["full", "inc", "inc"]
        lab.sh(f"vnb-backup --no-freeze {vm.name} {new}")
        assert len(vm.checkpoints()) == 4
        vm.write("vda", 2 * MiB, MiB, pattern=0x11)
        lab.sh(commands[0].replace("\\e", "\\").replace("vm1", vm.name))
        assert [name.partition(".")[0] for name in vm.checkpoints()] == ["vnb"]
        vm.write("vda", 3 * MiB, MiB, pattern=0x22)
        reference = vm.reference()
        lab.sh(f"vnb-backup --no-freeze {vm.name} {new}")
        assert levels(new) == ["full", "inc"]
        restores(lab, new, reference)
        vm.destroy()
        for disk in vm.disks.values():
            assert "virtnbdbackup" not in run("qemu-img", "info", disk.path)
    finally:
        vm.remove()
