# SPDX-License-Identifier: LGPL-2.1-or-later
"""NBD exports: connections, extents of a meta context, reads in flight. The only user of libnbd that reads."""

import os
import select

import nbd

from vnb.errors import Error
from vnb.frame import DATA, GiB, MiB

BASE_ALLOCATION = "base:allocation"
FIRST_SPAN = 16 * MiB  # of the first block status request: an answer soon
MAX_SPAN = 2 * GiB  # a block status request has 32 bits of length
FEW_EXTENTS = 2048  # in one reply: ask for more the next time
MANY_EXTENTS = 16384  # in one reply: ask for less, its list takes memory


class Connection:
    """
    One connection to an export.

    uri (str): nbd, nbds, nbd+unix, nbds+unix. name (str): the disk, for messages.
    context (str or None): a meta context to ask for. required (bool): its absence is an error.
    size (int): of the export, in bytes. has_context (bool): the server offers it.
    Raises Error, also for everything that happens later.
    """

    def __init__(self, uri, name, context=None, required=False):
        self.name = name
        self.context = context
        self.handle = nbd.NBD()
        try:
            self.handle.set_uri_allow_local_file(True)  # a URI names the files with TLS keys; it is our user's
            self.handle.set_pread_initialize(False)  # every completion is checked before a byte is used
            if context is not None:
                self.handle.add_meta_context(context)
            self.handle.connect_uri(uri)
            self.size = self.handle.get_size()
            self.has_context = context is not None and self.handle.can_meta_context(context)
            self.multi_conn = self.handle.can_multi_conn()
        except nbd.Error as error:
            raise Error(name, f"cannot connect: {reason(error)}") from None
        if required and not self.has_context:
            raise Error(name, f'server does not support meta context "{context}"')

    def status(self, offset, length):
        """
        Extents [(offset, length, flags), ...] of the context from offset on.

        Ascending and contiguous; the server may tell of less or more than was asked. At least one extent.
        """
        found = []

        def extent(context, offset, entries, error):
            if context == self.context and not error.value:
                for length, flags in zip(entries[0::2], entries[1::2]):
                    found.append((offset, length, flags))
                    offset += length

        try:
            self.handle.block_status(length, offset, extent)
        except nbd.Error as error:
            raise Error(self.name, reason(error), f"offset {offset}") from None
        if not found or any(length == 0 for _, length, _ in found):
            raise Error(self.name, f"server gave no extents of {self.context}", f"offset {offset}")
        return found

    def close(self):
        """End the connection; what the server says to that does not matter any more."""
        try:
            self.handle.shutdown()
        except nbd.Error:
            return


class Walk:
    """
    Walk the extents of one meta context, forwards, asking for as much at a time as gives lists of a good size.

    Without the context everything has flags 0: that is right for base:allocation alone.
    """

    def __init__(self, connection):
        self.connection = connection
        self._span = FIRST_SPAN
        self._known = []  # extents of the last reply, from self._at on they are still of use
        self._at = 0
        self._end = 0  # they reach up to here

    def within(self, offset, end, horizon=None):
        """
        Yield (offset, length, flags) that cover [offset, end) exactly. Calls must ascend.

        horizon (int): how far later calls will reach: the next request may ask up to there.
        """
        if not self.connection.has_context:
            yield offset, end - offset, 0
            return
        while offset < end:
            if offset >= self._end:
                self._ask(offset, max(end, horizon or 0))
            start, length, flags = self._known[self._at]
            if start + length <= offset:
                self._at += 1
                continue
            stop = min(start + length, end)
            yield offset, stop - offset, flags
            offset = stop

    def replies(self, end):
        """Yield lists of (offset, length, flags), a list a reply, that cover [0, end) exactly."""
        offset = 0
        while offset < end:
            self._ask(offset, end)
            yield [(start, min(length, end - start), flags) for start, length, flags in self._known if start < end]
            offset = self._end

    def _ask(self, offset, end):
        self._known = self.connection.status(offset, min(self._span, end - offset))
        self._at = 0
        start, length, _flags = self._known[-1]
        self._end = start + length
        if len(self._known) < FEW_EXTENTS:
            self._span = min(4 * self._span, MAX_SPAN)
        elif len(self._known) > MANY_EXTENTS:
            self._span = max(self._span // 4, MiB)


def allocation(connection, size):
    """Yield lists of (offset, length, state), a list a reply, that tile [0, size): a full backup's extents."""
    if not connection.has_context:
        if size:
            yield [(0, size, DATA)]
        return
    for reply in Walk(connection).replies(size):
        yield [(offset, length, state_of(flags)) for offset, length, flags in reply]


def changes(dirty, base, size):
    """
    Yield lists of (offset, length, state) of what is dirty: an increment's extents, a list a reply of the bitmap.

    dirty, base (Connection): of the bitmap's meta context and of base:allocation. Each has a cursor of its own,
    since two contexts never come back in the same pieces; clean ranges are not asked for their allocation.
    """
    walk = Walk(base)
    for reply in Walk(dirty).replies(size):
        ranges = [(offset, offset + length) for offset, length, flags in reply if flags & 1]
        found = []
        for offset, end in ranges:
            for start, length, flags in walk.within(offset, end, ranges[-1][1]):
                found.append((start, length, state_of(flags)))
        yield found


def state_of(flags):
    """The state of an extent with these flags of base:allocation: a hole that is not zero has to be read."""
    return flags & 3 if flags & 2 else DATA


class Reads:
    """
    Reads in flight on the connections of several exports.

    start() one, poll() until is_done(read), in any order.
    """

    def __init__(self):
        self._connections = {}

    def start(self, connection, offset, view):
        """Begin to read into view (memoryview) from offset; returns the read."""
        try:
            cookie = connection.handle.aio_pread(nbd.Buffer.from_buffer(view), offset)
        except nbd.Error as error:
            raise Error(connection.name, reason(error), f"offset {offset}") from None
        self._connections[connection.handle.aio_get_fd()] = connection
        return connection, cookie, offset

    def is_done(self, read):
        """Whether a read is done; raises Error if it failed."""
        connection, cookie, offset = read
        try:
            return connection.handle.aio_command_completed(cookie)
        except nbd.Error as error:
            raise Error(connection.name, reason(error), f"offset {offset}") from None

    def wait(self, read):
        """Poll until a read is done."""
        while not self.is_done(read):
            self._poll(read)

    def _poll(self, read):
        connections = [c for c in self._connections.values() if c.handle.aio_in_flight()]
        poller = select.poll()
        for connection in connections:
            direction = connection.handle.aio_get_direction()
            events = select.POLLIN if direction & nbd.AIO_DIRECTION_READ else 0
            if direction & nbd.AIO_DIRECTION_WRITE:
                events |= select.POLLOUT
            poller.register(connection.handle.aio_get_fd(), events)
        for fd, events in poller.poll():
            connection = self._connections[fd]
            try:
                # Hang-ups and errors are for libnbd to find: it reads the end of file.
                if events & ~select.POLLOUT:
                    connection.handle.aio_notify_read()
                elif events & select.POLLOUT:
                    connection.handle.aio_notify_write()
            except nbd.Error as error:
                raise Error(connection.name, reason(error), f"offset {read[2]}") from None


def reason(error):
    """What went wrong in an nbd.Error, without the names of libnbd's functions; the system's words where there are."""
    if error.errnum:
        said = os.strerror(error.errnum)
        text = error.string.partition(": ")[2] or error.string
        return text if said in text else said
    return error.string.partition(": ")[2] or error.string
