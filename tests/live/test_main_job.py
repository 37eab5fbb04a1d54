# SPDX-License-Identifier: LGPL-2.1-or-later
"""The main job, end to end: a full backup and two increments of a running machine, restored and mapped."""

import os
import re
import stat
import subprocess

import pytest
from lab import Disk, MiB, compare

POINTS = ("full", "first", "second")
# What a backup of these machines is: they have no agent that could freeze them.
RUN = "vnb-checkpoint run {vm} --no-freeze --level {level} --set {set} -- 'vnb-extents | vnb-read | {pack}'"


class Story:
    """
    A machine's life with three backups in it. set (str): where they are; each segment is packed in another way.

    points (dict): the checkpoint of each of POINTS. references (dict): of each a dict of raw image by disk.
    """

    def __init__(self, lab):
        self.lab = lab
        self.set = lab.new_directory("set")
        self.points = {}
        self.references = {}
        self.vm = lab.domain(Disk("vda", 256 * MiB), Disk("vdb", 128 * MiB, discard=True))
        vm = self.vm
        vm.write_random("vda", 0, 24 * MiB, seed=1)
        vm.write("vda", 64 * MiB, 32 * MiB, pattern=0x22)
        vm.write_random("vdb", 3 * MiB + 512, 8 * MiB, seed=2)
        vm.write("vdb", 96 * MiB, 32 * MiB, pattern=0x33)
        self.backup("full", "full", "-z")
        vm.zero("vda", 64 * MiB, 4 * MiB)
        vm.zero("vda", 72 * MiB, 4 * MiB, unmap=True)
        vm.discard("vda", 80 * MiB, 4 * MiB)
        vm.discard("vdb", 96 * MiB, 16 * MiB)
        vm.write_random("vda", 20 * MiB, 8 * MiB, seed=3)
        vm.write_bytes("vdb", 127 * MiB + 512, b"a sector" * 64)
        self.backup("first", "inc", "")
        vm.write("vda", 66 * MiB, 1 * MiB, pattern=0x44)
        vm.zero("vda", 0, 1 * MiB)
        vm.write_random("vdb", 100 * MiB, 4 * MiB, seed=4)
        self.backup("second", "inc", "--compress zstd")

    def backup(self, point, level, packing):
        pack = f"vnb-pack {packing} -o {self.set}"
        self.lab.sh(RUN.format(vm=self.vm.name, level=level, set=self.set, pack=pack))
        self.points[point] = self.lab.sh(f"vnb-cat --base {self.set}").stdout.decode().strip()
        self.references[point] = self.vm.reference()

    def segments(self):
        """The files of the set, in the order of the points."""
        names = os.listdir(self.set)
        return [os.path.join(self.set, name) for point in POINTS for name in names if self.points[point] in name]


@pytest.fixture(scope="module")
def story(lab):
    story = Story(lab)
    yield story
    assert lab.leftovers() == []
    story.vm.remove()


@pytest.fixture
def target(lab):
    """A directory for what is restored; no lab.new_directory(), as it is not there yet."""
    return f"{lab.new_directory('target')}/restored"


def holds(image, offset, length, pattern):
    """Whether a qcow2 image has this byte everywhere in a range."""
    done = subprocess.run(["qemu-io", "-r", "-f", "qcow2", "-c", f"read -P {pattern} {offset} {length}", image],
                          capture_output=True, text=True)
    return done.returncode == 0 and "verification failed" not in done.stdout


@pytest.mark.parametrize("image_format", ["qcow2", "raw"])
@pytest.mark.parametrize("point", POINTS)
def test_each_point_is_restored_as_it_was(lab, story, target, point, image_format):
    until = f"--until {story.points[point]}"
    lab.sh(f"vnb-cat {until} {story.set} | vnb-apply --format {image_format} {target}")
    assert sorted(os.listdir(target)) == [f"vda.{image_format}", f"vdb.{image_format}"]
    for disk in story.vm.disks:
        compare(story.references[point][disk], f"{target}/{disk}.{image_format}", image_format)


def test_the_latest_point_is_the_default(lab, story, target):
    lab.sh(f"vnb-cat {story.set} | vnb-apply {target}")
    compare(story.references["second"]["vda"], f"{target}/vda.qcow2", "qcow2")


def test_one_disk_alone_is_restored(lab, story, target):
    lab.sh(f"vnb-cat --disk vdb {story.set} | vnb-apply {target}")
    assert os.listdir(target) == ["vdb.qcow2"]
    compare(story.references["second"]["vdb"], f"{target}/vdb.qcow2", "qcow2")


