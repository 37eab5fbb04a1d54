# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Extents of a full backup and of an increment against a naive model, byte for byte.

Servers answer in pieces of any length, fewer or more than asked, and never two contexts in the same pieces.
"""

from unittest import mock

import samples  # noqa: F401  # its hypothesis profile
from hypothesis import example, given
from hypothesis import strategies as st

from vnb.cli import extents
from vnb.format import runs as runs_module
from vnb.format.frame import DATA, HOLE, ZERO
from vnb.nbd import block_status

STATES = {0: DATA, 1: DATA, 2: ZERO, 3: HOLE}  # 1: a hole that does not read as zeroes


class Fake:
    """A Connection to an export of which each byte has flags; answers are cut as `cuts` says, over and over."""

    def __init__(self, flags, cuts, minimum=1, beyond=0, has_context=True):
        self.size = len(flags)
        self.flags = flags + [0] * beyond  # a server may tell of more than there is
        self.cuts = cuts
        self.minimum = minimum
        self.has_context = has_context
        self.asked = []

    def ask(self, offset, length):
        assert 0 <= offset < offset + length <= self.size
        assert offset % self.minimum == length % self.minimum == 0
        assert not self.asked or offset >= self.asked[-1][0]
        self.asked.append((offset, length))
        extents_, longest = self.cuts[len(self.asked) % len(self.cuts)]
        entries, end = [], offset
        while end < len(self.flags) and len(entries) < 2 * extents_:
            start = end
            # Not more than `longest`, so that neighbours with the same flags come apart.
            while end < len(self.flags) and end - start < longest and self.flags[end] == self.flags[start]:
                end += 1
            end += -(end - offset) % self.minimum
            entries += [end - start, self.flags[start]]
        return mock.Mock(answer=lambda: entries)


def per_byte(runs):
    """{offset: state} of lists of runs, which must ascend."""
    found, end = {}, 0
    for offset, length, state in (run for list_ in runs for run in zip(list_[0::3], list_[1::3], list_[2::3])):
        assert offset >= end and length > 0
        end = offset + length
        found.update(dict.fromkeys(range(offset, end), state))
    return found


def small(function, *arguments):
    """Collect what it yields, with parts of two extents and spans of a few bytes."""
    limits = {"MAX_EXTENTS": 2, "FIRST_SPAN": 8, "MAX_SPAN": 32, "FEW_EXTENTS": 2, "MANY_EXTENTS": 4, "MiB": 4}
    with mock.patch.multiple(block_status, **limits):
        return list(function(*arguments))


def runs_of(values):
    """Flags of a disk, a byte each, in runs as disks have them."""
    return st.lists(st.tuples(st.sampled_from(values), st.integers(1, 12)), max_size=12).map(
        lambda runs: [flags for flags, length in runs for _ in range(length)]
    )


cuts = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 40)), min_size=1, max_size=5)


@given(runs_of([0, 1, 2, 3, 0x80000002]), cuts, st.integers(0, 9))
@example([], [(1, 1)], 0)
def test_allocation_tells_of_each_byte_once(flags, cuts, beyond):
    found = per_byte(small(block_status.allocation, Fake(flags, cuts, beyond=beyond), len(flags)))
    assert found == {offset: STATES[byte & 3] for offset, byte in enumerate(flags)}


@given(st.data(), cuts, cuts, st.integers(0, 9))
def test_changes_are_what_is_dirty_with_its_allocation(data, dirty_cuts, base_cuts, beyond):
    dirty = data.draw(runs_of([0, 1, 3]))
    base = data.draw(st.lists(st.sampled_from([0, 1, 2, 3]), min_size=len(dirty), max_size=len(dirty)) |
                     st.sampled_from([0, 3]).map(lambda flags: [flags] * len(dirty)))
    of_dirty, of_base = Fake(dirty, dirty_cuts, beyond=beyond), Fake(base, base_cuts)
    found = per_byte(small(block_status.changes, of_dirty, of_base, len(dirty)))
    assert found == {offset: STATES[base[offset]] for offset, byte in enumerate(dirty) if byte & 1}


@given(runs_of([0, 1]), cuts, cuts)
def test_without_base_allocation_all_that_is_dirty_is_data(dirty, dirty_cuts, base_cuts):
    base = Fake([3] * len(dirty), base_cuts, has_context=False)
    found = per_byte(small(block_status.changes, Fake(dirty, dirty_cuts), base, len(dirty)))
    assert found == {offset: DATA for offset, byte in enumerate(dirty) if byte & 1}
    assert not base.asked


@given(st.integers(0, 300))
def test_without_base_allocation_everything_is_data(size):
    fake = Fake([3] * size, [(1, 1)], has_context=False)
    assert per_byte(small(block_status.allocation, fake, size)) == dict.fromkeys(range(size), DATA)
    assert not fake.asked


@given(st.data(), st.integers(0, 20), st.integers(0, 7), cuts)
def test_the_rest_of_the_last_block_is_not_asked_for_but_read(data, blocks, rest, cuts):
    """Block status of less than a server's minimum is refused, and what was never asked for may be anything."""
    flags = [byte for _ in range(blocks) for byte in [data.draw(st.sampled_from([2, 3]))] * 8] + [3] * rest
    found = per_byte(small(block_status.allocation, Fake(flags, cuts, minimum=8), len(flags)))
    assert [found[offset] for offset in range(8 * blocks)] == flags[: 8 * blocks]
    # A server that tells of the rest without being asked is believed; it is not what the next answer begins with.
    assert all(found[offset] in (DATA, HOLE) for offset in range(8 * blocks, len(flags)))
    dirty = Fake([0] * len(flags), [(1, 8)], minimum=8)
    found = per_byte(small(block_status.changes, dirty, Fake(flags, [(1, 8)], minimum=8), len(flags)))
    assert set(found.values()) <= {DATA}
    assert set(found) == set(range(8 * blocks, len(flags)))


