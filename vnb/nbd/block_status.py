# SPDX-License-Identifier: LGPL-2.1-or-later
"""
NBD exports: which parts of one are data, zero, hole or dirty, as its server says when it is asked for block status.
"""

from __future__ import annotations

from itertools import accumulate

from vnb.base.errors import Error
from vnb.format.frame import DATA, HOLE, MAX_EXTENTS, ZERO, GiB, MiB
from vnb.format.runs import clipped

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from vnb.format.types import Runs
    from vnb.nbd.connection import Connection
    from vnb.nbd.connections import Connections


BASE_ALLOCATION = "base:allocation"
FIRST_SPAN = 16 * MiB  # of the first block status request: an answer soon
MAX_SPAN = 1 * GiB  # an answer with extents of 4 KiB takes 25 MiB then
FEW_EXTENTS = 2048  # in one reply: ask for more the next time
MANY_EXTENTS = 16384  # in one reply: ask for less, its list takes memory

# The state of an extent with these two flags of base:allocation: a hole that is not zero has to be read.
_STATES = (DATA, DATA, ZERO, HOLE)
DIRTY = 1  # the flag of a bitmap's meta context
READS_ZERO = 2  # the flag of base:allocation


class Context:
    """
    An export and one of its meta contexts, over a connection that comes and goes.

    name: the disk, for messages. context: None for an export of which nothing is asked but its size.
    size: bytes that the export has to have. required: the absence of the context is an error.
    """

    has_context = False
    minimum = 1  # bytes: of a request, see vnb.nbd.connection.Connection

    def __init__(
        self, connections: Connections, uri: str, name: str, context: str | None, size: int | None = None,
        required: bool = False,
    ) -> None:
        self.connections = connections
        self.uri = uri
        self.name = name
        self.context = context
        self.size = size
        self._required = required
        self._connection: Connection | None = None

    def open(self) -> Connection:
        """The connection, made now where there is none. Raises Error where it is not as it has to be."""
        if self._connection is None or not self._connection.is_open:
            self._connection = found = self.connections.open(self.uri, self.name, self.context)
            if self.size not in (None, found.size):
                raise Error(self.name, f"the export has {found.size} bytes, the stream says {self.size}")
            if self._required and not found.has_context:
                raise Error(self.name, f'server does not support meta context "{self.context}"')
            self.size, self.has_context, self.minimum = found.size, found.has_context, found.minimum
        return self._connection

    def ask(self, offset: int, length: int) -> Question:
        """Begin to ask for the extents in [offset, offset + length); returns a Question."""
        return Question(self.open(), offset, length)

    def close(self) -> None:
        """Close the connection; the next question makes another one."""
        if self._connection is not None:
            self.connections.release(self._connection)


class Question:
    """
    A block status request in flight.

    answer(): the flat list length, flags, length, flags, ... from offset on. The server may tell of less
    or more than was asked, but says something: each length is over 0.
    """

    def __init__(self, connection: Connection, offset: int, length: int) -> None:
        self.connection = connection
        self.offset = offset
        self._entries: list[int] = []
        self._raised: BaseException | None = None
        self._request = connection.status(offset, length, self._extent)

    def answer(self) -> list[int]:
        self.connection.connections.wait(self._request)
        if self._raised is not None:
            raise self._raised
        entries, self._entries = self._entries, []
        if not entries or 0 in entries[0::2]:
            raise Error(
                self.connection.name, f"server gave no extents of {self.connection.context}", f"offset {self.offset}"
            )
        return entries

    def _extent(self, context: str, offset: int, entries: list[int], error: Any) -> None:
        try:
            # A second list for one context would be against the protocol: it is not known what it goes on from.
            if context == self.connection.context and offset == self.offset and not error.value and not self._entries:
                self._entries = entries
        except BaseException as raised:
            self._raised = raised  # no memory: libnbd would print it, and take it for a failure of the request


