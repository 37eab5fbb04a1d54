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

from vnb.base.errors import StreamError


class Layers:
    """
    One disk at one point.

    layers (list of vnb.format.index.Rows): newest first, the last of them the full one.
    size (int): bytes of the disk. full_size (int): bytes of it in the full layer; what was added to the
    disk since then and never written reads as zeroes.
    """

    def __init__(self, name, layers, size, full_size):
        self.name = name
        self.layers = layers
        self.size = size
        self.full_size = full_size

    def pieces(self, offset=0, end=None):
        """
        Yield (offset, length, layer, row): which row of which layer has the bytes of [offset, end).

        Ascending and contiguous; layer (int) counts from the newest, row is (offset, length, position, size)
        as vnb.format.index has it, and whole: the piece lies in it. Both are None where no layer has anything, that
        is, for zeroes in the tail of a disk that grew. Memory does not grow with the range, so that a whole
        disk can be walked. Raises StreamError for an index that leaves out what the full layer must have.
        """
        for piece in pieces(self.layers, offset, self.size if end is None else end):
            if piece[2] is None and piece[0] < self.full_size:
                raise StreamError(self.name, "no segment has anything here", f"offset {piece[0]}")
            yield piece


def pieces(layers, offset, end):
    """
    Yield (offset, length, layer or None, row or None) over [offset, end); see Layers.pieces.

    Each layer is looked up in a range once, and walked from there.
    """
    cursors = []
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
            yield offset, limit - offset, None, None
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
