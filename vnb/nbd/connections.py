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

from __future__ import annotations

import itertools
import select
import time

import nbd

from vnb.base.errors import Error
from vnb.nbd.connection import _EVENTS, Connection, explained
from vnb.nbd.endpoint import PATIENCE

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from vnb.nbd.connection import Request


MOST_OF_EXTENTS, MOST_OF_READ = 4, 12  # the budget of a pipeline is 16: far from the 100 that QEMU takes
CROWDED_SECONDS = 3  # after which a server that does not greet us may be waiting for us to leave
IDLE_SECONDS = 0.5  # that a stage waits for the next one before its connections are free for that
RETRY_SECONDS = 0.2  # nothing tells when a server that hung up takes clients again


class Connections:
    """
    The connections of a stage: at most `most` at a time, which becomes less where a server takes less.

    patience: seconds that a server has to take one; None: PATIENCE. alone: nobody else is its client.
    is_used: whether the next stage still has work from us, and so a use for a connection that we
    wait for. That time does not count. of_job: the servers are those of a backup job.
    """

    def __init__(
        self, most: int, patience: float | None = None, alone: bool = False, is_used: Callable[[], bool] | None = None,
        of_job: bool = False,
    ) -> None:
        self.most = most
        self.clock = itertools.count(1)
        self._patience = PATIENCE if patience is None else patience
        self._alone = alone
        self._is_used = is_used
        self.of_job = of_job
        self._all: list[Connection] = []

    def open(self, uri: str, name: str, context: str | None = None, socket: socket.socket | None = None) -> Connection:
        """A new Connection that is ready, see there. Another one makes way where that is needed. Raises Error."""
        while len(self._all) >= self.most:
            self._close(min(self._all, key=_by_use))
        is_refused = is_unknown = False
        since = time.monotonic()
        connection = self._begin(uri, name, context, socket)
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

    def another(self, first: Connection) -> Connection | None:
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

    def drop(self, connection: Connection) -> None:
        """Let go of a connection that is not ready."""
        self._all.remove(connection)
        connection.handle = None

    def release(self, connection: Connection) -> None:
        """Close a connection, if it is one of ours still; whether it became ready or not."""
        if connection in self._all:
            self._close(connection)

    def give_back(self) -> None:
        """Close all connections, when their answers are there. Raises Error."""
        # A server may let go of none as long as it is speaking with one: those in its handshake first.
        while self._all:
            self._close(min(self._all, key=_by_use))

    def wait(self, request: Request) -> None:
        """Return when a request is done; those of the other connections go on meanwhile. Raises Error."""
        connection, cookie = request
        while not connection.is_done(cookie):
            self.turn()

    def wait_for(self, fd: int, event: int, give_back: bool) -> None:
        """
        Return when a descriptor is ready for an event of poll(2); until then take what the servers send. Raises Error.

        A server that cannot get rid of its answers may stand still with all that it does, and QEMU has a guest to run.
        give_back: when that takes long, and no answers are to come, close the connections.
        """
        since = time.monotonic()
        while fd not in self.turn(IDLE_SECONDS if give_back and self._all else None, fd, event):
            long = time.monotonic() - since >= IDLE_SECONDS
            if give_back and long and not any(connection.is_asked for connection in self._all):
                self.give_back()

    def turn(
        self, seconds: float | None = None, fd: int | None = None, event: int = 0, leaving: Connection | None = None,
    ) -> set[int]:
        """
        Wait until a connection can go on, and let those that can; returns the descriptors that were ready.

        seconds: it then returns without any. fd, event: one more that is waited for, as of poll(2).
        leaving: from which nothing is to come but its end. Raises Error.
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

    def _begin(self, uri: str, name: str, context: str | None, socket: socket.socket | None = None) -> Connection:
        connection = Connection(self, uri, name, context, socket)
        self._all.append(connection)
        return connection

    def _close(self, connection: Connection) -> None:
        try:
            connection.close()
        finally:
            self._all.remove(connection)

    def _make_way_for(self, connection: Connection) -> bool:
        """Close all others, of which the server has too many, and have fewer from now on. Whether there were any."""
        others = [other for other in self._all if other is not connection]
        if not others:
            return False
        self.most = max(1, sum(other.ready for other in others))
        for other in sorted(others, key=_by_use):
            self._close(other)
        return True

    def _unanswered(self, connection: Connection, is_refused: bool) -> Error:
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


def _by_use(connection: Connection) -> tuple[bool, int]:
    """Who makes way first: those in their handshake, then those that were used least lately."""
    return connection.ready, connection.used
