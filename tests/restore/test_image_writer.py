# SPDX-License-Identifier: LGPL-2.1-or-later
"""The qemu-nbd that serves an image for a backup, when it does not."""

import json
import os
import subprocess
import sys

import applied
import pytest

from vnb.base import processes
from vnb.base.errors import Error
from vnb.qemu import image_writer, img

CLOSES = f"""#!{sys.executable}
import signal, socket
connection, _ = socket.socket(fileno=3).accept()
signal.signal(signal.SIGTERM, signal.default_int_handler)
connection.close()
signal.pause()
"""
SILENT = "#!/bin/sh\nexec tail -n 0 -f $0\n"  # with a name in its arguments by which it can be found


@pytest.fixture
def qemu_nbd(tmp_path, monkeypatch):
    """A function that puts a script in the place of qemu-nbd."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    def put(text):
        (tmp_path / "qemu-nbd").write_text(text)
        (tmp_path / "qemu-nbd").chmod(0o755)

    return put


def serve(tmp_path):
    img.serve("vda", "vda-1", "image", "qcow2", str(tmp_path / "s"))


def test_it_closes_the_connection_and_has_not_ended(tmp_path, qemu_nbd):
    """As when it was killed: the connection is gone first."""
    qemu_nbd(CLOSES)
    with pytest.raises(Error) as raised:
        serve(tmp_path)
    assert str(raised.value) == "vda: cannot connect: server closed the connection"


def test_it_does_not_answer(tmp_path, qemu_nbd, monkeypatch):
    """As one that got SIGTERM while it started: nobody waits for it for ever, and it is ended."""
    qemu_nbd(SILENT)
    monkeypatch.setattr(img, "START_SECONDS", 0.2)
    with pytest.raises(Error, match="^vda: cannot connect: the server does not answer within 0.2 seconds$"):
        serve(tmp_path)
    assert applied.processes_with(tmp_path, "tail") == []


def test_it_does_not_answer_a_restore(tmp_path, qemu_nbd, monkeypatch):
    image_writer.create(str(tmp_path / "image"), "disk", "qcow2", 1 << 20, {})
    qemu_nbd(SILENT)
    monkeypatch.setattr(processes, "START_SECONDS", 0.2)
    with pytest.raises(Error, match="^disk: qemu-nbd does not answer$"):
        image_writer.Image("vda", str(tmp_path / "image"), "disk", "qcow2")
    assert applied.processes_with(tmp_path, "tail") == []


def test_it_has_ended_and_said_why(tmp_path, qemu_nbd):
    qemu_nbd("#!/bin/sh\necho 'qemu-nbd: Failed to get \"write\" lock' >&2\nexit 1\n")
    with pytest.raises(Error, match='^vda: Failed to get "write" lock$'):
        serve(tmp_path)


@pytest.mark.parametrize("count", range(8, 40, 2))
def test_few_descriptors(tmp_path, count):
    """A job that could not begin is ended: that needs some of what its first half has taken."""
    images = [f"--image {name}={tmp_path / name}" for name in ("vda", "vdb")]
    for name in ("vda", "vdb"):
        image_writer.create(str(tmp_path / name), name, "qcow2", 1 << 20, {})
    options = "--level full --destination x --no-proof"
    command = f"vnb-checkpoint run {' '.join(images)} {options} -- 'cat > /dev/null'"
    done = subprocess.run(
        ["bash", "-c", f"ulimit -n {count}; exec {command}"], env={**os.environ, "VNB_STATE_DIR": str(tmp_path)},
        capture_output=True, text=True, timeout=20, check=False,
    )
    assert done.returncode in (0, 1)
    assert ("Too many open files" in done.stderr) >= done.returncode
    for path in tmp_path.glob("jobs/*/job.json"):
        assert json.loads(path.read_text())["phase"] == "ended"
