# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Files written past the page cache, by a thread, while what comes next is read.

A copy into the page cache costs as much as all that vnb-pack does otherwise, what is in there has to be written in the
end all the same, while everybody waits for fsync(2), and it pushes out what the guests need.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import queue
import select
import threading

from vnb.base.buffers import beside
from vnb.base.errors import os_error
from vnb.format import writing

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vnb.format.types import Bytes, Wait


BLOCK = 2 << 20  # bytes of one write: large for disks, and all three small beside the cache of a processor
ALIGNMENT = 4096  # bytes: of an offset that every disk takes
BLOCKS = 3  # one is filled, one is written, one waits


class DirectWriter(writing.Writer):
    """
    A Writer to a file, from an offset on that is a multiple of ALIGNMENT.

    All is with the operating system after finish(), and not before: fsync(2) comes after it. close() ends the thread,
    whatever was written, and leaves the file open. Where the file system does not take direct writes, they go
    through the page cache.
    """

    def __init__(self, fd: int, name: str, start: int = 0) -> None:
        super().__init__(fd, name)
        self._block = _block()
        self._fill = 0  # bytes in the block
        self._at = start  # where in the file it goes
        self._made = 1  # blocks
        # (block, where it goes), or None in the end
        self._full: queue.SimpleQueue[tuple[memoryview, int] | None] = queue.SimpleQueue()
        # blocks that were written, or None from the thread that an error ended
        self._free: queue.SimpleQueue[memoryview | None] = queue.SimpleQueue()
        self._error: OSError | None = None  # that error
        self._thread: threading.Thread | None = None

    def write(self, header: Bytes, payload: Bytes | None = None) -> None:
        """Take a frame's bytes; they may be reused at once."""
        for part in (header,) if payload is None else (header, payload):
            self.offset += len(part)
            self._take(part)

    def flush(self) -> None:
        """Nothing: finish() is for that."""

    def finish(self) -> None:
        """Have all bytes written. Raises Error."""
        self.close()
        if self._error is not None:
            raise os_error(self.name, self._error)
        try:
            # The rest is not a multiple of the disk's sectors. It stays in the block: what follows goes behind it.
            set_direct(self.fd, False)
            _write(self.fd, self._block[: self._fill], self._at)
        except OSError as error:
            raise os_error(self.name, error) from None

    def close(self) -> None:
        """End the thread; what it was given is written before."""
        if self._thread is not None:
            self._full.put(None)
            self._thread.join()
            self._thread = None

    def _take(self, part: Bytes) -> None:
        begin = 0
        while begin < len(part):
            count = min(len(part) - begin, BLOCK - self._fill)
            self._block[self._fill : self._fill + count] = part[begin : begin + count]
            begin += count
            self._fill += count
            if self._fill == BLOCK:
                self._next_block()

    def _next_block(self) -> None:
        if self._thread is None:
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
            block = self._free_block()
            if block is None:
                assert self._error is not None
                raise os_error(self.name, self._error)
            self._block = block

    def _free_block(self) -> memoryview | None:
        return self._free.get()

    def _work(self) -> None:
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
                self._give(block)
            except OSError as error:
                self._error = error
                self._give(None)
                return

    def _give(self, block: memoryview | None) -> None:
        self._free.put(block)


class Stdout(DirectWriter):
    """
    Standard output, where it is a file: who writes to it next does so behind what was written.

    fd: of the same file, but opened for this. start: where standard output stands in it.
    wait: see vnb.cli.output.stdout(); a file system on the network may keep us waiting.
    """

    def __init__(self, fd: int, start: int, wait: Wait | None = None) -> None:
        super().__init__(fd, "stdout", start)
        self._wait_beside = wait
        self._given = None if wait is None else os.pipe()  # a byte for each block in the queue of free ones

    def flush(self) -> None:
        """
        Have in the file what was written. Raises Error.

        The start of a segment above all: a file in which only those before it stand would pass for a whole stream.
        """
        self.finish()

    def finish(self) -> None:
        """See DirectWriter."""
        if self._wait_beside is None:
            super().finish()
        else:
            beside(super().finish, self._wait_beside)
        os.lseek(1, self._at + self._fill, os.SEEK_SET)

    def _free_block(self) -> memoryview | None:
        if self._given is not None and self._wait_beside is not None:
            self._wait_beside(self._given[0], select.POLLIN)
            os.read(self._given[0], 1)
        return super()._free_block()

    def _give(self, block: memoryview | None) -> None:
        super()._give(block)
        if self._given is not None:
            os.write(self._given[1], b"\0")


def set_direct(fd: int, wanted: bool) -> None:
    """Have what is written to a file go past the page cache, or not. Raises OSError."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT if wanted else flags & ~os.O_DIRECT)


def _block() -> memoryview:
    # Direct writes come from whole pages. The kernel looks up each of them for each write, which takes half as long as
    # the copy into them; of huge pages there is one.
    block = mmap.mmap(-1, BLOCK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        block.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(block)


def _write(fd: int, view: memoryview, at: int) -> None:
    while len(view):
        count = os.pwrite(fd, view, at)
        view = view[count:]
        at += count
