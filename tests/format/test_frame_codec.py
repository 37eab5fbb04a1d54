# SPDX-License-Identifier: LGPL-2.1-or-later
"""Frames to bytes and back, and what a decoder does with what is no frame."""

import struct

import msgpack
import pytest
import samples  # noqa: F401  (its settings)
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from vnb.format import frame as f

INTEGERS = st.integers(0, f.MAX_INTEGER)
TEXT = st.text(st.characters(blacklist_categories=["Cs"]), max_size=20)
VALUES = st.recursive(
    st.none() | st.booleans() | INTEGERS | TEXT,
    lambda values: st.lists(values, max_size=4) | st.dictionaries(TEXT, values, max_size=4),
    max_leaves=20,
)
NAMES = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=8).filter(
    lambda name: name not in ("data", "tail", "extent")
)
FRAMES = st.tuples(NAMES, st.lists(VALUES, min_size=1, max_size=5), st.none() | st.binary(max_size=64))


def decode_whole(content):
    """(fields, payload) of one frame that is all of content."""
    fields, sum_, size, payload_size = f.decode(memoryview(content))
    if payload_size is None:
        assert size == len(content)
        return fields, None
    payload = content[size:]
    assert payload_size == len(payload)
    f.check_payload_sum(fields[0], content[:size], sum_, payload)
    return fields, payload


def encode_whole(fields, payload):
    header, _sum = f.encode(fields, payload)
    return header + (payload or b"")


def with_sum(body):
    """A frame without payload whose bytes before the sum are body, sound or not."""
    return body + struct.pack(">BQ", 0xCF, xxh3_64_intdigest(body))


@settings(max_examples=40)
@given(FRAMES)
def test_round_trip(frame):
    kind, values, payload = frame
    fields = [kind, *values]
    assert decode_whole(encode_whole(fields, payload)) == (fields, payload)


@settings(max_examples=40)
@given(FRAMES)
def test_a_part_of_a_frame_is_incomplete(frame):
    """A reader that sees the start of a sound frame asks for more, and never takes it for damage."""
    kind, values, payload = frame
    header, _sum = f.encode([kind, *values], payload)
    for size in range(len(header)):
        with pytest.raises(f.Incomplete):
            f.decode(memoryview(header)[:size])


@settings(max_examples=60)
@given(FRAMES, st.data())
def test_bit_of_a_frame_flipped(frame, choose):
    kind, values, payload = frame
    content = bytearray(encode_whole([kind, *values], payload))
    bit = choose.draw(st.integers(0, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << bit % 8
    try:
        fields, payload_ = decode_whole(bytes(content))
    except (f.FrameError, f.Incomplete, AssertionError):
        return
    pytest.fail(f"{fields} {payload_} passed")


@given(st.binary(max_size=200))
def test_noise(noise):
    try:
        f.decode(memoryview(noise))
    except (f.FrameError, f.Incomplete):
        pass


@given(st.binary(max_size=100), st.sampled_from([b"\x93\xa1x", b"\x98\xa4data", b"\x94\xa4tail", b"\x94\xa3vnb\x01"]))
def test_noise_that_starts_well(noise, start):
    try:
        f.decode(memoryview(start + noise))
    except (f.FrameError, f.Incomplete):
        pass


@given(st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), f.MAX_INTEGER) | st.floats() | TEXT | st.binary(max_size=9),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(TEXT | st.binary(max_size=3), values, max_size=3),
    max_leaves=8,
))
def test_any_msgpack_with_a_sound_sum(value):
    """What a hostile writer makes with sound sums: fields come out as JSON can say them, or not at all."""
    content = with_sum(b"\x93\xa1x" + msgpack.packb(value))
    try:
        fields, _, size, _ = f.decode(memoryview(content))
    except (f.FrameError, f.Incomplete):
        return
    assert size == len(content)
    assert encode_whole(fields, None) == content


@pytest.mark.parametrize(
    "value",
    [
        b"\xc4\x00",                        # bin
        b"\xcb" + bytes(8),                 # float
        b"\xff",                            # -1
        b"\xd4\x05\x00",                    # ext
        b"\xd6\xff" + bytes(4),             # timestamp
        b"\xc7\x00\xff",                    # timestamp of no bytes
        b"\xc1",                            # never used
        b"\xcc\x05",                        # 5, too long
        b"\xd9\x01a",                       # "a", too long
        b"\xdc\x00\x00",                    # an empty array, too long
        b"\x82\xa1a\x01\xa1a\x02",          # one key twice
        b"\x81\x01\x01",                    # a key that is no string
        b"\x81\xc4\x00\x01",                # a key of bytes
        b"\xa1\xff",                        # not UTF-8
        b"\xa3\xed\xa0\x80",                # half a surrogate pair
        b"\x91" * 17 + b"\x01",             # nested too deep
        b"\x91" * 5000 + b"\x01",
        b"\x81\xa1a" * 5000 + b"\x01",
        b"\xdc\x30\x01" + b"\x01" * 12289,  # too long an array
        b"\x92" + 2 * (b"\xdc\x18\x00" + b"\x90" * 6144),  # two too many values
        b"\xdd\xff\xff\xff\xff",            # four milliards of elements
        b"\xdf\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",            # 4 GiB of text
        b"\xc6\xff\xff\xff\xff",
        b"\xc9\xff\xff\xff\xff\x05",
    ],
)
def test_values_that_the_format_does_not_know(value):
    with pytest.raises(f.FrameError):
        f.decode(memoryview(with_sum(b"\x93\xa1x" + value) + bytes(f.MAX_HEAD)))


