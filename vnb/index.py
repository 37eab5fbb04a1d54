# SPDX-License-Identifier: LGPL-2.1-or-later
"""
The index of a segment: where each frame of each disk is, for readers that seek.

A row is four 64-bit words, little-endian: offset, length, position, size. position is where the data frame
starts, in bytes from the start of the segment, and size is the bytes of the whole frame. For a zero or hole
extent position is 0 and size is the state. Rows of one disk ascend and do not overlap.
"""

import sys
from array import array
from bisect import bisect_right
from itertools import repeat
from operator import gt

from vnb import frame as f
from vnb.errors import StreamError

ROW_WORDS = 4
ROW_SIZE = 8 * ROW_WORDS
FRAME_ROWS = 4096  # rows of one index frame: 128 KiB, gathered for each disk
MAX_WAITING = 8 * FRAME_ROWS  # rows gathered over all disks: 1 MiB


class Builder:
    """Gathers rows and writes them as index frames into out (vnb.stream.SegmentWriter) as it goes."""

    def __init__(self, out):
        self.out = out
        self._rows = {}
        self._waiting = 0

    def data(self, disk, offset, length, position, size):
        """A data frame was written at position."""
        self._add(disk, offset, length, position, size)

    def extents(self, disk, runs):
        """Extents were written: flat list of offset, length, state. Neighbours with one state share a row."""
        rows = self._rows.setdefault(disk, array("Q"))
        for offset, length, state in zip(runs[0::3], runs[1::3], runs[2::3]):
            if rows and rows[-1] == state and rows[-2] == 0 and rows[-4] + rows[-3] == offset:
                rows[-3] += length
            else:
                self._add(disk, offset, length, 0, state)
                rows = self._rows.setdefault(disk, array("Q"))

    def finish(self):
        """Write the rows that are still here."""
        for disk in sorted(self._rows):
            self._write(disk)

    def _add(self, disk, offset, length, position, size):
        rows = self._rows.setdefault(disk, array("Q"))
        if len(rows) >= FRAME_ROWS * ROW_WORDS:
            self._write(disk)
            rows = self._rows.setdefault(disk, array("Q"))
        elif self._waiting >= MAX_WAITING:
            self.finish()
            rows = self._rows.setdefault(disk, array("Q"))
        rows.extend((offset, length, position, size))
        self._waiting += 1

    def _write(self, disk):
        rows = self._rows.get(disk)
        if rows:
            self._waiting -= len(rows) // ROW_WORDS
            self._rows[disk] = array("Q")
            if sys.byteorder == "big":
                rows.byteswap()
            self.out.index(disk, len(rows) // ROW_WORDS, rows.tobytes())


class Rows:
    """
    The rows of one disk in one segment, ascending: what this segment says of any range.

    words (memoryview of 64-bit words): ROW_WORDS a row.
    """

    def __init__(self, words):
        self.words = words
        self.offsets = words[0::ROW_WORDS]
        self.count = len(words) // ROW_WORDS

    def __len__(self):
        return self.count

    def lookup(self, offset, end):
        """Yield (offset, length, position, size) of all rows that meet [offset, end), ascending and whole."""
        words = self.words
        at = max(0, bisect_right(self.offsets, offset) - 1)
        for row in range(at, self.count):
            word = row * ROW_WORDS
            start, length, position, size = words[word : word + ROW_WORDS]
            if start >= end:
                return
            if start + length > offset:
                yield start, length, position, size


def rows_of(payloads, segment_length, disk_size, name):
    """
    Rows of one disk from the payloads (list of bytes, in stream order) of its index frames.

    disk_size (int): the disk's size. Raises StreamError for rows that overlap, descend or point outside.
    """
    words = array("Q")
    for payload in payloads:
        words.frombytes(payload)
    if sys.byteorder == "big":
        words.byteswap()
    view = memoryview(words)
    offsets, lengths, positions, sizes = (view[column::ROW_WORDS] for column in range(ROW_WORDS))
    if len(offsets):
        ends = array("Q", map(int.__add__, offsets, lengths)) if _fits(offsets, lengths) else None
        if (
            ends is None
            or min(lengths) == 0
            or ends[-1] > disk_size
            or any(map(gt, ends, offsets[1:]))
            or any(map(gt, positions, repeat(segment_length)))
            or max(sizes) > f.MAX_HEADER + f.MAX_PAYLOAD
        ):
            raise StreamError(name, "the index is not sound")
    return Rows(view)


def _fits(offsets, lengths):
    return max(offsets) <= f.MAX_OFFSET and max(lengths) <= f.MAX_OFFSET
