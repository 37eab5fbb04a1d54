# SPDX-License-Identifier: LGPL-2.1-or-later
"""vnb.store.merge against a naive model of every byte: the merged segment brings one where the chain does."""

import subprocess
import sys

import makers
import pytest
import samples
from hypothesis import given
from hypothesis import strategies as st
from samples import applied
from xxhash import xxh3_64_intdigest

from vnb.base.errors import Error, StreamError
from vnb.format import index, values
from vnb.format.frame import HOLE, ZERO
from vnb.store import backupset, chain, saved_segment
from vnb.store.merge import Merge

SIZES = st.integers(0, 200)
FRAMES = ("none", "lz4", "zero", "hole", "clean")


@st.composite
def chains(draw, most=4):
    """[(disks, frames)]: a full and increments, with disks that come, go, grow, and start again in full."""
    result = []
    before = {}
    for number in range(draw(st.integers(1, most))):
        disks, frames, now = [], [], {}
        for name in draw(st.sampled_from(["a", "ab", "ba", "b", ""])) if number else draw(st.sampled_from(["a", "ab"])):
            level = "inc" if name in before and draw(st.integers(0, 4)) else "full"
            size = before[name] + draw(st.sampled_from([0, 0, 1, 50])) if level == "inc" else draw(SIZES)
            now[name] = size
            at = 0
            while at < size:
                length = draw(st.integers(1, size - at))
                kind = draw(st.sampled_from(FRAMES if level == "inc" else FRAMES[:-1]))
                if kind != "clean":
                    frames.append((kind, len(disks), at, length, draw(st.integers(1, 255))))
                at += length
            disks.append((name, size, level))
        result.append((disks, frames))
        before = now
    return result


def saved(segments, spec_of=lambda number: None):
    """The segments of chains() as one file's bytes. spec_of: number of a segment -> no index for it, if true."""
    with samples.written() as (writer, content):
        for number, (disks, frames) in enumerate(segments):
            head = samples.head(f"p{number}", f"p{number - 1}" if number else None,
                                created=f"2026-01-31T12:00:{number:02}.000000Z", domain_xml=f"<{number}/>")
            out = writer.segment(head, [samples.disk(*disk, about=number) for disk in disks])
            builder = index.Builder(out)
            out.file(samples.part(path=f"/{number}", size=1), b"%d" % number)
            for kind, disk, offset, length, byte in frames:
                if kind in ("zero", "hole"):
                    samples.extents(out, disk, [offset, length, ZERO if kind == "zero" else HOLE], builder)
                else:
                    samples.data(out, disk, offset, bytes([byte]) * length, kind, builder)
            if spec_of(number):
                builder.finish()
            out.end()
        return content()


def merged(content, start=0, stop=None, **options):
    """The bytes of one segment out of those from start to stop of a file's."""
    with samples.written() as (writer, result):
        merge_into(writer, content, start, stop, **options)
        return result()


def merge_into(writer, content, start=0, stop=None, with_index=True, **options):
    with samples.memory(content) as fd:
        path = saved_segment.segments_in_file(f"/proc/self/fd/{fd}")
        merge = Merge(path[start:stop], "the chain", **options)
        merge.read_head()
        out = writer.segment(merge.head, merge.disks)
        builder = index.Builder(out) if with_index else None
        merge.write(out, builder)
        if builder:
            builder.finish()
        out.end()


@given(chains(), st.booleans(), st.integers(0, 15))
def test_it_brings_one_where_the_chain_does(segments, repack, indexed):
    content = saved(segments, lambda number: indexed >> number & 1)
    one = merged(content, repack=repack)
    assert applied(one) == applied(content)
    ((head, disks, frames, _end, _length),) = samples.read(one)
    last = samples.read(content)[-1]
    assert head == {**last[0], "id": head["id"], "level": "full", "parent": None}
    assert head["id"] not in {f"id-p{number}" for number in range(9)}
    assert [disk["level"] for disk in disks] == ["full"] * len(disks)
    assert [{**disk, "level": None} for disk in disks] == [{**disk, "level": None} for disk in last[1]]
    assert [frame for frame in frames if frame[0] == "File"] == [frame for frame in last[2] if frame[0] == "File"]


