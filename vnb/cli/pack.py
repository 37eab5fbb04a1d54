# SPDX-License-Identifier: LGPL-2.1-or-later
"""vnb-pack - compress, index and store a stream

Usage:
  vnb-pack [-z | --compress CODEC] [--threads N] [-o DIR [--must-exist]]
           [options]
  vnb-pack --help | --version

Reads a stream with data. Writes it with an index to standard output, or writes
each of its segments into a file of the backup set DIR.

Options:
  -z                compress with lz4
  --compress CODEC  compress with none, lz4[:LEVEL] or zstd[:LEVEL]; frames that
                    are compressed already stay as they are, but none
                    decompresses them
  --threads N       the number of threads that compress and check; with 0 the
                    thread that reads and writes does this too [default: 2]
  -o DIR            store each segment in this backup set: complete and synced,
                    or not at all
  --must-exist      fail if DIR is not there, as when its file system is not
                    mounted
  --progress MODE   show the progress: auto, none or json; see vnb(7)
"""

from __future__ import annotations

import os

from vnb.base import log
from vnb.base.buffers import Ordered, Pool
from vnb.base.errors import Error
from vnb.cli import arguments, output
from vnb.cli.progress import Progress
from vnb.cli.stdio import stdin
from vnb.format import codec, heads, values
from vnb.format.index import Builder
from vnb.job import proof
from vnb.store.backupset import is_missing
from vnb.store.storing import Store

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vnb.format.stream import Segment
    from vnb.format.writing import SegmentWriter, Writer


TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any



def writes_stream(args: dict[str, Any]) -> bool:
    """Whether standard output gets a stream."""
    return not args["-o"]


def main(args: dict[str, Any]) -> None:
    spec = ("lz4", None) if args["-z"] else codec.parse(args["--compress"] or "none")
    compress = None if spec[0] == "none" else codec.compressor(*spec)
    threads = arguments.integer(args, "--threads", 0, 64)
    pool = Pool()
    packer = Packer(compress, args["--compress"] == "none", threads, pool)
    out = None if args["-o"] else output.stdout()
    with Progress(args["--progress"]) as progress:
        for segment in stdin(stage="data", pool=pool):
            progress.begin(segment.head)
            if out is not None:
                packer.pack(segment, segment.head, out, progress)
                continue
            head = heads.alone(segment.head)
            _refuse_other_set(args["-o"], head)
            if is_missing(args["-o"]):
                if args["--must-exist"]:
                    raise Error(args["-o"], "is not there, and --must-exist is given: is its file system mounted?")
                log.detail(f"{args['-o']}: is a new backup set")  # vnb-checkpoint has said so, of one that it sees
            with Store(args["-o"], head, segment.disks) as store:
                report = proof.Report(head)
                packer.pack(segment, head, store.writer, progress)
                store.commit()
                report.taken()
        if out is None or output.is_last():
            progress.summarize()  # no later stage knows more


def _refuse_other_set(directory: str | None, head: Any) -> None:
    """Raise Error if a set is not the one that the run is for: the commit would not find the segment."""
    expected = os.environ.get("VNB_SET")
    if directory is None:
        return
    if expected and proof.is_of_run(head) and os.path.realpath(directory) != os.path.realpath(expected):
        raise Error(directory, f'is not the set that vnb-checkpoint run is for: -o "$VNB_SET" is, {expected} '
                    '("env -u VNB_SET" allows a copy)')


class Packer:
    """
    Compresses segments and adds their index.

    compress: see codec.compressor; None: plain frames stay plain. unpack: compressed frames are decompressed.
    pool (Pool): gives the buffers of payloads, and takes them back.
    Every frame is checked against the hash of its plain bytes, so the bytes that were read from the source are stored.
    """

    def __init__(self, compress: Any, unpack: bool, threads: int, pool: Any) -> None:
        self.compress = compress
        self.unpack = unpack
        self.threads = threads
        self.pool = pool

    def pack(self, segment: Segment, head: Any, writer: Writer, progress: Any) -> Any:
        """Write one segment with this head, with an index as it goes. progress (Progress) follows it."""
        with progress.segment(writer.segment(head, segment.disks)) as out:
            self._pack(segment, out)

    def _pack(self, segment: Segment, out: SegmentWriter) -> None:
        index = Builder(out)
        names = [disk["name"] for disk in segment.disks]
        with Ordered(lambda data: self._work(data, names), self.threads) as work:
            for frame in segment:
                if type(frame) is not values.Data:
                    work.append((frame, None, None))
                elif self.compress is None and frame.codec == "none":
                    # The bytes are in the processor's cache: their checksum costs less than waking a thread.
                    work.append(self._work(frame, names))
                else:
                    work.call(frame)
                while work.full:
                    self._write(out, index, *work.pop())
            while len(work):
                self._write(out, index, *work.pop())
        index.finish()
        out.end()

    def _work(self, data: values.Data, names: list[str]) -> Any:
        plain = codec.plain(data, names[data.disk])
        if data.codec != "none":
            return (data, "none", plain) if self.unpack else (data, data.codec, data.payload)
        if self.compress is None:
            return data, "none", plain
        return data, *self.compress(plain)

    def _write(self, out: SegmentWriter, index: Any, frame: Any, name: str, payload: Any) -> None:
        if frame.__class__ is values.Data:
            place = out.data(frame.disk, frame.offset, frame.length, name, frame.hash, payload)
            index.data(frame.disk, frame.offset, frame.length, *place)
            self.pool.give(frame.payload)
            return
        out.frame(frame)
        if frame.__class__ is values.Extents:
            index.extents(frame.disk, frame.runs)
        elif frame.payload is not None:
            self.pool.give(frame.payload)
