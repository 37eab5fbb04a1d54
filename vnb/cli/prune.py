# SPDX-License-Identifier: LGPL-2.1-or-later
"""vnb-prune - drop or merge the restore points that no rule keeps

Usage:
  vnb-prune [--dry-run] [--keep-last N] [--keep-daily N] [--keep-weekly N]
      [--keep-monthly N] [--keep-yearly N] [options] SET
  vnb-prune --help | --version

Keeps the restore points of a set that any of the options keeps, and always
the latest one. Removes the others for good. A dropped restore point that a
kept one needs is merged into it.

Options:
  --dry-run         change nothing: print what would be kept, merged, dropped
  --keep-last N     keep the last N restore points
  --keep-daily N    keep the last restore point of each of the last N days
                    that have one
  --keep-weekly N   the same for weeks, which begin on Monday
  --keep-monthly N  the same for months
  --keep-yearly N   the same for years
  --progress MODE   show the progress: auto, none or json; see vnb(7)
"""

from __future__ import annotations

import contextlib
import errno
import os

from vnb.base import locks, log
from vnb.base.errors import Error, UsageError, os_error
from vnb.cli import arguments
from vnb.cli.progress import Progress
from vnb.cli.retention import MOST, PERIODS, Plan, age, disks_now
from vnb.cli.runner import show
from vnb.format.index import Builder
from vnb.store import backupset, chain, pruned, storing
from vnb.store.merge import Merge

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator


TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


LOCK = ".prune.lock"  # beside the segments: a set on shared storage may be pruned from several hosts


def main(args: dict[str, Any]) -> None:
    directory = args["SET"]
    counts = {}
    for period in ("last", *PERIODS):
        if args[f"--keep-{period}"] is not None:
            counts[period] = arguments.integer(args, f"--keep-{period}", 0, MOST)
    if not any(counts.values()):
        raise UsageError(None, "give at least one --keep option a number greater than 0")
    if not os.path.isdir(directory):
        raise Error(directory, os.strerror(errno.ENOTDIR if os.path.lexists(directory) else errno.ENOENT))
    if args["--dry-run"]:
        plan = _plan(directory, counts)
        for file in plan.damaged:
            log.warn(file.line)
        show("".join(f"{line}\n" for line in report(plan)))
        return
    with only_one(directory):
        plan = _plan(directory, counts)
        for file in plan.damaged:
            log.warn(file.line)
        for point, needed in plan.left_alone.items():
            log.warn(f"{directory}: {point}: left alone: needs {needed}, {chain.where(needed, plan.damaged)}")
        length = sum(segment.length for run in plan.merges for segment in run)
        with Progress(args["--progress"]) as progress:
            for run in plan.merges:
                progress.begin()
                store(run, directory, progress, sum(segment.length for segment in run) / length)
        remove(plan, directory)


def _plan(directory: str, counts: dict[str, int]) -> Plan:
    segments, damaged = segments_of(directory)
    return Plan(segments, damaged, directory, counts, disks_now)


def segments_of(directory: str) -> Any:
    """(segments, damaged) of a set, see vnb.store.backupset.readable(). Raises Error where there are none with data."""
    segments, damaged = backupset.some([directory])
    for segment in segments:
        if segment.head["stage"] != "data":
            raise Error(segment.name, f'holds no data, but {segment.head["stage"]}')
    return segments, damaged


