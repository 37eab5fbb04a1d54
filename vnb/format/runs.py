# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Runs: extents of one disk in a flat list, offset, length, state, offset, length, state, ... An extent frame has them so.

They ascend and do not overlap. Pure: it opens nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from operator import eq

from vnb.format.frame import MAX_EXTENTS


def joined(runs: list[int]) -> list[int]:
    """The same runs, with neighbours of one state made one. Where there are none, this is the very list."""
    states = runs[2::3]
    if not any(map(eq, states, states[1:])):
        return runs  # servers nearly always send them so, and then Python does nothing for each
    found = runs[:3]
    for offset, length, state in zip(runs[3::3], runs[4::3], runs[5::3]):
        if state == found[-1] and found[-3] + found[-2] == offset:
            found[-2] += length
        else:
            found += (offset, length, state)
    return found


def clipped(runs: list[int], size: int) -> list[int]:
    """The part of runs that lies below size, in bytes."""
    found: list[int] = []
    for offset, length, state in zip(runs[0::3], runs[1::3], runs[2::3]):
        if offset < size:
            found += (offset, min(length, size - offset), state)
    return found


def batches(runs: list[int]) -> Iterator[list[int]]:
    """The runs in lists that fit into extent frames."""
    for at in range(0, len(runs), 3 * MAX_EXTENTS):
        yield runs[at : at + 3 * MAX_EXTENTS]


class Joining:
    """
    Extents that come one by one, and leave as runs of at most MAX_EXTENTS, neighbours of one state as one.

    put is called with each list of runs. Nothing waits after flush().
    """

    def __init__(self, put: Callable[[list[int]], None]) -> None:
        self._put = put
        self._runs: list[int] = []

    def add(self, offset: int, length: int, state: int) -> None:
        """Take the next extent."""
        runs = self._runs
        if runs and runs[-1] == state and runs[-3] + runs[-2] == offset:
            runs[-2] += length
            return
        if len(runs) == 3 * MAX_EXTENTS:
            self.flush()
        self._runs += (offset, length, state)

    def flush(self) -> None:
        """Pass on what waits, if anything does."""
        if self._runs:
            runs, self._runs = self._runs, []
            self._put(runs)
