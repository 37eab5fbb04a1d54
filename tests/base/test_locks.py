# SPDX-License-Identifier: LGPL-2.1-or-later
"""Locks: taken, refused, and waited for with a word."""

import os
import subprocess
import sys
import threading

import pytest

from vnb.base import locks, waiting

HOLDER = """import fcntl, sys
file = open(sys.argv[1])
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()"""


@pytest.fixture
def held(tmp_path):
    """A file that another process has locked, and that process, which lets go when its input ends."""
    path = tmp_path / "file"
    path.touch()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLDER, path], **pipes) as holder:
        assert holder.stdout.readline() == b"held\n"
        fd = os.open(path, os.O_RDONLY)
        yield path, fd, holder
        os.close(fd)


def test_a_lock_that_another_has_is_refused_at_once(held):
    with pytest.raises(BlockingIOError):
        locks.take(held[1])


def test_a_wait_is_told_to_whoever_listens(held):
    path, fd, holder = held
    told = []

    def tell(what):
        told.append(what)
        if what is not None:
            holder.stdin.close()

    with waiting.told_to(tell):
        locks.wait_for(fd, path)
    assert told == [f"the lock of {path}, which another process holds (lsof {path})", None]


def test_a_long_wait_is_said(held, monkeypatch, capsys):
    path, fd, holder = held
    said = threading.Event()
    monkeypatch.setattr(locks, "SAY_SECONDS", 0)
    monkeypatch.setattr(locks.log, "note", lambda text: (print(text), said.set(), holder.stdin.close()))
    locks.wait_for(fd, path)
    assert said.is_set()
    assert capsys.readouterr().out == f"waiting for the lock of {path}, which another process holds (lsof {path})\n"


def test_a_short_wait_is_not(held, monkeypatch):
    path, fd, holder = held
    monkeypatch.setattr(locks.log, "note", lambda text: pytest.fail(text))
    with waiting.told_to(None):
        threading.Thread(target=holder.stdin.close).start()
        locks.wait_for(fd, path)
