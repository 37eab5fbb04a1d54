# SPDX-License-Identifier: LGPL-2.1-or-later
"""Restore of whole machines: what boots in the end is the machine of that point."""

import os
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import guest
import libvirt
import pytest
import samples
from backups import backup, levels, restores
from lab import ROOT, Disk, MiB, run
from remote import SSHD, Hypervisor

BACKUP, RESTORE = ROOT / "bin" / "vnb-backup", ROOT / "bin" / "vnb-restore"


class Restored(guest.Linux):
    """A machine that vnb-restore defined: it has a name, and a console; everything else is as it was restored."""

    def __init__(self, lab, name, console):
        self.lab = lab
        self.name = name
        self.uuid = lab.connection.lookupByName(name).UUIDString()
        self.console = console

    def remove(self):
        """Its files stay where they are."""
        self.destroy()
        self.handle.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_KEEP_NVRAM)


def points(directory):
    """The points of a set, in order."""
    return [name.rpartition(".")[0].rpartition(".")[0] for name in sorted(os.listdir(directory))]


FILE_SYSTEMS = {"vda": "ext4", "vdb": "xfs"}
WRITE = """
    cd /mnt/{disk} && mkdir -p {name} && for i in 1 2 3 4 5 6; do
        dd if=/dev/urandom of={name}/$i bs=64k count=$((i * 3)) 2>&1
    done && find . -type f ! -name sums | sort | xargs sha256sum > sums && sync
"""
STEPS = (
    ("full", "", "first"),
    ("inc", "rm -r /mnt/{disk}/first/[456]; sync", "second"),
    ("inc", "cd /; rm -r /mnt/{disk}/second; sync; fstrim /mnt/{disk}", "third"),
)


@pytest.mark.skipif(shutil.which("xfs_repair") is None, reason="xfsprogs is not installed")
def test_a_machine_of_each_point_boots_and_has_its_files(lab):
    # mkfs.xfs makes no file system under 300 MiB
    sizes = {"vda": 128 * MiB, "vdb": 320 * MiB}
    disks = [Disk(name, sizes[name], filesystem=kind, discard=True) for name, kind in FILE_SYSTEMS.items()]
    vm = guest.linux(lab, *disks)
    restored = None
    try:
        directory = lab.path("machine set")
        directory_q = f'"{directory}"'
        sums = []
        for level, change, name in STEPS:
            for disk in FILE_SYSTEMS:
                vm.run(f"{change}\n{WRITE}".format(disk=disk, name=name))
            sums.append({disk: vm.run(f"cat /mnt/{disk}/sums") for disk in FILE_SYSTEMS})
            backup(lab, vm, level, directory_q, store="vnb-extents | vnb-read | vnb-pack -z -o {set}")
        allocated = {disk: allocation(vm.disks[disk].path) for disk in FILE_SYSTEMS}
        for number, point in reversed(list(enumerate(points(directory)))):
            target = lab.path(f"restored {number}")
            name = f"{vm.name}-restored"
            done = lab.sh(f'{RESTORE} --until {point} --define --name {name} {directory_q} "{target}"')
            own = f"{target}/{os.path.basename(vm.console)}"
            moved = f"serial: its output goes to {own}: {vm.console} is the original's"
            assert done.stderr == f"vnb-config: {moved}\nvnb-config: {name}: defined\n"
            assert sorted(os.listdir(target)) == ["initrd", "vda.qcow2", "vdb.qcow2", "vmlinuz"]
            for file in ("initrd", "vmlinuz"):
                assert Path(target, file).read_bytes() == Path(lab.path(file)).read_bytes()
            for disk in FILE_SYSTEMS if number == len(STEPS) - 1 else ():
                found = allocation(f"{target}/{disk}.qcow2")
                assert abs(found - allocated[disk]) <= allocated[disk] / 20, (disk, found, allocated[disk])
            vm.destroy()  # for its memory
            restored = Restored(lab, name, own)
            restored.start()
            for disk, expected in sums[number].items():
                assert restored.run(f"cat /mnt/{disk}/sums") == expected
                assert "FAILED" not in restored.run(f"cd /mnt/{disk} && sha256sum -c sums")
                files = restored.run(f"cd /mnt/{disk} && find . -type f ! -name sums | wc -l")
                assert int(files) == len(expected.splitlines())
                # To mount it has replayed the journal: what is left is for fsck to judge.
                restored.run(f"umount /mnt/{disk}")
            assert restored.uuid != vm.uuid
            restored.destroy()
            for disk, kind in FILE_SYSTEMS.items():
                check_file_system(lab, f"{target}/{disk}.qcow2", kind)
            restored.remove()
            restored = None
    finally:
        if restored is not None:
            restored.remove()
        vm.remove()


