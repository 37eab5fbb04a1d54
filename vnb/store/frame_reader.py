# SPDX-License-Identifier: LGPL-2.1-or-later
"""The plain bytes of data frames in saved segments, wherever one wants them, and never unchecked."""

from __future__ import annotations

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

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vnb.format.types import Bytes, Row
    from vnb.store.saved_segment import SavedSegment


BLOCK = 16 * f.KiB  # what is read for a byte, of a frame that was read before
SMALL = 64 * f.KiB  # requests up to this size are read by block
LARGE = 128 * f.KiB  # frames from this size on have blocks: less is read as fast as a whole
AHEAD = 8 * f.MiB  # bytes of a segment that are fetched for readers who go forwards
BLOCK_CACHE = 2 * f.MiB  # of checksums of blocks: 4 GiB of disk
_HEADER = f.DATA_HEADER_SIZES["none"]


class Source:
    """One disk in one saved segment. number: of the disk. what: for messages."""

    __slots__ = ("_asked", "_next", "number", "segment", "what")

    def __init__(self, segment: SavedSegment, number: int) -> None:
        self.segment = segment
        self.number = number
        self.what = f'{segment.name}: {segment.disks[number]["name"]}'
        self._next = self._asked = 0

    def touched(self, row: Row) -> None:
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
    Reads data frames for any number of threads. cache_size: bytes of unpacked frames to keep.

    A row is one of vnb.format.index: (offset, length, position, size). All methods raise Error.
    """

    def __init__(self, cache_size: int) -> None:
        self.cache_size = cache_size
        self._plain = Cache(cache_size)
        self._blocks = Cache(BLOCK_CACHE)

    def read(self, view: memoryview, skip: int, source: Source, row: Row, request: int) -> None:
        """
        Fill view with the bytes of a frame from the one at skip on.

        request: bytes that are wanted at once, these and others.
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

    def plain(self, source: Source, row: Row) -> memoryview:
        """The plain bytes of a frame, from the cache or into it."""
        plain: memoryview = self._plain.get((source, row[2]), lambda: self._load(source, row))
        return plain

    def _load(self, source: Source, row: Row) -> memoryview:
        segment = source.segment
        source.touched(row)
        try:
            raw = memoryview(os.pread(segment.fd, row[3], segment.start + row[2]))
        except OSError as error:
            raise os_error(source.what, error, f"offset {row[0]}") from None
        return memoryview(_checked(source, row, raw[: f.MAX_DATA_HEADER], raw, len(raw)))

    def _read_whole(self, view: memoryview, source: Source, row: Row) -> None:
        """Read a frame that is stored as it is to where it is wanted, without a copy in between."""
        segment = source.segment
        header = bytearray(_HEADER)
        source.touched(row)
        try:
            count = os.preadv(segment.fd, [header, view], segment.start + row[2])
        except OSError as error:
            raise os_error(source.what, error, f"offset {row[0]}") from None
        _checked(source, row, memoryview(header), view, count)

    def _read_blocks(self, view: memoryview, skip: int, source: Source, row: Row) -> bool:
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


def _is_stored(row: Row) -> bool:
    """Whether a frame has its plain bytes as they are: a compressed one is shorter."""
    return row[3] == row[1] + _HEADER


def _sums(plain: Bytes) -> memoryview:
    return memoryview(array("Q", [xxh3_64_intdigest(plain[at : at + BLOCK]) for at in range(0, len(plain), BLOCK)]))


def held_against_row(what: str, number: int, row: Row, header: memoryview, count: int) -> tuple[str, int, int]:
    """
    (codec, hash, size of its payload) of the data frame that an index row of a disk points to. Raises StreamError.

    number: of the disk in its segment. header: the frame's first bytes. count: how many of the row's bytes were read.
    """
    offset, length, _, size = row
    try:
        fields, _, header_size, payload = f.decode(header)
        if fields[:4] != ["data", number, offset, length] or payload is None or header_size + payload != size:
            raise FrameError("not the frame that the index says is here")
        if count != size:
            raise FrameError("short record")
    except (FrameError, f.Incomplete) as error:
        raise StreamError(what, str(error) or "short record", f"offset {offset}") from None
    return fields[4], fields[5], payload


def _checked(source: Source, row: Row, header: memoryview, rest: memoryview, count: int) -> Bytes:
    """
    The plain bytes of a frame, held against its row in the index, its sum and its hash.

    header: its first bytes. rest: ends with its payload. count: bytes read.
    """
    offset, length, _, _ = row
    name, hash_, payload = held_against_row(source.what, source.number, row, header, count)
    return codec.plain(Data(source.number, offset, length, name, hash_, rest[len(rest) - payload :]), source.what)
