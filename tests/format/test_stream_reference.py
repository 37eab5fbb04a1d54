# SPDX-License-Identifier: LGPL-2.1-or-later
"""The fast reader and the slow one agree on every stream: sound, damaged, or against a rule."""

import hashlib

import pytest
import reference_reader
import samples
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import disk, head, part

from vnb.base.errors import Error
from vnb.format import frame as f
from vnb.format import stream

STREAM = samples.every_kind()


def fast(content):
    """As reference_reader.segments, or None: refused."""
    found = []
    with samples.memory(content) as fd:
        try:
            for segment in stream.Reader(fd, "sample"):
                frames = [
                    (raw.fields, None if raw.payload is None else bytes(raw.payload))
                    for raw in segment.raws() if raw.fields[0] not in ("end", "tail")
                ]
                found.append((segment.head, segment.disks, frames, segment.end, segment.length))
        except Error:
            return None
    return found


def slow(content):
    try:
        return reference_reader.segments(bytes(content))
    except reference_reader.Refused:
        return None


def test_every_kind_of_frame():
    assert fast(STREAM) == slow(STREAM) is not None


@settings(max_examples=40)
@given(samples.contents())
def test_sound_streams(segments):
    content = samples.written_from(segments)
    assert fast(content) == slow(content) is not None


def test_a_head_of_nearly_the_largest_size():
    content = samples.segment(head(domain_xml="x" * (f.MAX_HEAD - 1000)), [disk(size=0)])
    assert fast(content) == slow(content) is not None


def test_cut():
    for size in range(0, len(STREAM), 3):
        assert fast(STREAM[:size]) == slow(STREAM[:size])


def test_damaged():
    """Payloads of data are left out: their users check them."""
    for at in range(0, len(STREAM), 2):
        damaged = bytearray(STREAM)
        damaged[at] ^= 1 << at % 8
        assert fast(damaged) == slow(damaged)


NUMBERS = st.sampled_from([0, 1, 2, 3, 5, 50, 99, 100, 101, f.MAX_OFFSET, f.MAX_OFFSET + 1, f.MAX_INTEGER])
ODD = st.sampled_from([None, True, "", "x", "full", "inc", "a/b", ".a", "a\nb", [], {}, [5], {"a": 5}]) | NUMBERS
SHA256 = hashlib.sha256(b"abc").hexdigest()
DESCRIBED = {"role": "nvram", "path": "/v", "size": 3, "sha256": SHA256}
HEADS = st.sampled_from([
    head("p1", "p0", files=[{**DESCRIBED, "base": True}]), head("p1", "p0", files=[DESCRIBED]),
    head(files=[DESCRIBED]), head(files=[DESCRIBED, DESCRIBED]), head(files=[{**DESCRIBED, "base": True}]),
    head("p1", "p0"), head("p2", "p0", level="diff"), head(), head(stage="extents"), head(stage="disks"),
])


def changed(fields):
    """The map, or with one key changed or left out."""
    keys = st.sampled_from(sorted(fields))
    return st.one_of(
        st.just(fields),
        st.tuples(keys, ODD).map(lambda pair: {**fields, pair[0]: pair[1]}),
        keys.map(lambda left: {key: fields[key] for key in fields if key != left}),
    )


RUNS = st.lists(st.tuples(NUMBERS, NUMBERS, st.sampled_from([0, 2, 3, 3, 3, 1])), min_size=1, max_size=3).map(
    lambda runs: [word for run in runs for word in run])
FRAMES = st.one_of(
    st.tuples(st.just("extent"), st.sampled_from([0, 0, 1]), RUNS | st.just([0, 100, 3]) | ODD).map(list),
    st.just(["extent", 0, [0, 100, 3]]),
    st.tuples(st.just("disk"), st.sampled_from([0, 1]), changed(disk(size=100))).map(list),
    st.sampled_from([disk(size=100), disk("vdb", 0, "inc"), disk("vdb", 0)]).map(lambda fields: ["disk", 1, fields]),
    st.tuples(changed(part(size=3)), st.sampled_from([b"", b"a", b"abc"])).map(lambda two: (["file", two[0]], two[1])),
    st.sampled_from([(["file", part(size=3)], b"ab"), (["file", part(size=3, offset=2)], b"c"), (["+x", 5], b"abc")]),
    st.tuples(st.just("index"), NUMBERS, NUMBERS, NUMBERS).map(lambda fields: (list(fields), bytes(32))),
    st.just((["index", 0, 1, 0], bytes(32))),
    changed({"role": "nvram", "path": "/v", "mode": 0o600}).map(lambda fields: ["same", fields]),
    st.sampled_from([["+x", 5], ["x", {}], ["end", {}], ["tail", 5, 5, 5], ["vnb", 1, head()]]),
    st.tuples(st.sampled_from(["disk", "file", "same", "extent", "index", "end", "vnb"]), ODD, ODD).map(list),
)


INC = [disk(size=100, level="inc")]
SOUND = st.sampled_from([
    ["+x", 5], (["+x", 5], b"abc"), ["x", {}], (["file", part(size=3)], b"abc"), ["extent", 0, [3, 2, 3]],
    ["extent", 0, [50, 5, 2, 99, 1, 3]], ["same", {"role": "nvram", "path": "/v", "mode": 0o600}],
])


@settings(max_examples=150)
@given(HEADS | changed(head()), st.just(INC) | st.just([]) | st.lists(changed(disk(size=100)), max_size=1),
       st.lists(SOUND | FRAMES, max_size=4))
def test_sound_sums_and_any_rule_broken(fields, disks, frames):
    try:
        content = samples.segment(fields, disks, *frames)
    except (f.FrameError, Error, OverflowError):
        return
    assert fast(content) == slow(content)


@pytest.mark.parametrize("disk_, offset, length, codec, stored", [
    (0, 0, 100, "none", 100), (0, 0, 100, "none", 99), (0, 0, 100, "lz4", 99), (0, 0, 100, "lz4", 100),
    (0, 0, 101, "none", 101), (1, 0, 100, "none", 100), (0, 1, 99, "none", 99), (0, 0, 0, "none", 0),
    (0, 0, 100, "zstd", 1), (0, 0, 100, "lz4", 0), (0, f.MAX_INTEGER, 100, "none", 100),
])
def test_data_frames(disk_, offset, length, codec, stored):
    with samples.written() as (writer, content):
        out = writer.segment(head(), [disk(size=100)])
        out.data(disk_, offset, length, codec, 5, bytes(stored))
        out.end()
        whole = content()
    assert fast(whole) == slow(whole)


@pytest.mark.parametrize("body", [
    b"\x93\xa4data\x05", b"\x93\xa4tail\x05", b"\x94\xa4data\x05\x05", b"\xdc\x00\x03\xa4tail\x05",
    b"\x98\xa4data\x00\x00\x64\xa4none\x05",
])
def test_data_and_tail_have_one_layout(body):
    """The fast reader takes them apart by it, and must not meet another."""
    whole = samples.segment(head(), [])
    start = whole.index(b"\x93\xa3end")
    content = whole[:start] + body + b"\xcf" + f.xxh3(body).to_bytes(8, "big") + whole[start:]
    assert fast(content) is None and slow(content) is None
    content = whole[:start] + body + b"\xcf" + f.xxh3(body).to_bytes(8, "big") + b"\xc6\0\0\0\1a" + whole[start:]
    assert fast(content) is None and slow(content) is None