def allocation(path):
    """Bytes that a file takes of its file system."""
    return os.stat(path).st_blocks * 512


def check_file_system(lab, image, kind):
    """The kind's own checker, run on a copy and changing nothing, has nothing to say against it."""
    raw = lab.path("fsck.raw")
    try:
        run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, raw)
        checker = {"ext4": ["e2fsck", "-fn"], "xfs": ["xfs_repair", "-n"]}[kind]
        done = subprocess.run([*checker, raw], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    finally:
        os.unlink(raw)


def uefi():
    """(loader, template of nvram) of UEFI firmware that needs no secure boot; skips the test where there is none."""
    for directory, suffix in (("/usr/share/OVMF", "_4M"), ("/usr/share/OVMF", ""), ("/usr/share/edk2/ovmf", "")):
        found = [f"{directory}/OVMF_{what}{suffix}.fd" for what in ("CODE", "VARS")]
        if all(map(os.path.exists, found)):
            return found
    pytest.skip("OVMF is not installed")


def test_what_uefi_remembers_comes_back(lab):
    """The nvram, as the firmware wrote it, is the restored machine's, which starts with it and has it for itself."""
    loader, template = uefi()
    nvram = lab.path("uefi vars.fd")
    firmware = f"""
        <loader readonly="yes" type="pflash">{loader}</loader><nvram template="{template}">{nvram}</nvram>"""
    vm = guest.linux(lab, Disk("vda", 16 * MiB), firmware=firmware, memory=256 * MiB)
    restored = None
    try:
        vm.run("test -d /sys/firmware/efi")
        remembered = Path(nvram).read_bytes()
        assert remembered != Path(template).read_bytes()
        directory, target, name = lab.new_directory("set"), lab.path("uefi restored"), f"{vm.name}-restored"
        backup(lab, vm, "full", directory)
        vm.destroy()
        assert Path(nvram).read_bytes() == remembered
        done = lab.sh(f"{RESTORE} --define --name {name} {directory} '{target}'")
        assert done.stderr.endswith(f"vnb-config: {name}: defined\n")
        restored = Restored(lab, name, f"{target}/{os.path.basename(vm.console)}")
        root = ElementTree.fromstring(restored.handle.XMLDesc())  # noqa: S314 - libvirt's
        own = root.findtext("os/nvram")
        assert own == f"{target}/uefi vars.fd"
        assert Path(own).read_bytes() == remembered
        assert Path(root.findtext("os/loader")).read_bytes() == Path(loader).read_bytes()
        os.unlink(nvram)  # whoever still needed it would not start, or make another
        restored.start()
        restored.run("test -d /sys/firmware/efi")
        assert not os.path.exists(nvram)
    finally:
        if restored is not None:
            restored.remove()
        vm.remove()


def test_what_uefi_remembers_where_only_libvirt_knows_the_place(lab):
    """
    A definition may say firmware='efi' and no more: libvirt 9.0 names loader and nvram while the domain runs alone.

    The nvram of one that is off is found where libvirt keeps it, and a clone has it for itself.
    """
    uefi()
    vm = lab.domain(Disk("vda", 16 * MiB), start=False)
    clones = []
    try:
        lab.connection.defineXML(vm.xml().replace("<os>", "<os firmware='efi'>"))
        vm.start(paused=True)
        root = ElementTree.fromstring(vm.handle.XMLDesc())  # noqa: S314 - libvirt's
        nvram = Path(root.findtext("os/nvram"))
        remembered = b"remembered".ljust(nvram.stat().st_size, b".")
        nvram.write_bytes(remembered)
        running, off = lab.new_directory("set"), lab.new_directory("set")
        backup(lab, vm, "copy", running, "--no-freeze")
        vm.destroy()
        backup(lab, vm, "copy", off)
        for number, directory in enumerate((running, off)):
            name, target = f"{vm.name}-{number}", lab.path(f"{vm.name} clone {number}")
            lab.sh(f"{RESTORE} --define --name {name} {directory} '{target}'")
            clones.append(lab.connection.lookupByName(name))
            assert Path(target, nvram.name).read_bytes() == remembered
            clones[-1].createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)
            root = ElementTree.fromstring(clones[-1].XMLDesc())  # noqa: S314 - libvirt's
            assert root.findtext("os/nvram") == f"{target}/{nvram.name}"
    finally:
        for clone in clones:
            if clone.isActive():
                clone.destroy()
            clone.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_KEEP_NVRAM)
        vm.remove()