@pytest.mark.parametrize(
    "fields",
    [
        ["x"], [], [5, 5], ["", 5], ["a\nb", 5], ["x" * 256, 5], ["x", *range(30)],
        ["x", 1 << 64], ["x", -1], ["x", 1.0], ["x", b""], ["x", {1: 2}], ["x", "\ud800"], ["x", object()],
        ["x", list(range(12289))], ["x", {str(n): n for n in range(1025)}], ["x", "a" * f.MAX_HEADER],
        ["x", [[]] * 6145, {"a": [[]] * 6144}],
        ["vnb", 1, "a" * f.MAX_HEAD], ["extent", 0, [0] * 12291], ["extent", 0, ["\ud800"]], ["extent", 0, [1 << 64]],
    ],
    ids=lambda fields: repr(fields)[:30],
)
def test_what_no_decoder_accepts_is_not_encoded(fields):
    with pytest.raises(f.FrameError):
        f.encode(fields)


def test_largest_frames():
    for kind, limit in (("x", f.MAX_HEADER), ("vnb", f.MAX_HEAD)):
        room = limit - len(encode_whole([kind, ""], None)) - f.BIN_SIZE - 4
        fields = [kind, "a" * room]
        assert decode_whole(encode_whole(fields, None)) == (fields, None)
    payload = bytes(f.MAX_PAYLOAD)
    assert decode_whole(encode_whole(["x", 1], payload)) == (["x", 1], payload)
    with pytest.raises(f.FrameError, match="too large"):
        f.encode(["x", 1], payload + b"a")


def test_largest_extent_frame():
    """Extents of the largest numbers fit, as many as there may be."""
    fields = ["extent", 1023, [f.MAX_OFFSET, f.MAX_OFFSET, 3] * f.MAX_EXTENTS]
    assert decode_whole(encode_whole(fields, None)) == (fields, None)


def test_payload_over_the_limit_is_refused_by_its_length():
    body = b"\x94\xa1x\x05"
    sum_ = struct.pack(">BQ", 0xCF, 0)
    for marker in (b"\xc6" + struct.pack(">I", f.MAX_PAYLOAD + 1), b"\xc6\xff\xff\xff\xff"):
        with pytest.raises(f.FrameError, match="too large"):
            f.decode(memoryview(body + sum_ + marker))
    for marker in (b"\xc4\x05", b"\xc5\x00\x05"):
        with pytest.raises(f.FrameError, match="bin 32"):
            f.decode(memoryview(body + sum_ + marker + bytes(9)))


DATA = st.fixed_dictionaries({
    "disk": st.integers(0, 1023), "offset": st.integers(0, f.MAX_OFFSET), "length": st.integers(2, f.MAX_DATA),
    "hash_": INTEGERS,
})


@given(DATA, st.sampled_from(f.CODECS), st.data())
def test_data_round_trip(values, codec, choose):
    length = values["length"]
    stored = length if codec == "none" else choose.draw(st.integers(1, length - 1))
    header, sum_ = f.encode_data(codec=codec, stored=stored, **values)
    assert len(header) == f.DATA_HEADER_SIZES[codec] <= f.MAX_DATA_HEADER
    fields, sum_read, size, payload = f.decode(memoryview(header + bytes(9)))
    assert fields == ["data", values["disk"], values["offset"], length, codec, values["hash_"]]
    assert (sum_read, size, payload) == (sum_, len(header), stored)
    for cut in range(len(header)):
        with pytest.raises(f.Incomplete):
            f.decode(memoryview(header)[:cut])
    # Any msgpack library reads it.
    whole = msgpack.unpackb(header[: -f.BIN_SIZE] + b"\xc4\x00")
    assert whole == ["data", values["disk"], values["offset"], length, codec, values["hash_"], sum_, b""]


@pytest.mark.parametrize("length, codec, stored", [
    (0, "none", 0), (f.MAX_DATA + 1, "none", f.MAX_DATA + 1), (0xFFFFFFFF, "none", 0xFFFFFFFF),
    (0xFFFFFFFF, "lz4", 5), (8, "none", 7), (8, "none", 9), (8, "lz4", 8), (8, "lz4", 9), (8, "lz4", 0),
    (8, "lz4", 0xFFFFFFFF), (8, "zstd", 0),
])
def test_data_of_impossible_sizes(length, codec, stored):
    header, _sum = f.encode_data(0, 0, length, codec, 0, stored)
    with pytest.raises(f.FrameError):
        f.decode(memoryview(header + bytes(64)))


def test_unknown_codec():
    for name in (b"\xa4lzma", b"\xa3abc", b"\xa0", b"\xbf" + bytes(31)):
        body = b"\x98\xa4data" + b"\xcd\0\0" + b"\xcf" + bytes(8) + b"\xce\0\0\0\5" + name + b"\xcf" + bytes(8)
        with pytest.raises(f.FrameError, match="unknown codec"):
            f.decode(memoryview(with_sum(body) + b"\xc6\0\0\0\5" + bytes(64)))


@given(st.integers(34, f.MAX_INTEGER), INTEGERS)
def test_tail_round_trip(length, back):
    tail = f.encode_tail(length, back)
    assert len(tail) == f.TAIL.size
    assert f.decode_tail(memoryview(tail)) == (length, back)
    fields, sum_, size, payload = f.decode(memoryview(tail))
    assert (fields, size, payload) == (["tail", length, back], len(tail), None)
    assert msgpack.unpackb(tail) == ["tail", length, back, sum_]


@settings(max_examples=30)
@given(st.integers(0, 8 * f.TAIL.size - 1))
def test_tail_damaged(bit):
    tail = bytearray(f.encode_tail(1000, 60))
    tail[bit // 8] ^= 1 << bit % 8
    with pytest.raises(f.FrameError):
        f.decode_tail(memoryview(tail))
    with pytest.raises((f.FrameError, f.Incomplete)):
        f.decode(memoryview(tail))
