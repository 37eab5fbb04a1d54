# SPDX-License-Identifier: LGPL-2.1-or-later
"""A relay between a server and its clients: it knows who is connected, and what nobody takes."""

import contextlib
import socket
import tempfile
import threading

from servers import DEADLINE

PIECE = 1 << 16  # bytes that are passed on at once


class Relay:
    """
    Passes on what the clients of a server (servers.Server) and the server say. A context; uri is for the clients.

    at_once (int or None): clients that are taken at a time; the next one gets no word before one of them has gone.
    peak, open, all (int): clients that were connected at most, are so, and ever were. sent (int): bytes to clients.
    """

    def __init__(self, server, at_once=None):
        self.open = self.peak = self.all = self.sent = 0
        self._server = server.uri.partition("socket=")[2]
        self._changed = threading.Condition()
        self._room = threading.Semaphore(at_once or 1 << 20)

    def __enter__(self):
        self._directory = tempfile.TemporaryDirectory(prefix="vnb-test.")
        path = f"{self._directory.name}/s"
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(path)
        self._listening.listen(64)
        self.uri = f"nbd+unix:///?socket={path}"
        self._thread = threading.Thread(target=self._take, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._room.release()  # for the one that may wait for it
        self._listening.shutdown(socket.SHUT_RDWR)
        self._thread.join(DEADLINE)
        self._listening.close()
        self._directory.cleanup()

    def export(self, name):
        """The URI of an export (str)."""
        return self.uri.replace(":///", f":///{name}")

    def wait_for(self, condition):
        """Wait until condition() is true, of what changes here; or raise TimeoutError."""
        with self._changed:
            if not self._changed.wait_for(condition, DEADLINE):
                raise TimeoutError(f"open {self.open}, sent {self.sent}")

    def _take(self):
        with contextlib.suppress(OSError):  # of the end
            while True:
                self._room.acquire()
                client, _ = self._listening.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client):
        with client, socket.socket(socket.AF_UNIX) as server:
            self._count(1)
            left = threading.Lock()  # taken by the direction that ends first
            try:
                server.connect(self._server)
                answers = threading.Thread(target=self._pass_on, args=(server, client, left, True), daemon=True)
                answers.start()
                self._pass_on(client, server, left)
                answers.join()
            finally:
                self._room.release()

    def _pass_on(self, source, target, left, is_counted=False):
        with contextlib.suppress(OSError):  # one of them has gone
            while part := source.recv(PIECE):
                target.sendall(part)
                if is_counted:
                    with self._changed:
                        self.sent += len(part)
                        self._changed.notify_all()
        if left.acquire(blocking=False):
            self._count(-1)  # before a client hears of it, and connects again
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def _count(self, step):
        with self._changed:
            self.open += step
            self.all += step > 0
            self.peak = max(self.peak, self.open)
            self._changed.notify_all()
