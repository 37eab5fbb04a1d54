# SPDX-License-Identifier: LGPL-2.1-or-later
"""Messages between a keeper and the commands that talk to it: lines of JSON over a unix socket."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import time

from vnb.base import waiting
from vnb.base.errors import Error, Saved

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from typing import Any


PATIENCE_SECONDS = 5  # for whoever waits for a keeper to wait without a word, the first time
WAITED_FOR_SECONDS = 30  # for whoever has begun a job to wait for its end, where that fails
MAX_MESSAGE = 32 << 20  # a head has XML in it, disks are a few hundred bytes each
REQUEST_SECONDS = 10  # for whoever speaks to the keeper to say what it wants, and to take the answer
UNASKED = {"note", "ending", "ended", "doing"}  # keys of messages that are no answers


class Line:
    """Messages over a socket, one line of JSON each."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self._rest = b""
        self._doing: str | None = None  # what the other side waits for, as it has said

    def fileno(self) -> int:
        return self.socket.fileno()

    def send(self, **message: Any) -> None:
        """Send a message; one that nobody reads any more is lost, which is no harm."""
        with contextlib.suppress(OSError):
            try:
                self.socket.sendall(json.dumps(message).encode() + b"\n")
            except TimeoutError:
                self.socket.shutdown(socket.SHUT_RDWR)  # a part of it may be on its way: no other can follow

    def receive(self) -> dict[str, Any] | None:
        """The next message, or None at the end. Raises Error for what is none."""
        while b"\n" not in self._rest:
            try:
                more = self.socket.recv(65536)
            except TimeoutError:
                raise Error("keeper", "does not answer") from None
            except OSError:
                more = b""
            if not more:
                return None
            self._rest += more
            if len(self._rest) > MAX_MESSAGE:
                raise Error("keeper", "message too long")
        line, _, self._rest = self._rest.partition(b"\n")
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            raise Error("keeper", "malformed message")
        return message

    def patiently(self, hear: Callable[[dict[str, Any]], Any]) -> dict[str, Any] | None:
        """As receive(); says, as a note to hear(message), what the other side waits for when that takes long."""
        begun = now = time.monotonic()
        pause = PATIENCE_SECONDS
        next_ = begun + pause
        while True:
            while b"\n" not in self._rest and not select.select([self.socket], [], [], max(0, next_ - now))[0]:
                now = time.monotonic()
                limit = self.socket.gettimeout()
                if limit is not None and now - begun > limit:
                    raise Error("keeper", "does not answer")
                what = self._doing or "the keeper of the job"
                hear({"note": f"waiting for {what}, {now - begun:.0f} seconds by now"})
                pause *= 2
                next_ = now + pause
            message = self.receive()
            if message is None or "doing" not in message:
                return message
            self._doing = message["doing"]
            now = time.monotonic()

    def answer(self, hear: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        """Read what nobody asked for, which goes to hear(message), up to an answer; returns it, raises an error."""
        while True:
            message = self.patiently(hear)
            if message is None:
                raise KeeperDied("keeper", "ended without an answer")
            if "error" in message:
                raise (Saved if message.get("saved") else Error)(*message["error"])
            if not UNASKED & message.keys():
                return message
            hear(message)

    def tell(self, text: str) -> None:
        """A line for the user. It is lost where so many have not been read: who tells it has a guest to watch over."""
        self.offer(note=text)

    def warn(self, text: str) -> None:
        """A line for the user, which --strict makes a failure."""
        self.offer(note=text, warning=True)

    def offer(self, **message: Any) -> None:
        """Send a short message unless so many have not been read that it would have to wait."""
        # A socket counts as writable while most of its buffer is free, so a line fits.
        if self.socket.fileno() >= 0 and select.select([], [self.socket], [], 0)[1]:
            self.send(**message)

    def waits(self) -> Any:
        """A context in which the other side is told what this process waits for."""
        return waiting.told_to(lambda what: self.offer(doing=what))

    def close(self) -> None:
        self.socket.close()


class KeeperDied(Error):
    """The keeper ended without a word: somebody killed it."""
