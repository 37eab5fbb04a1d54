# SPDX-License-Identifier: LGPL-2.1-or-later
"""Saved disks as they were at a point, read from the segments that lead there: any bytes, every one checked."""

import os
import threading

from vnb import backupset, chain, codec
from vnb import frame as f
from vnb.cache import Cache
from vnb.errors import Error, StreamError, os_error
from vnb.frame import FrameError
from vnb.layers import Layers
from vnb.stream import Data

PLAIN_CACHE = 24 * f.MiB  # of frames, unpacked: a frame is read in pieces, and by several threads
INDEX_CACHE = 8 * f.MiB  # of index pages: a quarter of a million extents
MAX_EXTENTS = 1024  # of one answer: more would keep Python's lock for milliseconds
MAX_PIECES = 4 * MAX_EXTENTS  # looked at for one answer: neighbours with one state are one extent
_NONE_HEADER = f.DATA_HEADER_SIZES["none"]
_ZEROES = memoryview(bytes(f.MiB))


class Images:
    """
    The saved disks in sets and files, at all their points.

    operands (list of str): sets and files. until (str or None): the point of disks named without one.
    disks (list of str): no other disk is here. all_points (bool): False for that point alone.
    Raises Error if there is no chain to that point, or no such disk.
    All methods may be called from any thread.
    """

    def __init__(self, operands, until=None, disks=(), all_points=True):
        self.name = operands[0] if len(operands) == 1 else "the chain"
        self.segments = backupset.segments(operands)
        self.path = chain.path(self.segments, self.name, until)
        self.point = self.path[-1].head["point"]
        here = [disk["name"] for disk in self.path[-1].disks]
        for disk in disks:
            if disk not in here:
                raise Error("--disk", f"no disk {disk} at point {self.point}, there is {', '.join(here) or 'none'}")
        self.disks = list(dict.fromkeys(disks)) or here
        self.default = self.disks[0] if disks or len(here) == 1 else None
        self._only = set(disks)
        self._all_points = all_points
        self._images = {}
        self._rows = {}
        self._lock = threading.Lock()
        self._plain = Cache(PLAIN_CACHE)
        self._pages = Cache(INDEX_CACHE)

    def names(self):
        """The names of all images: the disks at the point chosen, then those at each other point, newest first."""
        names = list(self.disks)
        if not self._all_points:
            return names
        others = chain.points(self.segments)
        others.pop(self.point)
        for segment in sorted(others.values(), key=lambda segment: segment.head["created"], reverse=True):
            for disk in segment.disks:
                if not self._only or disk["name"] in self._only:
                    names.append(f'{disk["name"]}@{segment.head["point"]}')
        return names

    def open(self, name):
        """The Image called DISK, at the point chosen, or DISK@POINT; the default one without a name. Raises Error."""
        if not name:
            if self.default is None:
                raise Error(self.name, f"one of several disks has to be named: {', '.join(self.disks)}")
            name = self.default
        path = self.path
        disk = name
        if disk not in self.disks:
            disk, _, until = name.partition("@")
            if not (until and self._all_points) or self._only and disk not in self._only:
                raise Error(self.name, f"no disk {name} at point {self.point}")
            path = chain.path(self.segments, self.name, until)
        with self._lock:
            key = disk, path[-1].head["point"]
            if key not in self._images:
                self._images[key] = self._open(disk, path)
            return self._images[key]

    def _open(self, name, path):
        parts = []
        rows = []
        for segment in reversed(path):
            number = next((number for number, disk in enumerate(segment.disks) if disk["name"] == name), None)
            if number is None:
                raise Error(self.name, f'no disk {name} at point {segment.head["point"]}')
            if segment not in self._rows:
                segment.open()  # the file is held from here on, and is still the one whose head was read
                self._rows[segment] = segment.rows(self._pages)
            parts.append((segment, number))
            rows.append(self._rows[segment][number])
            if segment.disks[number]["level"] == "full":
                break
        size = parts[0][0].disks[parts[0][1]]["size"]
        full_size = segment.disks[number]["size"]
        return Image(name, path[-1].head, Layers(name, rows, size, full_size), parts, self._plain)


