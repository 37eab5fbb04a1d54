# SPDX-License-Identifier: LGPL-2.1-or-later
"""vnb-dump - print a stream for people or as JSON, and turn JSON into a stream

Usage:
  vnb-dump [--brief] [options] [SET_OR_FILE...]
  vnb-dump --list [options] SET_OR_FILE...
  vnb-dump --map [--svg] [--columns N] [options] SET_OR_FILE...
  vnb-dump --json [--no-payload] [options] [SET_OR_FILE...]
  vnb-dump --from-json [options]
  vnb-dump --help | --version

Reads standard input, or the segments in files and backup sets. If a segment
is damaged, prints everything before the damage and exits with status 1.

Options:
  --brief       leave out the extents: print only heads and totals
  --list        print one line for each segment, and which of them lead to the
                latest restore point
  --map         print a strip of states for each disk and segment
  --svg         with --map: make an SVG image instead of text
  --columns N   cut each disk of a map into N parts; default: 64, or 512 with
                an SVG image
  --json        print one JSON object for each frame, one a line
  --no-payload  with --json: print the sizes of payloads in their place
  --from-json   read lines of JSON, and write the stream that they came from
"""

from __future__ import annotations

import json
import os
import sys

from vnb.base import log
from vnb.base.errors import Error, StreamError, one_line
from vnb.cli import arguments, output, state_map
from vnb.cli.restore_points import age, listed
from vnb.cli.runner import show
from vnb.cli.stdio import said_by_another, stdin
from vnb.format import codec, stream, values
from vnb.format.frame import DATA, STATE_NAMES
from vnb.format.jsonlines import JsonReader, line_of
from vnb.store import backupset, saved_segment

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


SHOWN_HEAD = ("point", "level", "stage", "parent", "created", "checkpoint", "chain", "id", "run")
SHOWN_TEXT = 200  # characters of what nobody knows


def writes_stream(args: dict[str, Any]) -> bool:
    """Whether standard output gets a stream."""
    return args["--from-json"]


def main(args: dict[str, Any]) -> int | None:
    if args["--from-json"]:
        _from_json()
        return 0
    if args["--list"]:
        return listed(args["SET_OR_FILE"])
    if args["--map"]:
        args["--columns"] = args["--columns"] or ("512" if args["--svg"] else "64")
        columns = arguments.integer(args, "--columns", 1, 4096)
        return _map(args["SET_OR_FILE"], columns, state_map.svg if args["--svg"] else state_map.text)
    status = 0
    for path in _inputs(args["SET_OR_FILE"]):
        try:
            fd = stdin().input.fd if path is None else saved_segment.open_file(path)
        except Error as error:
            sys.stdout.flush()
            log.error(error)
            status = 1
            continue
        name = "stdin" if path is None else path
        dump = _JsonDump(fd, name, args["--no-payload"]) if args["--json"] else _TextDump(fd, name, args["--brief"])
        status |= dump.run()
        if path is not None:
            os.close(fd)
    return status


def _inputs(operands):
    """The paths of all files of the operands, or None for standard input."""
    return [path for operand in operands for path in _paths(operand)] or [None]


def _paths(operand):
    if not os.path.isdir(operand):
        return [operand]
    paths = backupset.paths(operand)
    if not paths:
        raise Error(operand, "no segment here")
    return paths


class _Dump:
    """Reads one stream, and says of each fault that it found one. run() returns the exit status."""

    def __init__(self, reader):
        self.reader = reader
        self.status = 0

    def run(self):
        try:
            for raw in self.reader.raws():
                self.show(raw)
        except StreamError as error:
            self.rest()
            self.fault(error)
        self.ends()
        return self.status

    def fault(self, error):
        sys.stdout.flush()
        (log.detail if said_by_another(error) else log.error)(error)
        self.status = 1

    def check(self, raw):
        """Say so if a payload of data differs from its hash."""
        try:
            check_data(self.reader, raw)
        except Error as error:
            self.fault(error)

    def show(self, raw):
        """A frame was checked."""

    def rest(self):
        """A fault was found: show what can be shown all the same."""

    def ends(self):
        """The stream has ended, or it is damaged."""