@pytest.mark.parametrize("name", [
    "-dash\tand tab", "no\u00a0break, \U0001f469\u200d\U0001f52c",
], ids=["dash", "joiner"])
def test_a_machine_of_any_name(lab, name):
    """libvirt takes tabs, no-break spaces, joiners and leading dashes: so do a backup, a set and a restore."""
    vm = lab.domain(Disk("vda", 16 * MiB), start=False)
    restored = None
    try:
        vm.handle.rename(name)  # its images stay where they are: libvirt loses a tab in a path
        lab.domains[name] = lab.domains.pop(vm.name)
        vm.name = name
        vm.start()
        target, directory = lab.path("of any name"), lab.path("set of", name)
        for script in (
            f'{BACKUP} --no-freeze -- "$NAME" "$SET"', f'{BACKUP} --no-freeze -- "$NAME" "$SET"',
            'vnb-checkpoint list -- "$NAME"', 'vnb-verify "$SET"', 'vnb-dump "$SET"',
            f'{RESTORE} --name="$NAME-2" --define "$SET" "$TARGET"', 'vnb-checkpoint delete --set "$SET" -- "$NAME"',
        ):
            done = lab.sh(script, env={"NAME": name, "SET": directory, "TARGET": target})
            assert "Traceback" not in done.stderr
            assert "\t" not in done.stderr and "\u200d" not in done.stderr  # what is shown is made visible
        assert vm.checkpoints() == []
        assert levels(directory) == ["full", "inc"]
        restored = lab.connection.lookupByName(f"{name}-2")
    finally:
        if restored is not None:
            restored.undefine()
        vm.remove()
        shutil.rmtree(target, ignore_errors=True)


def test_nvram_on_a_block_device_and_output_in_a_file(lab):
    """The device and the file are the original's: a clone, which runs beside it, has files of its own."""
    device = lab.sh("truncate -s 4M nvram.img && losetup -f --show nvram.img").stdout.decode().strip()
    loader, output = lab.path("code.fd"), lab.path("output")
    Path(loader).write_bytes(bytes(64 << 10))
    os.chmod(loader, 0o644)
    os_xml = f"""
        <loader readonly="yes" type="pflash">{loader}</loader>
        <nvram type="block"><source dev="{device}"/></nvram>"""
    serial = f'<serial type="file"><source path="{output}"/></serial>'
    vm = restored = None
    try:
        Path(device).write_bytes(b"N" * (4 * MiB))
        vm = lab.domain(Disk("vda", 16 * MiB), os_xml=os_xml, extra_xml=serial, start=False).start(paused=True)
        directory, target = lab.new_directory("set"), lab.path("nvram elsewhere")
        backup(lab, vm, "copy", directory, "--no-freeze")
        done = lab.sh(f"{RESTORE} --define --name clone {directory} '{target}'")
        assert f"vnb-config: serial: its output goes to {target}/output: {output} is the original's" in done.stderr
        restored = lab.connection.lookupByName("clone")
        restored.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)
        root = ElementTree.fromstring(restored.XMLDesc())  # noqa: S314 - libvirt's
        nvram = root.find("os/nvram/source").get("file")
        assert nvram == f"{target}/{os.path.basename(device)}"
        assert Path(nvram).read_bytes() == b"N" * (4 * MiB)
        assert root.find("./devices/serial/source").get("path") == f"{target}/output"
        assert Path(target, "output").exists()
    finally:
        if restored is not None:
            if restored.isActive():
                restored.destroy()
            restored.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_KEEP_NVRAM)
        if vm is not None:
            vm.destroy()
            vm.handle.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_KEEP_NVRAM)
            vm.remove()
        lab.sh(f"losetup -d {device}")


