# SPDX-License-Identifier: LGPL-2.1-or-later
"""The pieces of a disk, against a naive model that has a cell for every byte."""

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vnb.base.errors import StreamError
from vnb.format import index
from vnb.format.frame import HOLE, ZERO
from vnb.store.overlay import Layers, pieces

SIZE = 48  # bytes of the disk: small, so that everything meets everything


@st.composite
def rows(draw, size=SIZE):
    """Ascending rows that do not overlap: [(offset, length, position, size), ...]."""
    cuts = sorted(draw(st.sets(st.integers(0, size), max_size=12)))
    found = []
    for number, (offset, end) in enumerate(zip(cuts, cuts[1:])):
        kind = draw(st.sampled_from(["data", "zero", "hole", "nothing"]))
        if kind == "data":
            found.append((offset, end - offset, 100 + number, 60))
        elif kind != "nothing":
            found.append((offset, end - offset, 0, ZERO if kind == "zero" else HOLE))
    return found


def layer(found, page_rows=3):
    """vnb.format.index.Rows of a list of rows, a few to a page, so that there are several pages."""
    payloads = [
        b"".join(struct.pack("<4Q", *row) for row in found[at : at + page_rows])
        for at in range(0, len(found), page_rows)
    ]
    return index.in_memory("test", SIZE, 1000, payloads)


@settings(deadline=None)
@given(st.lists(rows(), max_size=6), st.integers(0, SIZE), st.integers(0, SIZE))
def test_pieces_are_what_the_newest_layer_has(layers, offset, end):
    offset, end = min(offset, end), max(offset, end)
    model = [None] * SIZE
    for number, found in reversed(list(enumerate(layers))):
        for row in found:
            model[row[0] : row[0] + row[1]] = [(number, row)] * row[1]
    cells = []
    for at, length, number, row in pieces([layer(found) for found in layers], offset, end):
        assert at == offset + len(cells)
        assert length > 0
        cells += [None if row is None else (number, row)] * length
    assert cells == model[offset:end]


@settings(deadline=None)
@given(rows(), st.lists(st.integers(0, SIZE)))
def test_cursor_finds_what_a_scan_finds(found, offsets):
    cursor = layer(found).cursor()
    for offset in sorted(offsets):
        assert cursor.at(offset) == next((row for row in found if row[0] + row[1] > offset), None)


@settings(deadline=None)
@given(rows(), st.sets(st.integers(0, SIZE), min_size=2, max_size=2))
def test_lookup_gives_the_rows_that_meet_a_range(found, cuts):
    offset, end = sorted(cuts)  # nobody asks for an empty range
    expected = [row for row in found if row[0] < end and row[0] + row[1] > offset]
    assert list(layer(found).lookup(offset, end)) == expected


def test_tail_of_a_grown_disk_is_nobodys():
    """What was added to a disk and never written is in no segment, and reads as zeroes."""
    layers = Layers("vda", [layer([]), layer([(0, 16, 0, ZERO)])], SIZE, 16)
    assert list(layers.pieces()) == [(0, 16, 1, (0, 16, 0, ZERO)), (16, SIZE - 16, 2, None)]


def test_hole_in_the_index_of_a_full_is_an_error():
    """An index that leaves something out must not make zeroes of it."""
    layers = Layers("vda", [layer([(0, 8, 0, ZERO), (12, 4, 0, ZERO)])], SIZE, 16)
    with pytest.raises(StreamError, match="vda: offset 8: no segment has anything here"):
        list(layers.pieces())


def test_a_thousand_layers():
    """A year of three increments a day is not too deep."""
    layers = [layer([(at % SIZE, 1, 1, 60)]) for at in range(1000)]
    assert [piece[2] for piece in pieces(layers, 0, SIZE)] == list(range(SIZE))
