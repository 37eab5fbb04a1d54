# SPDX-License-Identifier: LGPL-2.1-or-later
"""A file of virtnbdbackup with the data of a disk: its frames, read and checked."""

from __future__ import annotations

import io
import json
import os
import re
import stat
import zlib

from vnb.base.errors import Error, os_error
from vnb.format import frame as f

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any


# A stream of virtnbdbackup, as versions 1.9.15 and 2.x write it. Numbers are 16 hexadecimal digits, \r\n ends things:
#
#   meta 0 LENGTH \r\n JSON \r\n
#   data OFFSET LENGTH \r\n plain bytes, or lz4 frames that give as many \r\n
#   zero OFFSET LENGTH \r\n                                             only in a full one
#   stop 0 0 \r\n
#   JSON \r\n comp 0 LENGTH \r\n                                        only in a compressed one: sizes of lz4 frames
FRAME = re.compile(rb"(meta|data|zero|stop|comp) ([0-9a-f]{16}) ([0-9a-f]{16})\r\n")
FRAME_SIZE = 40
END = b"\r\n"
VERSIONS = (1, 2)  # of the stream; 1 is 2 without compression
MAX_META = 1 << 20
PACKED = 64 * f.KiB  # of lz4 data, handed to its library at a time
PACKED_FIRST = 4 * f.KiB  # of a frame, which may be a short one: what is behind it is copied
PIECE = 512 * f.KiB  # plain bytes of a data frame, as vnb-read has it


class Input:
    """
    A file that virtnbdbackup wrote, read once from start to end.

    size, modified (Unix time): of the file. offset: of the next byte.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._file = open_file(path)
        status = os.fstat(self._file.fileno())
        self.size = status.st_size
        self.modified = status.st_mtime
        self.offset = 0
        self._ahead = b""  # read from the file, and not yet from here
        self._adler = 1

    def __enter__(self) -> Input:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def error(self, reason: object) -> Error:
        return Error(self.path, reason, f"stream offset {self.offset}")

    def peek(self, size: int) -> bytes:
        """Its next bytes, at most size of them, which stay to be read."""
        self._fill(size)
        return self._ahead[:size]

    def read(self, size: int) -> bytes:
        """Exactly size bytes."""
        self._fill(size)
        found = self._ahead[:size]
        if len(found) < size:
            raise self.error(f"short record: expected {size} bytes, got {len(found)}")
        self._ahead = self._ahead[size:]
        self.offset += size
        return found

    def _fill(self, size: int) -> None:
        while len(self._ahead) < size:
            try:
                found = os.read(self._file.fileno(), size - len(self._ahead))
            except OSError as error:
                raise os_error(self.path, error, f"stream offset {self.offset}") from None
            if not found:
                break
            self._adler = zlib.adler32(found, self._adler)
            self._ahead = self._ahead + found if self._ahead else found

    def expect(self, text: bytes) -> None:
        if self.read(len(text)) != text:
            raise self.error("not a stream of virtnbdbackup, or damaged")

    def frame(self) -> tuple[str, int, int]:
        """(kind, offset, length) of the frame that comes next."""
        match = FRAME.fullmatch(self.read(FRAME_SIZE))
        if match is None:
            raise self.error("not a stream of virtnbdbackup, or damaged")
        return match[1].decode(), int(match[2], 16), int(match[3], 16)

    def meta(self) -> dict[str, Any]:
        """The header, which comes next."""
        kind, _, length = self.frame()
        if kind != "meta" or length > MAX_META:
            raise self.error("not a stream of virtnbdbackup, or damaged")
        meta = _json(self.read(length))
        if not isinstance(meta, dict):
            raise self.error("malformed header")
        self.expect(END)
        return meta

    def plain(self, length: int) -> Iterator[bytes]:
        """Yield length bytes in pieces."""
        while length:
            piece = self.read(min(PIECE, length))
            yield piece
            length -= len(piece)

    def unpacked(self, length: int) -> Iterator[bytes]:
        """
        Yield length bytes in pieces, from as many lz4 frames as there are.

        They say themselves where they end. Each may unpack to 32 MiB and more, so it is done in pieces.
        """
        from lz4.frame import LZ4FrameDecompressor

        waiting = bytearray()
        decompressor = LZ4FrameDecompressor()
        size = PACKED_FIRST
        while length or not decompressor.eof:
            if decompressor.eof:
                decompressor = LZ4FrameDecompressor()
                size = PACKED_FIRST
            packed = b""
            if decompressor.needs_input:
                packed = self.read(max(1, len(self.peek(size))))
                size = min(2 * size, PACKED)
            try:
                found = decompressor.decompress(packed, max_length=PIECE)
            except (RuntimeError, ValueError) as error:
                raise self.error(f"damaged lz4 data ({error})") from None
            if len(found) > length:
                raise self.error("more lz4 data than its frame says")
            length -= len(found)
            waiting += found
            if len(waiting) >= PIECE:
                yield bytes(waiting[:PIECE])
                del waiting[:PIECE]
            if decompressor.eof and decompressor.unused_data:
                self._ahead = decompressor.unused_data + self._ahead
                self.offset -= len(decompressor.unused_data)
        if waiting:
            yield bytes(waiting)

    def trailer(self) -> None:
        """Pass over the list of sizes behind a compressed stream: the frames say it themselves."""
        length = self.size - self.offset - len(END) - FRAME_SIZE
        for _ in self.plain(max(0, length)):
            pass
        self.expect(END)
        kind, _, said = self.frame()
        if kind != "comp" or said != length:
            raise self.error("the list of compressed sizes is damaged")

    def end(self) -> None:
        if self.peek(1):
            raise self.error("there is more after the end of the stream")

    def check_adler(self) -> None:
        """Hold all that was read against the checksum that versions from 2 on leave beside the file."""
        path = f"{self.path}.chksum"
        if os.path.exists(path):
            text = read_file(path, MAX_META)[1].strip()
            if text.isdigit() and text != b"%d" % self._adler:  # one release wrote something else than a number
                raise Error(self.path, f"is damaged: its checksum is {self._adler}, {path} says {text.decode()}")


def _json(text: str | bytes) -> Any:
    """The value that a text is in JSON, None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def open_file(path: str) -> io.FileIO:
    """A regular file (io.FileIO), open for reading. Raises Error."""
    try:
        # Not to wait for whoever may open the other end of a FIFO.
        file = io.FileIO(path, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
    except OSError as error:
        raise os_error(path, error) from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise Error(path, "not a regular file")
    return file


def read_file(path: str, limit: int) -> tuple[int, bytes]:
    """(mode, bytes) of a small regular file. Raises Error for one of more than limit bytes."""
    with Input(path) as source:
        if source.size > limit:
            raise Error(path, f"{source.size} bytes, expected at most {limit}")
        return stat.S_IMODE(os.stat(path).st_mode), source.read(source.size)