@pytest.fixture
def machine(lab):
    """A machine that is off, with nvram and a medium, and a set that holds it; (vm, set)."""
    nvram, iso = lab.path("nvram of it"), lab.path("a.iso")
    Path(nvram).write_bytes(b"what the firmware remembers.....".ljust(4096) * 32)
    Path(iso).write_bytes(bytes(2048))
    loader = lab.path("firmware.fd")
    Path(loader).write_bytes(bytes(64 << 10))
    extra = f"""
        <disk type="file" device="cdrom"><source file="{iso}"/><target dev="sda" bus="sata"/><readonly/></disk>
        <interface type="user"><mac address="52:54:00:11:22:33"/></interface>
        <graphics type="vnc" autoport="yes" passwd="secret"/><video><model type="vga"/></video>"""
    os_xml = f'<loader readonly="yes" type="pflash">{loader}</loader><nvram>{nvram}</nvram>'
    vm = lab.domain(Disk("vda", 16 * MiB), Disk("vdb", 16 * MiB), extra_xml=extra, os_xml=os_xml, start=False)
    directory = lab.new_directory("set")
    try:
        backup(lab, vm, "full", directory, "--no-freeze --exclude vdb")
        yield vm, directory
        assert lab.leftovers() == []
    finally:
        vm.remove()


def restore(lab, machine_, *options, check=True):
    """(finished process, target directory)"""
    target = lab.new_directory("restored")
    os.chmod(target, 0o711)  # noqa: S103 - QEMU's user must get through
    return lab.sh(f"{RESTORE} {' '.join(options)} {machine_[1]} {target}", check=check), target


def test_xml_that_virsh_takes(lab, machine):
    vm, _ = machine
    done, target = restore(lab, machine)
    assert done.stderr.splitlines() == [
        "vnb-config: vdb: was not restored: removed from the domain",
        "vnb-config: sda: the cdrom has no medium in it any more",
        "vnb-config: vnc: switched off, since its password, if it had one, is not in the backup: set one, "
        "or say --keep-graphics",
    ]
    assert sorted(os.listdir(target)) == ["domain.xml", "firmware.fd", "nvram of it", "vda.qcow2"]
    assert Path(target, "nvram of it").read_bytes() == Path(lab.path("nvram of it")).read_bytes()
    lab.sh(f"virsh define --validate {target}/domain.xml")
    domain = lab.connection.lookupByName(f"restore_{vm.name}")
    try:
        root = ElementTree.fromstring(domain.XMLDesc())  # noqa: S314 - libvirt's
        assert root.findtext("os/nvram") == f"{target}/nvram of it"
        assert root.findtext("os/loader") == f"{target}/firmware.fd"
        assert root.find("./devices/interface/mac").get("address") != "52:54:00:11:22:33"
        assert root.find("./devices/graphics/listen").get("type") == "none"
        domain.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)
        domain.destroy()
    finally:
        domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_KEEP_NVRAM)


