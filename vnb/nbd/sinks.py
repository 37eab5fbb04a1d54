# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Targets: where the bytes of a disk go. A file or block device, or an NBD server.

All have the same face: write() and zero() begin a request, in_flight counts those not answered yet, poll() waits for
an answer, drain() for all, finish() makes all durable, close() lets go. One thread at a time uses a target; abort()
alone may come from another. What fails is an Error with the disk's name and, for a request, its offset.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket

from vnb.base import syscalls
from vnb.base.errors import Error, os_error
from vnb.format.frame import GiB, MiB
from vnb.nbd.connections import Connections

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from vnb.format.types import Bytes
    from vnb.nbd.connection import Connection, Request


MAX_ZERO = 1 * GiB  # of one request: a server that has to write its zeroes is busy for a while
MAX_REQUESTS = 16  # in flight on one connection
MAX_CLUSTER = 2 * MiB  # of a qcow2 image, which may be behind any NBD server

_ZEROES = memoryview(bytes(1 * MiB))


class Raw:
    """
    A file or a block device that is written directly.

    fd: open for writing; closed by close(). name: the disk, for messages.
    keep: zeroes stay allocated, otherwise they are given back to the file system or device.
    durable: finish() makes it so.
    """

    in_flight = 0  # a write is done when write() returns

    def __init__(self, fd: int, name: str, keep: bool = False, durable: bool = True) -> None:
        self.fd = fd
        self.name = name
        self._zero_modes = [syscalls.ZERO_RANGE] if keep else [syscalls.PUNCH_HOLE, syscalls.ZERO_RANGE]
        self._durable = durable
        self._write_back = syscalls.WriteBack(fd)

    def write(self, offset: int, plain: Bytes, done: Callable[[], None]) -> None:
        """Write plain at offset, then call done()."""
        view = memoryview(plain)
        if self._durable:
            self._write_back.count(len(view))
        try:
            while len(view):
                count = os.pwrite(self.fd, view, offset)
                offset += count
                view = view[count:]
        except OSError as error:
            raise os_error(self.name, error, f"offset {offset}") from None
        done()

    def zero(self, offset: int, length: int) -> None:
        """Make [offset, offset + length) read as zeroes."""
        while self._zero_modes:
            try:
                syscalls.fallocate(self.fd, self._zero_modes[0] | syscalls.KEEP_SIZE, offset, length)
                return
            except OSError as error:
                # Neither file systems nor devices tell what they can do before they are asked.
                if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV):
                    raise os_error(self.name, error, f"offset {offset}") from None
                del self._zero_modes[0]
        while length:
            part = _ZEROES[: min(length, len(_ZEROES))]
            self.write(offset, part, _nothing)
            offset += len(part)
            length -= len(part)

    def poll(self) -> None:
        """Nothing is ever in flight."""

    def drain(self) -> None:
        """Nothing is ever in flight."""

    def finish(self) -> None:
        """Make all that was written durable."""
        try:
            if self._durable:
                os.fsync(self.fd)
        except OSError as error:
            raise os_error(self.name, error) from None

    def abort(self) -> None:
        """A write to a file can't be stopped; it ends by itself."""

    def close(self) -> None:
        """Close the file, once."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Nbd:
    """
    An NBD export.

    name: the disk, what: the export, both for messages. uri: of the export. socket: see Connection.
    keep: zeroes stay allocated. alone: see Connections.
    size: of the export, in bytes. can_flush: finish() can tell that all is durable.
    cluster: bytes. QEMU may zero all of a cluster of which a part is to be zero, as long as nothing was written
    to it; a write to it that is on its way is lost then, and its cluster freed (QEMU 7.2). So the two never meet there.
    """

    _connection: Connection
    _fd: int | None = None  # of the connection, for abort()

    def __init__(
        self, name: str, what: str, uri: str, socket: socket.socket | None = None, keep: bool = False,
        alone: bool = False,
    ) -> None:
        self.name = name
        self.cluster = MAX_CLUSTER
        self._keep = keep
        # cookie: (whether it zeroes, first cluster, last cluster, done) of those in flight
        self._requests: dict[int, tuple[bool, int, int, Callable[[], None]]] = {}
        self._connections = Connections(1, alone=alone)
        self._connection = self._connections.open(uri, what, socket=socket)
        self._fd = os.dup(self._connection.handle.aio_get_fd())
        self._connection.name = name
        self.size, self.can_flush = self._connection.size, self._connection.can_flush
        if self._connection.is_read_only:
            Nbd.close(self)
            raise Error(what, "the export is read-only")

    @property
    def in_flight(self) -> int:
        """Requests whose answers have not come."""
        return len(self._requests)

    def write(self, offset: int, plain: Bytes, done: Callable[[], None]) -> None:
        """Begin to write plain at offset; done() is called when it may be used again."""
        view, most = memoryview(plain), self._connection.maximum
        if len(view) > most:
            done = _after(done, -(-len(view) // most))
        while len(view):
            part, view = view[:most], view[most:]
            self._start(offset, len(part), False, done, self._connection.write, offset, part)
            offset += len(part)

    def zero(self, offset: int, length: int) -> None:
        """Begin to make [offset, offset + length) read as zeroes."""
        while length:
            if self._connection.can_zero:
                part = min(length, MAX_ZERO)
                self._start(offset, part, True, _nothing, self._connection.zero, offset, part, self._keep)
            else:
                part = min(length, len(_ZEROES), self._connection.maximum)
                self.write(offset, _ZEROES[:part], _nothing)
            offset += part
            length -= part

    def _start(
        self, offset: int, length: int, zeroes: bool, done: Callable[[], None], function: Callable[..., Request],
        *args: Any,
    ) -> None:
        first, last = offset // self.cluster, (offset + length - 1) // self.cluster
        while self.in_flight >= MAX_REQUESTS or self._meets(zeroes, first, last):
            self.poll()
        _, cookie = function(*args)
        self._requests[cookie] = zeroes, first, last, done

    def _meets(self, zeroes: bool, first: int, last: int) -> bool:
        """Whether one of the other kind is in flight that begins or ends in one of these clusters."""
        return any(
            other != zeroes and begin <= last and first <= end for other, begin, end, _ in self._requests.values()
        )

    def poll(self) -> None:
        """Wait until a request makes progress. Raises what failed."""
        if not self._take_answers():
            self._connection.step()
            self._take_answers()

    def _take_answers(self) -> bool:
        """Whether any requests were done, each of which is told so. Raises what failed."""
        answered = [cookie for cookie in self._requests if self._connection.is_answered(cookie)]
        for cookie in answered:
            *_, done = self._requests.pop(cookie)
            self._connection.is_done(cookie)
            done()
        return bool(answered)

    def drain(self) -> None:
        """Wait until nothing is in flight."""
        while self.in_flight:
            self.poll()

    def finish(self) -> None:
        """Make all that was written durable, as far as the server can, and disconnect."""
        if self.can_flush:
            self._connections.wait(self._connection.flush())
        self._connections.give_back()

    def abort(self) -> None:
        """Break the connection: whoever waits for a reply is woken. From any thread."""
        if self._fd is not None:
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self._fd)) as connection:
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection, whatever is in flight; once."""
        if self._fd is not None:
            self._connection.handle = None  # the last one that has it: that closes the socket
            os.close(self._fd)
            self._fd = None


def _after(done: Callable[[], None], count: int) -> Callable[[], None]:
    """A function that calls done() when it is called for the count-th time."""
    left = [count]

    def one() -> None:
        left[0] -= 1
        if left[0] == 0:
            done()

    return one


def _nothing() -> None:
    pass
