# SPDX-License-Identifier: LGPL-2.1-or-later
"""vnb-verify - check a stream, or a backup set, to its last byte

Usage:
  vnb-verify [--threads N] [options]
  vnb-verify [--json] [--each | --quarantine] [--threads N] [options]
      SET_OR_FILE...
  vnb-verify --help | --version

Checks all segments of sets and files, their indexes, and that all restore
points can be restored, and prints a line for each fault. Without operands,
reads a stream from standard input and passes on the sound part of it.

Options:
  --json        print one JSON object for each fault and segment, one a line
  --each        check each segment of the files for itself: its base may be
                missing, and they need not belong together
  --quarantine  rename each damaged file of a set, so that no command reads it,
                and print the restore points that are lost with it
  --threads N   threads that decompress, and files at a time [default: 2]
  --progress MODE
               show the progress: auto, none or json; see vnb(7)
"""

from __future__ import annotations

import contextlib
import json
import os
import threading

from vnb.base import log
from vnb.base.buffers import Ordered
from vnb.base.errors import Error
from vnb.cli import arguments, output
from vnb.cli.progress import Progress
from vnb.cli.runner import show
from vnb.cli.stdio import stdin
from vnb.store import backupset, chain, saved_segment
from vnb.store.checker import Checker
from vnb.store.index_check import RowCheck

TYPE_CHECKING = False
if TYPE_CHECKING:
    pass


TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any



def writes_stream(args: dict[str, Any]) -> bool:
    """Whether standard output gets a stream."""
    return not args["SET_OR_FILE"]


def main(args: dict[str, Any]) -> int | None:
    threads = arguments.integer(args, "--threads", 0, 64)
    with Progress(args["--progress"]) as progress:
        if args["SET_OR_FILE"]:
            report = _Report(args["--json"])
            return _operands(args["SET_OR_FILE"], threads, report, progress, args["--each"], args["--quarantine"])
        _filter(threads, progress)
    return 0


def _filter(threads: int, progress: Any) -> Any:
    """Standard input to standard output: byte for byte, each frame once it was checked."""
    out = None if os.isatty(1) else output.stdout()
    follow = chain.Follow("stdin")

    def begin(segment):
        progress.begin(segment.head)
        # The stream may start with an increment; each segment after it has to follow the one before.
        if follow.head is None:
            follow.begin(segment.head, segment.disks)
        else:
            follow.accept(segment.head, segment.disks)

    checker = Checker(stdin().input.fd, "stdin", threads, _raise, progress, out)
    checker.reader.begun = log.take_run
    try:
        for _ in checker.segments(begin):
            pass
    finally:
        if out is not None:
            out.finish()  # of a damaged stream too: what is sound


def _raise(error: Error) -> None:
    raise error


class _Report:
    """Says what was found: one line a fault on standard error, or with --json all on standard output."""

    def __init__(self, is_json):
        self.is_json = is_json
        self.status = 0
        self.stopping = False
        self._lock = threading.Lock()

    def go_on(self):
        """Raise an Error if nobody wants to know the rest."""
        if self.stopping:
            raise Error(None, "stopped")

    def fault(self, error):
        with self._lock:
            self.status = 1
            if not self.is_json:
                log.error(error)
                return
            where = error.where or ""
            offset = int(where[len("stream offset "):]) if where.startswith("stream offset ") else None
            self._show({"name": error.what, "offset": offset, "fault": str(error.reason)})

    def segment(self, path, segment, sound):
        with self._lock:
            if self.is_json:
                head = segment.head
                self._show({
                    "name": path, "offset": segment.start, "bytes": segment.length, "point": head["point"],
                    "parent": head["parent"], "level": head["level"], "id": head["id"], "sound": sound,
                })
            elif sound:
                log.detail(f'{path}: {segment.head["point"]}: sound')

    def _show(self, line):
        show(json.dumps(line) + "\n", flush=True)


def _operands(operands, threads, report, progress, each=False, quarantine=False):
    files = [operand for operand in operands if not os.path.isdir(operand)]
    checks = {}  # operand, or None for all files: list of _File
    jobs = [(None, path) for path in files]
    for operand in dict.fromkeys(operands):
        if operand in files:
            continue
        try:
            paths = backupset.paths(operand)
            if not paths:
                raise Error(operand, "no segment here")
            jobs += [(operand, path) for path in paths]
        except Error as error:
            report.fault(error)
    progress.begin()
    size = sum(_size(path) for _, path in jobs)
    work = Ordered(
        lambda path: _File(path, threads, report, progress, size).check(), threads if len(jobs) > 1 else 0
    )
    try:
        called = 0
        for taken in range(len(jobs)):
            while called < len(jobs) and not work.full:
                work.call(jobs[called][1])
                called += 1
            checks.setdefault(jobs[taken][0], []).append(work.pop())
    except BaseException:
        report.stopping = True  # the other threads; one that waits for a pipe ends with the process
        raise
    with work:
        pass  # its threads have nothing to do any more
    told = []
    for directory, found in checks.items():
        if directory is not None:
            told += _check_set(directory, found, report)
            if quarantine:
                _quarantine(directory, found, report)
    if files and not each:
        _check_files(files, checks, report, told)
    return report.status


