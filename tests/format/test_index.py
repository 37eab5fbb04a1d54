# SPDX-License-Identifier: LGPL-2.1-or-later
"""The index of a saved segment: written in bounded frames, read in pages, never believed."""

import struct
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import makers
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vnb.base.cache import Cache
from vnb.base.errors import StreamError
from vnb.format import frame as f
from vnb.format import index, writing
from vnb.format.frame import HOLE, ZERO
from vnb.store import backupset


class Collected:
    """Takes index frames in the place of a SegmentWriter."""

    def __init__(self):
        self.frames = []

    def index(self, disk, rows, payload):
        assert len(payload) == rows * index.ROW_SIZE
        self.frames.append((disk, rows, bytes(payload)))

    def rows(self, disk):
        """All rows of a disk, as they were written."""
        payload = b"".join(payload for number, _, payload in self.frames if number == disk)
        return list(struct.iter_unpack("<4Q", payload))


def segments(tmp_path, plan, **options):
    return [backupset.segments([path])[0] for path in makers.make_set(tmp_path, plan, **options)]


def test_neighbours_with_one_state_share_a_row():
    out = Collected()
    builder = index.Builder(out)
    builder.extents(0, [0, 10, ZERO, 10, 10, ZERO, 20, 10, HOLE])
    builder.extents(0, [30, 10, HOLE, 50, 10, HOLE])
    builder.data(0, 60, 10, 100, 60)
    builder.extents(0, [70, 10, HOLE])
    builder.finish()
    assert out.rows(0) == [(0, 20, 0, ZERO), (20, 20, 0, HOLE), (50, 10, 0, HOLE), (60, 10, 100, 60), (70, 10, 0, HOLE)]


def test_frames_are_bounded_and_in_order():
    out = Collected()
    builder = index.Builder(out)
    expected = {disk: [] for disk in range(20)}
    for number in range(3 * index.FRAME_ROWS):
        # One busy disk, and many that say little: their rows wait for each other, but not for ever.
        for disk in (0, 1 + number % 19):
            row = (100 * number, 10, 1000 + number, 60)
            builder.data(disk, *row)
            expected[disk].append(row)
    builder.finish()
    assert {disk: out.rows(disk) for disk in expected} == expected
    assert max(rows for _, rows, _ in out.frames) <= index.FRAME_ROWS


def test_builder_takes_no_more_memory_than_its_limit():
    """A thousand disks whose extents interleave are gathered, but not without end."""
    builder = index.Builder(SimpleNamespace(index=lambda *_: None))
    tracemalloc.start()
    for number in range(400):
        for disk in range(1000):
            builder.data(disk, 100 * number, 10, 1000 + number, 60)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * index.MAX_WAITING * index.ROW_SIZE


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["data", "zero", "hole", "nothing"]), st.integers(1, 9)), max_size=60),
    st.integers(0, 300),
    st.integers(1, 300),
    st.booleans(),
)
def test_lookup_gives_the_rows_that_meet_a_range(runs, offset, length, cached):
    rows = []
    at = 0
    for number, (kind, size) in enumerate(runs):
        if kind == "data":
            rows.append((at, size, 500 + number, 60))
        elif kind != "nothing":
            rows.append((at, size, 0, ZERO if kind == "zero" else HOLE))
        at += size
    pages = [rows[at : at + 4] for at in range(0, len(rows), 4)]
    payloads = [b"".join(struct.pack("<4Q", *row) for row in page) for page in pages]
    firsts = [page[0][0] for page in pages]
    found = index.Rows("test", 1000, 1000, firsts, payloads.__getitem__, Cache(300) if cached else None)
    expected = [row for row in rows if row[0] < offset + length and row[0] + row[1] > offset]
    assert list(found.lookup(offset, offset + length)) == expected


@pytest.mark.parametrize(
    "rows",
    [
        [(0, 0, 500, 60)],  # nothing
        [(0, 16, 500, 60), (8, 16, 600, 60)],  # overlap
        [(990, 16, 500, 60)],  # past the end of the disk
        [(1 << 63, 1 << 63, 500, 60)],  # too large to add
        [(0, 16, 990, 60)],  # past the end of the segment
        [(0, 16, 500, f.MAX_DATA + 100)],  # more than a frame may have
        [(0, 16, 0, f.DATA)],  # no data frame starts there
        [(0, 16, 0, 7)],  # no such state
    ],
)
def test_unsound_rows_are_refused_when_they_are_met(rows):
    payload = b"".join(struct.pack("<4Q", *row) for row in rows)
    found = index.in_memory("test", 1000, 1000, [payload])
    with pytest.raises(StreamError, match="test: offset [0-9]+: the index is not sound"):
        list(found.lookup(0, 1000))


