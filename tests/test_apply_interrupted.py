# SPDX-License-Identifier: LGPL-2.1-or-later
"""vnb-apply that is stopped: nothing under a final name, nothing left, or what is left is removed by the next one."""

import os
import random
import signal
import subprocess
import sys
import time

import applied
import makers
import pytest
from applied import eventually, restored, segments_of

from vnb import qemu
from vnb.errors import Error

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


def test_what_a_living_one_makes_is_left_alone(half, tmp_path):
    """Two restores into one directory at a time."""
    process, out, rest = half("--disk", "vda")
    restored(b"".join(segments_of(PLAN)), "--disk", "vdb", out)
    _, stderr = process.communicate(rest, timeout=applied.DEADLINE)
    assert (process.returncode, stderr) == (0, b"")
    assert sorted(os.listdir(out)) == ["vda.qcow2", "vdb.qcow2"]


def test_killed_while_its_server_starts(tmp_path):
    """A qemu-nbd that takes no notice would keep its image locked, for whoever comes next."""
    image = tmp_path / "image"
    qemu.create(str(image), "disk", "qcow2", 1 << 20, {})
    program = "import sys, vnb.qemu; sys.stdout.write('x'); sys.stdout.flush(); " \
              "vnb.qemu.Image('vda', sys.argv[1], 'vda', 'qcow2').zero(0, 65536); sys.stdin.read()"
    chance = random.Random(1)
    for _ in range(25):
        process = subprocess.Popen([sys.executable, "-c", program, image], stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, env=applied.ENVIRONMENT)
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
    qemu.create(str(path), "disk", "qcow2", 1 << 20, {})
    image = qemu.Image("vda", str(path), "vda", "qcow2")
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
