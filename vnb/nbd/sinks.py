# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Targets: where the bytes of a disk go. A file or block device, or an NBD server.

All have the same face: write() and zero() begin a request, in_flight counts those not answered yet, poll() waits for
an answer, drain() for all, finish() makes all durable, close() lets go. One thread at a time uses a target; abort()
alone may come from another. What fails is an Error with the disk's name and, for a request, its offset.
"""

import contextlib
import errno
import os
import select
import socket
import time

from vnb.base import syscalls
from vnb.base.errors import Error, os_error
from vnb.format.frame import GiB, MiB
from vnb.nbd.endpoint import PATIENCE

MAX_ZERO = 1 * GiB  # of one request: a server that has to write its zeroes is busy for a while
MAX_NBD = 32 * MiB  # of one request, where the server does not say
MAX_REQUESTS = 16  # in flight on one connection
MAX_CLUSTER = 2 * MiB  # of a qcow2 image, which may be behind any NBD server

_ZEROES = memoryview(bytes(1 * MiB))


class Lost(Error):
    """The connection to an NBD server broke."""


class Raw:
    """
    A file or a block device that is written directly.

    fd (int): open for writing; closed by close(). name (str): the disk, for messages.
    keep (bool): zeroes stay allocated, otherwise they are given back to the file system or device.
    durable (bool): finish() makes it so.
    """

    in_flight = 0  # a write is done when write() returns

    def __init__(self, fd, name, keep=False, durable=True):
        self.fd = fd
        self.name = name
        self._zero_modes = [syscalls.ZERO_RANGE] if keep else [syscalls.PUNCH_HOLE, syscalls.ZERO_RANGE]
        self._durable = durable
        self._write_back = syscalls.WriteBack(fd)

    def write(self, offset, plain, done):
        """Write plain (bytes-like) at offset, then call done()."""
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

    def zero(self, offset, length):
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

    def poll(self):
        """Nothing is ever in flight."""

    def drain(self):
        """Nothing is ever in flight."""

    def finish(self):
        """Make all that was written durable."""
        try:
            if self._durable:
                os.fsync(self.fd)
        except OSError as error:
            raise os_error(self.name, error) from None

    def abort(self):
        """A write to a file can't be stopped; it ends by itself."""

    def close(self):
        """Close the file, once."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


class Nbd:
    """
    An NBD export.

    name (str): the disk, what (str): the export, both for messages.
    connect (callable): begins to connect an nbd.NBD(), without waiting. keep (bool): zeroes stay allocated.
    size (int): of the export, in bytes. can_flush (bool): finish() can tell that all is durable.
    cluster (int): bytes. QEMU may zero all of a cluster of which a part is to be zero, as long as nothing was written
    to it; a write to it that is on its way is lost then, and its cluster freed (QEMU 7.2). So the two never meet there.
    """

    _handle = None
    _fd = None  # of the connection, for abort()

    def __init__(self, name, what, connect, keep=False):
        import nbd

        self._nbd = nbd
        self.name = name
        self.in_flight = 0
        self.cluster = MAX_CLUSTER
        self._requests = {}  # number: (whether it zeroes, first cluster, last cluster) of those in flight
        self._number = 0
        self._failed = None
        self._raised = None
        self._zero_flags = nbd.CMD_FLAG_NO_HOLE if keep else 0
        self._handle = nbd.NBD()
        try:
            connect(self._handle)
            wait_connected(self._handle)
            self._fd = os.dup(self._handle.aio_get_fd())
            self.size = self._handle.get_size()
            if self._handle.is_read_only():
                raise Error(what, "the export is read-only")
            self._can_zero = self._handle.can_zero()
            self.can_flush = self._handle.can_flush()
            self._max = self._handle.get_block_size(nbd.SIZE_MAXIMUM) or MAX_NBD
        except TimeoutError:
            hint = "a firewall may be in between, or the server has as many clients as it takes"
            raise Error(what, f"cannot connect: no answer within {PATIENCE} seconds: {hint}") from None
        except nbd.Error as error:
            raise Lost(what, f"cannot connect: {_reason(error)}") from None

    def write(self, offset, plain, done):
        """Begin to write plain (bytes-like) at offset; done() is called when it may be used again."""
        view = memoryview(plain)
        if len(view) > self._max:
            done = _after(done, -(-len(view) // self._max))
        while len(view):
            part, view = view[: self._max], view[self._max :]
            # The view itself, which libnbd takes and lets go: its Buffer around it would never be freed (libnbd 1.14).
            self._start(self._handle.aio_pwrite, part, offset, len(part), done)
            offset += len(part)

    def zero(self, offset, length):
        """Begin to make [offset, offset + length) read as zeroes."""
        while length:
            if self._can_zero:
                part = min(length, MAX_ZERO)
                self._start(self._handle.aio_zero, part, offset, part, _nothing, self._zero_flags, zeroes=True)
            else:
                part = min(length, len(_ZEROES), self._max)
                self.write(offset, _ZEROES[:part], _nothing)
            offset += part
            length -= part

    def _start(self, function, what, offset, length, done, flags=0, zeroes=False):
        request = (zeroes, offset // self.cluster, (offset + length - 1) // self.cluster)
        while self.in_flight >= MAX_REQUESTS or self._meets(*request):
            self.poll()
        self._number += 1
        number = self._number

        def completed(error):
            try:
                self.in_flight -= 1
                del self._requests[number]
                if error.value and self._failed is None:
                    self._failed = (error.value, offset)
                done()
            except BaseException as raised:
                self._raised = raised  # no memory: libnbd would print it, and take it for a failure of the request
            return 1  # nobody will ask for this request again

        try:
            self.in_flight += 1
            self._requests[number] = request
            function(what, offset, completed, flags)
        except self._nbd.Error as error:
            raise self._error(error, f"offset {offset}") from None
        self._check()

    def _meets(self, zeroes, first, last):
        """Whether one of the other kind is in flight that begins or ends in one of these clusters."""
        return any(
            other != zeroes and begin <= last and first <= end for other, begin, end in self._requests.values()
        )

    def poll(self):
        """Wait until a request makes progress. Raises what failed."""
        try:
            self._handle.poll(-1)
        except self._nbd.Error as error:
            self._check()
            raise Lost(self.name, f"lost the connection to the NBD server ({_reason(error)})") from None
        self._check()

    def drain(self):
        """Wait until nothing is in flight."""
        while self.in_flight:
            self.poll()

    def finish(self):
        """Make all that was written durable, as far as the server can, and disconnect."""
        try:
            if self.can_flush:
                self._handle.flush()
            self._handle.shutdown()
        except self._nbd.Error as error:
            raise self._error(error) from None

    def abort(self):
        """Break the connection: whoever waits for a reply is woken. From any thread."""
        if self._fd is not None:
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self._fd)) as connection:
                connection.shutdown(socket.SHUT_RDWR)

    def close(self):
        """Close the connection, once."""
        self._handle = None
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _error(self, error, where=None):
        lost = self._handle.aio_is_dead() or self._handle.aio_is_closed()
        return (Lost if lost else Error)(self.name, _reason(error), where)

    def _check(self):
        if self._raised is not None:
            raise self._raised
        if self._failed is not None:
            number, offset = self._failed
            if number in (errno.ENOTCONN, errno.ESHUTDOWN):
                raise Lost(self.name, "lost the connection to the NBD server", f"offset {offset}")
            raise Error(self.name, os.strerror(number), f"offset {offset}")


def wait_connected(handle):
    """
    Wait until an NBD handle is connected. Unlike libnbd's own waiting, a signal gets through, and it has an end.

    Raises nbd.Error, or TimeoutError after PATIENCE.
    """
    import nbd

    deadline = time.monotonic() + PATIENCE
    while handle.aio_is_connecting():
        direction = handle.aio_get_direction()
        poll = select.poll()
        poll.register(
            handle.aio_get_fd(),
            (select.POLLIN if direction & nbd.AIO_DIRECTION_READ else 0)
            | (select.POLLOUT if direction & nbd.AIO_DIRECTION_WRITE else 0),
        )
        ready = poll.poll(1000 * max(0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError
        for _fd, events in ready:
            if events & ~select.POLLOUT and direction & nbd.AIO_DIRECTION_READ:
                handle.aio_notify_read()
            else:
                handle.aio_notify_write()


def _reason(error):
    """What went wrong in an nbd.Error: the system's words where there are, else libnbd's without its function."""
    return os.strerror(error.errnum) if error.errnum else error.string.partition(": ")[2] or error.string


def _after(done, count):
    """A function that calls done() when it is called for the count-th time."""
    left = [count]

    def one():
        left[0] -= 1
        if left[0] == 0:
            done()

    return one


def _nothing():
    pass
