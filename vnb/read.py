# SPDX-License-Identifier: LGPL-2.1-or-later
"""vnb-read - read the data of extents from NBD exports

Usage:
  vnb-read [--requests N] [--request-size SIZE] [--connections N] [--debug]
  vnb-read --help | --version

Reads a stream with extents, writes it with their data.

Options:
  --requests N         reads in flight over all disks [default: 16]
  --request-size SIZE  bytes of one read, and of a data frame [default: 512k]
  --connections N      connections to each export, where the server allows
                       several [default: 1]
  --debug              show tracebacks
  --help               print this
  --version            print the version
"""

import collections

from xxhash import xxh3_64_intdigest

from vnb import arguments, export, stream
from vnb.errors import Error
from vnb.frame import DATA, MAX_DATA
from vnb.pool import Pool


def main(args):
    requests = arguments.integer(args, "--requests", 1, 1024)
    request_size = arguments.size(args, "--request-size", 4096, MAX_DATA)
    connections = arguments.integer(args, "--connections", 1, 64)
    out = stream.stdout()
    for segment in stream.stdin(stage="extents"):
        exports = [_connect(disk, connections) for disk in segment.disks]
        # Where the data came from is nobody's business after this stage.
        disks = [{key: value for key, value in disk.items() if key != "source"} for disk in segment.disks]
        written = out.segment({**segment.head, "stage": "data"}, disks)
        pipeline = Pipeline(written, exports, requests, request_size)
        for frame in segment:
            if frame.__class__ is stream.Extents:
                pipeline.add(frame)
            else:
                pipeline.drain()
                written.frame(frame)
        pipeline.drain()
        written.end()
        for connection in (connection for group in exports for connection in group):
            connection.close()


def _connect(disk, count):
    name, source = disk["name"], disk.get("source")
    if not isinstance(source, dict) or not isinstance(source.get("uri"), str):
        raise Error(name, "the stream does not say where this disk is exported")
    first = export.Connection(source["uri"], name)
    if first.size != disk["size"]:
        raise Error(name, f'the export has {first.size} bytes, the stream says {disk["size"]}')
    more = count - 1 if first.multi_conn else 0
    return [first, *(export.Connection(source["uri"], name) for _ in range(more))]


class Pipeline:
    """Reads in flight, and extents that wait behind them: all leave in the order in which they came."""

    def __init__(self, out, exports, requests, request_size):
        self.out = out
        self.exports = exports
        self.requests = requests
        self.request_size = request_size
        self.pool = Pool()
        self.reads = export.Reads()
        self.queue = collections.deque()  # (read, disk, offset, view), or (None, disk, runs, None)
        self.in_flight = 0
        self.turn = 0

    def add(self, frame):
        """Take an Extents frame: start reads for its data, as many as may be in flight, and pass on the rest."""
        kept = []
        for offset, length, state in frame:
            if state != DATA:
                kept += (offset, length, state)
                continue
            if kept:
                self.queue.append((None, frame.disk, kept, None))
                kept = []
            self._read(frame.disk, offset, offset + length)
        if kept:
            self.queue.append((None, frame.disk, kept, None))
        # Extents that wait behind reads are bounded too: a disk may have millions of zeroes and little data.
        while self.queue and (not self.in_flight or len(self.queue) > 2 * self.requests):
            self._write_first()

    def _read(self, disk, offset, end):
        while offset < end:
            # Whole requests begin at multiples of their size: servers like it, and frames of two backups match.
            length = min(self.request_size - offset % self.request_size, end - offset)
            while self.in_flight >= self.requests:
                self._write_first()
            view = self.pool.take(length)
            connections = self.exports[disk]
            self.turn += 1
            read = self.reads.start(connections[self.turn % len(connections)], offset, view)
            self.queue.append((read, disk, offset, view))
            self.in_flight += 1
            offset += length

    def drain(self):
        """Write all that is in the queue."""
        while self.queue:
            self._write_first()
        self.out.writer.flush()

    def _write_first(self):
        read, disk, what, view = self.queue.popleft()
        if read is None:
            self.out.extents(disk, what)
            return
        self.reads.wait(read)
        self.in_flight -= 1
        self.out.data(disk, what, len(view), "none", xxh3_64_intdigest(view), view)
        self.pool.give(view)