def test_disks_and_nvram_of_every_kind(lab):
    """A backing image, a data file, a volume, an nvram that is a source: all are the restored files, and it starts."""
    base, pool, store = lab.path("base.qcow2"), lab.path("pool"), lab.path("store")
    loader, nvram = lab.path("code.fd"), lab.path("vars.fd")
    for directory in (pool, store):
        os.mkdir(directory, 0o711)
    for options, path in (
        ([], base), ([], f"{pool}/volume"), (["-o", f"data_file={store}/vdb.raw"], f"{store}/vdb.qcow2"),
    ):
        run("qemu-img", "create", "-q", "-f", "qcow2", *options, path, 16 * MiB)
    Path(loader).write_bytes(bytes(64 << 10))
    Path(nvram).write_bytes(b"N" * (128 << 10))
    for path in (base, f"{store}/vdb.raw", loader):
        os.chmod(path, 0o666)  # noqa: S103 - libvirt gives QEMU neither a loader nor, before 10.10, a data file
    volume = """
        <disk type="volume" device="disk"><driver name="qemu" type="qcow2"/><source pool="vnb-source" volume="volume"/>
          <target dev="vdc" bus="virtio"/></disk>"""
    os_xml = f"""
        <loader readonly="yes" type="pflash">{loader}</loader>
        <nvram type="file"><source file="{nvram}"/></nvram>"""
    source = lab.connection.storagePoolCreateXML(
        f"<pool type='dir'><name>vnb-source</name><target><path>{pool}</path></target></pool>"
    )
    vm = restored = None
    try:
        disks = Disk("vda", 16 * MiB, backing=base), Disk("vdb", path=f"{store}/vdb.qcow2")
        vm = lab.domain(*disks, extra_xml=volume, os_xml=os_xml)
        vm.write("vda", 0, MiB)
        vm.write("vdb", MiB, MiB)
        directory, target = lab.new_directory("set"), lab.path("every kind")
        backup(lab, vm, "full", directory, "--no-freeze")
        done = lab.sh(f"{RESTORE} --define --name every-kind {directory} '{target}'")
        restored = lab.connection.lookupByName("every-kind")
        assert sorted(os.listdir(target)) == ["code.fd", "vars.fd", "vda.qcow2", "vdb.data", "vdb.qcow2", "vdc.qcow2"]
        assert f"vnb-apply: vdb: its data is in {target}/vdb.data: QEMU's user has to read and write it" in done.stderr
        if lab.connection.getLibVersion() < 10_010_000:  # libvirt gives it the qcow2 file alone
            owner = os.stat(f"{target}/vdb.data").st_uid
            assert owner != 0
            assert f"vnb-config: vdb: {target}/vdb.data is QEMU's now (user {owner})" in done.stderr
        assert os.stat(f"{target}/vdb.data").st_mode & 0o077 == 0
        restored.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)
        root = ElementTree.fromstring(restored.XMLDesc())  # noqa: S314 - libvirt's
        sources = [source.get("file") for source in root.findall("./devices/disk/source")]
        assert sources == [f"{target}/{name}.qcow2" for name in ("vda", "vdb", "vdc")]
        assert root.find("os/nvram/source").get("file") == f"{target}/vars.fd"
        assert root.findtext("os/loader") == f"{target}/code.fd"
    finally:
        if restored is not None:
            if restored.isActive():
                restored.destroy()
            restored.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_KEEP_NVRAM)
        if vm is not None:
            vm.remove()
        source.destroy()


def test_a_replacement_on_the_same_host(lab, machine):
    """Autostart as it was, and the checkpoints that are in the way named; the command that is named helps."""
    vm, directory = machine
    vm.handle.setAutostart(1)
    backup(lab, vm, "inc", directory, "--no-freeze --exclude vdb")
    vm.handle.setAutostart(0)
    done, target = restore(lab, machine, "--define", "--keep-identity", "--autostart", "--keep-graphics")
    assert "2 checkpoints" in done.stderr
    command = done.stderr.splitlines()[-1].partition("before the next backup: ")[2]
    assert vm.handle.autostart() == 1
    root = ElementTree.fromstring(vm.handle.XMLDesc())  # noqa: S314 - libvirt's
    assert root.find("./devices/disk/source").get("file") == f"{target}/vda.qcow2"
    assert root.find("./devices/interface/mac").get("address") == "52:54:00:11:22:33"
    lab.sh(command)
    assert vm.checkpoints() == []
    assert "full" in backup(lab, vm, "auto", directory, "--no-freeze").stderr
    vm.handle.setAutostart(0)


def test_a_restore_over_existing_images_keeps_the_checkpoints(lab, vm):
    """Their bitmaps are still in the images, and have recorded what the restore wrote: the next increment is right."""
    directory = lab.new_directory("set")
    vm.write_random("vda", 4 * MiB, 4 * MiB, seed=1)
    backup(lab, vm, "full", directory, "--no-freeze")
    first, = vm.checkpoints()
    vm.write_random("vda", 6 * MiB, 4 * MiB, seed=2)
    backup(lab, vm, "inc", directory, "--no-freeze")
    vm.write_random("vda", 20 * MiB, 2 * MiB, seed=3)
    vm.zero("vda", 4 * MiB, MiB)
    before = vm.checkpoints()
    vm.destroy()
    disks = " ".join(f"--disk {name}=qcow2:{disk.path}" for name, disk in vm.disks.items())
    target = lab.new_directory("restored")
    done = lab.sh(f"{RESTORE} --until {first} --keep-identity --define {disks} {directory} {target}")
    assert "checkpoints" not in done.stderr
    done = lab.sh(f"{RESTORE} --until {first} --keep-identity {disks} {directory} {target}")
    assert "checkpoints" not in done.stderr
    assert vm.checkpoints() == before
    vm.start()
    vm.write_random("vda", 5 * MiB, MiB, seed=4)
    done = backup(lab, vm, "auto", directory, "--no-freeze")
    assert "increment since" in done.stderr
    assert "full" not in done.stderr
    restores(lab, directory, vm.reference())


