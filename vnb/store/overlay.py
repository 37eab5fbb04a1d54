# SPDX-License-Identifier: LGPL-2.1-or-later
"""
A disk at a point in time, from the segments that lead there. Pure logic on index rows; it opens nothing.

The segments are layers, newest first. What a layer has a row for is decided there; only what it leaves out is
looked up in the next older one:

    newest   ....[  data  ]..............[hole]....
    older    [data][data][ zero ]...............[data]
    full     [ data ][ hole ][ data ][ data ][ data ]
    pieces    |    |        |    |   |    |    | | |

Nothing is merged beforehand, so that a disk is there as soon as its indexes are.
"""

from __future__ import annotations

from vnb.base.errors import StreamError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Optional

    from vnb.format.index import Cursor, Rows
    from vnb.format.types import Row
    Piece = tuple[int, int, int, Optional[Row]]  # offset, length, layer, row



class Layers:
    """
    One disk at one point.

    layers: newest first, the last of them the full one.
    size: bytes of the disk. full_size: bytes of it in the full layer; what was added to the
    disk since then and never written reads as zeroes.
    """

    def __init__(self, name: str, layers: Sequence[Rows], size: int, full_size: int) -> None:
        self.name = name
        self.layers = layers
        self.size = size
        self.full_size = full_size

    def pieces(self, offset: int = 0, end: int | None = None) -> Iterator[Piece]:
        """
        Yield (offset, length, layer, row): which row of which layer has the bytes of [offset, end).

        Ascending and contiguous; layer counts from the newest, row is (offset, length, position, size)
        as vnb.format.index has it, and whole: the piece lies in it. It is None where no layer has anything, that
        is, for zeroes in the tail of a disk that grew. Memory does not grow with the range, so that a whole
        disk can be walked. Raises StreamError for an index that leaves out what the full layer must have.
        """
        for piece in pieces(self.layers, offset, self.size if end is None else end):
            if piece[3] is None and piece[0] < self.full_size:
                raise StreamError(self.name, "no segment has anything here", f"offset {piece[0]}")
            yield piece


def pieces(layers: Sequence[Rows], offset: int, end: int) -> Iterator[Piece]:
    """
    Yield (offset, length, layer, row or None) over [offset, end); see Layers.pieces.

    Each layer is looked up in a range once, and walked from there.
    """
    cursors: list[Cursor] = []
    limits = [end]  # limits[depth] is where the range ends that the newer layers left to layer depth
    depth = 0
    while True:
        limit = limits[depth]
        if offset >= limit:
            if depth == 0:
                return
            limits.pop()
            depth -= 1
            continue
        if depth == len(layers):
            yield offset, limit - offset, depth, None
            offset = limit
            continue
        if depth == len(cursors):
            cursors.append(layers[depth].cursor())
        row = cursors[depth].at(offset)
        if row is not None and row[0] <= offset:
            stop = min(row[0] + row[1], limit)
            yield offset, stop - offset, depth, row
            offset = stop
        else:
            limits.append(limit if row is None else min(row[0], limit))
            depth += 1