@given(chains(), st.data())
def test_increments_become_one_increment(segments, data):
    """Applied to anything at all, it does what they do one after the other."""
    start = data.draw(st.integers(0, len(segments) - 1))
    stop = data.draw(st.integers(start + 1, len(segments)))
    content = saved(segments, lambda number: True)
    before = applied(merged(content, 0, start)) if start else {}
    if start:
        # What an increment leaves alone shows on a disk full of one byte.
        before = {name: b"\xa5" * len(image) for name, image in before.items()}
    one = merged(content, start, stop)
    each = [merged(content, number, number + 1) for number in range(start, stop)]
    state = before
    for content_ in each:
        state = applied(content_, state)
    assert applied(one, before) == state
    ((head, *_),) = samples.read(one)
    assert head["parent"] == (f"p{start - 1}" if start else None)
    assert head["level"] == ("inc" if start else "full")
    assert head["point"] == f"p{stop - 1}"


@given(chains(), st.data())
def test_the_order_of_merging_does_not_matter(segments, data):
    """merge(merge(a, b), c) is merge(a, b, c), and so is merge(a, merge(b, c))."""
    content = saved(segments, lambda number: True)
    cut = data.draw(st.integers(0, len(segments)))
    parts = [merged(content, *bounds) for bounds in ((0, cut), (cut, len(segments))) if bounds[0] < bounds[1]]
    both = b"".join(parts)
    assert covered(merged(both)) == covered(merged(content))


def covered(content):
    """[(disk, offset, length, what)] of a segment's bytes: neighbours of one kind in one, data by its bytes."""
    result = {}
    ((_head, disks, frames, _end, _length),) = samples.read(content)
    for disk in disks:
        result[disk["name"]] = [disk["level"], [None] * disk["size"]]
    for frame in frames:
        if frame[0] == "data":
            result[disks[frame[1]]["name"]][1][frame[2] : frame[2] + frame[3]] = frame[7]
        elif frame[0] == "extent":
            for offset, length, state in zip(frame[2][0::3], frame[2][1::3], frame[2][2::3]):
                result[disks[frame[1]]["name"]][1][offset : offset + length] = [-state] * length
    return result


def plan_in(directory, plan, **options):
    makers.make_set(directory, plan, **options)
    return chain.path(backupset.segments([directory]), "set")


def content_of(segment):
    with open(segment.name, "rb") as file:
        return file.read()


def frames_of(path, **options):
    with samples.written() as (writer, content):
        merge = Merge(path, "the chain", **options)
        merge.read_head()
        out = writer.segment(merge.head, merge.disks)
        merge.write(out)
        out.end()
        return samples.read(content())[0][2]


PLAN = [{"vda": "64k:A 64k:B 64k:C 64k:- 64k:0"}, {"vda": "64k:. 32k:D 128k:. 32k:E"}]


def test_a_whole_frame_is_passed_on_as_it_is_stored(tmp_path):
    path = plan_in(tmp_path / "set", PLAN, spec="lz4")
    first, *_ = frames_of(path)
    assert first[:5] == ("data", 0, 0, 65536, "lz4")
    assert first[5] == xxh3_64_intdigest(b"A" * 65536)
    ((_, _, stored, *_),) = samples.read(content_of(path[0]))
    assert first == stored[0]


@pytest.mark.parametrize("repack", [False, True])
def test_the_rest_of_a_cut_frame_has_a_hash_of_its_own(tmp_path, repack):
    frames = frames_of(plan_in(tmp_path / "set", PLAN, spec="lz4"), repack=repack)
    rest = frames[2]
    assert rest[:5] == ("data", 0, 96 << 10, 32 << 10, "lz4" if repack else "none")
    assert rest[5] == xxh3_64_intdigest(b"B" * (32 << 10))
    assert rest[7] == b"B" * (32 << 10)


def test_zeroes_stay_holes_and_zeroes(tmp_path):
    frames = frames_of(plan_in(tmp_path / "set", PLAN))
    assert [frame for frame in frames if frame[0] == "extent"] == [
        ("extent", 0, [192 << 10, 32 << 10, HOLE]), ("extent", 0, [256 << 10, 64 << 10, ZERO])
    ]


