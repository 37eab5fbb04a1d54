# SPDX-License-Identifier: LGPL-2.1-or-later
"""
NBD exports: connections, extents of a meta context, reads in flight.

Only libnbd's asynchronous calls are used, with a poll(2) of our own around them: its others wait in C, where a
Python signal handler cannot run, so that Ctrl-C would do nothing while a server does not answer.
"""

import re
import select
import time
from errno import ECONNABORTED, ECONNRESET, ENOTCONN, EPIPE
from itertools import accumulate

import nbd

from vnb.errors import Error
from vnb.frame import DATA, HOLE, MAX_EXTENTS, ZERO, GiB, MiB
from vnb.interrupts import held

BASE_ALLOCATION = "base:allocation"
FIRST_SPAN = 16 * MiB  # of the first block status request: an answer soon
MAX_SPAN = 1 * GiB  # an answer with extents of 4 KiB takes 25 MiB then
FEW_EXTENTS = 2048  # in one reply: ask for more the next time
MANY_EXTENTS = 16384  # in one reply: ask for less, its list takes memory

# The state of an extent with these two flags of base:allocation: a hole that is not zero has to be read.
_STATES = (DATA, DATA, ZERO, HOLE)
_GONE = (ECONNABORTED, ECONNRESET, ENOTCONN, EPIPE)
DIRTY = 1  # the flag of a bitmap's meta context
READS_ZERO = 2  # the flag of base:allocation

_EVENTS = {
    nbd.AIO_DIRECTION_READ: select.POLLIN,
    nbd.AIO_DIRECTION_WRITE: select.POLLOUT,
    nbd.AIO_DIRECTION_BOTH: select.POLLIN | select.POLLOUT,
}


def explained(error, uri):
    """The Error of a connection to a URI that failed, with what is wrong with TLS: libnbd says only that it fails."""
    if uri.startswith("nbds:"):
        from vnb import tls  # most have no need of it, and it is slow to import

        reason = tls.why(uri)
        if reason is not None:
            return error.__class__(error.what, f"cannot connect: {reason}", error.where)
    return error


class Connection:
    """
    One connection to an export.

    uri (str): nbd, nbds, nbd+unix, nbds+unix. name (str): the disk, for messages.
    context (str or None): a meta context to ask for. required (bool): its absence is an error.
    size (int): of the export, in bytes. has_context (bool): the server offers it. multi_conn (bool).
    minimum, maximum (int): bytes; requests are at least this long, multiples of it, and at most that long.
    patience (int or None): seconds for a server to answer that has to be there; None: it may take its time.
    Raises Error, also for everything that happens later.
    """

    def __init__(self, uri, name, context=None, required=False, patience=None):
        self.name = name
        self.context = context
        self.handle = handle = nbd.NBD()
        self._pending = {}  # cookie: offset, oldest first
        try:
            self._begin(uri)
            deadline = None if patience is None else time.monotonic() + patience
            while handle.aio_is_connecting():
                _turn([self], deadline)
            self.size = handle.get_size()
            self.has_context = context is not None and handle.can_meta_context(context)
            self.multi_conn = handle.can_multi_conn()
            self.minimum = max(1, handle.get_block_size(nbd.SIZE_MINIMUM))
            self.maximum = handle.get_block_size(nbd.SIZE_MAXIMUM) or 32 * MiB
        except nbd.Error as error:
            raise explained(self.error(error), uri) from None
        except Error as error:
            raise explained(error, uri) from None
        if required and not self.has_context:
            raise Error(name, f'server does not support meta context "{context}"')

    def _begin(self, uri):
        handle = self.handle
        handle.set_uri_allow_local_file(True)  # a URI names the files with TLS keys; it is our user's
        handle.set_pread_initialize(False)  # every completion is checked before a byte is used
        # Whether a request must be aligned is for the server to say: the last one of an odd size cannot be.
        handle.set_strict_mode(handle.get_strict_mode() & ~nbd.STRICT_ALIGN)
        try:
            if self.context is not None:
                handle.add_meta_context(self.context)
            handle.aio_connect_uri(uri)
        except ValueError as error:  # no text for C: both may come from a stream
            raise Error(self.name, f"cannot connect: {error}") from None

    ready = True  # requests may be made of it

    @property
    def in_flight(self):
        """Requests whose answers were not taken yet."""
        return len(self._pending)

    @property
    def expects(self):
        """Whether something is to come from the server: poll(2) for it."""
        return self.handle.aio_in_flight() > 0

    def failed(self, error):
        """Something awaited brought an nbd.Error: raises its Error."""
        raise self.error(error) from None

    def read(self, offset, view):
        """Begin to read into view (memoryview) from offset; returns the request."""
        # The view itself, which libnbd takes and lets go: its Buffer around it would never be freed (libnbd 1.14).
        return self._request(self.handle.aio_pread, offset, view, offset)

    def ask(self, offset, length):
        """Begin to ask for the extents of the context in [offset, offset + length); returns a Question."""
        return Question(self, offset, length)

    def status(self, offset, length, extent):
        """Begin to ask for the extents of the context, which libnbd gives to extent(); returns the request."""
        return self._request(self.handle.aio_block_status, offset, length, offset, extent)

    def _request(self, function, offset, *args):
        try:
            cookie = function(*args)
        except nbd.Error as error:
            raise self.error(error, offset) from None
        self._pending[cookie] = offset
        return self, cookie

    def is_done(self, cookie):
        """Whether the request with a cookie is done; raises Error if it failed."""
        try:
            done = self.handle.aio_command_completed(cookie)
        except nbd.Error as error:
            raise self.error(error, self._pending[cookie]) from None
        if done:
            del self._pending[cookie]
        return done

    def error(self, error, offset=None):
        """The Error for an nbd.Error of a request at an offset, or of whatever is in flight."""
        text = error.string or "unknown error"
        if error.errnum in _GONE or "disconnected unexpectedly" in text or "invalid state" in text:
            # It was noticed somewhere, and is a failure of the oldest request: that one is waited for.
            text, offset = "server closed the connection", next(iter(self._pending.values()), offset)
        elif offset is None:
            offset = next(iter(self._pending.values()), None)
        # What is left is the server's words, or the system's for its errno, without the names of libnbd's functions.
        text = re.sub(r"^nbd_\w+: ", "", text)
        text = re.sub(r"^(?:connect: |recv: |send: |handshake: |[a-z-]+: command failed: )", "", text)
        if offset is None:
            return Error(self.name, f"cannot connect: {text}")
        return Error(self.name, text, f"offset {offset}")

    def close(self):
        """
        End the connection. What the server says to that does not matter any more, but it is awaited, so that a
        server that serves one client is ready for the next one.
        """
        try:
            self.handle.aio_disconnect()
            while not (self.handle.aio_is_closed() or self.handle.aio_is_dead()):
                _turn([self])
        except (nbd.Error, Error):
            return


