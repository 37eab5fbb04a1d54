# SPDX-License-Identifier: LGPL-2.1-or-later
"""Domains that are off, started paused, paused; images without libvirt: the same levels, the same chains."""

import os
import signal

import libvirt
import pytest
from backups import backup, levels, record, restores, snapshot, tip
from lab import MiB, run, wait_for


@pytest.fixture
def directory(lab):
    return lab.new_directory("set")


def raw_copy(lab, image):
    """The content of an image that nobody uses, by qemu-img."""
    path = os.path.join(lab.new_directory("copy"), "raw")
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, path)
    return path


def references(lab, vm):
    return {name: raw_copy(lab, disk.path) for name, disk in vm.disks.items()}


def test_one_chain_goes_on_whether_the_domain_runs_or_not(lab, vm, directory):
    points = []

    def take(level, offset):
        backup(lab, vm, level, directory, store="vnb-extents | vnb-read | vnb-pack -o {set}")
        points.append((tip(lab, directory), vm.reference() if vm.is_active() else references(lab, vm)))

    take("full", 0)
    vm.write("vda", 4 * MiB, MiB)
    vm.destroy()
    take("inc", 0)
    take("inc", 0)
    vm.start()
    vm.write("vda", 6 * MiB, MiB)
    vm.zero("vdb", 8 * MiB, MiB, unmap=True)
    take("inc", 0)
    vm.write("vdb", 20 * MiB, MiB)
    vm.destroy()
    take("auto", 0)
    vm.start()
    take("auto", 0)
    assert levels(directory) == ["full", *["inc"] * 5]
    for point, reference in points:
        restores(lab, directory, reference, point)


def test_a_chain_that_begins_offline(lab, vm, directory):
    vm.destroy()
    backup(lab, vm, "full", directory)
    vm.start()
    vm.write("vda", 30 * MiB, MiB)
    assert "full in this" not in backup(lab, vm, "inc", directory).stderr
    restores(lab, directory, vm.reference())


def test_copy_and_diff_offline_leave_no_bitmap(lab, vm, directory):
    backup(lab, vm, "full", directory)
    vm.write("vda", 30 * MiB, MiB)
    vm.destroy()
    before = run("qemu-img", "info", "--output=json", vm.disks["vda"].path)
    backup(lab, vm, "diff", directory)
    restores(lab, directory, references(lab, vm))
    backup(lab, vm, "copy", lab.new_directory("copies"))
    assert run("qemu-img", "info", "--output=json", vm.disks["vda"].path) == before


def test_over_a_snapshot_a_bitmap_counts_as_the_union_of_its_layers(lab, vm, directory):
    """qemu-nbd shows what changed since the snapshot alone; the older changes are in the layer below."""
    backup(lab, vm, "full", directory)
    vm.write("vda", 30 * MiB, MiB)
    vm.disks["vda"].path = snapshot(lab, vm)
    vm.write("vda", 40 * MiB, MiB)
    vm.destroy()
    done = backup(lab, vm, "inc", directory)
    assert "full in this increment" not in done.stderr
    restores(lab, directory, references(lab, vm))
    info = run("qemu-img", "info", "--output=json", vm.disks["vda"].path)
    assert ".union" not in info


def test_a_union_that_a_dead_keeper_left_hinders_no_backup_of_the_guest_that_was_started(lab, vm, directory):
    """It cannot be removed from an image that is in use, and need not be."""
    backup(lab, vm, "full", directory)
    vm.disks["vda"].path = snapshot(lab, vm)
    vm.write("vda", 40 * MiB, MiB)
    vm.destroy()
    lab.sh(f"vnb-checkpoint begin {vm.name} --level inc --set {directory} > {lab.path('begun')}")
    os.kill(record(lab, vm)["owner"]["pid"], signal.SIGKILL)
    wait_for(lambda: not lab.processes(), "the end of the servers")
    vm.start()
    done = backup(lab, vm, "inc", directory)
    assert f".union stays in {vm.disks['vda'].path}, which the guest uses by now" in done.stderr
    restores(lab, directory, vm.reference())
    vm.destroy()
    lab.sh(f"vnb-checkpoint cleanup {vm.name} --set {directory} --force")
    assert ".union" not in run("qemu-img", "info", "--output=json", vm.disks["vda"].path)


def test_offline_after_a_hard_death_is_full(lab, vm, directory):
    backup(lab, vm, "full", directory)
    vm.write("vda", 30 * MiB, MiB)
    vm.kill()
    done = backup(lab, vm, "inc", directory, check=False)
    assert done.returncode == 1
    assert "no disk has a sound bitmap that goes back to a restore point: a full backup is needed first" in done.stderr
    backup(lab, vm, "auto", directory)
    assert levels(directory) == ["full", "full"]
    restores(lab, directory, references(lab, vm))


