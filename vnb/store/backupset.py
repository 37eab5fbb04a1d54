# SPDX-License-Identifier: LGPL-2.1-or-later
"""Backup sets: segments in files, found, opened and stored durably; formats/backup-set.md has the layout."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat

from vnb.base import locks
from vnb.base.errors import Error, os_error
from vnb.format import frame as f
from vnb.format import rules, stream
from vnb.store import chain
from vnb.store.damage import NOTHING, Damaged, newest_by_name
from vnb.store.saved_segment import SavedSegment, open_file, places

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vnb.format.types import Head


SUFFIX = ".vnb"
_OF_VIRTNBDBACKUP = re.compile(r"[^.]+\.(full|copy|(inc|diff)\..+)\.data", re.DOTALL)  # names of its files
SET_ASIDE = ".damaged"  # behind the name of a file that vnb-verify has found damaged: it is no segment any more
MOVE = "move it out of the set"
LISTINGS = 5  # of a set from which files go while it is read
LACKING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # it is not the file that is damaged


def segments(operands: Sequence[str]) -> list[SavedSegment]:
    """The segments of sets (directories) and files, in no order that means anything. Raises Error for any damage."""
    found, damaged = readable(operands)
    for file in damaged:
        raise file.error
    return found


def some(operands: Sequence[str]) -> tuple[list[SavedSegment], list[Damaged]]:
    """readable(), where there has to be a segment. Raises Error."""
    found, damaged = readable(operands)
    if not found:
        for file in damaged:
            raise file.error
        raise Error(operands[0] if len(operands) == 1 else "the chain", "no segment here")
    return found, damaged


def readable(operands: Sequence[str]) -> tuple[list[SavedSegment], list[Damaged]]:
    """
    (segments, damaged): of sets (directories) and files all segments that can be used, in no order that means
    anything, and a vnb.store.damage.Damaged for each file that has others.

    A file in a set whose name is not that of a segment is passed over. Raises Error for a directory that cannot be
    listed, and where it is this process that lacks something.
    """
    found, damaged = [], []
    for operand in operands:
        if os.path.isdir(operand):
            segments, files = _readable_in_set(operand)
        else:
            segments, files = _readable_in_file(operand)
        found += segments
        damaged += files
    return found, damaged


def _readable_in_set(directory: str) -> tuple[list[SavedSegment], list[Damaged]]:
    for _ in range(LISTINGS):
        found: list[SavedSegment] = []
        damaged: list[Damaged] = []
        for path in paths(directory):
            segments, files = _readable_in_file(path, directory)
            found += segments
            damaged += files
        gone = [file for file in damaged if not os.path.lexists(file.name)]
        if not gone:
            break
        # vnb-prune removes a segment once another has taken its place, which may have come after we had looked.
    damaged = [file for file in damaged if file not in gone]
    found, others = _without_strangers(found)
    return found, damaged + others


def _readable_in_file(path: str, directory: str | None = None) -> tuple[list[SavedSegment], list[Damaged]]:
    """The same of one file. directory: the set that it is in."""
    found: list[SavedSegment] = []
    try:
        fd = open_file(path)
    except Error as error:
        return found, [_damaged(path, error, directory)]
    try:
        try:
            if directory is not None and not stat.S_ISREG(os.fstat(fd).st_mode):
                raise Error(path, "is not a regular file")
            places_ = list(places(path, fd))
        except Error as error:
            return found, [_damaged(path, error, directory, fd)]
        errors = []
        for place in reversed(places_):
            try:
                found.append(SavedSegment(path, fd, *place))
            except Error as error:
                errors.append(error)
        return found, [_damaged(path, error, directory, fd, len(places_)) for error in errors[:1]]
    finally:
        os.close(fd)


def _damaged(path: str, error: Error, directory: str | None, fd: int | None = None, count: int = 0) -> Damaged:
    """The Damaged of a file; fd: open. count: of its segments, 0 where that is not known."""
    if error.errno in LACKING:
        raise error
    name = os.path.basename(path)
    advice = f"vnb-verify --quarantine {directory} sets it aside" if directory and error.is_damage else ""
    start, head = _front(path, fd) if fd is not None else (None, None)
    if head is not None and count < 2 and is_name_of(name, head):
        newest = NOTHING
    elif directory is None or count > 1:
        newest = None
    else:
        can_be_read = start is not None or os.path.exists(path) and not os.path.isfile(path)
        starts_so = start is not None and start != b"" and f.HEAD_MAGIC.startswith(start)
        newest = newest_by_name(name, starts_so or count or not can_be_read)
    return Damaged(path, error, advice, head, newest)


def _front(path: str, fd: int) -> tuple[bytes | None, Head | None]:
    """
    (the first bytes, the outline of the first head) of a file that may be damaged behind them.

    None for what cannot be read. Reads nothing of what is no regular file, since that may have to be waited for.
    """
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return b"", None
        start = os.pread(fd, len(f.HEAD_MAGIC), 0)
        os.lseek(fd, 0, os.SEEK_SET)
        segment = next(iter(stream.Reader(fd, path)))
        return start, chain.outline(segment.head, segment.disks)[0]
    except OSError:
        return None, None
    except Error as error:
        return (start if error.errno is None else None), None


def _without_strangers(segments: list[SavedSegment]) -> tuple[list[SavedSegment], list[Damaged]]:
    """(segments, damaged): the segments of a set without those that are none of its backups."""
    found = []
    data = [segment for segment in segments if segment.head["stage"] == "data"]
    for segment in segments if data else ():  # without any it is a catalog of heads
        if segment.head["stage"] != "data":
            found.append((segment.name, Error(segment.name, f'holds no data, but {segment.head["stage"]}')))
    by_id: dict[str, SavedSegment] = {}
    # Of a segment and its copy, the segment is the one that has the name.
    for segment in sorted(data or segments, key=lambda segment: not _has_its_name(segment)):
        first = by_id.setdefault(segment.head["id"], segment)
        if first is not segment:
            found.append((segment.name, Error(segment.name, f"is a copy of {first.name}: both have one id")))
    kept = [segment for segment in data or segments if by_id[segment.head["id"]] is segment]
    used = {segment.name for segment in kept}
    return kept, [Damaged(file, error, "" if file in used else MOVE, newest=NOTHING) for file, error in found]


def _has_its_name(segment: SavedSegment) -> bool:
    return is_name_of(os.path.basename(segment.name), segment.head)


def paths(directory: str) -> list[str]:
    """The paths of a set's segments, sorted by name."""
    try:
        names = sorted(os.listdir(directory))
    except OSError as error:
        raise os_error(directory, error) from None
    found = [os.path.join(directory, name) for name in names if name.endswith(SUFFIX) and not name.startswith(".")]
    if not found and any(map(_OF_VIRTNBDBACKUP.fullmatch, names)):
        raise Error(
            directory, "is no set: virtnbdbackup wrote it. vnb-import reads it, and a set needs another directory"
        )
    return found


