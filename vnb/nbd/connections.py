# SPDX-License-Identifier: LGPL-2.1-or-later
"""
NBD connections: few at a time, for as many exports as there are.

    connections = Connections(most=4)
    connection = connections.open(uri, "vda")     ready, or an Error within a bounded time
    request = connection.read(offset, view)
    connections.wait(request)

A server takes so many clients, and lets the next one wait without a word: QEMU takes 100 in all, others take one. So
connections are a budget, which the stages of a pipeline share: each stage has a part of it. Within a stage the
connection that was used least lately makes way for a new one, and no stage keeps one while it has no use for it. A
server that does not greet us is an Error after PATIENCE.

Only libnbd's asynchronous calls are used, with a poll(2) of our own around them: its others wait in C, where a
Python signal handler cannot run, so that Ctrl-C would do nothing while a server does not answer.
"""

import itertools
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
from vnb.nbd.endpoint import PATIENCE

MOST_OF_EXTENTS, MOST_OF_READ = 4, 12  # the budget of a pipeline is 16: far from the 100 that QEMU takes
CROWDED_SECONDS = 3  # after which a server that does not greet us may be waiting for us to leave
IDLE_SECONDS = 0.5  # that a stage waits for the next one before its connections are free for that
RETRY_SECONDS = 0.2  # nothing tells when a server that hung up takes clients again
CLOSE_SECONDS = 5  # for a server to hear that we leave

_GONE = (ECONNABORTED, ECONNRESET, ENOTCONN, EPIPE)
_EVENTS = {
    nbd.AIO_DIRECTION_READ: select.POLLIN,
    nbd.AIO_DIRECTION_WRITE: select.POLLOUT,
    nbd.AIO_DIRECTION_BOTH: select.POLLIN | select.POLLOUT,
}


class Connection:
    """
    One connection to an export. It is begun here, and is ready when the server has said all that is below.

    connections (Connections): those that it is one of. uri (str): nbd, nbds, nbd+unix, nbds+unix.
    name (str): the disk, for messages. context (str or None): a meta context to ask for.
    size (int): of the export, in bytes. has_context (bool): the server offers it. multi_conn (bool).
    minimum, maximum (int): bytes; requests are at least this long, multiples of it, and at most that long.
    failure (Error or None): why it never became ready. is_refused (bool): the server hung up without a word of why,
    or has too many that wait, as one does that takes no more clients. is_unknown (bool): it says that there is no such
    export.
    """

    failure = None
    is_refused = is_unknown = False
    _is_ready = False
    _state = "START"  # libnbd's, while it connects

    def __init__(self, connections, uri, name, context=None):
        self.connections = connections
        self.uri = uri
        self.name = name
        self.context = context
        self.began = time.monotonic()
        self.used = 0  # when a request was made last, by the clock of connections
        self._pending = {}  # cookie: offset, oldest first
        self._answered = {}  # cookie: None, or the Error of one that failed
        self.handle = handle = nbd.NBD()
        handle.set_uri_allow_local_file(True)  # a URI names the files with TLS keys; it is our user's
        handle.set_pread_initialize(False)  # every completion is checked before a byte is used
        # Whether a request must be aligned is for the server to say: the last one of an odd size cannot be.
        handle.set_strict_mode(handle.get_strict_mode() & ~nbd.STRICT_ALIGN)
        try:
            if context is not None:
                handle.add_meta_context(context)
            handle.aio_connect_uri(uri)
        except ValueError as error:  # no text for C: both may come from a stream
            raise Error(name, f"cannot connect: {error}") from None
        except nbd.Error as error:
            self.failed(error)

    @property
    def is_open(self):
        """Whether it is ready, or may still become so."""
        return self.handle is not None

    @property
    def ready(self):
        """Whether requests may be made of it."""
        if not self._is_ready and self.handle is not None and self.handle.aio_is_ready():
            try:
                self._learn()
            except nbd.Error as error:
                self.failed(error)
        return self._is_ready

    def _learn(self):
        handle = self.handle
        self.size = handle.get_size()
        self.has_context = self.context is not None and handle.can_meta_context(self.context)
        self.multi_conn = handle.can_multi_conn()
        self.minimum = max(1, handle.get_block_size(nbd.SIZE_MINIMUM))
        self.maximum = handle.get_block_size(nbd.SIZE_MAXIMUM) or 32 * MiB
        self._is_ready = True

    @property
    def in_flight(self):
        """Requests whose answers were not taken yet."""
        return len(self._pending)

    @property
    def is_asked(self):
        """Whether the server owes us answers."""
        return self._is_ready and self.handle.aio_in_flight() > 0

    @property
    def expects(self):
        """Whether something is to come from the server: poll(2) for it."""
        return self.is_asked if self._is_ready else self.handle is not None and self.handle.aio_is_connecting()

    @property
    def is_connected(self):
        """Whether there is a connection on which the server could say something; asked before it is ready."""
        try:
            # libnbd waits for the greeting without having waited for TCP's connection (libnbd 1.14).
            with socket.socket(fileno=os.dup(self.handle.aio_get_fd())) as connection:
                connection.getpeername()
        except (nbd.Error, OSError):
            return False
        return True

    @property
    def is_greeted(self):
        """Whether the server has said anything; asked before it is ready."""
        return not self._look().startswith(("START", "CONNECT", "MAGIC"))

    def _look(self):
        if self.handle is not None:
            self._state = self.handle.connection_state()
        return self._state

    def failed(self, error):
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
        if path and self._state == "START" and error.errnum in (ENOENT, ECONNREFUSED):
            # A job takes its socket along when it ends.
            reason = f"{os.strerror(error.errnum)} (has its backup job ended)"
            self.failure = Error(self.name, f"cannot connect to {unquote(path[1])}: {reason}")
        self.handle = None  # the last one that has it: that closes the socket

    def proceed(self, direction, events):
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

    def read(self, offset, view):
        """Begin to read into view (memoryview) from offset; returns the request."""
        # The view itself, which libnbd takes and lets go: its Buffer around it would never be freed (libnbd 1.14).
        return self._request(self.handle.aio_pread, offset, view, offset)

    def status(self, offset, length, extent):
        """Begin to ask for the extents of the context, which libnbd gives to extent(); returns the request."""
        return self._request(self.handle.aio_block_status, offset, length, offset, extent)

    def _request(self, function, offset, *args):
        try:
            cookie = function(*args)
        except nbd.Error as error:
            raise self.error(error, offset) from None
        self.used = next(self.connections.clock)
        self._pending[cookie] = offset
        return self, cookie

    def is_done(self, cookie):
        """Whether the request with a cookie is done; raises Error if it failed. Not asked again when it is."""
        if not self.is_answered(cookie):
            return False
        error = self._answered.pop(cookie)
        if error is not None:
            raise error
        return True

    def is_answered(self, cookie):
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

    def settle(self):
        """Wait for all answers. They can be asked for as before, also when the connection is closed. Raises Error."""
        for cookie in tuple(self._pending):
            while not self.is_answered(cookie):
                self.connections.turn()

    def close(self):
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

    def error(self, error, offset=None):
        """The Error for an nbd.Error of a request at an offset, or of whatever is in flight."""
        text = error.string or "unknown error"
        if _is_gone(error) or "invalid state" in text:
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