def test_a_server_that_is_left_behind_ends_with_its_keeper(lab, vm, directory):
    """It holds the images: the domain would not start."""
    vm.destroy()
    lab.sh(f"vnb-checkpoint begin {vm.name} --level full --set {directory} > {lab.path('begun')}")
    keepers = [pid for pid, line in lab.processes().items() if "vnb-checkpoint" in line]
    assert [line for line in lab.processes().values() if line.startswith("qemu-nbd")]
    with pytest.raises(libvirt.libvirtError, match="lock"):
        vm.start()
    for pid in keepers:
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not lab.processes(), "the end of the servers")
    vm.start()
    lab.sh(f"vnb-checkpoint abort {vm.name}")
    assert vm.checkpoints() == []
    assert vm.bitmaps("vda") == []


def test_begin_and_abort_offline_leave_the_images_as_they_were(lab, vm, directory):
    vm.destroy()
    lab.sh(f"vnb-checkpoint begin {vm.name} --level full --set {directory} > {lab.path('begun')}")
    lab.sh(f"vnb-checkpoint abort {vm.name}")
    assert vm.checkpoints() == []
    assert "bitmaps" not in run("qemu-img", "info", "--output=json", vm.disks["vda"].path)


def test_start_paused_and_gone_again(lab, vm, directory):
    vm.destroy()
    backup(lab, vm, "full", directory, "--start-paused")
    assert not vm.is_active()
    vm.start()
    vm.write("vda", 30 * MiB, MiB)
    vm.destroy()
    backup(lab, vm, "inc", directory, "-S")
    assert not vm.is_active()
    restores(lab, directory, references(lab, vm))


def test_start_paused_ends_with_a_keeper_that_is_killed(lab, vm, directory):
    vm.destroy()
    lab.sh(f"vnb-checkpoint begin {vm.name} -S --level full --set {directory} > {lab.path('begun')}")
    assert vm.state() == libvirt.VIR_DOMAIN_PAUSED
    for pid, line in lab.processes().items():
        if "vnb-checkpoint" in line:
            os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not vm.is_active(), "the end of the domain")
    lab.sh(f"vnb-checkpoint abort {vm.name}")
    assert vm.checkpoints() == []


def begin_paused_and_kill_keeper(lab, vm, directory):
    lab.sh(f"vnb-checkpoint begin {vm.name} -S --level full --set {directory} > {lab.path('begun')}")
    os.kill(record(lab, vm)["owner"]["pid"], signal.SIGKILL)


@pytest.mark.parametrize("paused", [False, True])
@pytest.mark.parametrize(
    "command", ["cleanup --set {set} {vm}", "abort {vm}", "run --level full --destination x --no-proof {vm} -- cat"]
)
def test_a_guest_that_was_started_for_its_work_is_not_destroyed(lab, vm, directory, command, paused):
    """libvirt ends what the dead keeper started: what runs when its record is found may be somebody else's."""
    vm.destroy()
    begin_paused_and_kill_keeper(lab, vm, directory)
    wait_for(lambda: not vm.is_active(), "the end of the domain")
    vm.start(paused)
    qemu = vm.qemu_pid()
    lab.sh(f"vnb-checkpoint {command.format(set=directory, vm=vm.name)} > {lab.path('out')}")
    assert record(lab, vm) is None
    assert vm.is_active()
    assert vm.qemu_pid() == qemu


def test_start_paused_is_destroyed_after_libvirtd_was_restarted(lab, vm, directory):
    """The new one does not know that it is to end with a connection."""
    vm.destroy()
    lab.sh(f"vnb-checkpoint begin {vm.name} -S --level full --set {directory} > {lab.path('begun')}")
    lab.restart_libvirtd()
    lab.sh(f"vnb-checkpoint abort {vm.name}")
    assert not vm.is_active()


def test_start_paused_and_resumed_is_in_use(lab, vm, directory):
    vm.destroy()
    lab.sh(f"vnb-checkpoint begin {vm.name} -S --level full --set {directory} > {lab.path('begun')}")
    lab.restart_libvirtd()
    vm.resume()
    lab.sh(f"vnb-checkpoint abort {vm.name}")
    assert vm.state() == libvirt.VIR_DOMAIN_RUNNING
    assert not vm.has_job()


def test_a_paused_domain_and_pause(lab, vm, directory):
    vm.pause()
    backup(lab, vm, "full", directory)
    assert vm.state() == libvirt.VIR_DOMAIN_PAUSED
    vm.resume()
    backup(lab, vm, "inc", directory, "--pause")
    assert vm.state() == libvirt.VIR_DOMAIN_RUNNING
    restores(lab, directory, vm.reference())