def test_clean_ranges_are_not_asked_for_their_allocation():
    """A disk of many TiB with one change costs a request or two."""
    base = Fake([0] * 4000, [(9, 4000)])
    dirty = Fake([0] * 3000 + [1] * 5 + [0] * 995, [(9, 4000)])
    assert per_byte(small(block_status.changes, dirty, base, 4000)) == dict.fromkeys(range(3000, 3005), DATA)
    assert base.asked == [(3000, 5)]


def test_spans_grow_while_answers_are_short_and_shrink_when_they_are_long():
    fake = Fake([0] * 400, [(1, 400)])
    fake.ask = lambda offset, length, ask=fake.ask: mock.Mock(answer=lambda: [ask(offset, length) and length, 0])
    small(block_status.allocation, fake, 400)
    assert [length for _, length in fake.asked] == [8, 32, *[32] * 11, 8]
    fake = Fake([0, 2] * 400, [(5, 1)])
    small(block_status.allocation, fake, 800)
    assert min(length for _, length in fake.asked[:-1]) == 4


class Frames:
    """In the place of a SegmentWriter."""

    def __init__(self):
        self.frames = []

    def extents(self, disk, runs):
        assert disk == 5
        assert 0 < len(runs) <= 3 * 2
        self.frames.append(runs)


@given(st.lists(runs_of([DATA, ZERO, HOLE, None]), max_size=8))
def test_batch_keeps_every_byte_and_merges_what_is_one(lists):
    """None: what an increment does not speak of."""
    out, batch, offset, expected = Frames(), None, 0, {}
    with mock.patch.object(runs_module, "MAX_EXTENTS", 2):
        batch = extents._Batch(out, 5)
        for states in lists:
            runs = []
            for state in states:
                if state is not None:
                    runs += (offset, 1, state)
                    expected[offset] = state
                offset += 1
            batch.add(runs)
            # All data is on its way: whoever reads it need not wait for what comes next.
            so_far = per_byte(out.frames)
            assert all(state != DATA or at in so_far for at, state in expected.items())
            assert len(batch._held) <= 3
        batch.flush()
    assert per_byte(out.frames) == expected
    words = [word for frame in out.frames for word in frame]
    for at in range(3, len(words), 3):
        joins = words[at - 3] + words[at - 2] == words[at] and words[at - 1] == words[at + 2]
        assert not joins or words[at + 2] == DATA


def test_a_batch_that_was_passed_on_is_not_passed_on_again():
    out = Frames()
    batch = extents._Batch(out, 5)
    batch.add([0, 10, HOLE])
    batch.add([])
    batch.flush()
    assert out.frames == [[0, 10, HOLE]]
