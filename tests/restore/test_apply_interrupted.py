# SPDX-License-Identifier: LGPL-2.1-or-later
"""vnb-apply that is stopped: nothing under a final name, nothing left, or what is left is removed by the next one."""

import errno
import os
import random
import signal
import subprocess
import sys
import time

import applied
import makers
import pytest
import samples
from applied import eventually, restored, segments_of

from vnb.base.errors import Error
from vnb.format import stream
from vnb.qemu import image_writer
from vnb.restore.imagedir import ImageDirectory
from vnb.restore.restore import Restore
from vnb.restore.targets import Recipe
from vnb.restore.writer import Buffers

PLAN = [{"vda": "512k:? 64k:-", "vdb": "512k:A"}, {"vda": "64k:B", "vdb": "64k:0"}]


@pytest.fixture
def half(tmp_path):
    """(process, directory, the rest of its input): a vnb-apply in the middle of the second segment."""
    first, second = segments_of(PLAN)
    out = tmp_path / "out"
    processes = []

    def start(*arguments):
        process = applied.start(*arguments, out)
        processes.append(process)
        process.stdin.write(first + second[:-50])
        process.stdin.flush()
        disks = 1 if "--disk" in arguments else 2
        eventually(lambda: out.exists() and len(list(out.glob(".*/vd*"))) == disks)
        return process, out, second[-50:]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("format_", ["qcow2", "raw"])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal(half, format_, signum):
    """The directory was made for it, so it goes as well."""
    process, out, _ = half("--format", format_)
    process.send_signal(signum)
    _, stderr = process.communicate(timeout=applied.DEADLINE)
    assert process.returncode == -signum
    assert stderr.decode() == ("" if signum == signal.SIGINT else f"vnb-apply: ended by {signum.name}\n")
    assert not out.exists()
    eventually(lambda: applied.processes_with(out) == [])


@pytest.mark.usefixtures("killed")
@pytest.mark.parametrize("format_", ["qcow2", "raw"])
def test_killed(half, format_, tmp_path):
    """What it was making has no final name, its server ends by itself, and the next run clears up."""
    process, out, _ = half("--format", format_)
    assert os.listdir(out) != []
    process.kill()
    process.communicate()
    assert [name for name in os.listdir(out) if not name.startswith(".")] == []
    eventually(lambda: applied.processes_with(out) == [])
    restored(b"".join(segments_of(PLAN)), "--format", format_, out)
    assert sorted(os.listdir(out)) == [f"vda.{format_}", f"vdb.{format_}"]
    for name, content in makers.images(PLAN)[-1].items():
        assert applied.same(out / f"{name}.{format_}", format_, content, tmp_path)


TWO = [{"vda": "64k:A 64k:-", "vdb": "64k:B"}]
RAW = Recipe("raw")
OUTSIDE = Recipe("qcow2", {"data_file": "on", "data_file_raw": "on"})
RECIPES = pytest.mark.parametrize("recipe", [RAW, OUTSIDE], ids=["raw", "data file"])
LINKS = pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])


def run(content, directory, recipe=RAW):
    """Restore within this process."""
    buffers = Buffers()
    with samples.memory(content) as fd, Restore(str(directory), recipe, {}, buffers) as restore:
        for segment in stream.Reader(fd, "stdin", pool=buffers):
            restore.apply(segment)
        restore.finish()
        restore.publish()


def without_links():
    """As on file systems that have none."""
    def link(*_):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    os.link = link


def whole(out, recipe, tmp_path):
    """All images are there, and nothing else."""
    files = [f"{name}.{end}" for name in TWO[0] for end in (["raw"] if recipe is RAW else ["qcow2", "data"])]
    assert sorted(os.listdir(out)) == sorted(files)
    for name, content in makers.images(TWO)[0].items():
        assert applied.same(out / f"{name}.{recipe.format}", recipe.format, content, tmp_path)


@pytest.mark.usefixtures("killed")
@RECIPES
@LINKS
def test_killed_at_every_step(tmp_path, recipe, links):
    """The next run finishes, as if there had been none, unless all images have their names: it replaces none."""
    content = segments_of(TWO)[0]
    count, lived, partly, complete = 0, False, 0, 0
    files = 2 if recipe is RAW else 4
    while not lived:
        count += 1
        out = tmp_path / f"out-{count}"
        lived = applied.killed_at(count, run, content, out, recipe, prepare=None if links else without_links)
        named = [name for name in os.listdir(out) if name[0] != "."] if out.exists() else []
        if len(named) == files:
            complete += 1
            with pytest.raises(Error, match="File exists"):
                run(content, out, recipe)
        else:
            partly += len(named) > 0
            run(content, out, recipe)
        whole(out, recipe, tmp_path)
    assert partly == (files - 1) * (1 if links else 2) and complete > 3  # without, it takes two calls


@pytest.mark.usefixtures("killed")
@LINKS
def test_killed_while_names_are_taken_back(tmp_path, links):
    """One of them was taken meanwhile, and the others must not stay; what is another's does."""
    content = segments_of([{"vda": "64k:A", "vdb": "64k:A", "vdc": "64k:A"}])[0]

    def prepare():
        ImageDirectory.refuse_existing = lambda *_: None
        if not links:
            def rename(source, target, dst_dir_fd=None):
                if os.path.lexists(target) and dst_dir_fd is None:
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
                before(source, target, dst_dir_fd=dst_dir_fd)

            before, os.rename = os.rename, rename
            without_links()

    def fail():
        with pytest.raises(Error, match="File exists"):
            run(content, out)

    count, lived, partly = 0, False, 0
    while not lived:
        count += 1
        out = tmp_path / f"out-{count}"
        out.mkdir()
        (out / "vdc.raw").write_bytes(b"precious")
        lived = applied.killed_at(count, fail, prepare=prepare)
        partly += len(list(out.glob("*.raw"))) > 1
        ImageDirectory(str(out)).close()
        assert os.listdir(out) == ["vdc.raw"] and (out / "vdc.raw").read_bytes() == b"precious"
    assert partly > 2