def disk_xml(format_, path, in_source="", below=""):
    return f"""<disk type="file" device="disk"><driver name="qemu" type="{format_}"/>
        <source file="{path}">{in_source}</source>{below}<target dev="vda" bus="virtio"/></disk>"""


@pytest.fixture
def place(lab):
    """A directory for images that a machine's user makes, where QEMU's user may write to all of them."""
    made = lab.new_directory("images")
    os.chmod(made, 0o777)  # noqa: S103 - QEMU's user
    mask = os.umask(0)
    yield made
    os.umask(mask)


def is_read_by_qemu_only(lab, disk, what, bytes_, options=""):
    """Off, the backup of a machine with this disk is refused; started paused, these are the first bytes it takes."""
    vm = lab.domain(extra_xml=disk, start=False)
    sets = lab.new_directory("set"), lab.new_directory("set")
    done = backup(lab, vm, "copy", sets[0], options, check=False)
    assert done.returncode == 1
    why = f"{what} can be read while its domain runs only (--start-paused)"
    assert done.stderr == f"vnb-checkpoint: {vm.name}: vda: {why}\n"
    assert os.listdir(sets[0]) == []
    backup(lab, vm, "copy", sets[1], f"{options} --start-paused")
    restored = lab.new_directory("restored")
    lab.sh(f"vnb-cat {sets[1]} | vnb-apply --format raw {restored}")
    with open(os.path.join(restored, "vda.raw"), "rb") as file:
        assert file.read(len(bytes_)) == bytes_
    vm.remove()


def test_a_slice_of_a_file_is_read_by_qemu_only(lab, place):
    image = os.path.join(place, "whole.raw")
    with open(image, "wb") as file:
        file.write(b"\1" * MiB + b"\2" * MiB)
    slices = f"<slices><slice type='storage' offset='{MiB}' size='{MiB}'/></slices>"
    is_read_by_qemu_only(lab, disk_xml("raw", image, slices), "a disk that is a slice of a file", b"\2" * MiB)


def test_an_encrypted_disk_is_read_by_qemu_only(lab, place):
    """A raw image with LUKS in it looks like any other."""
    secret = lab.connection.secretDefineXML("<secret ephemeral='no' private='yes'/>")
    secret.setValue(b"s3cret", 0)
    image = os.path.join(place, "luks.raw")
    given = "--object secret,id=s,data=s3cret"
    # It measures how fast it derives keys, and gives up where the kernel has counted no time for that.
    lab.sh(f"""
        until said=$(qemu-img create -q {given} -f luks -o key-secret=s,iter-time=10 {image} 4M 2>&1); do
            [[ $said == *"Unable to get accurate CPU usage"* ]] || exit
        done
        qemu-io {given} -c "write -P 7 0 1M" --image-opts driver=luks,key-secret=s,file.filename={image}
    """)
    encryption = f"<encryption format='luks'><secret type='passphrase' uuid='{secret.UUIDString()}'/></encryption>"
    disk = disk_xml("raw", image, encryption)
    is_read_by_qemu_only(lab, disk, "an encrypted disk", b"\7" * MiB, "--allow-plaintext")
    secret.undefine()


@pytest.fixture
def layers(place):
    """Paths: a qcow2 image, the image that its header says is below it, and another one for that."""
    top, base, other = (os.path.join(place, name) for name in ("top.qcow2", "base.qcow2", "other.qcow2"))
    for pattern, image in ((1, base), (2, other)):
        run("qemu-img", "create", "-q", "-f", "qcow2", image, "4M")
        write(image, pattern, 0, MiB)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", top)
    return top, base, other


def backing(path, format_="qcow2", below=""):
    return f"<backingStore type='file'><format type='{format_}'/><source file='{path}'/>{below}</backingStore>"


@pytest.mark.parametrize("below, bytes_", [("", b"\2"), ("<backingStore/>", b"\0")])
def test_a_chain_that_the_xml_has_is_read_by_qemu_only(lab, layers, below, bytes_):
    """libvirt obeys the XML, whatever the image's header says."""
    top, _base, other = layers
    is_read_by_qemu_only(
        lab, disk_xml("qcow2", top, below=below or backing(other)),
        "a disk with other images below it in the domain's XML than in its own header", bytes_ * MiB,
    )


