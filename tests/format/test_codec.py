# SPDX-License-Identifier: LGPL-2.1-or-later
"""Compression and hashes: what comes out is what went in, or it is an error."""

import random
import sys
import threading

import pytest
import samples  # noqa: F401  # its hypothesis profile
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from vnb.base.errors import Error, UsageError
from vnb.format import codec, values
from vnb.format.frame import MAX_DATA

zstandard = pytest.importorskip("zstandard")
SPECS = ["none", "lz4", "lz4:0", "lz4:9", "lz4:16", "zstd", "zstd:0", "zstd:1", "zstd:22"]
COMPRESSIBLE = b"some words, " * 400


def frame(plain, spec):
    name, payload = codec.compressor(*codec.parse(spec))(plain)
    return values.Data(0, 512, len(plain), name, xxh3_64_intdigest(plain), payload)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_there_and_back(spec, kind):
    data = frame(kind(COMPRESSIBLE), spec)
    assert data.codec == spec.partition(":")[0]
    assert len(data.payload) < len(COMPRESSIBLE) or spec == "none"
    data.payload = kind(bytes(data.payload))
    codec.check(data, "vda")
    assert bytes(codec.plain(data, "vda")) == COMPRESSIBLE


@given(st.binary(min_size=1, max_size=300) | st.tuples(st.binary(max_size=5), st.integers(1, 5000)).map(
    lambda made: made[0] * made[1] + b"."), st.sampled_from(SPECS[:6]))
def test_any_bytes_there_and_back(plain, spec):
    data = frame(plain, spec)
    assert len(data.payload) <= len(plain)
    assert (data.codec == "none") == (len(data.payload) == len(plain))
    assert bytes(codec.plain(data, "vda")) == plain


@pytest.mark.parametrize("spec", ["lz4", "zstd"])
def test_what_does_not_shrink_is_stored(spec):
    plain = random.Random(3).randbytes(100_000)
    data = frame(plain, spec)
    assert data.codec == "none"
    assert data.payload is plain


@pytest.mark.parametrize("spec", ["lz4", "zstd"])
def test_the_longest_frame(spec):
    plain = bytes(MAX_DATA)
    assert bytes(codec.plain(frame(plain, spec), "vda")) == plain


@pytest.mark.parametrize("spec", ["none", "lz4", "zstd"])
def test_each_bit_matters(spec):
    plain = b"some words, " * 9
    good = frame(plain, spec)
    for at in range(8 * len(good.payload)):
        payload = bytearray(good.payload)
        payload[at // 8] ^= 1 << at % 8
        data = values.Data(0, 512, len(plain), good.codec, good.hash, payload)
        reason = "differ from what was read" if spec == "none" else f"damaged {spec} data .its checksum differs"
        for function in (codec.plain, codec.check):
            with pytest.raises(Error, match=f"^vdb: offset 512: .*{reason}"):
                function(data, "vdb")


@pytest.mark.parametrize("spec", ["lz4", "zstd"])
@given(payload=st.binary(min_size=1, max_size=200), length=st.sampled_from([201, 5000, MAX_DATA]))
def test_payloads_made_to_deceive(spec, payload, length):
    """The checksum of the packed bytes is right, and what it covers is anything."""
    payload = xxh3_64_intdigest(payload).to_bytes(8, "big") + payload
    with pytest.raises(Error, match="vda: offset 512: "):
        codec.plain(values.Data(0, 512, length, spec, 5, payload), "vda")


@pytest.mark.parametrize("spec", ["lz4", "zstd"])
@pytest.mark.parametrize("size", [1, 7, 8])
def test_payloads_too_short_for_their_checksum(spec, size):
    with pytest.raises(Error, match="checksum differs"):
        codec.check(values.Data(0, 512, 100, spec, 5, b"\0" * size), "vda")


@pytest.mark.parametrize("spec", ["lz4", "zstd"])
def test_a_frame_that_unpacks_to_another_length(spec):
    data = frame(COMPRESSIBLE, spec)
    for length in (len(COMPRESSIBLE) - 1, len(COMPRESSIBLE) + 1, MAX_DATA):
        with pytest.raises(Error):
            codec.plain(values.Data(0, 0, length, spec, data.hash, data.payload), "vda")


def test_zstd_that_does_not_say_how_long_it_is():
    packed = zstandard.ZstdCompressor(write_content_size=False).compress(COMPRESSIBLE)
    payload = xxh3_64_intdigest(packed).to_bytes(8, "big") + packed
    data = values.Data(0, 0, len(COMPRESSIBLE), "zstd", xxh3_64_intdigest(COMPRESSIBLE), payload)
    with pytest.raises(Error, match="damaged zstd data"):
        codec.plain(data, "vda")


def test_other_bytes_with_a_right_checksum():
    """As a broken compressor would make them."""
    name, payload = codec.compressor("lz4")(COMPRESSIBLE)
    data = values.Data(0, 4096, len(COMPRESSIBLE), name, xxh3_64_intdigest(b"other"), payload)
    codec.check(data, "vda")
    with pytest.raises(Error, match="^vda: offset 4096: 4800 bytes differ from what was read from the source$"):
        codec.plain(data, "vda")


@pytest.mark.parametrize("spec", ["lz4", "zstd"])
def test_several_threads_at_once(spec):
    compress = codec.compressor(spec)
    found = []

    def work(number):
        plain = bytes([number]) * 100_000
        for _ in range(20):
            name, payload = compress(plain)
            data = values.Data(0, 0, len(plain), name, xxh3_64_intdigest(plain), payload)
            assert codec.plain(data, "vda") == plain
        found.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [0, 1, 2, 3]


@pytest.mark.parametrize("text", ["", "gzip", "none:1", "lz4:", "lz4:x", "lz4:-1", "lz4:17", "zstd:23", "LZ4"])
def test_what_is_no_codec(text):
    with pytest.raises(UsageError):
        codec.parse(text)


def test_zstd_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    reason = r"^zstd: this codec needs the Python package zstandard \(Debian: python3-zstandard\)$"
    with pytest.raises(Error, match=reason):
        codec.compressor("zstd")
    packed = b"x"
    payload = xxh3_64_intdigest(packed).to_bytes(8, "big") + packed
    with pytest.raises(Error, match=reason):
        codec.plain(values.Data(0, 0, 50, "zstd", 5, payload), "vda")
