# SPDX-License-Identifier: LGPL-2.1-or-later
"""The keeper's side of its lines, as far as it needs no machine: nobody who does not read or write holds it up."""

import json
import os
import socket
import types

import pytest
from job_records import record

from vnb.base import waiting
from vnb.base.errors import Error
from vnb.job.channel import Line
from vnb.job.keeper import _begin, keep_for
from vnb.job.state import JobDirectory
from vnb.job.watch import Keeper, State


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def test_lines_that_nobody_reads_are_lost_whole(pair):
    ours, theirs = pair
    line = Line(ours)
    for number in range(20000):
        line.tell(f"{number} {'x' * 50}")
    ours.shutdown(socket.SHUT_WR)
    with theirs.makefile() as file:
        notes = [json.loads(text)["note"] for text in file]
    assert 10 < len(notes) < 20000
    assert notes[0].startswith("0 ")


def test_a_message_that_nobody_takes_is_the_end_of_the_line(pair):
    ours, theirs = pair
    ours.settimeout(0.1)
    line = Line(ours)
    line.send(head="x" * (4 << 20))
    line.send(done=True)
    assert line.receive() is None


def test_a_job_that_began_by_half_is_ended_when_that_can_be_done(pair, tmp_path, monkeypatch):
    """As where libvirtd goes away while it begins: the error is told at once, and the keeper stays for the rest."""
    ours, theirs = pair
    directory = JobDirectory(str(tmp_path), "u-1")
    tries = []

    def begin(*_):
        directory.save(record())
        raise Error("vm", "cannot be begun")

    def abort(_job, reason=None):
        tries.append(reason)
        if len(tries) < 3:
            raise Error("vm", "no answer")

    monkeypatch.setattr("vnb.job.watch.TICK_SECONDS", 0.01)
    monkeypatch.setattr("vnb.job.job.begin", begin)
    monkeypatch.setattr("vnb.job.job.Job.abort", abort)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "control"))
        listener.listen()
        keeper, message = _begin(directory, None, Line(ours), listener, {"deadline": 0})
        assert message == {"error": ["vm", "cannot be begun", None]}
        keeper.loop()
    assert tries == ["it could not be begun"] * 3
    assert directory.load().owner["pid"] == os.getpid()
    assert Line(theirs).receive() == {"note": "vm: no answer"}  # once
    ours.shutdown(socket.SHUT_WR)
    assert theirs.recv(1000) == b""


def test_who_gave_it_up_has_taken_over_nothing(tmp_path):
    """A keeper that was busy for longer than anybody waits stays, and the thaw with it."""
    directory = JobDirectory(str(tmp_path), "u")
    keeper = Keeper(types.SimpleNamespace(directory=directory), None, None, {"deadline": 0}, State.OVER)
    for patient in (False, True):
        theirs, ours = socket.socketpair()
        with theirs, ours:
            theirs.settimeout(10)
            line = Line(theirs)
            line.send(do="make way")
            if patient:
                line.send(do="taken")
            else:
                theirs.close()
            keeper.listener = types.SimpleNamespace(accept=lambda ours=ours: (ours.dup(), None))
            keeper._hear_client()
            assert keeper.state is (State.TAKEN if patient else State.OVER)
    keeper.successor.close()


@pytest.mark.parametrize("raised", [MemoryError(), RuntimeError("can't start new thread"), ImportError("no room")])
def test_a_keeper_that_lacks_memory_says_so_in_a_line(pair, monkeypatch, raised):
    def fail(*_):
        raise raised

    ours, theirs = pair
    monkeypatch.setattr("vnb.job.keeper.open_source", fail)
    with pytest.raises(type(raised)):
        keep_for(ours, {})
    with pytest.raises(Error, match="^keeper: (out of memory.*|no room)$"):
        Line(theirs).answer(None)


def test_who_waits_says_what_for(pair, monkeypatch):
    """The first time after some seconds, then more and more rarely; what ends sooner is not said."""
    ours, theirs = pair
    monkeypatch.setattr("vnb.job.channel.PATIENCE_SECONDS", 0.05)
    keeper, starter = Line(ours), Line(theirs)
    said = []

    def hear(message):
        said.append(message["note"])
        if len(said) == 2:
            keeper.send(done=True)

    with keeper.waits():
        with waiting.on("the first"):
            pass
        with waiting.on("the guest agent"), waiting.on("what that waits for"):
            assert starter.answer(hear) == {"done": True}
    assert [line.partition(",")[0] for line in said] == ["waiting for the guest agent"] * 2
    keeper.send(done=True)
    assert starter.answer(hear) == {"done": True}  # what came late, about the end of the waits, is no answer


def test_a_keeper_that_is_silent_is_waited_for_as_long_as_said(pair):
    ours, theirs = pair
    theirs.settimeout(0.1)
    with pytest.raises(Error, match="^keeper: does not answer$"):
        Line(theirs).answer(lambda message: None)