class Further(Connection):
    """
    One more connection to the export of another: of use once it is ready, and missed by nobody if it never is.

    Some servers take no second client before the first has gone, and say nothing until then.
    """

    def __init__(self, uri, first):
        self.name = first.name
        self.context = None
        self.size = first.size
        self.handle = nbd.NBD()
        self._pending = {}
        self._state = "connecting"
        try:
            self._begin(uri)
        except nbd.Error as error:
            self.failed(error)

    @property
    def ready(self):
        """Whether requests may be made of it."""
        if self._state == "connecting" and self.handle.aio_is_ready():
            if self.handle.get_size() == self.size:
                self._state = "ready"
            else:
                self._drop()
        return self._state == "ready"

    @property
    def expects(self):
        """See Connection."""
        return self.handle.aio_is_connecting() if self._state == "connecting" else self.ready and super().expects

    def failed(self, error):
        """See Connection; before it was ready nothing is lost with it."""
        if self.ready:
            super().failed(error)
        self._drop()

    def _drop(self):
        self._state = "failed"
        self.handle = None  # the last one that has it: that closes the socket

    def close(self):
        """See Connection. One that is not ready is dropped, since nobody knows when it will be."""
        if self.ready:
            super().close()
        else:
            self._drop()


def wait(request, connections):
    """Return when a request is done; those of the other connections go on meanwhile. Raises Error."""
    connection, cookie = request
    while not connection.is_done(cookie):
        _turn([connection, *(c for c in connections if c is not connection and c.expects)])


def _turn(connections, deadline=None):
    """Wait until one of the connections can go on, and let those that can. Raises Error, also at a deadline."""
    poller = select.poll()
    by_fd = {}
    for connection in connections:
        handle = connection.handle
        try:
            direction = handle.aio_get_direction()
            fd = handle.aio_get_fd()
        except nbd.Error as error:
            connection.failed(error)
            continue
        by_fd[fd] = connection, direction
        poller.register(fd, _EVENTS[direction])
    ready = poller.poll(None if deadline is None else max(0, 1000 * (deadline - time.monotonic())))
    if not ready:
        raise Error(connections[0].name, "the NBD server does not answer")
    for fd, events in ready:
        connection, direction = by_fd[fd]
        try:
            # Hang-ups and errors are for libnbd to find, in a direction that it is waiting for.
            with held:  # it calls back
                if direction & nbd.AIO_DIRECTION_READ and events & ~select.POLLOUT:
                    connection.handle.aio_notify_read()
                elif direction & nbd.AIO_DIRECTION_WRITE:
                    connection.handle.aio_notify_write()
        except nbd.Error as error:
            connection.failed(error)


