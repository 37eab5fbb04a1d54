# SPDX-License-Identifier: LGPL-2.1-or-later
"""The keeper's side of its lines, as far as it needs no machine: nobody who does not read or write holds it up."""

import json
import socket

import pytest

from vnb.keeper import Line


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
