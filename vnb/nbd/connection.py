# SPDX-License-Identifier: LGPL-2.1-or-later
"""One connection to an NBD server: opened within bounded time, its failures in words."""

from __future__ import annotations

import os
import re
import select
import socket
import time
from errno import EAGAIN, ECONNABORTED, ECONNREFUSED, ECONNRESET, ENOENT, ENOTCONN, EPIPE
from urllib.parse import unquote

import nbd

from vnb.base.errors import Error
from vnb.base.signals import held
from vnb.format.frame import MiB

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from vnb.nbd.connections import Connections


CLOSE_SECONDS = 5  # for a server to hear that we leave

_GONE = (ECONNABORTED, ECONNRESET, ENOTCONN, EPIPE)
_EVENTS = {
    nbd.AIO_DIRECTION_READ: select.POLLIN,
    nbd.AIO_DIRECTION_WRITE: select.POLLOUT,
    nbd.AIO_DIRECTION_BOTH: select.POLLIN | select.POLLOUT,
}


if TYPE_CHECKING:
    Request = tuple["Connection", int]  # the connection, and libnbd's cookie


class Lost(Error):
    """The connection to an NBD server broke."""


class Connection:
    """
    One connection to an export. It is begun here, and is ready when the server has said all that is below.

    connections: those that it is one of. uri: nbd, nbds, nbd+unix, nbds+unix. socket: one that is connected to the
    server, in place of the URI. name: the disk, for messages. context: a meta context to ask for.
    size: of the export, in bytes. has_context: the server offers it. multi_conn, is_read_only, can_zero, can_flush.
    minimum, maximum: bytes; requests are at least this long, multiples of it, and at most that long.
    failure: why it never became ready. is_refused: the server hung up without a word of why, or has too many that
    wait, as one does that takes no more clients. is_unknown: it says that there is no such export.
    """

    failure: Error | None = None
    is_refused = is_unknown = False
    _is_ready = False
    _state = "START"  # libnbd's, while it connects

    def __init__(
        self, connections: Connections, uri: str, name: str, context: str | None = None,
        socket: socket.socket | None = None,
    ) -> None:
        self.connections = connections
        self.uri = uri
        self.name = name
        self.context = context
        self.began = time.monotonic()
        self.used = 0  # when a request was made last, by the clock of connections
        self._pending: dict[int, int | None] = {}  # cookie: offset, oldest first
        self._answered: dict[int, Error | None] = {}  # cookie: None, or the Error of one that failed
        self.handle = handle = nbd.NBD()
        handle.set_uri_allow_local_file(True)  # a URI names the files with TLS keys; it is our user's
        handle.set_pread_initialize(False)  # every completion is checked before a byte is used
        # Whether a request must be aligned is for the server to say: the last one of an odd size cannot be.
        handle.set_strict_mode(handle.get_strict_mode() & ~nbd.STRICT_ALIGN)
        try:
            if context is not None:
                handle.add_meta_context(context)
            if socket is None:
                handle.aio_connect_uri(uri)
            else:
                handle.aio_connect_socket(socket.detach())
        except ValueError as error:  # no text for C: both may come from a stream
            raise Error(name, f"cannot connect: {error}") from None
        except nbd.Error as error:
            self.failed(error)

    @property
    def is_open(self) -> bool:
        """Whether it is ready, or may still become so."""
        return self.handle is not None

    @property
    def ready(self) -> bool:
        """Whether requests may be made of it."""
        if not self._is_ready and self.handle is not None and self.handle.aio_is_ready():
            try:
                self._learn()
            except nbd.Error as error:
                self.failed(error)
        return self._is_ready

    def _learn(self) -> None:
        handle = self.handle
        self.size = handle.get_size()
        self.has_context = self.context is not None and handle.can_meta_context(self.context)
        self.multi_conn = handle.can_multi_conn()
        self.is_read_only = handle.is_read_only()
        self.can_zero = handle.can_zero()
        self.can_flush = handle.can_flush()
        self.minimum = max(1, handle.get_block_size(nbd.SIZE_MINIMUM))
        self.maximum = handle.get_block_size(nbd.SIZE_MAXIMUM) or 32 * MiB
        self._is_ready = True

    @property
    def in_flight(self) -> int:
        """Requests whose answers were not taken yet."""
        return len(self._pending)

    @property
    def is_asked(self) -> bool:
        """Whether the server owes us answers."""
        return self._is_ready and self.handle.aio_in_flight() > 0

    @property
    def expects(self) -> bool:
        """Whether something is to come from the server: poll(2) for it."""
        return self.is_asked if self._is_ready else self.handle is not None and self.handle.aio_is_connecting()

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection on which the server could say something; asked before it is ready."""
        try:
            # libnbd waits for the greeting without having waited for TCP's connection (libnbd 1.14).
            with socket.socket(fileno=os.dup(self.handle.aio_get_fd())) as connection:
                connection.getpeername()
        except (nbd.Error, OSError):
            return False
        return True

    @property
    def is_greeted(self) -> bool:
        """Whether the server has said anything; asked before it is ready."""
        return not self._look().startswith(("START", "CONNECT", "MAGIC"))

    def _look(self) -> str:
        if self.handle is not None:
            self._state = self.handle.connection_state()
        return self._state

    def failed(self, error: nbd.Error) -> None:
        """
        Something awaited brought an nbd.Error.

        Raises its Error; but before it was ready nothing is lost with it, and whoever wants it looks at failure.
        """
        if self._is_ready:
            raise self.error(error) from None
        # With TLS it may be our certificate that the server refuses, but not before that has begun.
        is_early = self._state.startswith("MAGIC") or not self.uri.startswith("nbds")
        self.is_refused = error.errnum == EAGAIN or (_is_gone(error) and is_early)
        self.is_unknown = error.errnum == ENOENT and self._state.startswith("NEWSTYLE")
        self.failure = self.error(error)
        path = re.search(r"[?&]socket=([^&]*)", self.uri)
        is_missing = self._state == "START" and error.errnum in (ENOENT, ECONNREFUSED)
        if path and is_missing and self.connections.of_job:
            # A job takes its socket along when it ends.
            reason = f"{os.strerror(error.errnum)} (has its backup job ended)"
            self.failure = Error(self.name, f"cannot connect to {unquote(path[1])}: {reason}")
        self.handle = None  # the last one that has it: that closes the socket

    def proceed(self, direction: int, events: int) -> None:
        """Let it go on: poll(2) has seen these events, where libnbd waits for a direction."""
        if not self._is_ready:
            self._look()
        try:
            # Hang-ups and errors are for libnbd to find, in a direction that it is waiting for.
            with held:  # it calls back
                if direction & nbd.AIO_DIRECTION_READ and events & ~select.POLLOUT:
                    self.handle.aio_notify_read()
                elif direction & nbd.AIO_DIRECTION_WRITE:
                    self.handle.aio_notify_write()
        except nbd.Error as error:
            self.failed(error)

    def step(self) -> None:
        """Wait in libnbd until it has gone on: cheaper than proceed(), for a thread that gets no signals."""
        try:
            self.handle.poll(-1)
        except nbd.Error as error:
            self.failed(error)

    def read(self, offset: int, view: memoryview) -> Request:
        """Begin to read into view from offset; returns the request."""
        # The view itself, which libnbd takes and lets go: its Buffer around it would never be freed (libnbd 1.14).
        return self._request(self.handle.aio_pread, offset, view, offset)

    def status(self, offset: int, length: int, extent: Callable[[str, int, list[int], Any], None]) -> Request:
        """Begin to ask for the extents of the context, which libnbd gives to extent(); returns the request."""
        return self._request(self.handle.aio_block_status, offset, length, offset, extent)

    def write(self, offset: int, view: memoryview) -> Request:
        """Begin to write view at offset; it must stay as it is until that is done. Returns the request."""
        return self._request(self.handle.aio_pwrite, offset, view, offset)

    def zero(self, offset: int, length: int, keep: bool) -> Request:
        """Begin to make a range read as zeroes. keep: it stays allocated. Returns the request."""
        flags = nbd.CMD_FLAG_NO_HOLE if keep else 0
        return self._request(self.handle.aio_zero, offset, length, offset, None, flags)

    def flush(self) -> Request:
        """Begin to have all durable of which the requests are done; returns the request."""
        return self._request(self.handle.aio_flush, None)

    def _request(self, function: Callable[..., int], offset: int | None, *args: Any) -> Request:
        try:
            cookie = function(*args)
        except nbd.Error as error:
            raise self.error(error, offset) from None
        self.used = next(self.connections.clock)
        self._pending[cookie] = offset
        return self, cookie

    def is_done(self, cookie: int) -> bool:
        """Whether the request with a cookie is done; raises Error if it failed. Not asked again when it is."""
        if not self.is_answered(cookie):
            return False
        error = self._answered.pop(cookie)
        if error is not None:
            raise error
        return True

    def is_answered(self, cookie: int) -> bool:
        """Whether the request with a cookie is done, well or not."""
        if cookie in self._answered:
            return True
        failure = None
        try:
            if not self.handle.aio_command_completed(cookie):
                return False
        except nbd.Error as error:
            failure = self.error(error, self._pending[cookie])
        del self._pending[cookie]
        self._answered[cookie] = failure
        return True

    def settle(self) -> None:
        """Wait for all answers. They can be asked for as before, also when the connection is closed. Raises Error."""
        for cookie in tuple(self._pending):
            while not self.is_answered(cookie):
                self.connections.turn()

    def close(self) -> None:
        """
        End the connection, when all answers are there. Raises Error.

        What the server says to that does not matter any more, but it is awaited for a while, so that a server that
        serves one client is ready for the next one.
        """
        if self.ready:
            self.settle()
            deadline = time.monotonic() + CLOSE_SECONDS
            try:
                self.handle.aio_disconnect()
                while not (self.handle.aio_is_closed() or self.handle.aio_is_dead()) and time.monotonic() < deadline:
                    self.connections.turn(CLOSE_SECONDS, leaving=self)
            except (nbd.Error, Error):
                pass  # it has ended all the same; one of the others that did so is found again where it is used
        self.handle = None
        self._is_ready = False

    def error(self, error: nbd.Error, offset: int | None = None) -> Error:
        """The Error for an nbd.Error of a request at an offset, or of whatever is in flight."""
        text = error.string or "unknown error"
        is_lost = _is_gone(error) or "invalid state" in text
        if is_lost:
            # It was noticed somewhere, and is a failure of the oldest request: that one is waited for.
            text, offset = "server closed the connection", next(iter(self._pending.values()), offset)
        elif offset is None:
            offset = next(iter(self._pending.values()), None)
        kind = Lost if is_lost else Error
        # What is left is the server's words, or the system's for its errno, without the names of libnbd's functions.
        text = re.sub(r"^nbd_\w+: ", "", text)
        text = re.sub(r"^(?:connect: |recv: |send: |handshake: |[a-z-]+: command failed: )", "", text)
        if not self._is_ready:
            return kind(self.name, f"cannot connect: {text}")
        return kind(self.name, text, None if offset is None else f"offset {offset}")


def explained(error: Error, uri: str) -> Error:
    """The Error of a connection to a URI that failed, with what is wrong with TLS: libnbd says only that it fails."""
    if uri.startswith("nbds:"):
        from vnb.nbd import tls_diagnosis  # most have no need of it, and it is slow to import

        reason = tls_diagnosis.why(uri)
        if reason is not None:
            return error.__class__(error.what, f"cannot connect: {reason}", error.where)
    return error


def _is_gone(error: nbd.Error) -> bool:
    """Whether an nbd.Error says that the server closed the connection."""
    return error.errnum in _GONE or "disconnected unexpectedly" in (error.string or "")