class _Showing(stream.Reader):
    """Prints each frame with a sound sum, whether it may stand where it is or not: it helps who looks for the fault."""

    payloads = True

    def raw(self):
        raw = super().raw()
        show(line_of(raw, self.payloads) + "\n")
        return raw


class _JsonDump(_Dump):
    """Prints all frames, and finds what is wrong with their payloads."""

    def __init__(self, fd, name, no_payload):
        super().__init__(_Showing(fd, name))
        self.reader.payloads = not no_payload

    def show(self, raw):
        self.check(raw)

    def rest(self):
        try:
            while True:
                self.reader.raw()
        except StreamError:
            pass  # the first fault is the one to tell


class _TextDump(_Dump):
    """Prints what is in the frames: heads, disks, files, extents merged into runs, totals."""

    def __init__(self, fd, name, brief):
        super().__init__(stream.Reader(fd, name))
        self.brief = brief
        self.points = []
        self.runs = {}
        self.totals = {}
        self.index_frames = self.index_rows = 0
        self.printers = {
            "vnb": self._vnb, "disk": self._disk, "file": self._file, "same": self._same,
            "extent": self._extent, "data": self._data, "index": self._index, "end": self._pass,
            "tail": self._tail,
        }

    def show(self, raw):
        kind, *rest = raw.fields
        if kind in self.printers:
            self.printers[kind](raw, *rest)
        else:
            payload = "" if raw.payload is None else f", {len(raw.payload)} bytes of payload"
            show(f"frame {kind}: {one_line(json.dumps(rest), SHOWN_TEXT)}{payload}\n")

    def _tail(self, _raw, *_fields):
        """All of a segment was checked."""
        self._end_runs()
        segment = self.reader.segment
        head = segment.head
        self.points.append(f'{head["point"]} ({head["level"]})')
        names = [disk["name"] for disk in segment.disks]
        width = max(map(len, ["disk", *names]))
        show(f'{"disk":{width}}  {"data":>16} {"zero":>16} {"hole":>16} {"stored":>16} {"ratio":>7}\n')
        for number, name in enumerate(names):
            totals = self.totals.get(number, _Totals())
            counts = " ".join(f"{totals.bytes[state]:16}" for state in STATE_NAMES)
            ratio = f"{totals.bytes[DATA] / totals.stored:.2f}" if totals.stored else "-"
            show(f"{name:{width}}  {counts} {totals.stored:16} {ratio:>7}\n")
        index = f"{self.index_rows} rows in {self.index_frames} frames" if self.index_frames else "none"
        show(f"frames {segment.end['frames']}, bytes {segment.length}, index {index}\n\n")
        self.totals = {}
        self.index_frames = self.index_rows = 0

    def ends(self):
        self._end_runs()
        if len(self.points) > 1:
            show("chain " + "\n   -> ".join(self.points) + "\n")

    def _vnb(self, raw, _version, head):
        show(f'segment {head["point"]} ({one_line(self.reader.input.name)}, stream offset {raw.start})\n')
        for key in SHOWN_HEAD[1:]:
            if head.get(key) is not None:
                show(f"  {key:<12} {one_line(head[key])}\n")
        show(f'  {"domain":<12} {one_line(head["domain"])} ({head["uuid"]})\n')
        for key, value in head.items():
            if key in ("domain_xml", "checkpoint_xml") and value is not None:
                show(f"  {key:<12} {len(value)} characters\n")
            elif key not in (*SHOWN_HEAD, "domain", "uuid", "domain_xml", "checkpoint_xml"):
                show(f"  {one_line(key, SHOWN_TEXT):<12} {one_line(json.dumps(value), SHOWN_TEXT)}\n")

    def _disk(self, _raw, number, disk):
        image = disk.get("image", {})
        more = {key: value for key, value in disk.items() if key not in ("name", "size", "level", "image")}
        known = [str(image[key]) for key in ("format", "path") if key in image]
        about = [f'{disk["size"]} bytes', disk["level"], *known]
        if more:
            about.append(json.dumps(more))
        show(f'disk {number} {disk["name"]}: {", ".join(one_line(text, SHOWN_TEXT) for text in about)}\n')

    def _file(self, raw, file):
        if file["offset"] + len(raw.payload) == file["size"]:
            show(f'file {file["role"]} {one_line(file["path"])}: {file["size"]} bytes, mode {file["mode"]:o}\n')

    def _same(self, _raw, same):
        show(f'file {same["role"]} {one_line(same["path"])}: not changed since the base, mode {same["mode"]:o}\n')

    def _extent(self, _raw, disk, runs):
        for offset, length, state in zip(runs[0::3], runs[1::3], runs[2::3]):
            self._run(disk, offset, length, state, 0, None)

    def _data(self, raw, disk, offset, length, name, _hash):
        self.check(raw)
        self._run(disk, offset, length, DATA, len(raw.payload), name)

    def _index(self, _raw, _disk, rows, _back):
        self.index_frames += 1
        self.index_rows += rows

    def _pass(self, _raw, *_fields):
        """What it says is in the totals."""

    def _run(self, disk, offset, length, state, stored, name):
        totals = self.totals.setdefault(disk, _Totals())
        totals.bytes[state] += length
        totals.stored += stored
        if self.brief:
            return
        run = self.runs.get(disk)
        if run is None or run.state != state or run.end != offset:
            self._end_run(disk)
            if not self.runs:
                show(f'{"offset":>16} {"length":>16} state {"frames":>8} {"stored":>12} disk\n')
            run = self.runs[disk] = _Run(offset, state)
        run.end = offset + length
        if name is not None:
            run.frames += 1
            run.stored += stored
            run.codecs.add(name)

    def _end_run(self, disk):
        run = self.runs.get(disk)
        if run is None:
            return
        what = f"{run.offset:16} {run.end - run.offset:16} {STATE_NAMES[run.state]:5}"
        name = self.reader.segment.disks[disk]["name"]
        if run.codecs:
            show(f"{what} {run.frames:8} {run.stored:12} {name} {','.join(sorted(run.codecs))}\n")
        else:
            show(f'{what} {"":8} {"":12} {name}\n')

    def _end_runs(self):
        for disk in sorted(self.runs):
            self._end_run(disk)
        self.runs = {}