def test_what_the_guest_zeroed_is_zero_in_the_restored_disk(lab, story, target):
    """It is dirty and reads as zeroes: an increment that leaves it out brings the old bytes back."""
    lab.sh(f"vnb-cat --until {story.points['first']} {story.set} | vnb-apply {target}")
    assert holds(f"{target}/vda.qcow2", 64 * MiB, 4 * MiB, 0)  # written with zeroes
    assert holds(f"{target}/vda.qcow2", 68 * MiB, 4 * MiB, 0x22)  # left alone
    assert holds(f"{target}/vda.qcow2", 72 * MiB, 4 * MiB, 0)  # written with zeroes that may be a hole
    assert holds(f"{target}/vdb.qcow2", 96 * MiB, 16 * MiB, 0)  # trimmed


def test_files_concatenate_to_a_stream(lab, story, target):
    lab.sh(f"cat {' '.join(story.segments())} | vnb-apply {target}")
    compare(story.references["second"]["vda"], f"{target}/vda.qcow2", "qcow2")


def test_an_increment_holds_what_changed_and_no_more(story):
    full, first, second = (os.path.getsize(path) for path in story.segments())
    assert full > 32 * MiB
    assert 8 * MiB < first < 12 * MiB  # random data, and a few blocks that it touched
    assert 4 * MiB < second < 8 * MiB


def test_a_set_is_private(story):
    assert stat.S_IMODE(os.stat(story.set).st_mode) == 0o700
    assert {stat.S_IMODE(os.stat(path).st_mode) for path in story.segments()} == {0o600}
    assert len(os.listdir(story.set)) == len(POINTS)


@pytest.mark.parametrize("point", POINTS)
def test_the_map_reads_as_the_machine_did(lab, story, target, point):
    for disk in story.vm.disks:
        copy = f"nbdcopy \"$uri\" {target}.{disk}"
        lab.sh(f"vnb-map --disk {disk} --until {story.points[point]} --run '{copy}' {story.set}")
        compare(story.references[point][disk], f"{target}.{disk}", "raw")


def test_the_map_of_a_running_socket_serves_several_clients(lab, story, target):
    """--socket, until it is told to end; and nothing of it stays."""
    os.mkdir(target)
    socket = f"{target}/socket"
    lab.sh(f"""
        vnb-map --disk vda --socket {socket} {story.set} &
        map=$!
        until [ -S {socket} ]; do kill -0 $map || exit 1; done
        nbdcopy 'nbd+unix:///vda?socket={socket}' {target}/a & one=$!
        nbdcopy 'nbd+unix:///vda?socket={socket}' {target}/b || exit 1
        wait $one || exit 1
        kill $map
        wait $map
        [ $? = 143 ] || [ $? = 0 ]
    """)
    compare(story.references["second"]["vda"], f"{target}/a", "raw")
    compare(story.references["second"]["vda"], f"{target}/b", "raw")
    assert not os.path.exists(socket)


def test_the_stream_is_sound_to_its_last_byte(lab, story):
    for path in story.segments():
        assert lab.sh(f"vnb-verify < {path} | cmp - {path}").stdout == b""


def test_the_domain_is_in_the_stream(lab, story):
    text = lab.sh(f"vnb-cat {story.set} | vnb-dump --json | sed -n 1p").stdout.decode()
    assert story.vm.uuid in text
    assert f"<name>{story.vm.name}</name>" in text


def test_the_last_points_checkpoint_stays_for_the_next_increment(story):
    assert story.points["second"] in story.vm.checkpoints()


