# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs of extents, against a model that has a cell for every byte."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vnb.format import runs
from vnb.format.frame import DATA, HOLE, ZERO

SIZE = 60  # bytes of the disk: small, so that everything meets everything


@st.composite
def ascending(draw):
    """Runs, some of which touch, some with something between them."""
    cuts = sorted(draw(st.sets(st.integers(0, SIZE), max_size=14)))
    found = []
    for offset, end in zip(cuts, cuts[1:]):
        state = draw(st.sampled_from([DATA, ZERO, HOLE, None]))
        if state is not None:
            found += (offset, end - offset, state)
    return found


def cells(found):
    """The state of each byte; None of those in no run."""
    result = [None] * (SIZE + 1)
    for offset, length, state in zip(found[0::3], found[1::3], found[2::3]):
        assert length > 0
        assert result[offset : offset + length] == [None] * length
        result[offset : offset + length] = [state] * length
    return result


def neighbours(found):
    """Pairs of runs that touch and have one state."""
    return [
        (one, other) for one, other in zip(zip(*[iter(found)] * 3), list(zip(*[iter(found)] * 3))[1:])
        if one[0] + one[1] == other[0] and one[2] == other[2]
    ]


@given(ascending())
def test_joined(found):
    result = runs.joined(list(found))
    assert cells(result) == cells(found)
    assert neighbours(result) == []


@given(ascending(), st.integers(0, SIZE))
def test_clipped(found, size):
    assert cells(runs.clipped(found, size)) == cells(found)[:size] + [None] * (SIZE + 1 - size)


@given(ascending(), st.integers(1, 4))
def test_batches(found, most):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "MAX_EXTENTS", most)
        result = list(runs.batches(found))
    assert sum(result, []) == found
    assert all(0 < len(batch) <= 3 * most for batch in result)


@given(ascending(), st.integers(1, 4), st.sets(st.integers(0, 20)))
def test_joining(found, most, flushes):
    """Whenever it is flushed; only a flush, or a frame that is full, leaves neighbours apart."""
    result = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "MAX_EXTENTS", most)
        joining = runs.Joining(result.append)
        for number, (offset, length, state) in enumerate(zip(found[0::3], found[1::3], found[2::3])):
            joining.add(offset, length, state)
            if number in flushes:
                joining.flush()
        joining.flush()
        joining.flush()
    assert all(0 < len(batch) <= 3 * most and neighbours(batch) == [] for batch in result)
    assert cells(sum(result, [])) == cells(found)
    if not flushes:
        assert sum(result, []) == runs.joined(list(found))
