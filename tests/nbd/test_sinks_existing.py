# SPDX-License-Identifier: LGPL-2.1-or-later
"""vnb-apply onto what exists: files, block devices, NBD exports. All of a disk is written there, zeroes too."""

import contextlib
import os
import subprocess

import applied
import makers
import pytest
import samples
from applied import qemu_img, qemu_nbd, refused, restored, same, segments_of
from xxhash import xxh3_64_intdigest

from vnb.format import writing
from vnb.format.frame import ZERO

PLAN = [{"vda": "64k:A 64k:- 64k:0 64k:? 512:B 1M:- 512:-"}, {"vda": "32k:0 64k:C 32k:- 64k:0 4k:. 4k:D 200k:."}]
EXPECTED = makers.images(PLAN)[-1]["vda"]
SIZE = len(EXPECTED)
OLD = b"old!"


@pytest.fixture(scope="module")
def content():
    return b"".join(segments_of(PLAN))


def old_file(path, size=SIZE):
    """A file that is full of what has to go."""
    path.write_bytes(OLD * (size // len(OLD)))
    return path


def test_raw_file(tmp_path, content):
    image = old_file(tmp_path / "image")
    restored(content, "--disk", f"vda={image}")
    assert image.read_bytes() == EXPECTED
    assert sorted(os.listdir(tmp_path)) == ["image"]


def test_raw_file_gives_back_what_is_zero(tmp_path):
    image = old_file(tmp_path / "image", 32 << 20)
    restored(b"".join(segments_of([{"vda": "64k:A 31M:- 960k:0"}])), "--disk", f"vda={image}")
    assert os.stat(image).st_blocks * 512 < 1 << 20


def test_larger_file_keeps_its_rest(tmp_path, content):
    image = old_file(tmp_path / "image", SIZE + 4096)
    restored(content, "--disk", f"vda={image}")
    assert image.read_bytes() == EXPECTED + OLD * 1024


def test_file_that_cannot_punch_holes(tmp_path, content):
    """ramfs has no fallocate(2): zeroes are written."""
    with applied.mounted(tmp_path / "fs", "size=16m", "ramfs"):
        image = old_file(tmp_path / "fs/image")
        restored(content, "--disk", f"vda={image}")
        assert image.read_bytes() == EXPECTED


def test_qcow2_file(tmp_path, content):
    image = tmp_path / "image"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", old_file(tmp_path / "old"), image)
    restored(content, "--disk", f"vda=qcow2:{image}")
    assert same(image, "qcow2", EXPECTED, tmp_path)


def test_qcow2_file_with_a_backing_file(tmp_path, content):
    """A hole of the disk must not let the old bytes below show."""
    old, image = old_file(tmp_path / "old"), tmp_path / "image"
    qemu_img("create", "-f", "qcow2", "-F", "raw", "-b", old, image)
    restored(content, "--disk", f"vda=qcow2:{image}")
    assert same(image, "qcow2", EXPECTED, tmp_path)
    assert old.read_bytes() == OLD * (SIZE // 4)


@pytest.mark.parametrize("pieces", ["4k:? 60k:0 ", "32k:? 32k:- "])
@pytest.mark.parametrize("how", ["qcow2", "nbd"])
def test_data_and_zeroes_in_one_cluster(tmp_path, pieces, how):
    """
    QEMU zeroes all of a cluster to which nothing was written, and may free it: a write on its way there is lost.

    Such is an image of which the guest, or a restore before, has zeroed what was allocated.
    """
    disk = pieces * 64
    content, expected = segments_of([{"vda": disk}])[0], makers.images([{"vda": disk}])[-1]["vda"]
    image = tmp_path / "image"
    qemu_img("create", "-f", "qcow2", image, len(expected))
    size = len(expected)
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", f"write 0 {size}", "-c", f"write -z 0 {size}", image], check=True,
                   stdout=subprocess.DEVNULL)
    if how == "nbd":
        with qemu_nbd(tmp_path, "--discard=unmap", "-f", "qcow2", image) as uri:
            restored(content, "--disk", f"vda={uri}")
    else:
        restored(content, "--disk", f"vda=qcow2:{image}")
    qemu_img("check", "-f", "qcow2", image)
    assert same(image, "qcow2", expected, tmp_path)


@pytest.mark.parametrize("cluster, pieces", [("64k", "4k:? 4k:0 "), ("2M", "512k:? 512k:0 ")])
def test_data_and_zeroes_in_one_cluster_of_a_raw_data_file(tmp_path, cluster, pieces):
    """There QEMU writes the zeroes, over what comes at the same time."""
    count, size = (16, "16M") if cluster == "2M" else (512, "4M")
    plan = [{"vda": f"{size}:A"}, {"vda": f"{size}:-"}, {"vda": pieces * count}]
    options = f"data_file=on,data_file_raw=on,cluster_size={cluster}"
    restored(b"".join(segments_of(plan)), "--image-options", options, tmp_path / "out")
    assert same(tmp_path / "out" / "vda.qcow2", "qcow2", makers.images(plan)[-1]["vda"], tmp_path)


@pytest.mark.parametrize("form", ["raw", "qcow2", "nbd"])
@pytest.mark.parametrize("update", [False, True])
def test_where_a_disk_grew_there_are_zeroes(tmp_path, form, update):
    """An increment says nothing of what nobody wrote to, and a larger target has anything there."""
    plan = [{"vda": "64k:A"}, {"vda": "4k:B 60k:. 4k:C 60k:."}]
    segments = segments_of(plan)
    image = old_file(tmp_path / "raw", 256 << 10)
    target = f"vda=raw:{image}"
    if form != "raw":
        image = tmp_path / "image"
        qemu_img("convert", "-f", "raw", "-O", "qcow2", tmp_path / "raw", image)
        target = f"vda=qcow2:{image}"
    with contextlib.ExitStack() as stack:
        if form == "nbd":
            target = f"vda={stack.enter_context(qemu_nbd(tmp_path, '-f', 'qcow2', image))}"
        if update:
            for segment in segments:
                restored(segment, "--update", "--disk", target, tmp_path / "copy")
        else:
            restored(b"".join(segments), "--disk", target)
    expected = bytes(makers.images(plan)[-1]["vda"]) + OLD * (128 << 8)
    assert same(image, "raw" if form == "raw" else "qcow2", expected, tmp_path)


def test_raw_file_on_which_a_guest_has_a_qcow2_image(tmp_path):
    """What we wrote there ourselves is no reason to doubt what the user said."""
    magic = b"QFI\xfb".ljust(4096, b"\1")
    image = tmp_path / "image"
    image.write_bytes(bytes(8192))
    disk = {"name": "vda", "size": 8192, "level": "full"}
    first, second = samples_of(magic, disk)
    restored(first + second, "--disk", f"vda={image}")
    assert image.read_bytes() == magic + bytes(4096) + b"\2" * 4096


def samples_of(magic, disk):
    """Two segments: a full with these first bytes, and an increment in which the disk grew by 4096 bytes of 2."""
    full, increment = makers.head(0), makers.head(1)
    found = []
    for head, size, frames in (
        (full, 8192, [(0, magic)]), (increment, 12288, [(8192, b"\2" * 4096)]),
    ):
        fd = os.memfd_create("segment")
        out = writing.Writer(fd).segment(head, [{**disk, "size": size, "level": "inc" if found else "full"}])
        for offset, content in frames:
            out.data(0, offset, len(content), "none", xxh3_64_intdigest(content), content)
        if not found:
            out.extents(0, [4096, 4096, ZERO])
        out.end()
        found.append(os.pread(fd, 1 << 20, 0))
        os.close(fd)
    return found


def test_relative_path(tmp_path, content):
    old_file(tmp_path / "vda:image")
    restored(content, "--disk", "vda=./vda:image", cwd=tmp_path)
    assert (tmp_path / "vda:image").read_bytes() == EXPECTED
    qemu_img("create", "-f", "qcow2", tmp_path / "nbd:image", SIZE)
    restored(content, "--disk", "vda=qcow2:nbd:image", cwd=tmp_path)
    assert same(tmp_path / "nbd:image", "qcow2", EXPECTED, tmp_path)


def test_one_disk_to_a_file_one_to_a_new_image(tmp_path):
    plan = [{"vda": "64k:A", "vdb": "64k:B", "vdc": "64k:C"}, {"vda": "64k:.", "vdb": "64k:D", "vdc": "64k:E"}]
    image = old_file(tmp_path / "image", 64 << 10)
    restored(b"".join(segments_of(plan)), "--disk", f"vdb={image}", "--disk", "vdc", tmp_path / "out")
    assert image.read_bytes() == b"D" * (64 << 10)
    assert os.listdir(tmp_path / "out") == ["vdc.qcow2"]


@pytest.mark.parametrize("format_", ["raw", "qcow2"])
def test_disk_that_grew(tmp_path, format_):
    """A file grows with it."""
    plan = [{"vda": "128k:A"}, {"vda": "64k:B 64k:. 64k:. 64k:C"}]
    image = old_file(tmp_path / "image", 128 << 10)
    if format_ == "qcow2":
        qemu_img("convert", "-f", "raw", "-O", "qcow2", image, tmp_path / "other")
        image = tmp_path / "other"
    restored(b"".join(segments_of(plan)), "--disk", f"vda={format_}:{image}")
    assert same(image, format_, makers.images(plan)[-1]["vda"], tmp_path)


GROWING = [{"vda": "128k:A", "vdb": "64k:A"}, {"vda": "64k:B 64k:. 64k:. 64k:C", "vdb": "64k:."},
           {"vda": "4k:D", "vdb": "4k:D", "vdc": "64k:E"}]


def chain_from(tmp_path):
    """The stream of vnb-cat, which knows all segments before it writes the first."""
    makers.make_set(tmp_path / "set", GROWING)
    return subprocess.run(["vnb-cat", tmp_path / "set"], stdout=subprocess.PIPE, check=True).stdout


@pytest.mark.parametrize("format_", ["raw", "qcow2"])
def test_what_is_too_small_for_a_later_segment_is_refused_before_the_first_write(tmp_path, format_):
    """It has the disk's old size: all of it would be written, and the restore refused then."""
    image, other, third = (old_file(tmp_path / name, size) for name, size in (
        ("image", 128 << 10), ("other", 64 << 10), ("third", 32 << 10)))
    if format_ == "qcow2":
        qemu_img("create", "-q", "-f", "qcow2", image, 128 << 10)
    content = chain_from(tmp_path)
    before = [path.read_bytes() for path in (image, other, third)]
    line = refused(content, "--disk", f"vda={format_}:{image}", "--disk", f"vdb={other}")
    assert line == f"{format_}:{image}: has 131072 bytes, disk vda needs 262144"
    line = refused(content, "--disk", f"vdb={other}", "--disk", f"vdc={third}")
    assert line == f"{third}: has 32768 bytes, disk vdc needs 65536"
    assert [path.read_bytes() for path in (image, other, third)] == before
    os.truncate(third, 64 << 10)
    restored(content, "--disk", f"vdb={other}", "--disk", f"vdc={third}")
    expected = makers.images(GROWING)[-1]
    assert (other.read_bytes(), third.read_bytes()) == (expected["vdb"], expected["vdc"])


def test_a_block_device_of_the_old_size_is_refused_before_the_first_write(tmp_path):
    content = chain_from(tmp_path)
    with loop_device(tmp_path / "backing", 128 << 10) as device:
        assert refused(content, "--disk", f"vda={device}") == f"{device}: has 131072 bytes, disk vda needs 262144"
    assert (tmp_path / "backing").read_bytes() == OLD * (1 << 15)


def test_the_sizes_to_come_are_in_a_stream_and_not_in_a_set(tmp_path):
    content = chain_from(tmp_path)
    heads = [head for head, *_ in samples.read(content)]
    assert [head.get("grows") for head in heads] == [{"vda": 256 << 10, "vdc": 64 << 10}, None, None]
    subprocess.run(["vnb-pack", "-o", tmp_path / "copy"], input=content, check=True)
    for path in (tmp_path / "copy").iterdir():
        assert "grows" not in samples.read(path.read_bytes())[0][0]
    one = subprocess.run(["vnb-cat", "--disk", "vdb", tmp_path / "set"], stdout=subprocess.PIPE, check=True).stdout
    assert not any("grows" in head for head, *_ in samples.read(one))


@contextlib.contextmanager
def loop_device(path, size, *options):
    """A block device, or skip."""
    path.write_bytes(OLD * (size // len(OLD)))
    done = subprocess.run(["losetup", *options, "--find", "--show", path], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("no loop devices here")
    device = done.stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


def test_block_device(tmp_path, content):
    with loop_device(tmp_path / "backing", 2 << 20) as device:
        restored(content, "--disk", f"vda={device}")
    assert (tmp_path / "backing").read_bytes() == EXPECTED + OLD * (((2 << 20) - SIZE) // 4)


def test_block_device_with_a_qcow2_image(tmp_path, content):
    with loop_device(tmp_path / "backing", 8 << 20) as device:
        qemu_img("create", "-f", "qcow2", device, SIZE)
        assert refused(content, "--disk", f"vda={device}") == (
            f"{device}: starts as qcow2 images do: say qcow2:{device} or raw:{device}"
        )
        restored(content, "--disk", f"vda=qcow2:{device}")
        assert same(device, "qcow2", EXPECTED, tmp_path)


def test_block_device_that_is_too_small(tmp_path, content):
    with loop_device(tmp_path / "backing", 1 << 20) as device:
        assert refused(content, "--disk", f"vda={device}") == f"{device}: has 1048576 bytes, disk vda needs {SIZE}"
    assert (tmp_path / "backing").read_bytes() == OLD * (1 << 18)


def test_block_device_that_is_mounted(tmp_path, content):
    with loop_device(tmp_path / "backing", 4 << 20) as device:
        subprocess.run(["mkfs.ext4", "-q", device], check=True)
        (tmp_path / "mnt").mkdir()
        if subprocess.run(["mount", device, tmp_path / "mnt"], capture_output=True, check=False).returncode:
            pytest.skip("mount is not allowed here")
        try:
            assert refused(content, "--disk", f"vda={device}") == f"{device}: Device or resource busy"
        finally:
            subprocess.run(["umount", tmp_path / "mnt"], check=True)


def test_block_device_that_is_read_only(tmp_path, content):
    with loop_device(tmp_path / "backing", 2 << 20, "--read-only") as device:
        assert refused(content, "--disk", f"vda={device}") == f"{device}: Read-only file system"


def test_file_that_a_loop_device_is_on(tmp_path, content):
    """What is mounted by `mount -o loop`: the kernel lets anybody write to the file behind it."""
    path = tmp_path / "backing"
    with loop_device(path, 2 << 20):
        os.link(path, tmp_path / "other name")
        for target in (path, tmp_path / "other name"):
            assert refused(content, "--disk", f"vda={target}") == f"{target}: is in use: a loop device is on it"
        assert path.read_bytes() == OLD * (1 << 19)
    restored(content, "--disk", f"vda={path}")


@pytest.mark.parametrize("format_", ["raw", "qcow2"])
def test_image_that_is_too_small(tmp_path, content, format_):
    """Nothing is written, to the other disk neither."""
    other = old_file(tmp_path / "other", 64 << 10)
    image = tmp_path / "image"
    qemu_img("create", "-f", format_, image, SIZE - 512)
    before = image.read_bytes()
    plan = [{"aaa": "64k:A", **PLAN[0]}]
    target = f"{format_}:{image}"
    line = refused(b"".join(segments_of(plan)), "--disk", f"vda={target}", "--disk", f"aaa={other}")
    assert line == f"{target}: has {SIZE - 512} bytes, disk vda needs {SIZE}"
    assert image.read_bytes() == before
    assert other.read_bytes() == OLD * (16 << 10)


def test_file_that_is_not_there_is_not_made(tmp_path, content):
    assert refused(content, "--disk", f"vda={tmp_path}/image") == f"{tmp_path}/image: No such file or directory"
    line = refused(content, "--disk", f"vda=qcow2:{tmp_path}/image")
    assert line == f"qcow2:{tmp_path}/image: No such file or directory"
    assert os.listdir(tmp_path) == []


def test_what_is_no_disk(tmp_path, content):
    assert refused(content, "--disk", f"vda={tmp_path}") == f"{tmp_path}: is neither a file nor a block device"
    assert refused(content, "--disk", "vda=/dev/null") == "/dev/null: is neither a file nor a block device"


def test_raw_content_is_not_taken_for_a_qcow2_image(tmp_path, content):
    """What a guest wrote to its first sector must not name files of ours."""
    image = tmp_path / "image"
    qemu_img("create", "-f", "qcow2", image, SIZE)
    with open(image, "r+b") as file:
        file.truncate(SIZE)
    before = image.read_bytes()
    assert refused(content, "--disk", f"vda={image}") == (
        f"{image}: starts as qcow2 images do: say qcow2:{image} or raw:{image}"
    )
    assert image.read_bytes() == before
    restored(content, "--disk", f"vda=raw:{image}")
    assert image.read_bytes() == EXPECTED


def test_qcow2_that_is_none(tmp_path, content):
    image = old_file(tmp_path / "image")
    assert refused(content, "--disk", f"vda=qcow2:{image}") == f"qcow2:{image}: Image is not in qcow2 format"


@pytest.mark.parametrize("format_", ["raw", "qcow2"])
def test_image_that_a_guest_runs_on(tmp_path, content, format_):
    """QEMU's locks are respected, in files that we write ourselves too."""
    image = tmp_path / "image"
    qemu_img("create", "-f", format_, image, SIZE)
    with qemu_nbd(tmp_path, "-f", format_, image):
        line = refused(content, "--disk", f"vda={format_}:{image}")
        assert line == f"{format_}:{image}: is in use: another process has its locks (is its domain running)"


def test_image_that_is_being_written_is_locked(tmp_path, content):
    """QEMU cannot start on it."""
    image = old_file(tmp_path / "image")
    process = applied.start("--disk", f"vda={image}")
    process.stdin.write(content[:-40])
    process.stdin.flush()
    applied.eventually(lambda: image.read_bytes()[:1] != b"o")
    done = subprocess.run(["qemu-io", "-f", "raw", "-c", "write 0 512", image], capture_output=True, check=False)
    assert b'Failed to get "write" lock' in done.stderr
    assert process.communicate(content[-40:], timeout=applied.DEADLINE) == (b"", b"")
    assert process.returncode == 0


def test_qemu_nbd(tmp_path, content):
    image = old_file(tmp_path / "image")
    with qemu_nbd(tmp_path, "-f", "raw", image) as uri:
        restored(content, "--disk", f"vda={uri}")
    assert image.read_bytes() == EXPECTED


def test_disk_that_is_dropped_stays_as_it_was(tmp_path):
    plan = [{"vda": "64k:A", "vdb": "64k:B"}, {"vda": "64k:C"}]
    vda, vdb = old_file(tmp_path / "vda", 64 << 10), old_file(tmp_path / "vdb", 64 << 10)
    done = applied.apply(b"".join(segments_of(plan)), "--disk", f"vda={vda}", "--disk", f"vdb={vdb}")
    assert done.returncode == 1
    left = f"{vdb} is left as it was at the restore point before"
    assert done.stderr == (
        f"vnb-apply: vdb: not part of restore point {makers.point(1)}: {left}\n"
        f"vnb-apply: --disk: no disk vdb at restore point {makers.point(1)}, there is vda\n"
    )
    assert vdb.read_bytes() == b"B" * (64 << 10)


def test_usage(content):
    for arguments, reason in [
        ([], "DIR is missing: new images are made there"),
        (["--disk", "vda"], "DIR is missing: new images are made there"),
        (["--disk", "=x", "."], '--disk: "=x" names no disk'),
        (["--disk", "a/b", "."], '--disk: "a/b" names no disk'),
        (["--disk", "vda=", "."], '--disk: "" names no file'),
        (["--disk", "vda=qcow2:", "."], '--disk: "qcow2:" names no file'),
        (["--disk", "vda", "--disk", "vda=x", "."], '--disk: "vda=x": the disk is there twice'),
        (["--disk", "vda=x", "--disk", "vdb=x"], '--disk: "vdb=x": the target is there twice'),
        (["--format", "vmdk", "."], '--format: "vmdk" is not qcow2 or raw'),
    ]:
        done = applied.apply(content, *arguments)
        assert done.returncode == 2
        assert done.stderr.startswith(f"vnb-apply: {reason}\nUsage:\n"), done.stderr
