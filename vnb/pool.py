# SPDX-License-Identifier: LGPL-2.1-or-later
"""Buffers that are used again: a fresh one of half a MiB costs its page faults each time."""

import collections
import threading


class Pool:
    """Buffers of at least the size asked for. As many exist as were ever out at once."""

    def __init__(self):
        self._free = []

    def take(self, size):
        """A memoryview of size bytes, with anything in it."""
        for at in range(len(self._free) - 1, -1, -1):
            if len(self._free[at]) >= size:
                return memoryview(self._free.pop(at))[:size]
        if self._free:
            self._free.pop(0)  # too small: let it go, so that the pool does not grow with sizes seen
        return memoryview(bytearray(size))[:]

    def give(self, view):
        """Take back a view from take(); nobody may use it any more."""
        self._free.append(view.obj)


class Ordered:
    """
    Call a function in several threads; results come in the order of the calls.

    threads (int): 0 calls it at once. depth (int): how many calls may wait; the caller keeps to `full`.
    """

    def __init__(self, function, threads):
        self._function = function
        self._jobs = collections.deque()
        self._depth = 2 * threads
        self._threads = threads
        if threads:
            import queue

            self._queue = queue.SimpleQueue()
            for _ in range(threads):
                threading.Thread(target=self._work, daemon=True).start()

    def __len__(self):
        return len(self._jobs)

    @property
    def full(self):
        """No call should be added before a result was taken."""
        return len(self._jobs) >= max(1, self._depth)

    def call(self, argument):
        """Have function(argument) called."""
        job = _Job(argument)
        self._jobs.append(job)
        if self._threads:
            job.done.acquire()
            self._queue.put(job)
        else:
            job.run(self._function)

    def append(self, result):
        """A result that needs no call, in its place in the order."""
        job = _Job(None)
        job.result = result
        self._jobs.append(job)

    def pop(self):
        """The result of the oldest call; raises what it raised."""
        job = self._jobs[0]
        with job.done:
            self._jobs.popleft()
        if job.error is not None:
            raise job.error
        return job.result

    def close(self):
        """Let the threads end."""
        for _ in range(self._threads):
            self._queue.put(None)

    def _work(self):
        while (job := self._queue.get()) is not None:
            job.run(self._function)
            job.done.release()


class _Job:
    __slots__ = ("argument", "done", "error", "result")

    def __init__(self, argument):
        self.argument = argument
        self.done = threading.Lock()
        self.error = self.result = None

    def run(self, function):
        try:
            self.result = function(self.argument)
        except Exception as error:  # raised again by pop(), in the thread that reports
            self.error = error