class Image:
    """
    One disk at one point. size (int): in bytes.

    parts: list of (SavedSegment, number of the disk in it), one a layer. cache (Cache): of unpacked frames.
    """

    def __init__(self, name, head, layers, parts, cache):
        self.name = name
        self.head = head
        self.size = layers.size
        self._layers = layers
        self._parts = parts
        self._cache = cache

    def read_into(self, view, offset):
        """
        Fill view (memoryview) with the bytes from offset on.

        Each frame that is touched is unpacked and held against the hash that was made at the source, all of it.
        Frames wanted in part stay in the cache. Raises Error; then view has nothing that may be used.
        """
        end = offset + len(view)
        for at, length, layer, row in self._layers.pieces(offset, end):
            part = view if length == len(view) else view[at - offset : at - offset + length]
            if row is None or not row[2]:
                _zero(part)
            elif length == row[1] and row[3] == length + _NONE_HEADER:
                self._read_whole(part, layer, row)
            else:
                skip = at - row[0]
                part[:] = self._plain(layer, row)[skip : skip + length]

    def prefetch(self, offset, length):
        """Have the frames of a range in the cache, as far as half of it may be used for that."""
        end = min(offset + length, offset + self._cache.limit // 2, self.size)
        for _, _, layer, row in self._layers.pieces(offset, end):
            if row is not None and row[2]:
                self._plain(layer, row)

    def extents(self, offset, length):
        """
        A list of (offset, length, state) from offset on, contiguous, neighbours with one state merged.

        It may end before the range does, and beyond it. state: see vnb.frame. Raises Error.
        """
        found = []
        current = None
        for seen, (at, size, _, row) in enumerate(self._layers.pieces(offset, offset + length)):
            state = f.HOLE if row is None else f.DATA if row[2] else row[3]
            if seen >= MAX_PIECES or state != current and len(found) == MAX_EXTENTS:
                break
            if state == current:
                found[-1] = found[-1][0], found[-1][1] + size, state
            else:
                found.append((at, size, state))
                current = state
        return found

    def _plain(self, layer, row):
        segment = self._parts[layer][0]
        return self._cache.get((segment, row[2]), lambda: self._load(layer, row))

    def _load(self, layer, row):
        """The plain bytes (memoryview) of a whole frame."""
        segment, _ = self._parts[layer]
        try:
            raw = memoryview(os.pread(segment.fd, row[3], segment.start + row[2]))
        except OSError as error:
            raise os_error(self._what(segment), error, f"offset {row[0]}") from None
        return memoryview(self._checked(layer, row, raw[: f.MAX_DATA_HEADER], raw, len(raw)))

    def _read_whole(self, part, layer, row):
        """Read a frame that is stored as it is to where it is wanted, without a copy in between."""
        segment, _ = self._parts[layer]
        header = bytearray(_NONE_HEADER)
        try:
            count = os.preadv(segment.fd, [header, part], segment.start + row[2])
        except OSError as error:
            raise os_error(self._what(segment), error, f"offset {row[0]}") from None
        self._checked(layer, row, memoryview(header), part, count)

    def _checked(self, layer, row, header, rest, count):
        """
        The plain bytes (bytes-like) of a frame, held against its row in the index, its sum and its hash.

        header (memoryview): its first bytes. rest (memoryview): ends with its payload. count (int): bytes read.
        """
        segment, number = self._parts[layer]
        offset, length, _, size = row
        try:
            fields, _, header_size, payload = f.decode(header)
            if fields[:4] != ["data", number, offset, length] or header_size + payload != size:
                raise FrameError("not the frame that the index says is here")
            if count != size:
                raise FrameError("short record")
        except (FrameError, f.Incomplete) as error:
            raise StreamError(self._what(segment), error or "short record", f"offset {offset}") from None
        _, _, _, _, name, hash_ = fields
        data = Data(number, offset, length, name, hash_, rest[len(rest) - payload :])
        return codec.plain(data, self._what(segment))

    def _what(self, segment):
        return f"{segment.name}: {self.name}"


def _zero(view):
    for at in range(0, len(view), len(_ZEROES)):
        part = view[at : at + len(_ZEROES)]
        part[:] = _ZEROES[: len(part)]
