# SPDX-License-Identifier: LGPL-2.1-or-later
"""vnb-checkpoint: disks of every kind, and what cannot be done about some of them."""

import os
import subprocess

import libvirt
import pytest
from backups import backup, restores, tip
from guest import linux
from lab import Disk, MiB, run, wait_for


@pytest.fixture
def directory(lab):
    return lab.new_directory("set")


def test_other_devices_are_left_out_and_said_so(lab, directory):
    medium = lab.path("medium.iso")
    run("qemu-img", "create", "-q", "-f", "raw", medium, "1M")
    devices = f"""
        <disk type="file" device="cdrom"><source file="{medium}"/><target dev="sda" bus="sata"/><readonly/></disk>
        <disk type="file" device="cdrom"><target dev="sdb" bus="sata"/><readonly/></disk>
        <disk type="file" device="floppy"><target dev="fda" bus="fdc"/></disk>
        <disk type="file" device="disk"><driver name="qemu" type="raw"/><source file="{medium}"/>
          <target dev="vdz" bus="virtio"/><readonly/></disk>"""
    vm = lab.domain(Disk("vda"), extra_xml=devices)
    vm.write("vda", 0, MiB)
    said = backup(lab, vm, "full", directory).stderr
    for name, why in (("sda", "is a cdrom"), ("sdb", "is a cdrom"), ("fda", "is a floppy"), ("vdz", "is read-only")):
        assert f"vnb-checkpoint: {vm.name}: {name} {why}: left out\n" in said
    restores(lab, directory, vm.reference("vda"))
    vm.remove()


@pytest.fixture
def block_device(lab):
    """A loop device with a qcow2 image in it."""
    path = lab.path("block.img")
    with open(path, "wb") as file:
        file.truncate(128 * MiB)
    device = run("losetup", "--find", "--show", path).strip()
    try:
        run("blockdev", "--setrw", device)  # a loop device stays read-only after it once was
        os.chmod(device, 0o666)  # noqa: S103 - QEMU's user
        run("qemu-img", "create", "-q", "-f", "qcow2", device, "64M")
        yield device
    finally:
        run("losetup", "--detach", device)


def test_qcow2_on_a_block_device(lab, directory, block_device):
    vm = lab.domain(Disk("vda", path=block_device))
    points = []
    for step in range(3):
        vm.write("vda", step * MiB, 2 * MiB, pattern=step + 1)
        backup(lab, vm, "auto", directory)
        points.append((tip(lab, directory), vm.reference()))
    vm.destroy()
    backup(lab, vm, "inc", directory)
    for point, reference in points:
        restores(lab, directory, reference, point)
    vm.remove()


def test_qcow2_with_a_data_file(lab, directory):
    made = lab.new_directory("data-file")
    os.chmod(made, 0o711)  # noqa: S103 - QEMU's user
    path = os.path.join(made, "vda.qcow2")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={made}/vda.data", path, "64M")
    for name in os.listdir(made):
        os.chmod(os.path.join(made, name), 0o666)  # noqa: S103
    vm = lab.domain(Disk("vda", path=path))
    for step in range(2):
        vm.write("vda", step * MiB, 2 * MiB, pattern=step + 1)
        backup(lab, vm, "auto", directory)
    restores(lab, directory, vm.reference())
    vm.remove()


def test_a_data_file_with_a_relative_name(lab, directory):
    """
    QEMU looks for it where QEMU was started, which is another place for each that opens the image: refused, and one
    command mends it.
    """
    made = lab.new_directory("data-file")
    path = os.path.join(made, "vda.qcow2")
    lab.sh(f"cd {made}; qemu-img create -q -f qcow2 -o data_file=vda.data {path} 4M; "
           f"qemu-io -f qcow2 -c 'write -P 7 0 1M' {path}")
    vm = lab.domain(Disk("vda", path=path), start=False)
    for options, whose in ((f"--image vda={path}", ""), (vm.name, f"{vm.name}: ")):
        done = lab.sh(f"cd {made}; vnb-checkpoint begin --level full --set set {options}", check=False)
        assert (done.returncode, done.stderr.partition("will be made\n")[2]) == (  # of the set, which is new
            1, f"vnb-checkpoint: {whose}vda: {path} names its data file vda.data, which QEMU looks for in the "
            f'directory where it is started: there, qemu-img amend -f qcow2 -o data_file="$PWD/vda.data" {path} makes '
            "the name absolute\n"
        )
    lab.sh(f'cd {made}; qemu-img amend -f qcow2 -o data_file="$PWD/vda.data" {path}')
    backup(lab, vm, "full", directory)
    target = lab.new_directory("restored")
    lab.sh(f"vnb-cat {directory} | vnb-apply --format raw {target}")
    with open(f"{target}/vda.raw", "rb") as file:
        assert file.read(MiB) == bytes([7]) * MiB
    vm.remove()