def test_streams_in_files_need_no_set(lab, vm, target):
    """What was saved is known from the heads that vnb-checkpoint keeps; the files are joined by cat(1)."""
    files = lab.new_directory("files")
    os.mkdir(target)
    for number, level in enumerate(("full", "inc", "inc")):
        vm.write_random("vda", number * 2 * MiB, 3 * MiB, seed=number)
        vm.zero("vdb", (8 + number) * MiB, MiB // 2)
        lab.sh(f"vnb-checkpoint run {vm.name} --no-freeze --level {level} --destination files --"
               f" 'vnb-extents | vnb-read | vnb-pack -z > {files}/{number}.vnb'")
    reference = vm.reference()
    lab.sh(f"cat {files}/*.vnb | vnb-apply {target}")
    for disk in vm.disks:
        compare(reference[disk], f"{target}/{disk}.qcow2", "qcow2")


def test_the_receiver_names_the_parent(lab, vm, target):
    """A set that vnb-checkpoint cannot see, as on another machine: it says itself what --base is."""
    set_ = lab.new_directory("set")
    lab.sh(f"vnb-checkpoint run {vm.name} --no-freeze --level full --destination there --"
           f" 'vnb-extents | vnb-read | vnb-pack -o {set_}'")
    vm.write("vda", 50 * MiB, 1 * MiB)
    lab.sh(f"vnb-checkpoint run {vm.name} --no-freeze --level inc --base $(vnb-cat --base {set_}) --"
           f" 'vnb-extents | vnb-read | vnb-pack -z | vnb-pack -o {set_}'")
    reference = vm.reference()
    lab.sh(f"vnb-cat {set_} | vnb-apply --format raw {target}")
    for disk in vm.disks:
        compare(reference[disk], f"{target}/{disk}.raw", "raw")


def test_begin_and_commit_are_the_same_steps(lab, vm, target):
    set_ = lab.new_directory("set")
    for level in ("full", "inc"):
        lab.sh(f"vnb-checkpoint begin {vm.name} --no-freeze --level {level} --set {set_} |"
               f" vnb-extents | vnb-read | vnb-pack -z -o {set_} && vnb-checkpoint commit {vm.name}")
        vm.write("vda", 50 * MiB, 1 * MiB)
    assert lab.sh(f"vnb-cat --base {set_}").stdout.decode().strip() in vm.checkpoints()


# What is refused, or goes wrong. Each: one line, status 1, and nothing left but what was there.


def refused(lab, script, pattern, status=1):
    """Run what has to fail, and return its stderr: no traceback, and one line that matches."""
    done = lab.sh(script, check=False, timeout=25)  # libvirt alone takes 30 seconds to say that a job runs
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    assert re.search(pattern, done.stderr, re.MULTILINE), done.stderr
    return done.stderr


def start(vm, set_, level="full", pack=None):
    """A whole backup, as a script."""
    return RUN.format(vm=vm.name, level=level, set=set_, pack=pack or f"vnb-pack -o {set_}")


def test_a_domain_that_does_not_exist(lab):
    line = refused(lab, "vnb-checkpoint begin no-such-vm --level copy > /dev/null", "^vnb-checkpoint: no-such-vm: ")
    assert line.count("\n") == 1


def test_a_domain_with_a_job_is_told_at_once(lab, vm):
    lab.sh(f"vnb-checkpoint begin {vm.name} --no-freeze --level full --destination x > /dev/null")
    checkpoints = vm.checkpoints()
    try:
        line = refused(lab, f"vnb-checkpoint begin {vm.name} --no-freeze --level full --destination x > /dev/null",
                       f"^vnb-checkpoint: {vm.name}: ")
        assert line.count("\n") == 1
        assert vm.has_job()
        assert vm.checkpoints() == checkpoints
    finally:
        lab.sh(f"vnb-checkpoint abort {vm.name}")
    assert vm.checkpoints() == []


def test_a_job_of_another_tool_is_left_alone(lab, vm):
    vm.handle.backupBegin(
        f"""<domainbackup mode="pull"><server transport="unix" socket="{vm.private_directory()}/x"/><disks>
        <disk name="vda" backup="yes" type="file"><scratch file="{vm.directory}/scratch"/></disk></disks>
        </domainbackup>""", None,
    )
    try:
        refused(lab, f"vnb-checkpoint begin {vm.name} --no-freeze --level full --destination x > /dev/null",
                f"^vnb-checkpoint: {vm.name}: ")
        assert vm.has_job()
    finally:
        vm.handle.abortJob()
        lab.sh(f"until ! [ -e {vm.directory}/scratch ]; do rm -f {vm.directory}/scratch; done")


@pytest.mark.parametrize("disk", [
    Disk("vda", 8 * MiB, format="raw"),
    Disk("vda", 8 * MiB, compat="0.10"),
], ids=["raw", "qcow2-version-2"])
def test_a_disk_that_can_hold_no_bitmap(lab, disk):
    vm = lab.domain(disk)
    try:
        refused(lab, f"vnb-checkpoint begin {vm.name} --no-freeze --level full --destination x > /dev/null",
                "^vnb-checkpoint: .*vda")
        assert lab.leftovers() == []
        assert vm.checkpoints() == []
    finally:
        vm.remove()


def test_an_increment_without_a_full_one(lab, vm):
    refused(lab, start(vm, lab.path("no-set"), "inc"), "^vnb-checkpoint: ")
    assert vm.checkpoints() == []


def test_a_command_that_fails_leaves_the_chain_as_it_was(lab, vm, target):
    """The next increment has all changes since the last one that was stored."""
    set_ = lab.new_directory("set")
    lab.sh(start(vm, set_))
    before = vm.checkpoints()
    vm.write("vda", 40 * MiB, 1 * MiB)
    refused(lab, start(vm, set_, "inc", "cat > /dev/null; exit 3"), "^vnb-checkpoint: ")
    assert vm.checkpoints() == before
    vm.write("vdb", 40 * MiB, 1 * MiB)
    lab.sh(start(vm, set_, "inc"))
    reference = vm.reference()
    lab.sh(f"vnb-cat {set_} | vnb-apply {target}")
    for disk in vm.disks:
        compare(reference[disk], f"{target}/{disk}.qcow2", "qcow2")


def test_a_reader_that_closes_the_pipe(lab, vm):
    """The stages die by SIGPIPE, the backup is aborted."""
    set_ = lab.new_directory("set")
    refused(lab, start(vm, set_, pack="head -c 100000 > /dev/null"), "^vnb-checkpoint: ")
    assert vm.checkpoints() == []
    assert os.listdir(set_) == []


def test_qemu_dies_midway(lab, vm):
    """Nothing is stored, and the stages end by themselves."""
    set_ = lab.new_directory("set")
    vm.write_random("vda", 8 * MiB, 48 * MiB, seed=7)
    pack = f"{{ head -c 1000000; kill -9 {vm.qemu_pid()}; cat; }} | vnb-pack -o {set_}"
    text = refused(lab, start(vm, set_, pack=pack), "^vnb-read: ")
    assert "vnb-pack: " in text
    assert os.listdir(set_) == []


needs_mount = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system: needs root")


@needs_mount
def test_a_set_on_a_full_disk(lab, vm):
    small = lab.new_directory("small")
    lab.sh(f"mount -t tmpfs -o size=1M tmpfs {small}")
    try:
        refused(lab, start(vm, f"{small}/set"), r"^vnb-pack: .*No space left on device$")
        assert os.listdir(f"{small}/set") == []
    finally:
        lab.sh(f"umount {small}")
    assert vm.checkpoints() == []


@needs_mount
def test_a_set_that_is_read_only(lab, vm):
    set_ = lab.new_directory("set")
    lab.sh(f"mount -t tmpfs -o ro tmpfs {set_}")
    try:
        refused(lab, start(vm, set_), r"Read-only file system$")
    finally:
        lab.sh(f"umount {set_}")
    assert vm.checkpoints() == []


def test_a_target_that_has_the_file_already(lab, story, target):
    os.mkdir(target)
    with open(f"{target}/vdb.qcow2", "w") as file:
        file.write("mine")
    refused(lab, f"vnb-cat {story.set} | vnb-apply {target}", f"^vnb-apply: {target}/vdb.qcow2: ")
    assert os.listdir(target) == ["vdb.qcow2"]
    assert os.path.getsize(f"{target}/vdb.qcow2") == 4


@needs_mount
def test_a_target_on_a_full_disk(lab, story, target):
    os.mkdir(target)
    lab.sh(f"mount -t tmpfs -o size=8M tmpfs {target}")
    try:
        refused(lab, f"vnb-cat {story.set} | vnb-apply {target}", "^vnb-apply: .*No space left on device$")
        assert os.listdir(target) == []
    finally:
        lab.sh(f"umount {target}")


def test_an_increment_without_its_full(lab, story, target):
    first = story.segments()[1]
    refused(lab, f"vnb-apply {target} < {first}", "^vnb-apply: ")
    assert not os.path.exists(target)
    other = lab.path("other-set")
    refused(lab, f"vnb-pack -o {other} < {first}", "^vnb-pack: ")
    assert not os.path.isdir(other) or os.listdir(other) == []


def test_segments_in_the_wrong_order(lab, story, target):
    full, first, second = story.segments()
    refused(lab, f"cat {full} {second} {first} | vnb-apply {target}", "^vnb-apply: ")
    assert not os.path.exists(target) or os.listdir(target) == []
