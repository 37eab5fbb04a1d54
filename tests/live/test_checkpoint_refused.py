# SPDX-License-Identifier: LGPL-2.1-or-later
"""vnb-checkpoint: what it refuses before anything is frozen, started or saved, with what to do about it."""

import os
import signal
import subprocess

import libvirt
import pytest
from backups import backup
from lab import Disk, MiB, run, wait_for


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


def is_refused(lab, vm, disk, why, options=""):
    """
    The backup is refused for a disk, and --exclude is what to do.

    With a freeze that is required: the machine has no agent, so what is found out only then is never said.
    """
    done = backup(lab, vm, "copy", lab.new_directory("set"), f"--require-freeze --raw {options}", check=False)
    assert (done.returncode, done.stderr) == (
        1, f"vnb-checkpoint: {vm.name}: {disk}: {why}: --exclude {disk} leaves it out\n"
    )
    backup(lab, vm, "full", lab.new_directory("set"), f"--no-freeze --raw --exclude {disk} {options}")


def other_disk(lab, name, bus="virtio", inside=""):
    """XML of another disk, with a new raw image that several may write to."""
    image = lab.new_directory("other") + "/disk.raw"
    run("qemu-img", "create", "-q", "-f", "raw", image, "16M")
    os.chmod(os.path.dirname(image), 0o711)  # noqa: S103 - QEMU's user
    os.chmod(image, 0o666)  # noqa: S103
    return f"""<disk type="file" device="disk"><driver name="qemu" type="raw"/><source file="{image}"/>
        <target dev="{name}" bus="{bus}"/>{inside}</disk>"""


def test_a_transient_disk(lab, directory):
    """Off, its image is one as any other: what its guests write never gets there."""
    vm = lab.domain(Disk("vda"), extra_xml=other_disk(lab, "vdb", inside="<transient/>"))
    is_refused(lab, vm, "vdb", "is transient, and libvirt makes no backup job of such a disk")
    vm.destroy()
    is_refused(lab, vm, "vdb", "is transient, and libvirt makes no backup job of such a disk", "--start-paused")
    backup(lab, vm, "full", directory, "--raw")
    restored = lab.new_directory("restored")
    lab.sh(f"vnb-cat {directory} | vnb-apply {restored}")
    assert sorted(os.listdir(restored)) == ["vda.qcow2", "vdb.qcow2"]
    vm.remove()


def test_a_vhost_user_disk(lab):
    place = lab.new_directory("vhost-user")
    os.chmod(place, 0o711)  # noqa: S103 - QEMU's user
    run("qemu-img", "create", "-q", "-f", "raw", f"{place}/disk.raw", "16M")
    server = subprocess.Popen([
        "qemu-storage-daemon", "--blockdev", f"driver=file,node-name=disk,filename={place}/disk.raw", "--export",
        f"type=vhost-user-blk,id=export,node-name=disk,writable=on,addr.type=unix,addr.path={place}/socket",
    ])
    try:
        wait_for(lambda: os.path.exists(f"{place}/socket"), "the vhost-user server")
        os.chmod(f"{place}/socket", 0o666)  # noqa: S103
        disk = f"""<disk type="vhostuser" device="disk"><driver name="qemu" type="raw"/>
            <source type="unix" path="{place}/socket"/><target dev="vdb" bus="virtio"/></disk>"""
        vm = lab.domain(Disk("vda"), start=False)
        shared = "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>"
        xml = vm.xml().replace("</memory>", f"</memory>{shared}")
        lab.connection.defineXML(xml.replace("</devices>", f"{disk}</devices>"))
        vm.start()
        is_refused(lab, vm, "vdb", "is a vhost-user disk, whose data QEMU does not read")
        vm.destroy()
        is_refused(lab, vm, "vdb", "is a vhost-user disk, whose data QEMU does not read")
        vm.remove()
    finally:
        server.terminate()
        server.wait()


@pytest.mark.parametrize("kind, say", [
    ("copy", "virsh blockcopy {vm.name} vdb {place}/copy.qcow2 --transient-job --bandwidth 1"),
    ("pull", "virsh blockpull {vm.name} vdb --bandwidth 1"),
    ("active-commit", "virsh blockcommit {vm.name} vdb --active --bandwidth 1"),
])
def test_a_disk_with_another_block_job(lab, kind, say):
    place = lab.new_directory("job")
    os.chmod(place, 0o777)  # noqa: S103 - QEMU's user
    vm = lab.domain(Disk("vda"), Disk("vdb"))
    vm.write_random("vdb", 0, 16 * MiB)
    vm.flush()
    if kind != "copy":
        vm.handle.snapshotCreateXML(
            f"<domainsnapshot><disks><disk name='vdb' snapshot='external'><source file='{place}/top.qcow2'/></disk>"
            "<disk name='vda' snapshot='no'/></disks></domainsnapshot>",
            libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA,
        )
        if kind != "pull":
            vm.write_random("vdb", 0, 16 * MiB)
    lab.sh(say.format(vm=vm, place=place))
    is_refused(lab, vm, "vdb", f"has another block job ({kind})")
    lab.sh(f"virsh blockjob {vm.name} vdb --abort")
    vm.remove()


def test_a_disk_that_another_running_domain_has_too(lab, directory):
    """QEMU would be refused the lock that a backup needs, and libvirtd 9.0 dies of that where there is another disk."""
    disk = other_disk(lab, "vdb", inside="<shareable/>")
    vm = lab.domain(Disk("vda"), extra_xml=disk)
    other = lab.domain(Disk("vda"), extra_xml=disk.replace("vdb", "vdc"))
    is_refused(lab, vm, "vdb", f"is shared with the domain {other.name}, which is running")
    other.remove()
    backup(lab, vm, "full", directory, "--raw")
    assert lab.leftovers() == []
    vm.remove()


def test_another_domain_whose_qemu_hangs_is_waited_for(lab, directory):
    """libvirt 11.0 to 11.4 asks QEMU before it describes a domain, for half a minute at most; others know it."""
    vm = lab.domain(Disk("vda"), extra_xml=other_disk(lab, "vdb", inside="<shareable/>"))
    other = lab.domain(Disk("vda"))
    os.kill(other.qemu_pid(), signal.SIGSTOP)
    try:
        question = subprocess.Popen(["virsh", "domblkstat", other.name, "vda"], env=lab.env, stdout=subprocess.DEVNULL)
        wait_for(lambda: other.handle.controlInfo()[0] == libvirt.VIR_DOMAIN_CONTROL_OCCUPIED, "the question")
        said = backup(lab, vm, "full", directory, "--raw --no-freeze").stderr.splitlines()
    finally:
        os.kill(other.qemu_pid(), signal.SIGCONT)
    assert question.wait(60) == 0
    waited = f"vnb-checkpoint: waiting for libvirt to describe the domain {other.name}, 5 seconds by now"
    assert said[:1] == [waited] * (11_000_000 <= lab.connection.getLibVersion() < 11_005_000)
    vm.remove()
    other.remove()