def test_an_encrypted_disk_is_refused_unless_plain_text_is_allowed(lab, directory):
    secret = lab.connection.secretDefineXML("<secret ephemeral='no' private='yes'/>")
    secret.setValue(b"s3cret", 0)
    made = lab.path("luks.qcow2")
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "--object", "secret,id=s,data=s3cret", "-o",
              "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10", made, "16M"]
    # It measures how fast it derives keys, and gives up where the kernel has counted no time for that.
    while "Unable to get accurate CPU usage" in (said := subprocess.run(create, capture_output=True, text=True).stderr):
        pass
    assert said == ""
    os.chmod(made, 0o666)  # noqa: S103 - QEMU's user
    disk = f"""<disk type="file" device="disk"><driver name="qemu" type="qcow2"/><source file="{made}">
        <encryption format="luks"><secret type="passphrase" uuid="{secret.UUIDString()}"/></encryption></source>
        <target dev="vda" bus="virtio"/></disk>"""
    vm = lab.domain(extra_xml=disk)
    done = backup(lab, vm, "full", directory, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        f"vnb-checkpoint: {vm.name}: vda: is encrypted and would be stored in plain text: --allow-plaintext, "
        "or --exclude vda\n"
    )
    backup(lab, vm, "full", directory, "--allow-plaintext")
    assert lab.sh(f"vnb-cat {directory} | grep -c s3cret", check=False).stdout == b"0\n"
    vm.remove()
    secret.undefine()


def test_a_scratch_directory_that_qemu_cannot_write_is_named(lab, vm, directory):
    closed = lab.new_directory("closed")
    done = backup(lab, vm, "full", directory, f"--scratch-dir {closed}", check=False)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert "ermission denied" in last
    assert "has to write in " in last
    assert closed in last
    assert vm.checkpoints() == []


def test_a_scratch_with_little_room_is_warned_of(lab, directory):
    small = lab.new_directory("small")
    run("mount", "-t", "tmpfs", "-o", "size=8m,mode=777", "tmpfs", small)
    try:
        vm = lab.domain(Disk("vda"))
        vm.write("vda", 0, 16 * MiB)
        done = backup(lab, vm, "full", directory, f"--scratch-dir {small} --scratch-reserve 0")
        assert f"{vm.name}: vda: the scratch directory {small} has " in done.stderr
        vm.remove()
    finally:
        run("umount", small)


def test_an_unplugged_disk_does_not_keep_a_checkpoint_from_being_deleted(lab, vm, directory):
    backup(lab, vm, "full", directory)
    vm.destroy()
    vm.handle.detachDeviceFlags(vm.disks["vdb"].xml(), libvirt.VIR_DOMAIN_AFFECT_CONFIG)
    disk = vm.disks.pop("vdb")
    vm.start()
    done = backup(lab, vm, "inc", directory)
    assert done.returncode == 0
    restores(lab, directory, vm.reference())
    # It comes back: what was written to it elsewhere is unknown, so it is taken in full.
    vm.destroy()
    vm.handle.attachDeviceFlags(disk.xml(), libvirt.VIR_DOMAIN_AFFECT_CONFIG)
    vm.disks["vdb"] = disk
    vm.start()
    assert "vdb: full in this increment" in backup(lab, vm, "inc", directory).stderr
    restores(lab, directory, vm.reference())
    lab.sh(f"vnb-checkpoint delete {vm.name} --set {directory}")
    assert vm.checkpoints() == []


def test_a_guest_that_shuts_down_midway_is_waited_for(lab, directory):
    """libvirt keeps it in a state in which nothing can be asked or ended, for half a minute."""
    vm = linux(lab, Disk("vda", 64 * MiB, filesystem="ext4"))
    backup(lab, vm, "full", directory)
    before = vm.checkpoints()
    vm.run("echo something > /mnt/vda/file; sync")
    lab.sh(f"vnb-checkpoint begin {vm.name} --level inc --set {directory} > {lab.path('begun')}")
    vm.handle.shutdownFlags(libvirt.VIR_DOMAIN_SHUTDOWN_GUEST_AGENT)
    wait_for(lambda: vm.state() != libvirt.VIR_DOMAIN_RUNNING, "the shutdown")
    lab.sh(f"vnb-checkpoint abort {vm.name}")
    assert vm.checkpoints() == before
    wait_for(lambda: not vm.is_active(), "the end of the guest")
    vm.start()
    vm.pause()  # Linux writes by itself
    backup(lab, vm, "inc", directory, "--no-freeze")
    restores(lab, directory, vm.reference())
    vm.remove()


def test_a_network_disk_says_what_is_missing(lab, directory):
    """Running, libvirt exports it like any other; off, there is no image that qemu-nbd could be given."""
    image, socket = lab.path("network.qcow2"), lab.path("network.sock")
    run("qemu-img", "create", "-q", "-f", "qcow2", image, "16M")
    server = subprocess.Popen(["qemu-nbd", "-t", "-f", "raw", "-x", "net", "-k", socket, image])
    try:
        wait_for(lambda: os.path.exists(socket), "qemu-nbd")
        os.chmod(socket, 0o666)  # noqa: S103 - QEMU's user
        disk = f"""<disk type="network" device="disk"><driver name="qemu" type="qcow2"/>
            <source protocol="nbd" name="net"><host transport="unix" socket="{socket}"/></source>
            <target dev="vda" bus="virtio"/></disk>"""
        vm = lab.domain(extra_xml=disk)
        backup(lab, vm, "full", directory)
        vm.destroy()
        done = backup(lab, vm, "copy", directory, check=False)
        assert done.returncode == 1
        assert done.stderr == (
            f"vnb-checkpoint: {vm.name}: vda: a disk of type network can be read while its domain runs only "
            "(--start-paused)\n"
        )
        vm.remove()
    finally:
        server.terminate()
        server.wait()