class _Run:
    """Neighbouring extents of one state, or data frames. codecs: empty for extents."""

    __slots__ = ("codecs", "end", "frames", "offset", "state", "stored")

    def __init__(self, offset, state):
        self.offset = offset
        self.state = state
        self.codecs = set()
        self.end = offset
        self.frames = self.stored = 0


class _Totals:
    """Bytes of one disk in one segment."""

    def __init__(self):
        self.bytes = dict.fromkeys(STATE_NAMES, 0)
        self.stored = 0


def _map(operands, columns, draw):
    """Draw what each segment has of each disk. Returns the exit status."""
    segments, damaged = backupset.some(operands)
    for file in damaged:
        log.warn(file.line)
    segments.sort(key=age)
    sizes = {}
    for segment in segments:
        for disk in segment.disks:
            sizes[disk["name"]] = max(disk["size"], sizes.get(disk["name"], 1))  # a disk of no bytes is drawn as one
    disks = {name: (size, []) for name, size in sorted(sizes.items())}
    status = 0
    for segment in segments:
        label = f'{segment.head["level"]:4} {segment.head["point"]}'
        try:
            for disk, rows in zip(segment.disks, segment.rows()):
                size, strips = disks[disk["name"]]
                strips.append((label, state_map.strip(rows.lookup(0, size), size, columns)))
        except StreamError as error:
            log.error(error)
            status = 1
        segment.close()
    for line in draw({name: found for name, found in disks.items() if found[1]}, columns):
        show(line + "\n")
    return status


def _from_json():
    out = output.stdout()
    reader = JsonReader(open(0, "rb", buffering=1 << 20, closefd=False), "stdin")  # noqa: SIM115
    for raw in reader.raws():
        check_data(reader, raw)
        out.write(raw.header, raw.payload)
    out.finish()


def check_data(reader: stream.Reader, raw: values.Raw) -> None:
    """Raise an Error if the payload of a data frame differs from its hash. Frames of other types pass."""
    data = raw.frame
    if type(data) is values.Data and reader.segment is not None:
        try:
            codec.check(data, reader.segment.disks[data.disk]["name"])
        except Error as error:
            raise reader.error(error, raw.start) from None
