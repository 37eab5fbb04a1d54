# SPDX-License-Identifier: LGPL-2.1-or-later
"""The README's recipes, as they stand there, on a machine that runs; and what it says to do about some troubles."""

import os
import re
import stat
from pathlib import Path

import guest
import pytest
from backups import levels
from lab import ROOT, Disk, MiB, compare

PLACES = ("backup", "restore", "standby", "mnt", "dev/vg", "run")  # of the README; the laboratory has its own
AWS = """#!/bin/sh
# aws s3 cp FROM TO, for standard input and output
store() { printf '%s/%s' "$AWS_STORE" "${1##*/}"; }
case $3 in -) exec cat > "$(store "$4")" ;; *) exec cat "$(store "$3")" ;; esac
"""
SSH = """#!/bin/sh
# ssh HOST COMMAND...: joined by spaces and given to a shell, as ssh(1) does
shift
exec sh -c "$*"
"""


def recipes(section):
    """The blocks of code of a section, as scripts."""
    text = (ROOT / "README.md").read_text().partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return [re.sub("(?m)^    ", "", block) for block in re.findall(r"(?m)(?:^    .*\n)+", text)]


@pytest.fixture
def host(lab):
    """Function that runs a script of the README for a machine: its places are in a directory of ours; its path."""
    here = Path(lab.new_directory("host"))
    here.chmod(0o711)
    for place in PLACES:
        (here / place).mkdir(parents=True)
    (here / "bin").mkdir()
    for name, text in (("aws", AWS), ("ssh", SSH)):
        (here / "bin" / name).write_text(text)
        (here / "bin" / name).chmod(stat.S_IRWXU)
    (here / "store").mkdir()
    (here / "examples").symlink_to(ROOT / "examples")

    def run(script, vm, check=True):
        script = re.sub(rf"(?<![\w.:])/(?={'|'.join(PLACES)})", f"{here}/", script)
        script = re.sub(r"\bvm1(?= |$)(?<!/vm1)", vm.name, script)
        env = {"PATH": f"{here}/bin:{lab.env['PATH']}", "AWS_STORE": f"{here}/store"}
        return lab.sh(f"set -e; cd {here}\n{script}", check=check, env=env)

    run.path = here
    return run


def test_every_day(lab, host):
    vm = guest.linux(lab, Disk("vda", 64 * MiB, filesystem="ext4"), Disk("vdb", 32 * MiB))
    try:
        vm.run("echo contents > /mnt/vda/file; sync")
        (host.path / "dev/vg/vdb").write_bytes(bytes(32 * MiB))
        scripts = recipes("Every day")
        assert len(scripts) == 8
        for number, script in enumerate(scripts):
            vm.run(f"echo {number} > /mnt/vda/number; sync")
            host(script, vm)
        assert (host.path / "restore/file").read_text() == "contents\n"
        reference = vm.reference()
        compare(reference["vdb"], host.path / "dev/vg/vdb", "raw")
        for name in ("vm1", "last", "ssh", "files", "s3"):
            compare(reference["vdb"], host.path / "restore" / name / "vdb.qcow2", "qcow2")
        compare(reference["vdb"], host.path / "standby/vm1/vdb.qcow2", "qcow2")
        assert (host.path / "restore/vm1/domain.xml").exists()
        for script in recipes("How to be sure"):
            host(script, vm)
        assert not os.listdir(host.path / "run")
        assert lab.leftovers() == []
    finally:
        vm.remove()


def test_an_internal_snapshot_can_be_reverted_after_prune(lab, vm, host):
    lab.sh(f"virsh snapshot-create-as {vm.name} before")
    host("vnb-backup --no-freeze vm1 /backup/vm1", vm)
    done = lab.sh(f"virsh snapshot-revert {vm.name} before", check=False)
    assert "Device has active dirty bitmaps" in done.stderr
    host("vnb-checkpoint prune vm1 --ledger /backup/vm1", vm)
    lab.sh(f"virsh snapshot-revert {vm.name} before")
    done = host("vnb-backup --no-freeze vm1 /backup/vm1", vm)
    assert "level full: the checkpoints of the saved points are all gone" in done.stderr
    lab.sh(f"virsh snapshot-delete {vm.name} before")


def test_a_bitmap_that_exists_already(lab, vm, host):
    """libvirt's message, for a checkpoint that it has forgotten; vnb does not meet it."""
    lab.sh(f"virsh checkpoint-create-as {vm.name} virtnbdbackup.0")
    lab.sh(f"virsh checkpoint-delete {vm.name} virtnbdbackup.0 --metadata")
    done = lab.sh(f"virsh checkpoint-create-as {vm.name} virtnbdbackup.0", check=False)
    assert "Bitmap already exists: virtnbdbackup.0" in done.stderr
    host("vnb-backup --no-freeze vm1 /backup/vm1", vm)
    vm.destroy()
    for disk in vm.disks.values():
        lab.sh(f"qemu-img bitmap --remove {disk.path} virtnbdbackup.0")
    vm.start()
    lab.sh(f"virsh checkpoint-create-as {vm.name} virtnbdbackup.0")
    host("vnb-backup --no-freeze vm1 /backup/vm1", vm)
    assert levels(host.path / "backup/vm1") == ["full", "inc"]


def test_bitmaps_after_a_crash(vm, host):
    host("vnb-backup --no-freeze vm1 /backup/vm1", vm)
    vm.kill()
    vm.start()
    done = host("vnb-backup --no-freeze vm1 /backup/vm1", vm)
    assert "vda: full in this increment: checkpoint inconsistent: missing or broken bitmap" in done.stderr
    assert host("vnb-backup --no-freeze vm1 /backup/vm1", vm).stderr.count("\n") == 1