def test_a_chain_that_the_xml_has_as_the_header_does(lab, layers, directory):
    top, base, _other = layers
    os.symlink(base, f"{base}.link")
    for below in (backing(base), backing(f"{base}.link", below="<backingStore/>")):
        vm = lab.domain(extra_xml=disk_xml("qcow2", top, below=below), start=False)
        backup(lab, vm, "full", lab.new_directory("set"))
        vm.remove()
    vm = lab.domain(extra_xml=disk_xml("qcow2", top, below=backing(base, "raw")), start=False)
    assert backup(lab, vm, "copy", directory, check=False).returncode == 1
    vm.remove()


def test_image_files_without_libvirt(lab, directory):
    image = lab.path("disk with space.qcow2")
    run("qemu-img", "create", "-q", "-f", "qcow2", image, "64M")
    script = (
        "vnb-checkpoint run --image 'vda={image}' --level {level} --set {set} -- "
        "'vnb-extents | vnb-read | vnb-pack -o {set}'"
    )
    points = []
    for step, level in enumerate(["full", "inc", "auto", "diff", "inc"]):
        run("qemu-io", "-f", "qcow2", "-c", f"write -P {step + 1} {step}M 2M", "-c", f"write -z {step}M 64k", image)
        lab.sh(script.format(image=image, level=level, set=directory))
        points.append(raw_copy(lab, image))
    names = sorted(os.listdir(directory))
    assert [name.split(".")[-2] for name in names] == ["full", "inc", "inc", "diff", "inc"]
    for name, reference in zip(names, points):
        restores(lab, directory, {"vda": reference}, name.rsplit(".", 2)[0])
    os.unlink(image)
    assert lab.leftovers() == []


def image_backup(lab, images, level, directory):
    """One backup of images ({disk: path}) without libvirt."""
    given = " ".join(f"--image {name}={path}" for name, path in images.items())
    return lab.sh(
        f"vnb-checkpoint run {given} --level {level} --set {directory} -- "
        f"'vnb-extents | vnb-read | vnb-pack -o {directory}'"
    )


def write(image, pattern, offset, length):
    run("qemu-io", "-f", "qcow2", "-c", f"write -P {pattern} {offset} {length}", image)


@pytest.fixture
def two_images(lab):
    """{"vda": path, "vdb": path} of two qcow2 images with other data."""
    made = lab.new_directory("images")
    images = {name: os.path.join(made, f"{name}.qcow2") for name in ("vda", "vdb")}
    for number, image in enumerate(images.values()):
        run("qemu-img", "create", "-q", "-f", "qcow2", image, "16M")
        write(image, 1 + number, 0, MiB)
    return images


def test_a_bitmap_that_does_not_record_is_of_no_use(lab, two_images, directory):
    """It is there and consistent, but what was written since it was disabled is not in it."""
    image_backup(lab, two_images, "full", directory)
    run("qemu-img", "bitmap", "--disable", two_images["vda"], tip(lab, directory))
    write(two_images["vda"], 3, 0, MiB)
    done = image_backup(lab, two_images, "inc", directory)
    assert "vda: full in this increment: no sound bitmap of it goes back to " in done.stderr
    assert "vdb: full" not in done.stderr
    restores(lab, directory, {name: raw_copy(lab, image) for name, image in two_images.items()})


def exchange(one, other):
    """What is at one path is at the other, and the other way round."""
    os.rename(one, f"{one}.away")
    os.rename(other, one)
    os.rename(f"{one}.away", other)


def test_files_that_have_changed_places_under_the_same_paths(lab, two_images, directory):
    """Their bitmaps have one name, and each tells of the changes of the other disk."""
    def take():
        said = image_backup(lab, two_images, "inc", directory).stderr
        restores(lab, directory, {name: raw_copy(lab, image) for name, image in two_images.items()})
        return said

    image_backup(lab, two_images, "full", directory)
    full = tip(lab, directory)
    exchange(*two_images.values())
    said = take()
    for name, other in (("vda", "vdb"), ("vdb", "vda")):
        assert f"{name}: full in this increment: its image is the file that {other} had at {full}" in said
    write(two_images["vda"], 3, 2 * MiB, MiB)
    assert "full in this" not in take()
    # A new file with all that was in the old one is no other disk's.
    run("cp", two_images["vda"], f"{two_images['vda']}.new")
    os.rename(f"{two_images['vda']}.new", two_images["vda"])
    assert "full in this" not in take()


def test_an_image_in_use_is_refused(lab, vm, directory):
    image = vm.disks["vda"].path
    done = lab.sh(f"vnb-checkpoint begin --image vda={image} --level full --set {directory} | cat", check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("vnb-checkpoint: vda: ")
    assert "lock" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_domain_that_is_not_there(lab):
    done = lab.sh("vnb-checkpoint begin nobody --level full --destination x | cat", check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("vnb-checkpoint: nobody: no such domain at qemu:///system (virsh ")
