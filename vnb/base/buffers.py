# SPDX-License-Identifier: LGPL-2.1-or-later
"""Buffers that are used again: a fresh one of half a MiB costs its page faults each time."""

from __future__ import annotations

import collections
import os
import queue
import select
import threading
from collections.abc import Callable

from vnb.base.signals import held

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


AT_ONCE = 4  # qemu-img processes: each takes 30 ms, mostly to start
SIGNAL_SECONDS = 1  # the most that a signal waits for us while a thread works
SMALL = 64 << 10  # below this malloc(3) has memory at hand that it was given back


class Pool:
    """
    Buffers of at least the size asked for, and at most twice that.

    limit: bytes that are kept for later; what is out is for the caller to bound.
    """

    def __init__(self, limit: int = 16 << 20) -> None:
        self._limit = limit
        self._kept = 0
        self._free: dict[int, list[bytearray]] = {}  # size: list of bytearray of that size, a power of 2

    def take(self, size: int) -> memoryview:
        """A memoryview of size bytes, with anything in it."""
        if size < SMALL:
            return memoryview(bytearray(size))
        rounded = 1 << (size - 1).bit_length()
        free = self._free.get(rounded)
        if free:
            self._kept -= rounded
            return memoryview(free.pop())[:size]
        return memoryview(bytearray(rounded))[:size]

    def give(self, view: memoryview) -> None:
        """Take back a view from take(); nobody may use it any more."""
        buffer = view.obj
        assert isinstance(buffer, bytearray)
        size = len(buffer)
        if size < SMALL:
            return
        if self._kept + size > self._limit:
            # Of a size that is not asked for any more, most likely: what is given now is asked for now.
            self._free.clear()
            self._kept = 0
        self._free.setdefault(size, []).append(buffer)
        self._kept += size


def beside(function: Callable[[], Any], wait: Callable[[int, int], None]) -> Any:
    """Call a function that may block, in a thread; wait() until it has returned. Gives what it gave, or raises that."""
    result: list[Any] = []
    raised: list[Exception] = []

    def work() -> None:
        try:
            result.append(function())
        except Exception as error:
            raised.append(error)
        finally:
            os.close(write_end)

    read_end, write_end = os.pipe()
    thread = threading.Thread(target=work, daemon=True)
    with held:
        thread.start()
    try:
        wait(read_end, select.POLLIN)
    finally:
        os.close(read_end)
    thread.join()
    if raised:
        raise raised[0]
    return result[0]


class Ordered:
    """
    Call a function in several threads; results come in the order of the calls.

        with Ordered(function, threads) as work:
            work.call(argument)
            while work.full: use(work.pop())

    threads: 0 calls it at once, in this thread. They start when there is something to do.
    """

    def __init__(self, function: Callable[[Any], Any], threads: int) -> None:
        self._function = function
        self._jobs: collections.deque[_Job] = collections.deque()
        self._threads: list[threading.Thread] = []
        self._count = threads
        # Two calls a thread: one that it works on, and one that waits, so that it need not.
        self._depth = max(1, 2 * threads)
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._ending = False

    def __enter__(self) -> Ordered:
        return self

    def __exit__(self, *_: object) -> None:
        """End the threads. Calls that no thread has begun are dropped."""
        self._ending = True
        # One word for all, which each thread passes on. A count would be wrong: a signal may come out of start(), of a
        # thread that runs by then, and that one must not take the word from another.
        self._queue.put(None)
        for thread in self._threads:
            thread.join()

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def full(self) -> bool:
        """A result should be taken before the next call."""
        return len(self._jobs) >= self._depth

    def call(self, argument: Any) -> None:
        """Have function(argument) called."""
        job = _Job(argument)
        self._jobs.append(job)
        if not self._count:
            job.run(self._function)
            return
        job.done.acquire()
        self._queue.put(job)
        if len(self._threads) < min(self._count, len(self._jobs)):
            thread = threading.Thread(target=self._work, daemon=True)
            with held:  # start() waits for the thread, and a signal that comes out of it leaves its lock in disorder
                thread.start()
                self._threads.append(thread)

    def append(self, result: Any) -> None:
        """A result that needs no call, in its place in the order."""
        job = _Job(None)
        job.result = result
        self._jobs.append(job)

    def pop(self) -> Any:
        """The result of the oldest call; raises what it raised."""
        job = self._jobs[0]
        # A signal that comes just before this waits is handled only when it wakes up.
        while not job.done.acquire(timeout=SIGNAL_SECONDS):
            pass
        self._jobs.popleft()
        if job.error is not None:
            raise job.error
        return job.result

    def _work(self) -> None:
        while (job := self._queue.get()) is not None and not self._ending:
            job.run(self._function)
            job.done.release()
        self._queue.put(None)


class _Job:
    __slots__ = ("argument", "done", "error", "result")

    def __init__(self, argument: Any) -> None:
        self.argument = argument
        self.done = threading.Lock()
        self.error: Exception | None = None
        self.result: Any = None

    def run(self, function: Callable[[Any], Any]) -> None:
        try:
            self.result = function(self.argument)
        except Exception as error:  # raised again by pop(), in the thread that reports
            self.error = error
