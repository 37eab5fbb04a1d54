# SPDX-License-Identifier: LGPL-2.1-or-later
"""Backup sets: segments in files, found, opened and stored durably; formats/backup-set.md has the layout."""

import contextlib
import errno
import os
import re
import secrets
import stat

from vnb.base import locks
from vnb.base.durable import make_private_directory, sync_directory
from vnb.base.errors import Error, StreamError, os_error
from vnb.format import frame as f
from vnb.format import index, rules, stream
from vnb.format.frame import FrameError
from vnb.store import chain
from vnb.store.damage import NOTHING, Damaged, newest_by_name
from vnb.store.direct_writer import DirectWriter

SUFFIX = ".vnb"
_OF_VIRTNBDBACKUP = re.compile(r"[^.]+\.(full|copy|(inc|diff)\..+)\.data", re.DOTALL)  # names of its files
PARTIAL = ".partial"
SET_ASIDE = ".damaged"  # behind the name of a file that vnb-verify has found damaged: it is no segment any more
PRUNED = ".pruned"  # a file of a set: checkpoints whose points were dropped, for vnb-checkpoint
MOST_PRUNED = 1 << 20  # bytes of it that are read
MOVE = "move it out of the set"
LISTINGS = 5  # of a set from which files go while it is read
LACKING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # it is not the file that is damaged
_INDEX_HEADER = 64  # an index frame's header is shorter
_INDEX_FRAME = _INDEX_HEADER + index.ROW_SIZE * index.FRAME_ROWS  # as long as those that vnb writes are