@pytest.mark.usefixtures("killed")
@LINKS
@pytest.mark.parametrize("change", ["written", "replaced", "removed", "moved"])
def test_image_of_a_killed_run_that_is_used_since(tmp_path, links, change):
    """It had its name, and somebody took it for whole: nothing that he did is undone."""
    content = segments_of(TWO)[0]
    out, image = tmp_path / "out", tmp_path / "out" / "vda.raw"
    count = 0
    while not image.exists():
        count += 1
        assert not applied.killed_at(count, run, content, out, prepare=None if links else without_links)
    if change == "written":
        with open(image, "r+b") as file:
            file.write(b"precious")
    else:
        image.rename(tmp_path / "moved")
        if change == "replaced":
            image.write_bytes(b"precious")
    if change in ("written", "replaced"):
        with pytest.raises(Error, match="vda.raw: File exists"):
            run(content, out)
        assert image.read_bytes()[:8] == b"precious"
        assert os.listdir(out) == ["vda.raw"]
    else:
        run(content, out)
        whole(out, RAW, tmp_path)
        assert (tmp_path / "moved").read_bytes() == makers.images(TWO)[0]["vda"]


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"[" * 100_000, b'{"../outside": [3, 0], "none": [1, 2]}'])
def test_list_of_names_that_makes_no_sense(tmp_path, text):
    """It was cut, or somebody else made it: nothing outside the directory is touched."""
    (tmp_path / "outside").write_bytes(b"abc")
    os.utime(tmp_path / "outside", ns=(0, 0))
    left = tmp_path / "out/.vnb-apply.00000000.partial"
    left.mkdir(0o700, parents=True)
    (left / "none").write_bytes(b"")
    (left / ".names").write_bytes(text)
    run(segments_of(TWO)[0], tmp_path / "out")
    whole(tmp_path / "out", RAW, tmp_path)
    assert (tmp_path / "outside").read_bytes() == b"abc"


def test_what_a_living_one_makes_is_left_alone(half, tmp_path):
    """Two restores into one directory at a time."""
    process, out, rest = half("--disk", "vda")
    restored(b"".join(segments_of(PLAN)), "--disk", "vdb", out)
    _, stderr = process.communicate(rest, timeout=applied.DEADLINE)
    assert (process.returncode, stderr) == (0, b"")
    assert sorted(os.listdir(out)) == ["vda.qcow2", "vdb.qcow2"]


@pytest.mark.usefixtures("killed")
def test_killed_while_its_server_starts(tmp_path):
    """A qemu-nbd that takes no notice would keep its image locked, for whoever comes next."""
    image = tmp_path / "image"
    image_writer.create(str(image), "disk", "qcow2", 1 << 20, {})
    program = "import sys, vnb.qemu.image_writer; sys.stdout.write('x'); sys.stdout.flush(); " \
              "vnb.qemu.image_writer.Image('vda', sys.argv[1], 'vda', 'qcow2').zero(0, 65536); sys.stdin.read()"
    chance = random.Random(1)
    for _ in range(25):
        process = subprocess.Popen([sys.executable, "-c", program, image], stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, env=applied.environment())
        assert process.stdout.read(1) == b"x"
        time.sleep(chance.uniform(0, 0.1))  # the moment is what the test is about
        process.kill()
        process.communicate()
        eventually(lambda: applied.processes_with(image, "qemu-nbd") == [])


def test_input_that_ends(half):
    process, out, _ = half()
    _, stderr = process.communicate(timeout=applied.DEADLINE)
    assert process.returncode == 1
    assert stderr.decode().startswith("vnb-apply: stdin: stream offset ")
    assert not out.exists()


def test_server_killed(half):
    """qemu-nbd, in the middle: the disk's name is said, and nothing is left."""
    process, out, rest = half("--disk", "vda")
    server, = eventually(lambda: applied.processes_with(out, "qemu-nbd"))
    os.kill(server, signal.SIGKILL)
    _, stderr = process.communicate(rest, timeout=applied.DEADLINE)
    assert (process.returncode, stderr.decode()) == (1, "vnb-apply: vda: qemu-nbd: it was killed by SIGKILL\n")
    assert not out.exists()


@pytest.mark.parametrize("request_", ["write", "zero"])
def test_server_killed_while_nothing_is_awaited(tmp_path, request_):
    """The next request finds the connection broken: it says the same as one whose answer does not come."""
    path = tmp_path / "disk.qcow2"
    image_writer.create(str(path), "disk", "qcow2", 1 << 20, {})
    image = image_writer.Image("vda", str(path), "vda", "qcow2")
    server, = applied.processes_with(path, "qemu-nbd")
    os.kill(server, signal.SIGKILL)
    image._server._child.wait(applied.DEADLINE)
    with pytest.raises(Error) as raised:
        if request_ == "write":
            image.write(0, bytes(65536), lambda: None)
        else:
            image.zero(0, 65536)
        image.drain()
    assert str(raised.value) == "vda: qemu-nbd: it was killed by SIGKILL"
    image.close()


def test_ignored_signal_stays_ignored(half):
    """As with nohup(1): the servers do not get it either."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process, out, rest = half()
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    process.send_signal(signal.SIGHUP)
    _, stderr = process.communicate(rest, timeout=applied.DEADLINE)
    assert (process.returncode, stderr) == (0, b"")
    assert sorted(os.listdir(out)) == ["vda.qcow2", "vdb.qcow2"]
