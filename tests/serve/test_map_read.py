# SPDX-License-Identifier: LGPL-2.1-or-later
"""Saved disks at a point, read without a server: any range, every byte checked."""

import itertools
import os
import random
import threading
from pathlib import Path

import makers
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vnb.base.errors import Error
from vnb.format import frame as f
from vnb.store import saved_disk
from vnb.store.saved_disk import Images

PLAN = [
    {"vda": "200k:? 64k:- 32k:0 300k:A 512k:- 7k:?", "vdb": "64k:B 64k:0"},
    {"vda": "10k:. 20k:C 200k:. 100k:0 40k:? 3k:-", "vdb": "1k:. 512:?"},
    {"vda": "15k:. 4k:? 1k:0 900k:. 1M:.", "vdb": ""},  # it has grown
    {"vda": "1M:. 64k:D", "vdb": "128k:E"},
]
POINTS = range(len(PLAN))


@pytest.fixture(scope="module", params=["none", "lz4"])
def saved(request, tmp_path_factory):
    """(path of a set, its images at each point)."""
    directory = str(tmp_path_factory.mktemp("saved") / "set")
    makers.make_set(directory, PLAN, spec=request.param, frame_size=96 << 10)
    return directory, makers.images(PLAN)


def read(opened, offset, length):
    view = memoryview(bytearray(b"\xee" * length))
    opened.read_into(view, offset)
    return view


def test_every_disk_at_every_point(saved):
    directory, expected = saved
    images = Images([directory])
    for number, disk in itertools.product(POINTS, ("vda", "vdb")):
        opened = images.open(f"{disk}@{makers.point(number)}")
        assert opened.size == len(expected[number][disk])
        assert read(opened, 0, opened.size) == expected[number][disk]


def test_random_ranges(saved):
    directory, expected = saved
    opened = Images([directory]).open("vda")
    plain = expected[-1]["vda"]
    random_ = random.Random(6)
    for _ in range(500):
        offset = random_.randrange(len(plain))
        length = random_.randrange(1, min(len(plain) - offset, random_.choice([5, 4096, 300_000])) + 1)
        assert read(opened, offset, length) == plain[offset : offset + length]


def test_until_by_name_and_by_time(saved):
    directory, expected = saved
    for until in (makers.point(1), "2026-01-31T12:00:01"):
        opened = Images([directory], until).open("vda")
        assert read(opened, 0, opened.size) == expected[1]["vda"]


def test_names(saved):
    directory, _ = saved
    images = Images([directory], makers.point(2))
    assert images.names() == ["vda", "vdb"] + [
        f"{disk}@{makers.point(number)}" for number in (3, 1, 0) for disk in ("vda", "vdb")
    ]
    assert images.default is None
    with pytest.raises(Error, match="one of several disks has to be named: vda, vdb"):
        images.open("")


def test_chosen_disks(saved):
    directory, expected = saved
    images = Images([directory], None, ["vdb"])
    assert images.default == "vdb"
    assert read(images.open(""), 0, 10) == expected[-1]["vdb"][:10]
    assert [name.partition("@")[0] for name in images.names()] == ["vdb"] * 4
    for name in ("vda", f"vda@{makers.point(0)}"):
        with pytest.raises(Error, match="no disk vda"):
            images.open(name)
    with pytest.raises(Error, match="--disk: no disk sda at restore point .*, there is vda, vdb"):
        Images([directory], None, ["sda"])


def test_one_point_alone(saved):
    directory, _ = saved
    images = Images([directory], None, [], all_points=False)
    assert images.names() == ["vda", "vdb"]
    with pytest.raises(Error, match="no disk vda@"):
        images.open(f"vda@{makers.point(0)}")


@pytest.mark.parametrize("index", [True, False])
def test_concatenated_segments_in_any_order(tmp_path, index):
    paths = makers.make_set(tmp_path / "set", PLAN, index=index)
    joined = tmp_path / "joined"
    joined.write_bytes(b"".join(Path(path).read_bytes() for path in [paths[3], paths[0], paths[2]]))
    opened = Images([paths[1], str(joined)]).open("vda")
    assert read(opened, 0, opened.size) == makers.images(PLAN)[-1]["vda"]


