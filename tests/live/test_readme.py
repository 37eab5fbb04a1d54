# SPDX-License-Identifier: LGPL-2.1-or-later
"""The commands of the README on a domain that runs, and what vnb-troubleshooting(7) says to do about some messages."""

import os

import guest
import pytest
from backups import levels
from host import blocks_of_markdown
from lab import ROOT, Disk, MiB, compare

SECTIONS = ("A first backup, and a first restore", "The pipeline")

def test_the_readme(no_machines, lab, host):
    """All of its commands, but for those that install something."""
    vm = guest.linux(lab, Disk("vda", 64 * MiB, filesystem="ext4"), Disk("vdb", 32 * MiB))
    try:
        vm.run("echo contents > /mnt/vda/file; sync")
        text = (ROOT / "README.md").read_text()
        sections = [text.partition(f"\n## {name}\n")[2].partition("\n## ")[0] for name in SECTIONS]
        scripts = [script for section in sections for script in blocks_of_markdown(section) if "vnb-" in script]
        scripts = [script for script in scripts if not script.startswith(" ")]  # the picture
        assert len(scripts) > 5
        for number, script in enumerate(scripts):
            vm.run(f"echo {number} > /mnt/vda/number; sync")
            host(script, vm)
        assert (host.path / "restore/file").read_text() == "contents\n"
        reference = vm.reference()
        for name in ("vm1", "ssh"):
            compare(reference["vdb"], host.path / "restore" / name / "vdb.qcow2", "qcow2")
        lab.sh(f"virsh undefine --checkpoints-metadata restore_{vm.name}")
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
    assert "full backup: the checkpoints of the restore points in " in done.stderr
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
