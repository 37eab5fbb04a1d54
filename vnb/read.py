# SPDX-License-Identifier: LGPL-2.1-or-later
"""vnb-read - read the data of extents from NBD exports

Usage:
  vnb-read [--requests N] [--request-size SIZE] [--connections N] [options]
  vnb-read --help | --version

Reads a stream with extents, writes it with their data.

Options:
  --requests N         reads in flight over all disks [default: 64]
  --request-size SIZE  bytes of one read, and of a data frame [default: 512k]
  --connections N      to each export at most, where the server allows
                       several [default: 4]
  --progress MODE      auto, none or json: how far it is, see vnb(7)
"""

import collections
import functools
from operator import attrgetter

from xxhash import xxh3_64_intdigest

from vnb import arguments, output, stream
from vnb.errors import Error, UsageError
from vnb.export import Connection, Further, wait
from vnb.frame import DATA, MAX_DATA, ZERO, GiB, MiB
from vnb.pool import Pool
from vnb.progress import Progress

MAX_IN_FLIGHT = 16 * MiB  # bytes: what the buffers of reads in flight take, however many are asked for
BUSY = 4  # reads in flight on a connection: with so many on each, another one is worth its handshake
MAX_WAITING = 1 << 16  # numbers in lists of extents that wait behind a read in flight: 3 MiB
MAX_ZEROES = 1 * GiB  # one extent of zeroes that were read
LIST = 16  # numbers that take as much memory as a list with none


def main(args):
    requests = arguments.integer(args, "--requests", 1, 1024)
    request_size = arguments.size(args, "--request-size", 4096, MAX_DATA)
    if request_size & (request_size - 1):
        raise UsageError("--request-size", f'"{args["--request-size"]}" is not a power of 2')
    connections = arguments.integer(args, "--connections", 1, 64)
    out = output.stdout()
    with Progress(args["--progress"]) as progress:
        for segment in stream.stdin(stage="extents"):
            progress.begin(segment.head)
            read(segment, out, connections, request_size, requests, progress)


def read(segment, out, connections, request_size, requests, progress):
    """Write a segment (vnb.stream.Segment) with extents to out (vnb.stream.Writer), with their data."""
    exports = [Export(disk, connections, request_size) for disk in segment.disks]
    # Where the data came from is nobody's business after this stage.
    disks = [{key: value for key, value in disk.items() if key != "source"} for disk in segment.disks]
    with progress.segment(out.segment({**segment.head, "stage": "data"}, disks)) as written:
        pipeline = Pipeline(written, exports, requests)
        for frame in segment:
            if frame.__class__ is stream.Extents:
                pipeline.add(frame)
            else:
                pipeline.drain()
                written.frame(frame)
        pipeline.drain()
        written.end()
    for export in exports:
        export.close()


class Export:
    """
    The connections to one disk's export, made as they are needed, and how much to ask of it at a time.

    connections (list): at most count. request_size (int): bytes.
    """

    def __init__(self, disk, count, request_size):
        name, source = disk["name"], disk.get("source", {})
        if not isinstance(source.get("uri"), str):
            raise Error(name, "the stream does not say where this disk is exported")
        first = Connection(source["uri"], name)
        if first.size != disk["size"]:
            raise Error(name, f'the export has {first.size} bytes, the stream says {disk["size"]}')
        self.connections = [first]
        self.request_size = min(max(request_size, first.minimum), first.maximum, MAX_DATA)
        self._uri = source["uri"]
        self._most = count if first.multi_conn else 1

    def close(self):
        """End the connections."""
        # A server may let go of none as long as it is speaking with one: those in its handshake first.
        for connection in sorted(self.connections, key=attrgetter("ready")):
            connection.close()

    def next_connection(self):
        """The one that has the least to do."""
        ready = [connection for connection in self.connections if connection.ready]
        best = min(ready, key=attrgetter("in_flight"))
        if best.in_flight >= BUSY and len(self.connections) < self._most:
            self.connections.append(Further(self._uri, best))
        return best


class Pipeline:
    """Reads in flight, and extents that wait behind them: all leave in the order in which they came."""

    def __init__(self, out, exports, requests):
        self.out = out
        self.exports = exports
        self.requests = requests
        self.pool = Pool()
        self.queue = collections.deque()  # (request, disk, offset, view), or (None, disk, runs, None)
        self.in_flight = 0
        self.bytes_in_flight = 0
        self.waiting = 0  # numbers in lists that are in the queue
        self.zeroes = None  # (disk, offset, end) of zeroes that were read and not written: they may go on

    def add(self, frame):
        """Take an Extents frame: start reads for its data, as many as may be in flight, and pass on the rest."""
        kept = []
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

    def _pass_on(self, disk, runs):
        self.queue.append((None, disk, runs, None))
        self.waiting += LIST + len(runs)
        # Extents that wait behind reads are bounded too: a disk may have millions of zeroes and little data.
        while not self.in_flight and self.queue or self.waiting > MAX_WAITING:
            self._write_first()

    def _read(self, disk, offset, end):
        export = self.exports[disk]
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

    def drain(self):
        """Write all that is in the queue."""
        while self.queue:
            self._write_first()
        self._write_zeroes()
        self.out.writer.flush()

    def _write_first(self):
        request, disk, what, view = self.queue.popleft()
        if request is None:
            self._write_zeroes()
            self.out.extents(disk, what)
            self.waiting -= LIST + len(what)
            return
        wait(request, [connection for export in self.exports for connection in export.connections])
        self.in_flight -= 1
        self.bytes_in_flight -= len(view)
        length, hash_ = len(view), xxh3_64_intdigest(view)
        # Zeroes that were written out are data for the server. The hash tells first, since it is there anyway.
        if hash_ == _hash_of_zeroes(length) and view.tobytes() == bytes(length):
            self._add_zeroes(disk, what, length)
        else:
            self._write_zeroes()
            self.out.data(disk, what, length, "none", hash_, view)
        self.pool.give(view)

    def _add_zeroes(self, disk, offset, length):
        if self.zeroes is not None and self.zeroes[0] == disk and self.zeroes[2] == offset:
            offset, length = self.zeroes[1], offset + length - self.zeroes[1]
        else:
            self._write_zeroes()
        self.zeroes = disk, offset, offset + length
        if length >= MAX_ZEROES:
            self._write_zeroes()  # whoever reads us should hear of it; and we, where nobody does any more

    def _write_zeroes(self):
        if self.zeroes is not None:
            disk, offset, end = self.zeroes
            self.zeroes = None
            self.out.extents(disk, [offset, end - offset, ZERO])


@functools.lru_cache(maxsize=64)  # nearly all reads are of one length
def _hash_of_zeroes(length):
    return xxh3_64_intdigest(bytes(length))