def test_a_disk_that_comes_later_and_one_that_is_full_again(tmp_path):
    """Nothing older than a disk's own full is part of it, and older points do not have the disk."""
    plan = [{"vda": "64k:A"}, {"vda": "1k:B", "vdb": "64k:C"}]
    makers.make_set(tmp_path / "set", plan)
    images = Images([str(tmp_path / "set")])
    assert read(images.open("vdb"), 0, 65536) == b"C" * 65536
    assert images.names() == ["vda", "vdb", f"vda@{makers.point(0)}"]
    with pytest.raises(Error, match="no disk vdb"):
        images.open(f"vdb@{makers.point(0)}")


def walk(opened, length):
    """All extents, asked for length bytes at a time, as a client would."""
    found = []
    offset = 0
    while offset < opened.size:
        part = opened.extents(offset, min(length, opened.size - offset))
        for start, size, state in part:
            assert start == offset and size > 0
            found.append((start, size, state))
            offset += size
    return found


@pytest.mark.parametrize("length", [1000, 1 << 30])
def test_extents_tell_where_zeroes_are(saved, length):
    directory, expected = saved
    images = Images([directory])
    for number in POINTS:
        opened = images.open(f"vda@{makers.point(number)}")
        plain = expected[number]["vda"]
        for offset, size, state in walk(opened, length):
            assert state == f.DATA or not any(plain[offset : offset + size])
            assert state in (f.DATA, f.ZERO, f.HOLE)
        assert offset + size == len(plain)


def test_extents_merge_and_keep_their_kinds(saved):
    directory, _ = saved
    opened = Images([directory]).open(f"vda@{makers.point(0)}")
    assert opened.extents(0, opened.size) == [
        (0, 200 << 10, f.DATA), (200 << 10, 64 << 10, f.HOLE), (264 << 10, 32 << 10, f.ZERO),
        (296 << 10, 300 << 10, f.DATA), (596 << 10, 512 << 10, f.HOLE), (1108 << 10, 7 << 10, f.DATA),
    ]  # fmt: skip


def test_extents_of_a_checkerboard_come_in_bounded_answers(tmp_path):
    plan = [{"vda": " ".join(["512:A 512:0"] * 3000)}]
    makers.make_set(tmp_path / "set", plan)
    opened = Images([str(tmp_path / "set")]).open("")
    assert len(opened.extents(0, opened.size)) == saved_disk.MAX_EXTENTS
    assert len(walk(opened, opened.size)) == 6000


def damage(path, marker, at=0):
    """Flip a bit of a file, at bytes after the only place where marker is."""
    content = bytearray(Path(path).read_bytes())
    assert content.count(marker) == 1
    content[content.index(marker) + at] ^= 0x04
    Path(path).write_bytes(content)


@pytest.mark.parametrize("spec", ["none", "lz4"])
@pytest.mark.parametrize("where", ["header", "payload"])
@pytest.mark.parametrize("size", [100, 65536])
def test_a_damaged_frame_fails_and_the_rest_reads(tmp_path, spec, where, size):
    plan = [{"vda": "64k:A 64k:B 64k:C"}]
    (path,) = makers.make_set(tmp_path / "set", plan, spec=spec)
    content = Path(path).read_bytes()
    second = content.index(b"\x98\xa4data", content.index(b"\x98\xa4data") + 1)
    damage(path, content[second : second + 64], 20 if where == "header" else 60)
    opened = Images([str(tmp_path / "set")]).open("")
    for _ in range(2):
        with pytest.raises(Error, match=r"\.full\.vnb: vda: offset 65536: ") as error:
            read(opened, 65536, size)
        assert "\n" not in str(error.value)
    assert read(opened, 0, 65536) == b"A" * 65536
    assert read(opened, 131072, 65536) == b"C" * 65536


