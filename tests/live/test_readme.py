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


def test_every_day(no_machines, lab, host):
    vm = guest.linux(lab, Disk("vda", 64 * MiB, filesystem="ext4"), Disk("vdb", 32 * MiB))
    try:
        vm.run("echo contents > /mnt/vda/file; sync")
        (host.path / "dev/vg/vdb").write_bytes(bytes(32 * MiB))
        scripts = recipes("Every day")
        assert len(scripts) == 9
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
    host("vnb-checkpoint delete vm1 --set /backup/vm1", vm)
    lab.sh(f"virsh snapshot-revert {vm.name} before")
    done = host("vnb-backup --no-freeze vm1 /backup/vm1", vm)
    assert "level full: the checkpoints of the restore points in " in done.stderr
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


def test_checkpoints_that_libvirt_has_forgotten(lab, vm, host):
    """What is left of them is the bitmaps in the images."""
    host("vnb-backup --no-freeze vm1 /backup/vm1", vm)
    for checkpoint in vm.checkpoints():
        lab.sh(f"virsh checkpoint-delete {vm.name} {checkpoint} --metadata")
    host("vnb-checkpoint redefine vm1 --set /backup/vm1", vm)
    host("vnb-backup --no-freeze vm1 /backup/vm1", vm)
    assert levels(host.path / "backup/vm1") == ["full", "inc"]


def test_an_image_that_cannot_hold_a_bitmap(lab, host):
    vm = lab.domain(Disk("vda", 16 * MiB, compat="0.10"), start=False)
    try:
        done = host("vnb-backup --no-freeze vm1 /backup/vm1", vm, check=False)
        assert "vda: a qcow2 image of version 2 cannot hold a bitmap" in done.stderr
        lab.sh(f"qemu-img amend -f qcow2 -o compat=1.1 {vm.disks['vda'].path}")
        host("vnb-backup --no-freeze vm1 /backup/vm1", vm.start())
    finally:
        vm.remove()


def test_an_agent_that_does_not_run(lab, host):
    channel = '<channel type="unix"><target type="virtio" name="org.qemu.guest_agent.0"/></channel>'
    vm = lab.domain(Disk("vda", 16 * MiB), extra_xml=channel)
    try:
        done = host("vnb-backup vm1 /backup/vm1", vm)
        assert "the guest is not frozen: its guest agent is not connected" in done.stderr
        done = host("vnb-backup --require-freeze vm1 /backup/vm1", vm, check=False)
        assert (done.returncode, vm.has_job()) == (1, False)
        assert "cannot freeze the guest: its guest agent is not connected" in done.stderr
        assert "not frozen" not in host("vnb-backup --no-freeze vm1 /backup/vm1", vm).stderr
        assert lab.leftovers() == []  # as a keeper that waits to thaw what nobody froze
    finally:
        vm.remove()


def test_a_directory_that_qemu_must_not_enter(vm, host):
    """The message names the user and the directory; what it takes is a mode."""
    closed = host.path / "backup/closed"
    closed.mkdir(mode=0o700)
    done = host("vnb-backup --no-freeze --scratch-dir /backup/closed vm1 /backup/vm1", vm, check=False)
    if done.returncode == 0:
        pytest.skip("QEMU runs as the one who runs the tests")
    assert "Permission denied (QEMU, user " in done.stderr
    assert f"has to write in {closed}" in done.stderr or f", {closed}" in done.stderr
    closed.chmod(0o777)  # noqa: S103 - for the user that was named
    host("vnb-backup --no-freeze --scratch-dir /backup/closed vm1 /backup/vm1", vm)
    assert not os.listdir(closed)


def test_a_job_of_another_program(lab, vm, host):
    xml = host.path / "job.xml"
    server = f"<server transport='unix' socket='{vm.private_directory()}/x'/>"
    xml.write_text(f"<domainbackup mode='pull'>{server}</domainbackup>")
    lab.sh(f"virsh backup-begin {vm.name} {xml}")
    done = host("vnb-backup --no-freeze vm1 /backup/vm1", vm, check=False)
    assert "a backup job is active already" in done.stderr
    host("virsh domjobabort vm1", vm)
    host("vnb-backup --no-freeze vm1 /backup/vm1", vm)