class SavedSegment:
    """
    A segment in a file. head (dict), disks (list of dict): as chain.outline() leaves them, open() has all of them.

    name (str): the file's path.

    start, length (int): where it is in the file, in bytes. fd (int): opened when first needed, see close().
    """

    def __init__(self, path, fd, start, length, last_index):
        self.name = path
        self.start = start
        self.length = length
        self._last_index = last_index
        self._fd = None
        segment = self._read(fd)
        self.head, self.disks = chain.outline(segment.head, segment.disks)

    @property
    def fd(self):
        """The file, open for reading. Raises Error."""
        if self._fd is None:
            self._fd = open_file(self.name)
        return self._fd

    def close(self):
        """Close the file; it is opened again when needed."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def open(self):
        """This segment as vnb.format.stream.Reader gives it, from its first byte. Raises Error if it was replaced."""
        segment = self._read(self.fd)
        if chain.outline(segment.head, segment.disks) != (self.head, self.disks):
            raise Error(self.name, "the file has changed since it was opened")
        return segment

    def _read(self, fd):
        try:
            os.lseek(fd, self.start, os.SEEK_SET)
        except OSError as error:
            raise os_error(self.name, error) from None
        reader = stream.Reader(fd, self.name)
        reader.input.offset = self.start
        segment = next(iter(reader), None)
        if segment is None:
            raise self._error("the file was cut short", 0)
        return segment

    def rows(self, cache=None):
        """
        A list of vnb.format.index.Rows, one a disk: from the index, or from the frames where there is none.

        cache (vnb.base.cache.Cache or None): keeps pages of the index; without one each look-up fetches its own.
        """
        if not self._last_index:
            return [
                index.in_memory(self.name, disk["size"], self.length, payloads)
                for disk, payloads in zip(self.disks, self._scan())
            ]
        return [
            index.Rows(
                self.name,
                disk["size"],
                self.length,
                [first for first, _, _ in pages],
                lambda number, pages=pages: self._index_frame(*pages[number][1:])[1],
                cache,
            )
            for disk, pages in zip(self.disks, self._index_pages())
        ]

    def frame_at(self, position, size):
        """The bytes (bytearray) of the frame at a position in this segment, size bytes of it. Any thread."""
        frame = bytearray(size)
        try:
            have = os.preadv(self.fd, [frame], self.start + position)
        except OSError as error:
            raise os_error(self.name, error, f"stream offset {self.start + position}") from None
        if have != size:
            raise self._error("short record", position)
        return frame

    def _index_pages(self):
        """
        For each disk a list of (first offset, position, size) of its index frames, in order.

        Every frame is read and checked, so that one that is damaged, and with it the link to those before
        it, is found now and not taken for an empty range later. None is kept.
        """
        pages = [[] for _ in self.disks]
        position = self._last_index
        while True:
            fields, rows, size = self._index_frame(position)
            _, disk, _, back = fields
            pages[disk].append((int.from_bytes(rows[:8], "little"), position, size))
            if back == 0:
                break
            if not 0 < back < position:
                raise self._error("an index that points outside", position)
            position -= back
        for list_ in pages:
            list_.reverse()
            if any(first >= after for (first, *_), (after, *_) in zip(list_, list_[1:])):
                raise self._error("an index that descends", self._last_index)
        return pages

    def _index_frame(self, position, size=_INDEX_FRAME):
        """(fields, rows (memoryview), size) of the index frame at a position, checked. size: how much to read first."""
        whole = memoryview(self.frame_at(position, min(size, self.length - position)))
        try:
            fields, sum_, header, payload = f.decode(whole[:_INDEX_HEADER])
            if fields[0] != "index" or payload is None or len(fields) != 4:
                raise FrameError("no index frame where one is said to be")
            _, disk, rows, back = fields
            if not (type(disk) is type(rows) is type(back) is int and 0 <= disk < len(self.disks)):
                raise FrameError("an index of no disk")
            size = header + payload
            if rows == 0 or payload != rows * index.ROW_SIZE or size > self.length - position:
                raise FrameError("an index of the wrong size")
            if size > len(whole):
                whole = memoryview(self.frame_at(position, size))
            f.check_payload_sum("index", whole[:header], sum_, whole[header:size])
        except (FrameError, f.Incomplete) as error:
            raise self._error(error or "short record", position) from None
        return fields, whole[header:size], size

    def _scan(self):
        """Index payloads made from the headers of the frames; payloads are passed over, not read."""
        collected = _Collected(len(self.disks))
        builder = index.Builder(collected)
        position = 0
        tail = self.length - f.TAIL.size
        while position < tail:
            want = f.MAX_DATA_HEADER
            while True:
                window = memoryview(self.frame_at(position, min(want, self.length - position)))
                try:
                    fields, _sum, size, payload = f.decode(window)
                    break
                except f.Incomplete:
                    if len(window) < want:
                        raise self._error("short record", position) from None
                    want = min(2 * want, f.MAX_HEAD)
                except FrameError as error:
                    raise self._error(error, position) from None
            whole = size + (payload or 0)
            if position + whole > tail:
                raise self._error("a frame that is longer than the segment", position)
            if fields[0] == "data":
                if fields[1] >= len(self.disks):
                    raise self._error("an extent of no disk", position)
                builder.data(fields[1], fields[2], fields[3], position, whole)
            elif fields[0] == "extent":
                self._check_runs(fields, position)
                builder.extents(fields[1], fields[2])
            position += whole
        if fields[0] != "end":
            raise self._error('no frame "end" before the tail', position)
        builder.finish()
        return collected.payloads

    def _check_runs(self, fields, position):
        runs = fields[2] if len(fields) == 3 else None
        if not (
            type(fields[1]) is int and 0 <= fields[1] < len(self.disks) and isinstance(runs, list)
            and len(runs) % 3 == 0 and all(type(word) is int and 0 <= word <= f.MAX_OFFSET for word in runs)
        ):
            raise self._error('malformed frame "extent"', position)

    def _error(self, reason, position):
        return StreamError(self.name, reason, f"stream offset {self.start + position}")


class _Collected:
    """Takes index frames in the place of a SegmentWriter, in memory."""

    def __init__(self, disks):
        self.payloads = [[] for _ in range(disks)]

    def index(self, disk, _rows, payload):
        self.payloads[disk].append(payload)


def segments_in_file(path):
    """The segments (list of SavedSegment) of one file, first to last, found from their tails. Raises Error."""
    fd = open_file(path)
    try:
        return [SavedSegment(path, fd, *place) for place in reversed(list(places(path, fd)))]
    finally:
        os.close(fd)


def open_file(path):
    """A descriptor of a file with segments, for reading. Raises Error."""
    try:
        # Not to wait for whoever may open the other end of a FIFO: it can't be sought in, and is refused.
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise os_error(path, error) from None


def places(path, fd):
    """
    Yield (start, length, position of the last index frame or 0) of each segment in a file, last to first.

    Found from the tails alone. Raises Error where there is none.
    """
    try:
        end = os.lseek(fd, 0, os.SEEK_END)
    except OSError as error:
        raise os_error(path, error) from None
    if end == 0:
        raise StreamError(path, "empty file, expected a stream")
    while end > 0:
        size = min(end, f.TAIL.size)
        try:
            tail = os.pread(fd, size, end - size)
            length, back = f.decode_tail(memoryview(tail))
        except OSError as error:
            raise os_error(path, error) from None
        except FrameError as error:
            raise StreamError(path, f"cut short or not a stream ({error})", f"stream offset {end}") from None
        if not f.TAIL.size < length <= end or back > length - f.TAIL.size:
            raise StreamError(path, "the tail points outside", f"stream offset {end}")
        yield end - length, length, length - f.TAIL.size - back if back else 0
        end -= length


def segments(operands):
    """The segments of sets (directories) and files, in no order that means anything. Raises Error for any damage."""
    found, damaged = readable(operands)
    for file in damaged:
        raise file.error
    return found


def some(operands):
    """readable(), where there has to be a segment. Raises Error."""
    found, damaged = readable(operands)
    if not found:
        for file in damaged:
            raise file.error
        raise Error(operands[0] if len(operands) == 1 else "the chain", "no segment here")
    return found, damaged


def readable(operands):
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


def _readable_in_set(directory):
    for _ in range(LISTINGS):
        found, damaged = [], []
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


def _readable_in_file(path, directory=None):
    """The same of one file. directory (str or None): the set that it is in."""
    found = []
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


def _damaged(path, error, directory, fd=None, count=0):
    """The Damaged of a file; fd (int or None): open. count (int): of its segments, 0 where that is not known."""
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
        starts_so = bool(start) and f.HEAD_MAGIC.startswith(start)
        newest = newest_by_name(name, starts_so or count or not can_be_read)
    return Damaged(path, error, advice, head, newest)


def _front(path, fd):
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


def _without_strangers(segments):
    """(segments, damaged): the segments of a set without those that are none of its backups."""
    found = []
    data = [segment for segment in segments if segment.head["stage"] == "data"]
    for segment in segments if data else ():  # without any it is a catalog of heads
        if segment.head["stage"] != "data":
            found.append((segment.name, Error(segment.name, f'holds no data, but {segment.head["stage"]}')))
    by_id = {}
    # Of a segment and its copy, the segment is the one that has the name.
    for segment in sorted(data or segments, key=lambda segment: not _has_its_name(segment)):
        first = by_id.setdefault(segment.head["id"], segment)
        if first is not segment:
            found.append((segment.name, Error(segment.name, f"is a copy of {first.name}: both have one id")))
    kept = [segment for segment in data or segments if by_id[segment.head["id"]] is segment]
    used = {segment.name for segment in kept}
    return kept, [Damaged(file, error, "" if file in used else MOVE, newest=NOTHING) for file, error in found]


def _has_its_name(segment):
    return is_name_of(os.path.basename(segment.name), segment.head)


def paths(directory):
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


def add_pruned(directory, names):
    """Write down, durably, that a set does not need these checkpoints any more. Raises OSError."""
    fd = os.open(
        os.path.join(directory, PRUNED), os.O_CREAT | os.O_APPEND | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with open(fd, "w", encoding="utf-8") as file:
        file.writelines(f"{name}\n" for name in names)
        file.flush()
        os.fsync(fd)
    sync_directory(directory)


def pruned(directory):
    """The checkpoints (set of str) that a set does not need any more, as far as that was written down."""
    try:
        # Not to wait for whoever may open the other end of a FIFO.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        with open(os.open(os.path.join(directory, PRUNED), flags), encoding="utf-8", errors="replace") as file:
            return set(file.read(MOST_PRUNED).splitlines())
    except OSError:
        return set()


def forget_pruned(directory, names):
    """These checkpoints (set of str) are gone. Where it cannot be written down, they are looked for once more."""
    with contextlib.suppress(OSError, Error), locked(directory):  # vnb-prune adds some while it has that lock
        path = os.path.join(directory, PRUNED)
        rest = pruned(directory) - names
        os.unlink(path)
        if rest:
            add_pruned(directory, sorted(rest))


def file_name(head, merged=False):
    """
    The name of a segment's file: its restore point, whose middle part is a time, and its level.

    merged (bool): it takes the place of others, and has its id in the name: else whoever copies a set, and knows files
    by name and size, would keep the one that it has.
    """
    id_ = f'.{head["id"][:12]}' if merged else ""
    name = f'{head["point"]}.{head["level"]}{id_}{SUFFIX}'
    if not rules.is_safe_name(name):
        raise Error("stdin", f'a restore point must not be named {head["point"]!r}')
    return name


def is_name_of(name, head):
    """Whether a file has the name that a segment with this head gets."""
    with contextlib.suppress(Error):
        return name in (file_name(head), file_name(head, merged=True))
    return False


def of_domain(segments, directory, uuid, domain):
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


def admit(directory, head, disks):
    """Raise Error unless a set may take a segment with this head and these disks."""
    held, damaged = readable([directory])
    names = {disk["name"] for disk in disks}
    for segment in held:
        if segment.head["id"] == head["id"]:
            raise Error(directory, f'segment {head["id"]} is already here ({segment.name})')
    held, _ = of_domain(held, directory, head["uuid"], head["domain"])
    for segment in held:
        if segment.head["point"] == head["point"] and segment.head["level"] == head["level"]:
            raise Error(directory, f'point {head["point"]} is already here ({segment.name})')
        if segment.head["point"] == head["point"] and names != {disk["name"] for disk in segment.disks}:
            raise Error(directory, f'point {head["point"]} is already here with other disks ({segment.name})')
    path = os.path.join(directory, file_name(head))
    if os.path.lexists(path):  # it is damaged, or of another restore point
        advice = next((f": {file.error.reason}; {file.advice}" for file in damaged if file.name == path), "")
        raise Error(path, f"another file has the name of this segment{advice}")
    parent = head["parent"]
    if parent is not None:
        before = chain.points(held).get(parent)
        if before is None:
            where = chain.where(parent, damaged) if damaged else ""
            raise Error(directory, f'does not hold {parent}, the base of {head["point"]}{where and f", {where}"}')
        follow = chain.Follow(directory)
        for segment in chain.path(held, directory, parent, damaged):
            follow.accept(segment.head, segment.disks)
        follow.accept(head, disks)
        chain.check_files(head, [segment.head for segment in held if segment.head["point"] == parent], directory)


def identity(found):
    """What tells a file, as os.stat() found it, from one that has taken its place or was written to since."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def set_aside(directory, files):
    """
    Give damaged files of a set names that are no segment's, durably. files (dict): {path: its identity()}.

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
def locked(directory):
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


class Store:
    """
    A segment on its way into a set: a temporary file, that commit() makes durable and names.

        with Store(directory, head, disks) as store:
            ... write to store.writer ...
            store.commit()

    Without commit() the temporary file is removed. The constructor refuses what the set may not take, before
    any data is read; commit() asks again, since another writer may have been faster. check (bool): False for
    a catalog of heads, which need not hold a whole chain, and for a segment that was merged. merged (bool): it is
    such a one, see file_name().
    """

    def __init__(self, directory, head, disks, check=True, merged=False):
        self.directory = directory
        self.head = head
        self.disks = disks
        self.check = check
        self.merged = merged
        self.name = file_name(head, merged)
        make_private_directory(directory)
        remove_abandoned(directory)
        if check:
            admit(directory, head, disks)
        self.path = os.path.join(directory, self.name)
        self._create()

    def _create(self):
        while True:
            self.partial = os.path.join(self.directory, f".{self.name}.{secrets.token_hex(4)}{PARTIAL}")
            try:
                self.fd = os.open(self.partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
            except OSError as error:
                raise os_error(self.partial, error) from None
            locks.wait_for(self.fd, self.partial)  # says that somebody still writes it, see remove_abandoned()
            if os.fstat(self.fd).st_nlink:
                self.writer = DirectWriter(self.fd, self.path)
                return
            # Another writer came between open and flock, and removed the file as one that nobody writes.
            os.close(self.fd)

    def __enter__(self):
        return self

    def commit(self):
        """Sync, name, and sync the directory: after this the segment is in the set. Returns its path."""
        self.writer.finish()
        try:
            os.fsync(self.fd)
            with locked(self.directory) as directory_fd:
                if self.check:
                    admit(self.directory, self.head, self.disks)
                elif self.merged and os.path.lexists(self.path):
                    raise Error(self.path, "another file has the name of this segment")
                os.rename(self.partial, self.path)
                self.partial = None
                os.fsync(directory_fd)
        except OSError as error:
            raise os_error(self.path, error) from None
        return self.path

    def __exit__(self, *_):
        self.writer.close()
        if self.partial is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.partial)
        os.close(self.fd)


def is_missing(directory):
    """Whether nothing is there; where that cannot be told, whoever opens it says why."""
    try:
        os.lstat(directory)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return False


def remove_abandoned(directory):
    """Remove temporary files whose writer was killed: the lock of a living one can't be had."""
    for name in os.listdir(directory):
        if not _is_partial(name):
            continue
        path = os.path.join(directory, name)
        try:
            # For writing: NFS locks nothing else. Not to wait for whoever may open the other end of a FIFO.
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            continue  # its writer was faster
        try:
            locks.take(fd)
            # Between open and flock its writer may have given it a final name: then it is not at path any more.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), os.lstat(path)):
                    os.unlink(path)
        except OSError:
            continue  # it is written by somebody, or nothing here can be locked: it does no harm
        finally:
            os.close(fd)


def _is_partial(name):
    return name.startswith(".") and name.endswith(PARTIAL) and SUFFIX + "." in name