def test_a_domain_of_this_name_is_not_replaced(lab, machine):
    """It is found before anything is restored."""
    vm, _ = machine
    before = vm.handle.XMLDesc()
    done, target = restore(lab, machine, "--define", "--name", vm.name, check=False)
    assert done.returncode == 1
    assert f"vnb-config: {vm.name}: there is such a domain at " in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert vm.handle.XMLDesc() == before
    assert os.listdir(target) == []


def test_a_running_domain_is_not_replaced(lab, machine):
    vm, _ = machine
    vm.start(paused=True)
    done, target = restore(lab, machine, "--define", "--keep-identity", check=False)
    assert done.returncode == 1
    assert done.stderr == f"vnb-config: {vm.name}: is running: shut it down before it is replaced\n"
    assert os.listdir(target) == []


@pytest.mark.skipif(os.geteuid() != 0 or SSHD is None, reason="logs in as root, to an sshd")
def test_files_are_not_restored_here_for_a_domain_that_is_elsewhere(lab, machine):
    """Its nvram would be missing there."""
    vm, directory = machine
    target, name = lab.path("elsewhere"), f"{vm.name}-elsewhere"
    define = f"vnb-config --define --name {name} --disk-dir {target} -c qemu+ssh://root@hv/system"
    hypervisor = Hypervisor(lab)
    try:
        done = lab.sh(f"vnb-cat --head {directory} | {define}", env=hypervisor.env, check=False)
        assert done.returncode == 1
        assert "is another host, and files of the domain would be restored on this one: run vnb-config" in done.stderr
        assert not os.path.exists(target)
        lab.sh(f"vnb-cat --head {directory} | {define} --no-files", env=hypervisor.env)
        lab.connection.lookupByName(name).undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_KEEP_NVRAM)
    finally:
        hypervisor.close()


def test_what_libvirt_refuses_leaves_no_files(lab):
    target = lab.new_directory("restored")
    xml = "<domain type='qemu'><name>n</name><os><type>no such</type><nvram>/x</nvram></os></domain>"
    part = ["file", samples.part(path="/x")], b"abc"
    stream = samples.segment(samples.head(stage="disks", domain_xml=xml), [], part)
    done = lab.sh(f"vnb-config --define --disk-dir {target}", check=False, stdin=stream)
    assert done.returncode == 1
    assert done.stderr.startswith("vnb-config: restore_n: ")
    assert os.listdir(target) == []


def test_a_disk_on_an_nbd_server(lab, machine):
    """No file is looked for there, and libvirt takes it."""
    vm, directory = machine
    target, name = lab.new_directory("restored"), f"{vm.name}-nbd"
    disk = "--disk vda=nbd://localhost/vda"
    done = lab.sh(f"vnb-cat --head {directory} | vnb-config --define --name {name} --disk-dir {target} {disk}")
    domain = lab.connection.lookupByName(name)
    try:
        assert "vda" not in done.stderr
        source = ElementTree.fromstring(domain.XMLDesc()).find("./devices/disk/source")  # noqa: S314 - libvirt's
        assert source.attrib == {"protocol": "nbd", "name": "vda"}
    finally:
        domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_KEEP_NVRAM)


def test_the_storage_pool_sees_the_disks(lab, machine):
    vm, directory = machine
    target = lab.new_directory("restored")
    pool = lab.connection.storagePoolCreateXML(
        f"<pool type='dir'><name>vnb-pool</name><target><path>{target}</path></target></pool>"
    )
    try:
        lab.sh(f"{RESTORE} --define {directory} {target}")
        assert "vda.qcow2" in pool.listVolumes()
    finally:
        pool.destroy()
        lab.connection.lookupByName(f"restore_{vm.name}").undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_KEEP_NVRAM)