class Connections:
    """
    The connections of a stage: at most `most` (int) at a time, which becomes less where a server takes less.

    patience (float): seconds that a server has to take one; None: PATIENCE. alone (bool): nobody else is its client.
    is_used (callable or None): whether the next stage still has work from us, and so a use for a connection that we
    wait for. That time does not count.
    """

    def __init__(self, most, patience=None, alone=False, is_used=None):
        self.most = most
        self.clock = itertools.count(1)
        self._patience = PATIENCE if patience is None else patience
        self._alone = alone
        self._is_used = is_used
        self._all = []

    def open(self, uri, name, context=None):
        """A new Connection that is ready. Another one makes way where that is needed. Raises Error."""
        while len(self._all) >= self.most:
            self._close(min(self._all, key=_by_use))
        is_refused = is_unknown = False
        since = time.monotonic()
        connection = self._begin(uri, name, context)
        while not connection.ready:
            now = time.monotonic()
            if connection.is_unknown and not is_unknown:
                # A limit of clients may answer so to one that comes at the same time as another (nbdkit 1.32).
                is_unknown = True
                self.drop(connection)
                time.sleep(RETRY_SECONDS)
                connection = self._begin(uri, name, context)
                continue
            if connection.failure is not None and (self._alone or not connection.is_refused):
                self.drop(connection)
                raise explained(connection.failure, uri)
            if now - since >= self._patience:
                if self._is_used is None or not self._is_used():
                    error = self._unanswered(connection, is_refused)
                    self.drop(connection)
                    raise error
                since = now
            if connection.is_refused:
                is_refused = True
                self.drop(connection)
                # Ours may be what is too much for it; else nothing tells when others have gone.
                if not self._make_way_for(connection):
                    time.sleep(RETRY_SECONDS)
                connection = self._begin(uri, name, context)
            elif now - since < CROWDED_SECONDS or connection.is_greeted or not self._make_way_for(connection):
                self.turn(min(CROWDED_SECONDS, since + self._patience - now))
        return connection

    def another(self, first):
        """
        One more Connection to the export of one that is ready, or None where there is no room for it.

        It is of use once it is ready, and nobody misses it if it never is: some servers take no second client before
        the first has gone, and say nothing until then.
        """
        if len(self._all) >= self.most:
            idle = [found for found in self._all if found.ready and not found.in_flight and found.uri != first.uri]
            if not idle:
                return None
            self._close(min(idle, key=_by_use))
        return self._begin(first.uri, first.name, None)

    def drop(self, connection):
        """Let go of a connection that is not ready."""
        self._all.remove(connection)
        connection.handle = None

    def release(self, connection):
        """Close a connection, if it is one of ours still; whether it became ready or not."""
        if connection in self._all:
            self._close(connection)

    def give_back(self):
        """Close all connections, when their answers are there. Raises Error."""
        # A server may let go of none as long as it is speaking with one: those in its handshake first.
        while self._all:
            self._close(min(self._all, key=_by_use))

    def wait(self, request):
        """Return when a request is done; those of the other connections go on meanwhile. Raises Error."""
        connection, cookie = request
        while not connection.is_done(cookie):
            self.turn()

    def wait_for(self, fd, event, give_back):
        """
        Return when a descriptor is ready for an event of poll(2); until then take what the servers send. Raises Error.

        A server that cannot get rid of its answers may stand still with all that it does, and QEMU has a guest to run.
        give_back (bool): when that takes long, and no answers are to come, close the connections.
        """
        since = time.monotonic()
        while fd not in self.turn(IDLE_SECONDS if give_back and self._all else None, fd, event):
            long = time.monotonic() - since >= IDLE_SECONDS
            if give_back and long and not any(connection.is_asked for connection in self._all):
                self.give_back()

    def turn(self, seconds=None, fd=None, event=0, leaving=None):
        """
        Wait until a connection can go on, and let those that can; returns the descriptors (set) that were ready.

        seconds (float or None): it then returns without any. fd, event: one more that is waited for, as of poll(2).
        leaving (Connection or None): from which nothing is to come but its end. Raises Error.
        """
        poller = select.poll()
        by_fd = {}
        for connection in tuple(self._all):
            if not connection.expects and connection is not leaving:
                continue
            try:
                direction = connection.handle.aio_get_direction()
                number = connection.handle.aio_get_fd()
            except nbd.Error as error:
                connection.failed(error)
                seconds = 0  # whoever waits for it is to see that
                continue
            by_fd[number] = connection, direction
            poller.register(number, _EVENTS[direction])
        if fd is not None:
            poller.register(fd, event)
        ready = poller.poll(None if seconds is None else 1000 * seconds)
        for number, events in ready:
            if number in by_fd:
                connection, direction = by_fd[number]
                connection.proceed(direction, events)
        return {number for number, _ in ready}

    def _begin(self, uri, name, context):
        connection = Connection(self, uri, name, context)
        self._all.append(connection)
        return connection

    def _close(self, connection):
        try:
            connection.close()
        finally:
            self._all.remove(connection)

    def _make_way_for(self, connection):
        """Close all others, of which the server has too many, and have fewer from now on. Whether there were any."""
        others = [other for other in self._all if other is not connection]
        if not others:
            return False
        self.most = max(1, sum(other.ready for other in others))
        for other in sorted(others, key=_by_use):
            self._close(other)
        return True

    def _unanswered(self, connection, is_refused):
        seconds = f"within {self._patience} seconds"
        if self._alone:
            reason = f"the server does not answer {seconds}"
        elif is_refused:
            reason = f"the server took no client {seconds}: it may have as many as it takes"
        elif not connection.is_connected:
            reason = f"no answer {seconds}: a firewall may be in between"
        elif not connection.is_greeted:
            reason = f"no greeting {seconds}: the server may have as many clients as it takes"
        else:
            reason = f"the server did not end its handshake {seconds}"
        return Error(connection.name, f"cannot connect: {reason}")


def explained(error, uri):
    """The Error of a connection to a URI that failed, with what is wrong with TLS: libnbd says only that it fails."""
    if uri.startswith("nbds:"):
        from vnb.nbd import tls_diagnosis  # most have no need of it, and it is slow to import

        reason = tls_diagnosis.why(uri)
        if reason is not None:
            return error.__class__(error.what, f"cannot connect: {reason}", error.where)
    return error


def _by_use(connection):
    """Who makes way first: those in their handshake, then those that were used least lately."""
    return connection.ready, connection.used


def _is_gone(error):
    """Whether an nbd.Error says that the server closed the connection."""
    return error.errnum in _GONE or "disconnected unexpectedly" in (error.string or "")
