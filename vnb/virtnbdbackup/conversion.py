# SPDX-License-Identifier: LGPL-2.1-or-later
"""The data of one file of virtnbdbackup, on its way into a disk of a segment."""

from __future__ import annotations

from xxhash import xxh3_64_intdigest

from vnb.format import frame as f
from vnb.format.runs import Joining
from vnb.virtnbdbackup.datafile import END, PIECE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vnb.format.types import Bytes
    from vnb.format.writing import SegmentWriter
    from vnb.virtnbdbackup.datafile import Input
    from vnb.virtnbdbackup.saved_file import DataFile


_ZEROES = bytes(PIECE)


class Copy:
    """The data of one file on its way into one disk of a segment. out: vnb.format.writing.SegmentWriter."""

    def __init__(self, file: DataFile, source: Input, out: SegmentWriter, number: int) -> None:
        self.file = file
        self.source = source
        self.out = out
        self.number = number
        self.at = 0  # where the next extent may begin
        self._holes = Joining(lambda runs: out.extents(number, runs))

    def run(self) -> None:
        if self.file.is_raw:
            self._raw()
        else:
            self.source.meta()
            self._stream()
            self.source.check_adler()
        if not self.file.incremental and self.at != self.file.size:
            raise self.source.error(f"{self.file.size - self.at} bytes of a full disk are missing")
        self._holes.flush()

    def _stream(self) -> None:
        total = 0
        while True:
            kind, offset, length = self.source.frame()
            if kind == "stop":
                break
            if kind not in ("data", "zero") or (kind == "zero" and self.file.incremental):
                raise self.source.error(f'frame "{kind}" where none may be')
            if not (self.at <= offset and length and offset + length <= self.file.size):
                raise self.source.error(f"{length} bytes at offset {offset} overlap or are not in the disk")
            if not self.file.incremental and offset != self.at:
                raise self.source.error(f"no frame has the {offset - self.at} bytes at offset {self.at}")
            if kind == "zero":
                self._extent(offset, length)
            else:
                total += length
                unpack = self.source.unpacked if self.file.compressed else self.source.plain
                for plain in unpack(length):
                    self._data(offset, plain)
                    offset += len(plain)
                self.source.expect(END)
        if total != self.file.data_size:
            raise self.source.error(f"the header says {self.file.data_size} bytes of data, there were {total}")
        if self.file.compressed:
            self.source.trailer()
        self.source.end()

    def _raw(self) -> None:
        """An image has zeroes and data alike."""
        while self.at < self.file.size:
            for plain in self.source.plain(min(PIECE, self.file.size - self.at)):
                if plain == _ZEROES[: len(plain)]:
                    self._extent(self.at, len(plain))
                else:
                    self._data(self.at, plain)
        self.source.end()

    def _data(self, offset: int, plain: Bytes) -> None:
        self._holes.flush()
        self.out.data(self.number, offset, len(plain), "none", xxh3_64_intdigest(plain), plain)
        self.at = offset + len(plain)

    def _extent(self, offset: int, length: int) -> None:
        self._holes.add(offset, length, f.HOLE)
        self.at = offset + length