class Walk:
    """
    Walk the extents of one meta context, forwards, asking for as much at a time as gives lists of a good size.

    unknown: the flags of what the server cannot be asked about: all of it without the context.
    """

    def __init__(self, context: Context, unknown: int) -> None:
        self.context = context
        self._unknown = unknown
        self._span = FIRST_SPAN
        self._question: Question | _Unasked | None = None
        self._entries: list[int] = []
        self._at = 0  # in entries: what is before it was left behind
        self._start = 0  # the offset of the extent there
        self._end = 0  # entries reach up to here

    def within(self, offset: int, end: int, horizon: int | None = None) -> Iterator[tuple[int, int, int]]:
        """
        Yield (offset, length, flags) that cover [offset, end) exactly. Calls must ascend.

        horizon: how far later calls will reach: the next request may ask up to there.
        """
        while offset < end:
            if offset >= self._end:
                self._ask(offset, max(end, horizon or 0))
                self._take()
            length = self._entries[self._at]
            stop = self._start + length
            if stop <= offset:
                self._start = stop
                self._at += 2
                continue
            stop = min(stop, end)
            yield offset, stop - offset, self._entries[self._at + 1]
            offset = stop

    def replies(self, end: int) -> Iterator[tuple[int, list[int]]]:
        """Yield (offset, entries), one a reply, that cover [0, end) at least; entries as Question has them."""
        if end:
            self._ask(0, end)
        while self._question is not None:
            self._take()
            offset, entries = self._start, self._entries
            self._entries = []
            if self._end < end:
                self._ask(self._end, end)  # the server looks for the next ones while these are worked on
            yield offset, entries

    def _ask(self, offset: int, end: int) -> None:
        context = self.context
        length = min(max(self._span, context.minimum), end - offset)
        # What is left of the last block of an odd size cannot be asked for.
        length = length - length % context.minimum if context.has_context else 0
        self._start = offset
        self._question = context.ask(offset, length) if length else _Unasked(end - offset, self._unknown)

    def _take(self) -> None:
        assert self._question is not None
        self._entries = self._question.answer()
        self._question = None
        self._at = 0
        self._end = self._start + sum(self._entries[0::2])
        count = len(self._entries) // 2
        if count < FEW_EXTENTS:
            self._span = min(4 * self._span, MAX_SPAN)
        elif count > MANY_EXTENTS:
            self._span = max(self._span // 4, MiB)


class _Unasked:
    """In the place of a Question: length bytes that nobody is asked about."""

    def __init__(self, length: int, flags: int) -> None:
        self._entries = [length, flags]

    def answer(self) -> list[int]:
        return self._entries


def allocation(base: Context, size: int) -> Iterator[Runs]:
    """Yield runs that tile [0, size): a full backup's extents. runs: flat list of offset, length, state, ..."""
    for start, lengths, flags in _parts(Walk(base, unknown=0), size):
        offsets = list(accumulate(lengths, initial=start))
        runs = [0] * (3 * len(lengths))
        end = offsets.pop()
        runs[0::3] = offsets
        runs[1::3] = lengths
        runs[2::3] = [_STATES[flag & 3] for flag in flags]
        yield runs if end <= size else clipped(runs, size)


def changes(dirty: Context, base: Context, size: int) -> Iterator[Runs]:
    """
    Yield runs of what is dirty: an increment's extents. runs: flat list of offset, length, state, ...

    dirty, base: of the bitmap's meta context and of base:allocation. Each has a cursor of its own,
    since two contexts never come back in the same pieces; clean ranges are not asked for their allocation.
    """
    walk = Walk(base, unknown=0)
    for start, lengths, flags in _parts(Walk(dirty, unknown=DIRTY), size):
        ranges = []
        for length, flag in zip(lengths, flags):
            if flag & DIRTY and start < size:
                ranges.append((start, min(start + length, size)))
            start += length
        runs: Runs = []
        for offset, end in ranges:
            for piece, length, flag in walk.within(offset, end, ranges[-1][1]):
                runs += (piece, length, _STATES[flag & 3])
            if len(runs) > 3 * MAX_EXTENTS:
                yield runs
                runs = []
        yield runs


def _parts(walk: Walk, size: int) -> Iterator[tuple[int, list[int], list[int]]]:
    """Yield (offset, lengths, flags) of the replies of a walk: one may be of a million extents, a part is not."""
    for offset, entries in walk.replies(size):
        for at in range(0, len(entries), 2 * MAX_EXTENTS):
            lengths = entries[at : at + 2 * MAX_EXTENTS : 2]
            yield offset, lengths, entries[at + 1 : at + 2 * MAX_EXTENTS : 2]
            offset += sum(lengths)
