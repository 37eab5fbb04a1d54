# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Writers: a thread a disk, between the stream and a target, in bounded memory.

    buffers = Buffers()                     payloads of the Reader, bytes on their way
    writer = Writer(target, "vda", buffers)
    writer.put(frame, fresh)                takes the frame over, buffer and all
    writer.start_finish(); writer.finish()  all is written and durable

The reading thread waits for memory alone; what fails in a writer is raised where the reading thread asks for it next.
"""

from __future__ import annotations

import queue
import threading

from vnb.format import codec
from vnb.format.frame import KiB, MiB
from vnb.format.values import Data, Extents

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vnb.nbd.sinks import Nbd, Raw


MEMORY = 16 * MiB  # of payloads and plain bytes between the stream and the disks, over all disks
SMALLEST = 64 * KiB  # the least that a buffer has: with few sizes, all get used again
RUN_MEMORY = 40  # bytes that one offset, length or state of an extent takes while it waits


class Buffers:
    """
    Memory for payloads on their way: at most `limit` bytes, used again. The pool of a vnb.format.stream.Reader.

    One thread takes and reserves, and waits until others gave enough back. limit has to be several times
    the largest frame. fail() makes the taking thread raise: nothing after it would be of use.
    """

    def __init__(self, limit: int = MEMORY) -> None:
        self.limit = limit
        self.failure: BaseException | None = None
        self._used = 0  # lent and reserved
        self._kept = 0  # in _free
        self._free: dict[int, list[bytearray]] = {}  # size: buffers
        self._lock = threading.Lock()  # used as it is: a signal in Condition.__enter__ would leave it locked
        self._changed = threading.Condition(self._lock)

    def take(self, size: int) -> memoryview:
        """A memoryview of size bytes, with anything in it. Raises what fail() was told."""
        size_of_buffer = max(SMALLEST, 1 << (size - 1).bit_length())
        with self._lock:
            self._reserve(size_of_buffer)
            free = self._free.get(size_of_buffer)
            if free:
                self._kept -= size_of_buffer
                buffer = free.pop()
            else:
                while self._kept and self._used + self._kept > self.limit:
                    self._drop()
                buffer = bytearray(size_of_buffer)
        return memoryview(buffer)[:size]

    def give(self, view: memoryview) -> None:
        """Take back a view from take(); nobody may use it any more."""
        buffer = view.obj
        assert isinstance(buffer, bytearray)
        with self._lock:
            self._free.setdefault(len(buffer), []).append(buffer)
            self._kept += len(buffer)
            self._release(len(buffer))

    def reserve(self, size: int) -> None:
        """Count size bytes that somebody will have in memory, until release(). Raises what fail() was told."""
        with self._lock:
            self._reserve(size)

    def release(self, size: int) -> None:
        """These bytes are not in memory any more."""
        with self._lock:
            self._release(size)

    def fail(self, error: BaseException) -> None:
        """Have the thread that takes raise error (an exception; the first one counts)."""
        with self._lock:
            if self.failure is None:
                self.failure = error
            self._changed.notify_all()

    def check(self) -> None:
        """Raise what fail() was told, if anything."""
        if self.failure is not None:
            raise self.failure

    def _reserve(self, size: int) -> None:
        while self._used + size > self.limit and self.failure is None:
            self._changed.wait()
        self.check()
        self._used += size

    def _release(self, size: int) -> None:
        self._used -= size
        self._changed.notify_all()

    def _drop(self) -> None:
        size = max(size for size, buffers in self._free.items() if buffers)
        self._free[size].pop()
        self._kept -= size


class Writer:
    """
    A thread that writes the frames of one disk to its target.

    After a failure it only gives back what it is handed; the failure is raised where buffers are taken, and by
    finish(). target: see Raw. name: of the disk. buffers (Buffers).
    """

    def __init__(self, target: Nbd | Raw, name: str, buffers: Buffers) -> None:
        self.target = target
        self.name = name
        self._buffers = buffers
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()  # bounded by what buffers lends
        self._aborted = False
        self._error: Exception | None = None
        self._ended = threading.Event()  # a join() that a signal interrupts takes the thread for ended
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def put(self, frame: Data | Extents, fresh: bool) -> None:
        """
        Write a Data or Extents frame. Raises what failed until now.

        fresh: the target reads as zeroes where nothing was written, so that zeroes need no request.
        """
        if type(frame) is Data:
            # The bytes that it is unpacked to are memory too.
            plain = 0 if frame.codec == "none" else frame.length
            self._buffers.reserve(plain)
            self._queue.put((frame, plain))
        elif type(frame) is Extents and not fresh:
            weight = RUN_MEMORY * len(frame.runs)
            self._buffers.reserve(weight)
            self._queue.put((frame, weight))

    def fence(self) -> None:
        """What comes now is written after all that came before: a segment may write to the same place again."""
        self._queue.put((None, None))

    def start_finish(self) -> None:
        """Begin what finish() waits for, so that several disks do it side by side."""
        self._queue.put(None)

    def finish(self) -> None:
        """Wait until all is written and durable, and the target is closed. After start_finish()."""
        self._ended.wait()
        self.target.close()
        if self._error is not None:
            raise self._error

    def abort(self) -> None:
        """Stop, whatever is in flight, and close the target. Harmless after finish()."""
        self._aborted = True  # from now on failures are ours
        self._queue.put(None)
        self.target.abort()
        self._ended.wait()
        self.target.close()

    def _run(self) -> None:
        try:
            self._write()
            if not self._aborted:
                self.target.finish()
        except Exception as error:  # raised again in the thread that reports
            if not self._aborted:
                self._error = error
                self._buffers.fail(error)
        finally:
            self._ended.set()

    def _write(self) -> None:
        target = self.target
        while not self._aborted:
            try:
                # While requests are in flight, wait for these: each reply brings us back here.
                item = self._queue.get(block=not target.in_flight)
            except queue.Empty:
                target.poll()
                continue
            if item is None:
                break
            frame, weight = item
            if frame is None:
                target.drain()
            elif frame.__class__ is Data:
                self._write_data(frame, weight)
            else:
                for offset, length, _state in frame:
                    target.zero(offset, length)
                self._buffers.release(weight)
        target.drain()

    def _write_data(self, frame: Data, weight: int) -> None:
        # After a failure nobody waits for buffers any more, so they are given back only where all went well.
        buffers = self._buffers
        payload: Any = frame.payload
        plain = codec.plain(frame, self.name)
        if weight:
            buffers.give(payload)
            self.target.write(frame.offset, plain, lambda: buffers.release(weight))
        else:
            self.target.write(frame.offset, plain, lambda: buffers.give(payload))
