# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Files written past the page cache, by a thread, while what comes next is read.

A copy into the page cache costs as much as all that vnb-pack does otherwise, what is in there has to be written in the
end all the same, while everybody waits for fsync(2), and it pushes out what the guests need.
"""

import contextlib
import errno
import fcntl
import mmap
import os
import queue
import threading

from vnb import stream
from vnb.errors import os_error

BLOCK = 2 << 20  # bytes of one write: large for disks, and all three small beside the cache of a processor
BLOCKS = 3  # one is filled, one is written, one waits


class DirectWriter(stream.Writer):
    """
    A Writer to a new file, from its first byte.

    All is with the operating system after finish(), and not before: fsync(2) comes after it. close() ends the thread,
    whatever was written, and leaves the file open. Where the file system does not take direct writes, they go
    through the page cache.
    """

    def __init__(self, fd, name):
        super().__init__(fd, name)
        self._block = _block()
        self._fill = 0  # bytes in the block
        self._at = 0  # where in the file it goes
        self._made = 1  # blocks
        self._full = queue.SimpleQueue()  # (block, where it goes), or None in the end
        self._free = queue.SimpleQueue()  # blocks that were written, or the OSError that ended the thread
        self._thread = None

    def write(self, header, payload=None):
        """Take a frame's bytes; they may be reused at once."""
        for part in (header,) if payload is None else (header, payload):
            self.offset += len(part)
            self._take(part)

    def flush(self):
        """Nothing: finish() is for that."""

    def finish(self):
        """Have all bytes written. Raises Error."""
        self.close()
        while not self._free.empty():
            self._checked(self._free.get())
        try:
            set_direct(self.fd, False)  # the rest is not a multiple of the disk's sectors
            _write(self.fd, self._block[: self._fill], self._at)
        except OSError as error:
            raise os_error(self.name, error) from None

    def close(self):
        """End the thread; what it was given is written before."""
        if self._thread is not None:
            self._full.put(None)
            self._thread.join()
            self._thread = None

    def _take(self, part):
        begin = 0
        while begin < len(part):
            count = min(len(part) - begin, BLOCK - self._fill)
            self._block[self._fill : self._fill + count] = part[begin : begin + count]
            begin += count
            self._fill += count
            if self._fill == BLOCK:
                self._next_block()

    def _next_block(self):
        if self._at == 0:
            with contextlib.suppress(OSError):  # not every file system can
                set_direct(self.fd, True)
            self._thread = threading.Thread(target=self._work, daemon=True)
            self._thread.start()
        self._full.put((self._block, self._at))
        self._at += BLOCK
        self._fill = 0
        if self._made < BLOCKS:
            self._made += 1
            self._block = _block()
        else:
            self._block = self._checked(self._free.get())

    def _checked(self, block):
        if isinstance(block, OSError):
            raise os_error(self.name, block)
        return block

    def _work(self):
        while (job := self._full.get()) is not None:
            block, at = job
            try:
                try:
                    _write(self.fd, block, at)
                except OSError as error:
                    # Refused only when it comes, or the rest of a write that found less room than it needs.
                    if error.errno != errno.EINVAL:
                        raise
                    set_direct(self.fd, False)
                    _write(self.fd, block, at)
                self._free.put(block)
            except OSError as error:
                self._free.put(error)
                return


def set_direct(fd, wanted):
    """Have what is written to a file go past the page cache, or not. Raises OSError."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT if wanted else flags & ~os.O_DIRECT)


def _block():
    return memoryview(mmap.mmap(-1, BLOCK))  # direct writes come from whole pages


def _write(fd, view, at):
    while len(view):
        count = os.pwrite(fd, view, at)
        view = view[count:]
        at += count
