# SPDX-License-Identifier: LGPL-2.1-or-later
"""The plain bytes of data frames in saved segments, wherever one wants them, and never unchecked."""

import contextlib
import os
from array import array

from xxhash import xxh3_64_intdigest

from vnb.base.cache import Cache
from vnb.base.errors import StreamError, os_error
from vnb.format import codec
from vnb.format import frame as f
from vnb.format.frame import FrameError
from vnb.format.values import Data

BLOCK = 16 * f.KiB  # what is read for a byte, of a frame that was read before
SMALL = 64 * f.KiB  # requests up to this size are read by block
LARGE = 128 * f.KiB  # frames from this size on have blocks: less is read as fast as a whole
AHEAD = 8 * f.MiB  # bytes of a segment that are fetched for readers who go forwards
BLOCK_CACHE = 2 * f.MiB  # of checksums of blocks: 4 GiB of disk
_HEADER = f.DATA_HEADER_SIZES["none"]


class Source:
    """One disk in one saved segment. segment: SavedSegment. number (int): of the disk. what (str): for messages."""

    __slots__ = ("_asked", "_next", "number", "segment", "what")

    def __init__(self, segment, number):
        self.segment = segment
        self.number = number
        self.what = f'{segment.name}: {segment.disks[number]["name"]}'
        self._next = self._asked = 0

    def touched(self, row):
        """
        A frame is about to be read: have the system fetch those behind it, if readers go forwards.

        Its own read-ahead waits to see a pattern, and several readers of one file make none.
        """
        _, _, position, size = row
        if abs(position - self._next) < AHEAD:
            if position + AHEAD // 2 > self._asked:
                start = max(self._asked, position + size)
                end = min(position + size + AHEAD, self.segment.length)
                if end > start:
                    with contextlib.suppress(OSError):  # only speed depends on it
                        os.posix_fadvise(
                            self.segment.fd, self.segment.start + start, end - start, os.POSIX_FADV_WILLNEED
                        )
                self._asked = end
        else:
            self._asked = 0
        self._next = position + size


class SavedData:
    """
    Reads data frames for any number of threads. cache_size (int): bytes of unpacked frames to keep.

    A row is one of vnb.format.index: (offset, length, position, size). All methods raise Error.
    """

    def __init__(self, cache_size):
        self.cache_size = cache_size
        self._plain = Cache(cache_size)
        self._blocks = Cache(BLOCK_CACHE)

    def read(self, view, skip, source, row, request):
        """
        Fill view (memoryview) with the bytes of a frame from the one at skip on.

        request (int): bytes that are wanted at once, these and others.
        """
        if len(view) == row[1] and _is_stored(row):
            self._read_whole(view, source, row)
            return
        key = source, row[2]
        plain = self._plain.peek(key)
        if plain is None:
            has_blocks = request <= SMALL and row[1] >= LARGE and _is_stored(row)
            if has_blocks and self._read_blocks(view, skip, source, row):
                return
            plain = self.plain(source, row)
            if has_blocks:
                self._blocks.put(key, _sums(plain))
        view[:] = plain[skip : skip + len(view)]

    def plain(self, source, row):
        """The plain bytes (memoryview) of a frame, from the cache or into it."""
        return self._plain.get((source, row[2]), lambda: self._load(source, row))

    def _load(self, source, row):
        segment = source.segment
        source.touched(row)
        try:
            raw = memoryview(os.pread(segment.fd, row[3], segment.start + row[2]))
        except OSError as error:
            raise os_error(source.what, error, f"offset {row[0]}") from None
        return memoryview(_checked(source, row, raw[: f.MAX_DATA_HEADER], raw, len(raw)))

    def _read_whole(self, view, source, row):
        """Read a frame that is stored as it is to where it is wanted, without a copy in between."""
        segment = source.segment
        header = bytearray(_HEADER)
        source.touched(row)
        try:
            count = os.preadv(segment.fd, [header, view], segment.start + row[2])
        except OSError as error:
            raise os_error(source.what, error, f"offset {row[0]}") from None
        _checked(source, row, memoryview(header), view, count)

    def _read_blocks(self, view, skip, source, row):
        """
        Read a part of a frame that was read and found right before; False if it was not.

        Its checksum is over all of it. So the whole frame is read once, and checksums of its blocks are kept.
        """
        key = source, row[2]
        sums = self._blocks.peek(key)
        if sums is None:
            return False
        segment = source.segment
        first, last = skip // BLOCK, (skip + len(view) - 1) // BLOCK
        start = first * BLOCK
        try:
            blocks = memoryview(
                os.pread(
                    segment.fd,
                    min((last + 1) * BLOCK, row[1]) - start,
                    segment.start + row[2] + _HEADER + start,
                )
            )
        except OSError as error:
            raise os_error(source.what, error, f"offset {row[0]}") from None
        if _sums(blocks) != sums[first : last + 1]:
            return False  # it has changed: reading all of it will tell
        view[:] = blocks[skip - start : skip - start + len(view)]
        return True


def _is_stored(row):
    """Whether a frame has its plain bytes as they are: a compressed one is shorter."""
    return row[3] == row[1] + _HEADER


def _sums(plain):
    return memoryview(array("Q", [xxh3_64_intdigest(plain[at : at + BLOCK]) for at in range(0, len(plain), BLOCK)]))


def _checked(source, row, header, rest, count):
    """
    The plain bytes (bytes-like) of a frame, held against its row in the index, its sum and its hash.

    header (memoryview): its first bytes. rest (memoryview): ends with its payload. count (int): bytes read.
    """
    offset, length, _, size = row
    try:
        fields, _, header_size, payload = f.decode(header)
        if fields[:4] != ["data", source.number, offset, length] or header_size + payload != size:
            raise FrameError("not the frame that the index says is here")
        if count != size:
            raise FrameError("short record")
    except (FrameError, f.Incomplete) as error:
        raise StreamError(source.what, str(error) or "short record", f"offset {offset}") from None
    _, _, _, _, name, hash_ = fields
    return codec.plain(Data(source.number, offset, length, name, hash_, rest[len(rest) - payload :]), source.what)
