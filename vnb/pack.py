# SPDX-License-Identifier: LGPL-2.1-or-later
"""vnb-pack - compress, index and store a stream

Usage:
  vnb-pack [-z | --compress CODEC] [--threads N] [-o DIR] [--debug]
  vnb-pack --help | --version

Reads a stream with data. Writes it, indexed, to standard output, or each of
its segments into a file of the backup set DIR.

Options:
  -z                compress with lz4
  --compress CODEC  none, lz4[:LEVEL] or zstd[:LEVEL]; frames that are
                    packed already stay so, but for none, which unpacks
  --threads N       threads that compress and check; 0 is none but the one
                    that reads and writes [default: 2]
  -o DIR            store in this backup set: complete, synced, or not at all
  --debug           show tracebacks
  --help            print this
  --version         print the version
"""

from vnb import arguments, codec, stream
from vnb.backupset import Store
from vnb.index import Builder
from vnb.pool import Ordered, Pool


def main(args):
    spec = ("lz4", None) if args["-z"] else codec.parse(args["--compress"] or "none")
    unpack = args["--compress"] == "none"
    threads = arguments.integer(args, "--threads", 0, 64)
    if spec[0] == "none" and not unpack:
        threads = 0  # a checksum of what is in the cache costs less than to wake a thread
    packer = Packer(codec.compressor(*spec), unpack, threads)
    if args["-o"]:
        for segment in packer.reader:
            with Store(args["-o"], segment.head, segment.disks) as store:
                packer.pack(segment, stream.Writer(store.fd, store.partial))
                store.commit()
        return
    out = stream.stdout()
    for segment in packer.reader:
        packer.pack(segment, out)


class Packer:
    """
    Packs the segments of standard input.

    compress: see codec.compressor. unpack (bool): frames that are packed are unpacked.
    Every frame is held against the hash of its plain bytes: what is stored is what was read from the source.
    """

    def __init__(self, compress, unpack, threads):
        self.compress = compress
        self.unpack = unpack
        self.threads = threads
        self.pool = Pool()
        self.reader = stream.stdin(stage="data", pool=self.pool)

    def pack(self, segment, writer):
        """Write one segment, with an index as it goes."""
        out = writer.segment(segment.head, segment.disks)
        index = Builder(out)
        names = [disk["name"] for disk in segment.disks]
        work = Ordered(lambda data: self._work(data, names), self.threads)
        try:
            for frame in segment:
                if frame.__class__ is stream.Data:
                    work.call(frame)
                else:
                    work.append((frame, None, None))
                while work.full:
                    self._write(out, index, *work.pop())
            while len(work):
                self._write(out, index, *work.pop())
        finally:
            work.close()
        index.finish()
        out.end()

    def _work(self, data, names):
        plain = codec.plain(data, names[data.disk])
        if data.codec == "none":
            return data, *self.compress(plain)
        if self.unpack:
            return data, "none", plain
        return data, data.codec, data.payload

    def _write(self, out, index, frame, name, payload):
        if frame.__class__ is stream.Data:
            place = out.data(frame.disk, frame.offset, frame.length, name, frame.hash, payload)
            index.data(frame.disk, frame.offset, frame.length, *place)
            self.pool.give(frame.payload)
            return
        out.frame(frame)
        if frame.__class__ is stream.Extents:
            index.extents(frame.disk, frame.runs)
        elif frame.payload is not None:
            self.pool.give(frame.payload)