def test_a_frame_that_is_another_one(tmp_path):
    """An index that leads to a sound frame of another place must not give its bytes."""
    (path,) = makers.make_set(tmp_path / "set", [{"vda": "64k:A 64k:B"}])
    content = bytearray(Path(path).read_bytes())
    first = content.index(b"\x98\xa4data")
    second = content.index(b"\x98\xa4data", first + 1)
    content[first:second] = content[second : 2 * second - first]
    Path(path).write_bytes(content)
    opened = Images([str(tmp_path / "set")]).open("")
    with pytest.raises(Error, match="offset 0: not the frame that the index says is here"):
        read(opened, 0, 65536)


def test_a_segment_that_vanishes_stays_readable(saved, tmp_path):
    paths = makers.make_set(tmp_path / "set", PLAN)
    opened = Images([str(tmp_path / "set")]).open("vda")
    for path in paths:
        os.unlink(path)
    assert read(opened, 0, opened.size) == saved[1][-1]["vda"]


def test_a_segment_that_is_cut_while_it_is_mapped(tmp_path):
    (path,) = makers.make_set(tmp_path / "set", [{"vda": "64k:A 64k:B"}])
    opened = Images([str(tmp_path / "set")]).open("")
    read(opened, 0, 1)  # the index, which is behind the frames, is in the cache now
    os.truncate(path, 100_000)
    assert read(opened, 0, 65536) == b"A" * 65536
    for size in (100, 65536):
        with pytest.raises(Error, match="offset 65536: short record"):
            read(opened, 65536, size)


def test_a_file_that_is_replaced_before_it_is_opened(tmp_path):
    plan = [{"vda": "64k:A"}, {"vda": "64k:B"}]
    paths = makers.make_set(tmp_path / "set", plan)
    images = Images([str(tmp_path / "set")])
    os.replace(paths[0], paths[1])
    with pytest.raises(Error, match="the file has changed since it was opened"):
        images.open("")


def test_readers_side_by_side(saved):
    directory, expected = saved
    images = Images([directory])
    wrong = []

    def use(number):
        try:
            random_ = random.Random(number)
            point = number % len(PLAN)
            plain = expected[point]["vda"]
            for _ in range(100):
                opened = images.open(f"vda@{makers.point(point)}")
                offset = random_.randrange(len(plain) - 1)
                length = random_.randrange(1, min(200_000, len(plain) - offset))
                if read(opened, offset, length) != plain[offset : offset + length]:
                    wrong.append((number, offset, length))
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_frame_cache_is_bounded(tmp_path):
    makers.make_set(tmp_path / "set", [{"vda": "4M:?"}])
    images = Images([str(tmp_path / "set")], cache=200_000)
    opened = images.open("")
    plain = makers.images([{"vda": "4M:?"}])[0]["vda"]
    for offset in range(0, 4 << 20, 4096):
        assert read(opened, offset, 4096) == plain[offset : offset + 4096]
    assert images._data._plain.size <= 200_000


def test_small_reads_of_a_large_frame(tmp_path, monkeypatch):
    """A frame is checked as a whole once; then a few KiB of it cost a few KiB of reading, and are checked too."""
    plan = [{"vda": "1M:? 300k:?"}]
    makers.make_set(tmp_path / "set", plan, frame_size=512 << 10)
    plain = makers.images(plan)[0]["vda"]
    opened = Images([str(tmp_path / "set")], cache=0).open("")
    sizes = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: sizes.append(size) or pread(fd, size, offset))
    random_ = random.Random(7)
    for _ in range(300):
        offset = random_.randrange(len(plain) - 1)
        length = min(random_.choice([1, 4096, 40_000]), len(plain) - offset)
        assert read(opened, offset, length) == plain[offset : offset + length]
    assert sum(size > 100_000 for size in sizes) == 3  # the frames


