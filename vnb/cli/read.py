# SPDX-License-Identifier: LGPL-2.1-or-later
"""vnb-read - read the data of extents from NBD exports

Usage:
  vnb-read [--requests N] [--request-size SIZE] [--connections N] [options]
  vnb-read --help | --version

Reads a stream with extents, and writes it with the bytes of its data extents.

Options:
  --requests N         the number of reads in flight, over all disks
                       [default: 64]
  --request-size SIZE  the bytes of one read, and of one data frame
                       [default: 512k]
  --connections N      the most connections to one export, if the server allows
                       several; all exports together get 12, or N if that is
                       more [default: 4]
  --progress MODE      show the progress: auto, none or json; see vnb(7)
"""

from __future__ import annotations

import collections
import functools
import time
from operator import attrgetter

from xxhash import xxh3_64_intdigest

from vnb.base.buffers import Pool
from vnb.base.errors import Error, UsageError
from vnb.cli import arguments, output
from vnb.cli.progress import Progress
from vnb.cli.stdio import stdin
from vnb.format import values
from vnb.format.frame import DATA, MAX_DATA, ZERO, GiB, MiB
from vnb.nbd.connections import MOST_OF_READ, Connections
from vnb.nbd.endpoint import PATIENCE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vnb.nbd.connection import Connection


TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


MAX_IN_FLIGHT = 16 * MiB  # bytes of all buffers of reads in flight, whatever --requests is
BUSY = 4  # reads in flight on a connection: if each has so many, another one is worth its handshake
MAX_WAITING = 1 << 16  # numbers in lists of extents that wait behind a read in flight: 3 MiB
MAX_ZEROES = 1 * GiB  # one extent of zeroes that were read
LIST = 16  # numbers that take as much memory as a list with none


def writes_stream(_args: dict[str, Any]) -> bool:
    """Whether standard output gets a stream."""
    return True


def main(args: dict[str, Any]) -> None:
    requests = arguments.integer(args, "--requests", 1, 1024)
    request_size = arguments.size(args, "--request-size", 4096, MAX_DATA)
    if request_size & (request_size - 1):
        raise UsageError("--request-size", f'"{args["--request-size"]}" is not a power of 2')
    most = arguments.integer(args, "--connections", 1, 64)
    connections = Connections(max(most, MOST_OF_READ), of_job=True)
    # The connections stay while the output is blocked, since there is work for them.
    out = output.stdout(functools.partial(connections.wait_for, give_back=False))
    pipeline = Pipeline(connections, requests)
    with Progress(args["--progress"]) as progress:
        for segment in stdin(stage="extents", wait=pipeline.wait_for):
            progress.begin(segment.head)
            exports = [Export(connections, disk, most, request_size) for disk in segment.disks]
            read(segment, exports, out, pipeline, progress)


def read(segment: Any, exports: Any, out: Any, pipeline: Pipeline, progress: Any) -> None:
    """Write a segment with extents to out, with their data."""
    # Later stages have no use for the URIs of the exports.
    disks = [{key: value for key, value in disk.items() if key != "source"} for disk in segment.disks]
    with progress.segment(out.segment({**segment.head, "stage": "data"}, disks)) as written:
        pipeline.begin(written, exports)
        for frame in segment:
            if frame.__class__ is values.Extents:
                pipeline.add(frame)
            else:
                pipeline.drain()
                written.frame(frame)
        pipeline.drain()
        written.end()
    pipeline.connections.give_back()


class Export:
    """
    The connections to one disk's export, which are made as they are needed, and the size of a request.

    count: the most connections. request_size: bytes; None: there was no connection yet.
    """

    def __init__(self, connections: Connections, disk: Any, count: int, request_size: int) -> None:
        name, source = disk["name"], disk.get("source", {})
        if not isinstance(source.get("uri"), str):
            raise Error(name, "the stream does not say where this disk is exported")
        self.request_size: Any = None
        self._connections = connections
        self._disk = disk
        self._wanted_size = request_size
        self._most = count
        self._ours: list[Connection] = []  # the connections that are open, or were open when we last looked

    def open(self) -> Any:
        """A new connection. Raises Error."""
        name = self._disk["name"]
        first = self._connections.open(self._disk["source"]["uri"], name)
        if first.size != self._disk["size"]:
            raise Error(name, f'the export has {first.size} bytes, the stream says {self._disk["size"]}')
        self._ours.append(first)
        if self.request_size is None:
            self.request_size = min(max(self._wanted_size, first.minimum), first.maximum, MAX_DATA)
            if not first.multi_conn:
                self._most = 1
        return first

    def next_connection(self) -> Connection:
        """The connection that has the least to do, or a new one if there is none."""
        ready = []
        for connection in tuple(self._ours):
            if connection.ready and connection.size == self._disk["size"]:
                ready.append(connection)
            elif not connection.is_open and connection.failure is None:
                self._ours.remove(connection)  # it was closed to make room for another one
            elif not connection.is_open or connection.ready or time.monotonic() > connection.began + PATIENCE:
                self._connections.release(connection)
                self._ours.remove(connection)
                self._most = max(1, len(self._ours))  # the server takes no more, so we do not ask for more again
        if not ready:
            return self.open()
        best = min(ready, key=attrgetter("in_flight"))
        if best.in_flight >= BUSY and len(self._ours) < self._most:
            another = self._connections.another(best)
            if another is not None:
                self._ours.append(another)
        return best