def report(plan: Plan) -> Iterator[str]:
    """The lines of --dry-run, oldest point first: what happens, time, level, point, why."""
    into = {}
    for run in plan.merges:
        for segment in run:
            into[segment] = run
    for segment in sorted(plan.segments, key=age):
        head = segment.head
        point, run = head["point"], into.get(segment)
        what, level, why = "drop", head["level"], ""
        if point in plan.left_alone:
            needed = plan.left_alone[point]
            what, why = "leave", f"needs {needed}, {chain.where(needed, plan.damaged)}"
        elif segment is not plan.by_point[point]:
            why = "another segment leads to this restore point"
        elif run is not None and segment is not run[-1]:
            what, why = "merge", f'into {run[-1].head["point"]}'
        elif point in plan.kept:
            what, why = "keep", ", ".join(plan.kept[point])
        elif point in plan.held:
            what, why = "keep", "needed by " + ", ".join(plan.held[point])
        if run is not None and segment is run[-1]:
            level = f'{level}->{"full" if run[0].head["parent"] is None else level}'
        yield f'{what:5} {head["created"][:19]}Z {level:9} {point}{"  " + why if why else ""}'


def store(run: Any, directory: str, progress: Any, share: Any) -> None:
    """
    Store one segment in the place of several. It is durable when this returns, and they are still there.

    share: of all that is merged, for progress.
    """
    merged = Merge(run, directory, repack=True)
    merged.read_head()
    # Store's own check refuses a restore point that is here already; what it would have found else, Plan did.
    with storing.Store(directory, merged.head, merged.disks, check=False, merged=True) as store:
        with progress.segment(store.writer.segment(merged.head, merged.disks), share) as out:
            index = Builder(out)
            merged.write(out, index)
            index.finish()
            out.end()
        store.commit()


def remove(plan: Plan, directory: str) -> None:
    """Remove the files that hold nothing which is needed, nor anything that came since the plan was made."""
    known = {segment.head["id"] for segment in plan.segments}
    with backupset.locked(directory) as directory_fd:  # nobody stores a segment meanwhile
        segments, damaged = segments_of(directory)
        for file in damaged:
            if file.name not in {other.name for other in plan.damaged}:
                raise file.error  # what it needs was not looked at
        by_point = chain.points(segments)
        wanted = {*plan.fixed, *plan.left_alone}
        wanted.update(segment.head["point"] for segment in segments if segment.head["id"] not in known)
        needed = set()
        for point in wanted:
            while point in by_point and by_point[point] not in needed:
                needed.add(by_point[point])
                point = by_point[point].head["parent"]
        files = {segment.name for segment in segments} - {segment.name for segment in needed}
        files -= {segment.name for segment in segments if segment.head["point"] in plan.left_alone}
        files -= {file.name for file in damaged}  # one that has several segments
        rest = [segment for segment in segments if segment.name not in files]
        check_rest(rest, plan, directory)
        # The newest go first: what is left of a chain, if this ends early, has all that it needs.
        gone = sorted((segment for segment in segments if segment.name in files), key=age, reverse=True)
        dropped = {segment.head["checkpoint"] for segment in gone} - {segment.head["checkpoint"] for segment in rest}
        try:
            if dropped - {None}:
                pruned.add_pruned(directory, sorted(dropped - {None}))
            for path in dict.fromkeys(segment.name for segment in gone):
                os.unlink(path)
            os.fsync(directory_fd)
        except OSError as error:
            raise os_error(error.filename or directory, error) from None


def check_rest(rest: Any, plan: Plan, directory: str) -> None:
    """Raise Error unless every kept point can be restored from the rest of the segments."""
    by_point = chain.points(rest)
    parents = {by_point[point].head["parent"] for point in plan.kept if point in by_point}
    for point in plan.kept:
        if point not in parents:  # the way to a parent is a part of the way to its child
            chain.path(rest, directory, point)


@contextlib.contextmanager
def only_one(directory: str) -> Iterator[None]:
    """Keep any other vnb-prune off a set for as long as this lasts."""
    path = os.path.join(directory, LOCK)
    try:
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            locks.take(fd)
            if os.fstat(fd).st_nlink:
                break
            os.close(fd)  # the one before us removed it between open and flock
    except BlockingIOError:
        os.close(fd)
        raise Error(directory, "another vnb-prune is at work here") from None
    except OSError as error:
        raise os_error(error.filename or path, error) from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)
        os.close(fd)