def test_a_frame_that_changes_after_it_was_read(tmp_path):
    (path,) = makers.make_set(tmp_path / "set", [{"vda": "512k:A"}], frame_size=512 << 10)
    opened = Images([str(tmp_path / "set")], cache=0).open("")
    assert read(opened, 0, 10) == b"A" * 10
    content = bytearray(Path(path).read_bytes())
    content[content.index(b"A" * 1000) + 300_000] ^= 1
    with open(path, "r+b") as file:
        file.write(content)
    assert read(opened, 0, 10) == b"A" * 10
    for offset in (300_000, 0):  # once it is known to be damaged, all of it is
        with pytest.raises(Error, match="vda: offset 0: 524288 bytes differ"):
            read(opened, 299_990 if offset else 0, 20 if offset else 100_000)


@pytest.mark.parametrize("most", [1, 10, 10_000])
def test_more_pieces_than_are_remembered(tmp_path, monkeypatch, most):
    monkeypatch.setattr(saved_disk, "MAX_PIECES", most)
    plan = [{"vda": " ".join(["512:A 512:0 512:B"] * 1000) + " 1M:-"}, {"vda": "700:. 1k:C " * 900}]
    makers.make_set(tmp_path / "set", plan)
    plain = makers.images(plan)[-1]["vda"]
    opened = Images([str(tmp_path / "set")]).open("")
    assert read(opened, 0, opened.size) == plain
    for offset in range(0, len(plain) - 3000, 50_000):
        assert read(opened, offset, 3000) == plain[offset : offset + 3000]


def test_what_comes_next_is_fetched_for_readers_who_go_forwards(tmp_path, monkeypatch):
    (path,) = makers.make_set(tmp_path / "set", [{"vda": "32M:?"}], frame_size=512 << 10)
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, offset, length, advice: asked.append((offset, offset + length)))
    opened = Images([str(tmp_path / "set")]).open("")
    for offset in range(0, opened.size, 256 << 10):
        read(opened, offset, 256 << 10)
    assert 4 <= len(asked) <= 16
    assert all(end == start for (_, end), (start, _) in zip(asked, asked[1:]))  # nothing twice, nothing left out
    assert asked[0][0] < 2 << 20 and asked[-1][1] == Path(path).stat().st_size
    asked.clear()
    for offset in range(opened.size - 4096, 0, -10 << 20):
        read(opened, offset, 4096)
    assert asked == []


def test_prefetch_leaves_frames_in_the_cache(tmp_path):
    (path,) = makers.make_set(tmp_path / "set", [{"vda": "1M:A 64k:0 64k:B"}])
    opened = Images([str(tmp_path / "set")]).open("")
    opened.prefetch(100, 5 << 20)
    os.truncate(path, 0)
    assert read(opened, 0, 65535) == b"A" * 65535
    assert read(opened, 1 << 20, 70_000) == bytes(65536) + b"B" * (70_000 - 65536)


extent = st.tuples(st.integers(1, 5000), st.sampled_from("?A0-."))


@settings(deadline=None, max_examples=60)
@given(st.lists(extent, min_size=1, max_size=8), st.lists(st.lists(extent, max_size=8), max_size=3), st.data())
def test_any_chain_reads_as_it_was_made(tmp_path_factory, full, increments, data):
    full = [(size, "A" if content == "." else content) for size, content in full]
    plan = [{"vda": " ".join(f"{size}:{content}" for size, content in extents)} for extents in [full, *increments]]
    directory = str(tmp_path_factory.mktemp("chain"))
    spec = data.draw(st.sampled_from(["none", "lz4"]))
    makers.make_set(directory, plan, spec=spec, frame_size=data.draw(st.sampled_from([512, 4096])))
    images = Images([directory])
    for number, expected in enumerate(makers.images(plan)):
        opened = images.open(f"vda@{makers.point(number)}")
        assert read(opened, 0, opened.size) == expected["vda"]
        offset = data.draw(st.integers(0, opened.size - 1))
        length = data.draw(st.integers(1, opened.size - offset))
        assert read(opened, offset, length) == expected["vda"][offset : offset + length]