class Pipeline:
    """Reads in flight, and extents that wait behind them. All leave in the order in which they came."""

    def __init__(self, connections: Connections, requests: int) -> None:
        self.connections = connections
        self.requests = requests
        self.out: Any = None
        self.exports: list[Export] = []
        self.pool = Pool()
        # (request, disk, offset, view), or (None, disk, runs, None)
        self.queue: collections.deque[Any] = collections.deque()
        self.in_flight = 0
        self.bytes_in_flight = 0
        self.waiting = 0  # numbers in lists that are in the queue
        self.zeroes: Any = None  # (disk, offset, end) of zeroes that were read and not yet written: more may follow

    def begin(self, out: Any, exports: list[Export]) -> None:
        """Begin with a segment with these exports (list of Export)."""
        self.out = out
        self.exports = exports

    def wait_for(self, fd: int, event: int) -> None:
        """Return when a descriptor has input. Until then pass on the answers of the servers. See input.Input."""
        ready = self.connections.turn(0, fd, event)
        while fd not in ready:
            if not self.queue:
                self.connections.wait_for(fd, event, give_back=True)
                return
            if self._is_first_done():
                self._write_first()
                ready = self.connections.turn(0, fd, event)
            else:
                ready = self.connections.turn(None, fd, event)

    def add(self, frame: values.Extents) -> None:
        """Take an Extents frame: start reads for its data, as many as may be in flight, and pass on the rest."""
        kept: list[int] = []
        for offset, length, state in frame:
            if state != DATA:
                kept += (offset, length, state)
                continue
            if kept:
                self._pass_on(frame.disk, kept)
                kept = []
            self._read(frame.disk, offset, offset + length)
        if kept:
            self._pass_on(frame.disk, kept)

    def _pass_on(self, disk: int, runs: list[int]) -> None:
        self.queue.append((None, disk, runs, None))
        self.waiting += LIST + len(runs)
        # Extents that wait behind reads have a limit too: a disk may have millions of zeroes and little data.
        while not self.in_flight and self.queue or self.waiting > MAX_WAITING:
            self._write_first()

    def _read(self, disk: int, offset: int, end: int) -> None:
        export = self.exports[disk]
        if export.request_size is None:
            export.open()
        while offset < end:
            # Whole requests begin at multiples of their size: servers like it, and frames of two backups match.
            length = min(export.request_size - offset % export.request_size, end - offset)
            while self.in_flight >= self.requests or self.bytes_in_flight + length > MAX_IN_FLIGHT:
                self._write_first()
            view = self.pool.take(length)
            request = export.next_connection().read(offset, view)
            self.queue.append((request, disk, offset, view))
            self.in_flight += 1
            self.bytes_in_flight += length
            offset += length

    def drain(self) -> None:
        """Write everything that is in the queue."""
        while self.queue:
            self._write_first()
        self._write_zeroes()
        self.out.writer.flush()

    def _is_first_done(self) -> bool:
        request = self.queue[0][0]
        return request is None or request[0].is_answered(request[1])

    def _write_first(self) -> None:
        request, disk, what, view = self.queue.popleft()
        if request is None:
            self._write_zeroes()
            self.out.extents(disk, what)
            self.waiting -= LIST + len(what)
            return
        self.connections.wait(request)
        self.in_flight -= 1
        self.bytes_in_flight -= len(view)
        length, hash_ = len(view), xxh3_64_intdigest(view)
        # Zeroes that the guest wrote are data for the server. We have the hash anyway, and it is the faster test.
        if hash_ == _hash_of_zeroes(length) and view.tobytes() == bytes(length):
            self._add_zeroes(disk, what, length)
        else:
            self._write_zeroes()
            self.out.data(disk, what, length, "none", hash_, view)
        self.pool.give(view)

    def _add_zeroes(self, disk: int, offset: int, length: int) -> None:
        if self.zeroes is not None and self.zeroes[0] == disk and self.zeroes[2] == offset:
            offset, length = self.zeroes[1], offset + length - self.zeroes[1]
        else:
            self._write_zeroes()
        self.zeroes = disk, offset, offset + length
        if length >= MAX_ZEROES:
            self._write_zeroes()  # the next stage sees progress, and we notice if it has ended

    def _write_zeroes(self) -> None:
        if self.zeroes is not None:
            disk, offset, end = self.zeroes
            self.zeroes = None
            self.out.extents(disk, [offset, end - offset, ZERO])


@functools.lru_cache(maxsize=64)  # nearly all reads are of one length
def _hash_of_zeroes(length: int) -> int:
    return xxh3_64_intdigest(bytes(length))