def file_name(head: Head, merged: bool = False) -> str:
    """
    The name of a segment's file: its restore point, whose middle part is a time, and its level.

    merged: it takes the place of others, and has its id in the name: else whoever copies a set, and knows files
    by name and size, would keep the one that it has.
    """
    id_ = f'.{head["id"][:12]}' if merged else ""
    name = f'{head["point"]}.{head["level"]}{id_}{SUFFIX}'
    if not rules.is_safe_name(name):
        raise Error("stdin", f'a restore point must not be named {head["point"]!r}')
    return name


def is_name_of(name: str, head: Head) -> bool:
    """Whether a file has the name that a segment with this head gets."""
    with contextlib.suppress(Error):
        return name in (file_name(head), file_name(head, merged=True))
    return False


def of_domain(
    segments: list[SavedSegment], directory: str | None, uuid: str, domain: str,
) -> tuple[list[SavedSegment], list[Damaged]]:
    """
    (segments, damaged): those of a set that are of this domain, and a Damaged for each file that has others.

    Raises Error unless it is a set of this domain: one file that somebody has put into a set makes no other set of it.
    """
    ours = [segment for segment in segments if segment.head["uuid"] == uuid]
    others = [segment for segment in segments if segment.head["uuid"] != uuid]
    if others and len(others) >= len(ours):
        other = others[0]
        where = f" ({other.name})" if ours else ""
        raise Error(
            directory, f'is a set of domain {other.head["domain"]} ({other.head["uuid"]}){where}, '
            f"not of {domain} ({uuid})"
        )
    damaged = []
    for segment in others:
        error = Error(segment.name, f'is of another domain, {segment.head["domain"]} ({segment.head["uuid"]})')
        damaged.append(Damaged(segment.name, error, MOVE, newest=NOTHING))
    return ours, damaged


def identity(found: os.stat_result) -> tuple[int, int, int, int]:
    """What tells a file, as os.stat() found it, from one that has taken its place or was written to since."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def set_aside(directory: str, files: dict[str, tuple[int, int, int, int]]) -> dict[str, str]:
    """
    Give damaged files of a set names that are no segment's, durably. files: {path: its identity()}.

    Returns {path: its new path}, without those that have changed since. Raises Error.
    """
    moved = {}
    with locked(directory) as directory_fd:
        try:
            for path, known in files.items():
                try:
                    if identity(os.stat(path)) != known:
                        continue
                except FileNotFoundError:
                    continue
                name, number = f"{path}{SET_ASIDE}", 0
                while os.path.lexists(name):
                    number += 1
                    name = f"{path}{SET_ASIDE}.{number}"
                os.rename(path, name)
                moved[path] = name
            os.fsync(directory_fd)
        except OSError as error:
            raise os_error(error.filename or directory, error) from None
    return moved


@contextlib.contextmanager
def locked(directory: str) -> Iterator[int]:
    """Keep other writers out of a set for as long as this lasts."""
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise os_error(directory, error) from None
    try:
        locks.wait_for(fd, directory)
        yield fd
    finally:
        os.close(fd)


def is_missing(directory: str) -> bool:
    """Whether nothing is there; where that cannot be told, whoever opens it says why."""
    try:
        os.lstat(directory)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return False
