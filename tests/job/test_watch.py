# SPDX-License-Identifier: LGPL-2.1-or-later
"""The keeper as a machine with states: what each message and each event does in each of them."""

import socket
import time
from types import SimpleNamespace

import pytest
from job_records import record

from vnb.base.errors import Error
from vnb.job.channel import Line
from vnb.job.watch import Keeper, State

OPTIONS = {"deadline": 3600, "idle": 60, "reserve": 1000, "strict": True}


class Job:
    """A job that can be ended, or not; said has what was done to it."""

    def __init__(self, refuses=False):
        self.record = record(scratch=["/scratch/vda"])
        self.head = self.record.head
        self.refuses = refuses
        self.done = []
        self.strict = None
        self.free, self.clients_there, self.stopped, self.lost = 10_000, 1, False, False
        self.directory = SimpleNamespace(remove=lambda: self.done.append("removed"), load=lambda: self.record)
        self.clients = SimpleNamespace(is_tcp=False, look=lambda _lists, _now: self.clients_there)
        self.held = SimpleNamespace(
            is_local=True, room=lambda _directory: self.free, is_guest_stopped=self._is_stopped, is_gone=False)

    def _is_stopped(self):
        if self.lost:
            raise Error("vm1", "no connection")
        return self.stopped

    def _end(self, how):
        if self.refuses:
            raise Error("vm1", "libvirt does not answer")
        self.done.append(how)

    def commit(self, _set, _proof):
        self._end("commit")

    def abort(self, reason=None):
        self._end(("abort", reason))

    def thaw(self):
        self.done.append("thaw")
        self.record.frozen = None
        return True

    def intend(self, **changes):
        for name, value in changes.items():
            setattr(self.record, name, value)


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(10)
        theirs.settimeout(10)
        yield ours, theirs


def keeper(pair, state, refuses=False):
    reason = "an older reason" if state is State.ENDING else None
    found = Keeper(Job(refuses), Line(pair[0]), None, OPTIONS, state, reason)
    if state is State.ALONE:
        found.starter = None
    return found


@pytest.mark.parametrize("state", [State.WATCHED, State.ALONE, State.ENDING])
@pytest.mark.parametrize("what, done", [("commit", "commit"), ("abort", ("abort", None))])
def test_whoever_asks_ends_the_job(pair, state, what, done):
    ours, theirs = pair
    found = keeper(pair, state)
    found._answer(Line(ours), {"do": what})
    assert (found.state, found.reason, found.job.done) == (State.OVER, None, [done])
    assert Line(theirs).receive() == {"done": True, "strict": None}


@pytest.mark.parametrize("state", [State.WATCHED, State.ALONE, State.ENDING])
@pytest.mark.parametrize("message, refuses", [({"do": "commit"}, True), ({"do": "dance"}, False), ({}, False)])
def test_what_fails_changes_nothing(pair, state, message, refuses):
    ours, theirs = pair
    found = keeper(pair, state, refuses)
    found._answer(Line(ours), message)
    assert (found.state, found.job.done) == (state, [])
    assert "error" in Line(theirs).receive()


@pytest.mark.parametrize("what, answer", [("abort", "done"), ("commit", "error"), ("keep", "error")])
def test_a_job_that_is_over_is_ended_once(pair, what, answer):
    ours, theirs = pair
    found = keeper(pair, State.OVER)
    found.reason = found.job.record.reason = "its deadline has passed"
    found._answer(Line(ours), {"do": what})
    assert (found.state, found.job.done) == (State.OVER, [])
    assert found.reason == (None if what == "abort" else "its deadline has passed")
    ours.shutdown(socket.SHUT_WR)
    line, messages = Line(theirs), []
    while (message := line.receive()) is not None:
        messages.append(message)
    assert answer in messages[-1]


@pytest.mark.parametrize("state, then", [(State.WATCHED, State.ALONE), (State.ENDING, State.ENDING)])
def test_the_starter_leaves_a_job_to_others(pair, state, then):
    _, theirs = pair
    found = keeper(pair, state)
    line = Line(theirs)
    line.send(do="keep", warnings=2)
    found._hear_starter()
    assert (found.state, found.starter, found.job.record.strict) == (then, None, 2)
    assert line.receive() == {"done": True}


@pytest.mark.parametrize("refuses, then", [(False, State.OVER), (True, State.ENDING)])
def test_a_starter_that_dies_ends_the_job(pair, refuses, then):
    _, theirs = pair
    found = keeper(pair, State.WATCHED, refuses)
    theirs.close()
    found._hear_starter()
    assert (found.state, found.reason) == (then, "the process that began it has died")
    assert found.left is not None and found.starter is None


EVENTS = {
    "deadline": lambda found: setattr(found, "deadline", 0),
    "scratch": lambda found: setattr(found.job, "free", 999),
    "guest": lambda found: setattr(found.job, "stopped", True),
}


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("state", [State.WATCHED, State.ALONE])
@pytest.mark.parametrize("refuses, then", [(False, State.OVER), (True, State.ENDING)])
def test_backup_loses_and_the_guest_wins(pair, event, state, refuses, then):
    found = keeper(pair, state, refuses)
    found._look()
    assert found.state is state
    EVENTS[event](found)
    found._look()
    assert found.state is then
    assert len(found.job.done) == (0 if refuses else 1)


def test_nobody_is_connected_for_long(pair):
    """That counts only where nobody watches: a starter may have a slow command."""
    for state, then in ((State.WATCHED, State.WATCHED), (State.ALONE, State.OVER)):
        found = keeper(pair, state)
        found.job.clients_there = 0
        found._look()
        assert found.state is state
        found.last_client -= 61
        found._look()
        assert found.state is then
    found = keeper(pair, State.ALONE)
    found.last_client -= 61
    found._look()
    assert found.state is State.ALONE  # somebody is


def test_a_guest_that_was_stopped_before_is_not_ours(pair):
    found = keeper(pair, State.WATCHED)
    found.job.record.stuck = found.job.stopped = True
    found._look()
    assert found.state is State.WATCHED
    found.job.stopped = False
    found._look()
    found.job.stopped = True
    found._look()
    assert found.state is State.OVER


def test_an_end_that_fails_is_tried_more_and_more_rarely(pair):
    found = keeper(pair, State.WATCHED, refuses=True)
    found.end_if_running("why")
    pauses = [found.pause]
    for _ in range(12):
        found.next_try = time.monotonic()
        found._look()
        pauses.append(found.pause)
    assert pauses == sorted(pauses) and pauses[0] == 2 and pauses[-1] == 300
    found._look()  # not yet
    assert found.job.record.trouble == "libvirt does not answer"
    found.job.refuses, found.next_try = False, 0
    found._look()
    assert (found.state, found.job.done) == (State.OVER, [("abort", "why")])
    found.end_if_running("another")  # once
    assert found.job.done == [("abort", "why")]


@pytest.mark.parametrize("reason, removed", [(None, ["thaw", "removed"]), ("why", ["thaw"])])
def test_a_thaw_that_is_left(pair, reason, removed):
    """The record goes with it, unless somebody has not been told yet why the job has ended."""
    found = keeper(pair, State.OVER)
    found.reason, found.job.record.frozen = reason, 7
    found._look()
    assert found.job.done == removed
    assert found.is_over
