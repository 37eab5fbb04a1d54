# SPDX-License-Identifier: LGPL-2.1-or-later
"""The qemu-nbd that serves an image for a backup, when it does not."""

import sys

import applied
import pytest

from vnb import child, qemu, qemuimg
from vnb.errors import Error

CLOSES = f"""#!{sys.executable}
import signal, socket
connection, _ = socket.socket(fileno=3).accept()
signal.signal(signal.SIGTERM, signal.default_int_handler)
connection.close()
signal.pause()
"""


@pytest.fixture
def qemu_nbd(tmp_path, monkeypatch):
    """A function that puts a script in the place of qemu-nbd."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    def put(text):
        (tmp_path / "qemu-nbd").write_text(text)
        (tmp_path / "qemu-nbd").chmod(0o755)

    return put


def serve(tmp_path):
    qemuimg.serve("vda", "image", "qcow2", str(tmp_path / "s"))


def test_it_closes_the_connection_and_has_not_ended(tmp_path, qemu_nbd):
    """As when it was killed: the connection is gone first."""
    qemu_nbd(CLOSES)
    with pytest.raises(Error) as raised:
        serve(tmp_path)
    assert str(raised.value) == "vda: cannot connect: server closed the connection"


def test_it_does_not_answer(tmp_path, qemu_nbd, monkeypatch):
    """As one that got SIGTERM while it started: nobody waits for it for ever, and it is ended."""
    qemu_nbd("#!/bin/sh\nexec sleep 600\n")
    monkeypatch.setattr(qemuimg, "START_SECONDS", 0.2)
    with pytest.raises(Error, match="^vda: the NBD server does not answer$"):
        serve(tmp_path)
    assert applied.processes_with("600", "sleep") == []


def test_it_does_not_answer_a_restore(tmp_path, qemu_nbd, monkeypatch):
    qemu.create(str(tmp_path / "image"), "disk", "qcow2", 1 << 20, {})
    qemu_nbd("#!/bin/sh\nexec sleep 600\n")
    monkeypatch.setattr(child, "START_SECONDS", 0.2)
    with pytest.raises(Error, match="^disk: qemu-nbd does not answer$"):
        qemu.Image("vda", str(tmp_path / "image"), "disk", "qcow2")
    assert applied.processes_with("600", "sleep") == []


def test_it_has_ended_and_said_why(tmp_path, qemu_nbd):
    qemu_nbd("#!/bin/sh\necho 'qemu-nbd: Failed to get \"write\" lock' >&2\nexit 1\n")
    with pytest.raises(Error, match='^vda: Failed to get "write" lock$'):
        serve(tmp_path)
