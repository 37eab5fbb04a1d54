# SPDX-License-Identifier: LGPL-2.1-or-later
"""Bytes of a stream from a file descriptor, some of them read ahead."""

from __future__ import annotations

import os
import select
import stat

from vnb.base.errors import os_error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vnb.format.types import Wait


AHEAD = 4096  # read beyond a payload, so that the next header costs no system call; it is copied once more


class Input:
    """
    Bytes of a file descriptor, with a small window to look ahead in. No payload is copied twice.

    name: for messages. offset: of the next byte, in the stream.
    wait: is given fd and an event of poll(2) before each read, and returns when that has come.
    """

    def __init__(self, fd: int, name: str, wait: Wait | None = None) -> None:
        self.fd = fd
        self.name = name
        self._wait = wait
        self.offset = 0
        self._buffer = bytearray(2 * AHEAD)
        self._start = self._end = 0

    def fill(self, size: int) -> memoryview:
        """Have at least size bytes in the window, fewer only at the end of file; the window."""
        while self._end - self._start < size:
            if self._start + size > len(self._buffer):
                kept = self._buffer[self._start : self._end]
                self._buffer = bytearray(max(2 * AHEAD, 2 * size))
                self._buffer[: len(kept)] = kept
                self._start, self._end = 0, len(kept)
            count = self._readv([memoryview(self._buffer)[self._end :]])
            if count == 0:
                break
            self._end += count
        return memoryview(self._buffer)[self._start : self._end]

    def skip(self, size: int) -> None:
        """Leave size bytes of the window behind."""
        self._start += size
        self.offset += size
        if self._start == self._end:
            self._start = self._end = 0

    def read_into(self, view: memoryview) -> int:
        """Fill view; returns how many bytes were there before the end of file."""
        have = min(len(view), self._end - self._start)
        view[:have] = memoryview(self._buffer)[self._start : self._start + have]
        self.skip(have)
        while have < len(view):
            # The window is empty here: the same call fetches the header that follows the payload.
            count = self._readv([view[have:], memoryview(self._buffer)[:AHEAD]])
            if count == 0:
                break
            self._end = max(0, count - (len(view) - have))
            self.offset += count - self._end
            have += count - self._end
        return have

    def _readv(self, views: list[memoryview]) -> int:
        while True:
            if self._wait is not None:
                self._wait(self.fd, select.POLLIN)
            try:
                return os.readv(self.fd, views)
            except BlockingIOError:
                wait_for_fd(self.fd, select.POLLIN)
            except OSError as error:
                raise os_error(self.name, error, f"stream offset {self.offset}") from None


def is_pipe(fd: int) -> bool:
    try:
        return stat.S_ISFIFO(os.fstat(fd).st_mode)
    except (OSError, TypeError):
        return False


def wait_for_fd(fd: int, event: int) -> None:
    """Wait for an event of poll(2) on a descriptor that may be non-blocking."""
    # ssh makes its standard streams non-blocking, and whoever shares them with it gets the same.
    poll = select.poll()
    poll.register(fd, event)
    poll.poll()