def _check_set(directory, checks, report):
    """Tell, and return, what is wrong with the links between the segments of a set. checks: list of _File."""
    heads = [head for file in checks for head in file.heads]
    stages = {head.head["stage"] for head in heads}
    for head in heads:
        if "data" in stages and head.head["stage"] != "data":  # without any it is a catalog of heads
            report.fault(Error(head.name, f'holds no data, but {head.head["stage"]}'))
    found = list(chain.faults(heads, directory))
    for fault in found:
        report.fault(fault)
    return [fault.reason for fault in found]


def _check_files(files, checks, report, told):
    """
    Tell what keeps files from being restored: each as it is, and all together, in the order that vnb-cat gives them.

    Their bases may be in a set that is checked with them. told: what was said of that.
    """
    for file in checks[None]:
        if file.faults:
            continue  # what comes after what is not known
        follow = chain.Follow(file.path)
        for head in file.heads:
            try:
                if follow.head is None:
                    follow.begin(head.head, head.disks)
                else:
                    follow.accept(head.head, head.disks)
            except Error as error:
                report.fault(error)
                follow.begin(head.head, head.disks)
            if head.head["stage"] != "data":
                report.fault(Error(file.path, f'holds no data, but {head.head["stage"]}'))
    heads = [head for found in checks.values() for file in found for head in file.heads]
    for fault in chain.faults(heads, files[0] if len(files) == 1 and len(checks) == 1 else "the files"):
        if fault.reason not in told:
            report.fault(fault)


def _quarantine(directory, checks, report):
    """Give each damaged file of a set another name, durably, and say what is lost with it."""
    bad = [file for file in checks if file.is_damaged]
    for file in checks:
        if file.faults and not file.is_damaged:
            log.warn(f"{file.path}: not set aside: it cannot be read, which does not say that it is damaged")
    if not bad:
        return
    before = chain.restorable([head for file in checks for head in file.heads])
    after = set(chain.restorable([head for file in checks if file not in bad for head in file.heads]))
    moved = backupset.set_aside(directory, {file.path: file.identity for file in bad})
    for path, name in moved.items():
        log.note(f"{path}: set aside as {os.path.basename(name)}")
    for file in bad:
        if file.path not in moved:
            report.fault(Error(file.path, "not set aside: it has changed since it was checked"))
        elif not file.heads:
            log.note(f"{file.path}: nothing tells which restore points it had")
    for point in before:
        if point not in after:
            log.note(f"{directory}: lost: {point}")
    if before and not after:
        log.note(f"{directory}: no restore point is left: the next backup must be a full one (--level auto or full)")


class _Head:
    """What chain.faults needs of a segment: the rest may be large."""

    def __init__(self, path, segment):
        self.name = path
        self.head, self.disks = chain.outline(segment.head, segment.disks)


def _size(path):
    """Bytes of a file; 0 for a pipe, or where there is none, which is told when it is opened."""
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


class _File:
    """
    One file with segments. size: bytes of all files together, for progress.

    After check(): heads (list of _Head), of damaged segments too where their head is sound. faults: that were
    told. is_damaged: there are some in what the file holds. identity: see vnb.store.backupset.identity().
    """

    def __init__(self, path, threads, report, progress, size):
        self.path = path
        self.threads = threads
        self.report = report
        self.progress = progress
        self.size = size
        self.heads = []
        self.faults = 0
        self.is_damaged = False
        self.identity = None

    def check(self):
        """Check all of it; returns itself."""
        try:
            fd = saved_segment.open_file(self.path)
        except Error as error:
            self._fault(error)
            return self
        try:
            self.identity = backupset.identity(os.fstat(fd))
            self._check(fd, self.heads)
        finally:
            os.close(fd)
        return self

    def _check(self, fd, heads):
        places = {}
        try:
            for start, *place in saved_segment.places(self.path, fd):
                places[start] = place
        except Error:
            pass  # what is wrong is found from the front, with the place where it is
        start = 0
        while start is not None:
            start = self._from(fd, start, places, heads)

    def _from(self, fd, start, places, heads):
        """Check segments from here on, up to the first one with a fault; where to go on after it, or None."""
        with contextlib.suppress(OSError):  # a pipe is read from where it is
            os.lseek(fd, start, os.SEEK_SET)
        checker = Checker(fd, self.path, self.threads, self._fault, self.progress, go_on=self.report.go_on)
        checker.reader.input.offset = start

        def begin(segment):
            heads.append(_Head(self.path, segment))

        def rows():
            indexed = places.get(start, (0, 0))[1] != 0
            return RowCheck(checker.reader) if indexed else None

        def share(segment):
            return places[segment.start][0] / self.size if segment.start in places and self.size else 0

        checker.rows = rows()
        before = self.faults
        try:
            for segment in checker.segments(begin, share):
                self.report.segment(self.path, segment, self.faults == before)
                start = segment.start + segment.length
                before = self.faults
                checker.rows = rows()
        except Error as error:
            self._fault(error)
            return min((other for other in places if other > start), default=None)
        return None

    def _fault(self, error):
        self.faults += 1
        self.is_damaged = self.is_damaged or error.is_damage
        self.report.fault(error)
