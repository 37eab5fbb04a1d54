# SPDX-License-Identifier: LGPL-2.1-or-later
"""Is the index of a segment that of its frames? For vnb-verify, which reads both."""

from __future__ import annotations

import sys
from array import array

from vnb.format.index import ROW_WORDS
from vnb.format.values import Data

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vnb.base.errors import Error
    from vnb.format.stream import Reader
    from vnb.format.values import Raw



class RowCheck:
    """
    Holds the rows of index frames against the frames before them.

    reader: of the segment, for its errors. Rows wait here until their index frame comes: of
    an index that is written as it goes, that is little.
    """

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._rows: dict[int, array[int]] = {}
        self._differed = False

    def frame(self, raw: Raw) -> Error | None:
        """An Error if the frame shows that the index is wrong, once, else None. All frames, in their order."""
        if self._differed:
            return None
        kind = raw.fields[0]
        if type(raw.frame) is Data:
            data = raw.frame
            self._of(data.disk).extend((data.offset, data.length, data.position, data.size))
        elif kind == "extent":
            _, disk, runs = raw.fields
            rows = self._of(disk)
            for offset, length, state in zip(runs[0::3], runs[1::3], runs[2::3]):
                if rows and rows[-2] == 0 and rows[-1] == state and rows[-4] + rows[-3] == offset:
                    rows[-3] += length
                else:
                    rows.extend((offset, length, 0, state))
        elif kind == "index":
            return self._index(raw)
        elif kind == "end":
            return self._finish(raw)
        return None

    def _of(self, disk: int) -> array[int]:
        return self._rows.setdefault(disk, array("Q"))

    def _index(self, raw: Raw) -> Error | None:
        disk = raw.fields[1]
        rows = array("Q")
        assert raw.payload is not None
        rows.frombytes(raw.payload)
        if sys.byteorder == "big":
            rows.byteswap()
        expected = self._of(disk)
        count = len(rows)
        if expected[:count] == rows:  # as vnb writes it
            del expected[:count]
            return None
        at = 0
        for row in range(0, count, ROW_WORDS):
            offset, length, position, size = rows[row : row + ROW_WORDS]
            if position == 0:
                # Neighbouring extents with one state are one here, and may be several there.
                have = expected[at : at + ROW_WORDS]
                if not have or [have[0], *have[2:]] != [offset, 0, size] or not 0 < length <= have[1]:
                    return self._error(raw, "the index differs from the frames", disk, offset)
                expected[at] += length
                expected[at + 1] -= length
                at += 0 if expected[at + 1] else ROW_WORDS
            elif expected[at : at + ROW_WORDS] != rows[row : row + ROW_WORDS]:
                return self._error(raw, "the index differs from the frames", disk, offset)
            else:
                at += ROW_WORDS
        del expected[:at]
        return None

    def _finish(self, raw: Raw) -> Error | None:
        for disk, rows in self._rows.items():
            if rows:
                return self._error(raw, f"{len(rows) // ROW_WORDS} rows are missing in the index", disk, rows[0])
        return None

    def _error(self, raw: Raw, reason: str, disk: int, offset: int) -> Error:
        self._differed = True
        assert self._reader.segment is not None
        name = self._reader.segment.disks[disk]["name"]
        return self._reader.error(f"{name}: offset {offset}: {reason}", raw.start)