def test_descending_rows_do_not_hang():
    payload = b"".join(struct.pack("<4Q", *row) for row in [(500, 16, 500, 60), (100, 16, 600, 60), (300, 16, 700, 60)])
    found = index.in_memory("test", 1000, 1000, [payload])
    with pytest.raises(StreamError, match="not sound"):
        list(found.lookup(0, 1000))


PLAN = [{"vda": "128k:A 64k:- 64k:0 100k:? 1M:-", "vdb": "64k:B 64k:0"}, {"vda": "64k:. 64k:0 512:C", "vdb": "1k:D"}]


def all_rows(segment):
    return [list(rows.lookup(0, 1 << 40)) for rows in segment.rows()]


def test_rows_are_the_same_from_the_index_and_from_the_frames(tmp_path):
    with_index = segments(tmp_path / "a", PLAN)
    without = segments(tmp_path / "b", PLAN, index=False)
    assert [all_rows(segment) for segment in with_index] == [all_rows(segment) for segment in without]
    assert [(row[0], row[1], row[3] if not row[2] else 0) for row in all_rows(with_index[0])[0]] == [
        (0, 65536, 0), (65536, 65536, 0), (131072, 65536, HOLE), (196608, 65536, ZERO),
        (262144, 65536, 0), (327680, 36864, 0), (364544, 1048576, HOLE),
    ]  # fmt: skip


def test_rows_of_concatenated_segments(tmp_path):
    paths = makers.make_set(tmp_path / "set", PLAN)
    joined = tmp_path / "joined"
    joined.write_bytes(b"".join(Path(path).read_bytes() for path in paths))
    assert [all_rows(segment) for segment in backupset.segments([str(joined)])] == [
        all_rows(segment) for segment in backupset.segments(paths)
    ]


def large(tmp_path, rows):
    """A segment whose index has several frames: rows data frames of one byte each."""
    path = tmp_path / "large.vnb"
    with open(path, "wb") as file:
        writer = writing.Writer(file.fileno(), str(path))
        out = writer.segment(makers.head(0), [{"name": "vda", "size": 2 * rows, "level": "full", "image": {}}])
        builder = index.Builder(out)
        for number in range(rows):
            builder.data(0, 2 * number, 1, *out.data(0, 2 * number, 1, "none", 0, b"x"))
            out.extents(0, [2 * number + 1, 1, HOLE])
            builder.extents(0, [2 * number + 1, 1, HOLE])
        builder.finish()
        out.end()
    return path


def test_pages_are_fetched_as_they_are_needed(tmp_path):
    path = large(tmp_path, 10_000)
    (segment,) = backupset.segments([str(path)])
    (rows,) = segment.rows(Cache(1 << 20))
    assert len(rows.firsts) == 5
    fetched = []
    frame_at = segment.frame_at
    segment.frame_at = lambda position, size: fetched.append(position) or frame_at(position, size)
    assert [row[0] for row in rows.lookup(19_000, 19_002)] == [19_000, 19_001]
    assert [row[0] for row in rows.lookup(19_990, 19_991)] == [19_990]
    assert len(fetched) == 1
    assert len(list(rows.lookup(0, 20_000))) == 20_000
    assert len(fetched) == 5


@pytest.mark.parametrize("where", ["back", "row", "sum"])
def test_damage_in_the_index_is_found_when_it_is_opened(tmp_path, where):
    """A link that leads elsewhere would leave out rows, and make zeroes of what they stand for."""
    path = large(tmp_path, 10_000)
    content = bytearray(path.read_bytes())
    at = content.rindex(b"\x96\xa5index")
    at += {"back": 11, "row": 1000, "sum": 20}[where]
    content[at] ^= 0x10
    path.write_bytes(content)
    (segment,) = backupset.segments([str(path)])
    with pytest.raises(StreamError, match="large.vnb: stream offset [0-9]+: "):
        segment.rows()


def test_an_index_that_is_cut_off_later_is_an_error(tmp_path):
    path = large(tmp_path, 10_000)
    (segment,) = backupset.segments([str(path)])
    (rows,) = segment.rows()
    with open(path, "r+b") as file:
        file.truncate(1000)
    with pytest.raises(StreamError, match="short record"):
        list(rows.lookup(0, 1))