class Question:
    """
    A block status request in flight.

    answer(): the flat list length, flags, length, flags, ... from offset on. The server may tell of less
    or more than was asked, but says something: each length is over 0.
    """

    def __init__(self, connection, offset, length):
        self.connection = connection
        self.offset = offset
        self._entries = []
        self._raised = None
        self._request = connection.status(offset, length, self._extent)

    def answer(self):
        wait(self._request, [self.connection])
        if self._raised is not None:
            raise self._raised
        entries, self._entries = self._entries, None
        if not entries or 0 in entries[0::2]:
            raise Error(
                self.connection.name, f"server gave no extents of {self.connection.context}", f"offset {self.offset}"
            )
        return entries

    def _extent(self, context, offset, entries, error):
        try:
            # A second list for one context would be against the protocol: it is not known what it goes on from.
            if context == self.connection.context and offset == self.offset and not error.value and not self._entries:
                self._entries = entries
        except BaseException as raised:
            self._raised = raised  # no memory: libnbd would print it, and take it for a failure of the request


class Walk:
    """
    Walk the extents of one meta context, forwards, asking for as much at a time as gives lists of a good size.

    unknown (int): the flags of what the server cannot be asked about: all of it without the context.
    """

    def __init__(self, connection, unknown):
        self.connection = connection
        self._unknown = unknown
        self._span = FIRST_SPAN
        self._question = None
        self._entries = []
        self._at = 0  # in entries: what is before it was left behind
        self._start = 0  # the offset of the extent there
        self._end = 0  # entries reach up to here

    def within(self, offset, end, horizon=None):
        """
        Yield (offset, length, flags) that cover [offset, end) exactly. Calls must ascend.

        horizon (int): how far later calls will reach: the next request may ask up to there.
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

    def replies(self, end):
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

    def _ask(self, offset, end):
        connection = self.connection
        length = min(max(self._span, connection.minimum), end - offset)
        # What is left of the last block of an odd size cannot be asked for.
        length = length - length % connection.minimum if connection.has_context else 0
        self._start = offset
        self._question = connection.ask(offset, length) if length else _Unasked(end - offset, self._unknown)

    def _take(self):
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

    def __init__(self, length, flags):
        self._entries = [length, flags]

    def answer(self):
        return self._entries


def allocation(connection, size):
    """Yield runs that tile [0, size): a full backup's extents. runs: flat list of offset, length, state, ..."""
    for start, lengths, flags in _parts(Walk(connection, unknown=0), size):
        offsets = list(accumulate(lengths, initial=start))
        runs = [0] * (3 * len(lengths))
        end = offsets.pop()
        runs[0::3] = offsets
        runs[1::3] = lengths
        runs[2::3] = [_STATES[flag & 3] for flag in flags]
        yield runs if end <= size else _clipped(runs, size)


def changes(dirty, base, size):
    """
    Yield runs of what is dirty: an increment's extents. runs: flat list of offset, length, state, ...

    dirty, base (Connection): of the bitmap's meta context and of base:allocation. Each has a cursor of its own,
    since two contexts never come back in the same pieces; clean ranges are not asked for their allocation.
    """
    walk = Walk(base, unknown=0)
    for start, lengths, flags in _parts(Walk(dirty, unknown=DIRTY), size):
        ranges = []
        for length, flag in zip(lengths, flags):
            if flag & DIRTY and start < size:
                ranges.append((start, min(start + length, size)))
            start += length
        runs = []
        for offset, end in ranges:
            for piece, length, flag in walk.within(offset, end, ranges[-1][1]):
                runs += (piece, length, _STATES[flag & 3])
            if len(runs) > 3 * MAX_EXTENTS:
                yield runs
                runs = []
        yield runs


def _parts(walk, size):
    """Yield (offset, lengths, flags) of the replies of a walk: one may be of a million extents, a part is not."""
    for offset, entries in walk.replies(size):
        for at in range(0, len(entries), 2 * MAX_EXTENTS):
            lengths = entries[at : at + 2 * MAX_EXTENTS : 2]
            yield offset, lengths, entries[at + 1 : at + 2 * MAX_EXTENTS : 2]
            offset += sum(lengths)


def _clipped(runs, size):
    """runs without what is beyond size: a server may tell of more than was asked."""
    clipped = []
    for offset, length, state in zip(runs[0::3], runs[1::3], runs[2::3]):
        if offset < size:
            clipped += (offset, min(length, size - offset), state)
    return clipped