def test_each_frame_that_is_wanted_is_read_once(tmp_path, monkeypatch):
    """Also one that is cut into many pieces; and what newer segments cover is not read."""
    plan = [
        {"vda": [(1 << 20, "A"), (1 << 20, "B")]},
        {"vda": " ".join(["16k:. 16k:C"] * 32) + " 1024k:D"},
        {"vda": "8k:E"},
    ]
    path = plan_in(tmp_path / "set", plan, frame_size=1 << 20)
    reads = []
    read = Merge._read
    monkeypatch.setattr(Merge, "_read", lambda self, *where: reads.append(where[2]) or read(self, *where))
    frames_of(path)
    assert len(reads) == len(set(reads)) == 1 + 32 + 1 + 1


def test_many_extents_are_in_frames_of_bounded_size(tmp_path):
    plan = [{"vda": " ".join(["512:0 512:-"] * 5000)}]
    frames = frames_of(plan_in(tmp_path / "set", plan))
    assert [len(frame[2]) // 3 for frame in frames] == [4096, 4096, 10000 - 8192]


def damaged(path, offset):
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize("spec", ["none", "lz4"])
@pytest.mark.parametrize("at", ["A" * 8, "B" * 8])
def test_damage_is_found_in_what_is_passed_on_and_in_what_is_cut(tmp_path, spec, at):
    path = plan_in(tmp_path / "set", PLAN, spec=spec)
    content = content_of(path[0])
    damaged(path[0].name, content.index(at.encode() if spec == "none" else at[:1].encode() * 5))
    with pytest.raises(Error, match="differ|damaged"):
        frames_of(path)


def test_what_is_covered_need_not_be_sound(tmp_path):
    path = plan_in(tmp_path / "set", [{"vda": "64k:A 64k:B"}, {"vda": "64k:C"}])
    damaged(path[0].name, content_of(path[0]).index(b"AAAA"))
    assert [frame[7][:1] for frame in frames_of(path)] == [b"C", b"B"]


def with_unknown(kind, with_index=True):
    with samples.written() as (writer, content):
        out = writer.segment(samples.head(), [samples.disk("a", 64)])
        builder = index.Builder(out)
        samples.data(out, 0, 0, b"x" * 32, "none", builder)
        out.frame(values.Other([kind, 1], b"payload"))
        samples.data(out, 0, 32, b"y" * 32, "none", builder)
        if with_index:
            builder.finish()
        out.end()
        return content()


@pytest.mark.parametrize("with_index", [False, True])
def test_a_frame_of_a_required_unknown_type_is_refused(with_index):
    with pytest.raises(StreamError, match='unknown frame type "x"'):
        merged(with_unknown("x", with_index))


@pytest.mark.parametrize("with_index", [False, True])
def test_a_frame_of_an_optional_unknown_type_is_left_out(with_index):
    assert applied(merged(with_unknown("+x", with_index))) == {"a": b"x" * 32 + b"y" * 32}


def test_an_index_that_leaves_out_a_frame_is_found():
    with samples.written() as (writer, content):
        out = writer.segment(samples.head("p1", "p0"), [samples.disk("a", 64, "inc")])
        builder = index.Builder(out)
        samples.data(out, 0, 0, b"x" * 32, "none", builder)
        samples.data(out, 0, 32, b"y" * 32)
        builder.finish()
        out.end()
        content = content()
    with pytest.raises(StreamError, match="the index leaves out a frame"):
        merged(content)


def test_memory_does_not_grow_with_the_disk(tmp_path):
    """An increment that cuts every frame of a full one of 160 MiB, into two pieces."""
    plan = [{"vda": "160M:A"}, {"vda": " ".join(["4k:B 508k:."] * 320)}]
    makers.make_set(tmp_path / "set", plan, frame_size=512 << 10)
    script = ("import runpy, sys; sys.argv = ['vnb-cat', '--merge', sys.argv[1]]\n"
              "try: runpy.run_path('bin/vnb-cat', run_name='__main__')\n"
              "finally: print(*(line for line in open('/proc/self/status') if 'VmHWM' in line), file=sys.stderr)")
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "set"], stdout=subprocess.DEVNULL,
                          stderr=subprocess.PIPE, cwd=samples.ROOT, check=True)
    assert int(done.stderr.split()[1]) < 80 << 10  # kiB
