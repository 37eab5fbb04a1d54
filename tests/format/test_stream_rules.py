# SPDX-License-Identifier: LGPL-2.1-or-later
"""Streams whose sums are all sound and that break a rule of the format."""

import hashlib
import os
import resource
import struct
import subprocess
import sys
import threading

import pytest
import samples
from hypothesis import given, settings
from samples import disk, head, part, segment

from vnb.base.errors import Error, StreamError
from vnb.format import frame as f
from vnb.format import stream, writing
from vnb.format.frame import HOLE, ZERO

DISKS = [disk(size=100)]
WHOLE = ["extent", 0, [0, 100, HOLE]]  # all of the disk


def refused(content, reason, **options):
    with pytest.raises(StreamError) as caught:
        samples.read(content, **options)
    text = str(caught.value)
    assert reason in text and "\n" not in text and len(text) < 400
    assert text.startswith("sample: ")


@pytest.mark.parametrize("key", ["id", "point", "domain", "uuid", "created", "stage", "level", "parent", "checkpoint"])
@pytest.mark.parametrize("value", [5, True, [], {}, "", "a\nb", "x" * 256, "\x1b[2J"])
def test_wrong_value_in_head(key, value):
    if (key, value) == ("domain", "\x1b[2J"):
        return  # libvirt takes what is not printable
    refused(segment(head(**{key: value}), DISKS, WHOLE), "malformed head")


@pytest.mark.parametrize("key", ["id", "point", "domain", "uuid", "created", "stage", "level", "parent", "checkpoint"])
def test_key_missing_in_head(key):
    """Consumers take these for granted."""
    fields = head()
    del fields[key]
    refused(segment(fields, DISKS, WHOLE), "malformed head")


@pytest.mark.parametrize("key, value", [
    ("chain", 5), ("chain", ""), ("run", []), ("domain_xml", 5), ("checkpoint_xml", {}),
    ("created", "2026-01-31"), ("created", "2026-01-31T12:00:00Z"), ("created", "2026-01-31T12:00:00.00000٠Z"),
    ("level", "inc"), ("level", "diff"), ("level", "none"), ("stage", "DATA"),
    ("grows", 5), ("grows", [1]), ("grows", {"vda": True}), ("grows", {"vda": 1 << 63}),
    ("grows", {"../x": 1}), ("grows", {"": 1}),
])
def test_more_wrong_heads(key, value):
    refused(segment(head(**{key: value}), DISKS, WHOLE), "malformed head")


def test_full_with_a_parent():
    refused(segment(head("p1", "p0", level="full"), DISKS, WHOLE), "level full and parent p0")
    refused(segment(head("p1", "p1"), DISKS, WHOLE), "its own base")


def test_newer_version():
    content = segment(head(), DISKS, WHOLE)
    for version in (0, 2, 127, f.MAX_INTEGER):
        newer = f.encode(["vnb", version, head()])[0] + content[len(f.encode(["vnb", 1, head()])[0]):]
        refused(newer, f"format version {version}, this vnb knows version 1: a newer vnb is needed")
    for version in (True, "1", None, [1]):
        refused(f.encode(["vnb", version, head()])[0], "malformed head: version")


@pytest.mark.parametrize("fields", [["vnb", 1], ["vnb", 1, 5], ["vnb", 1, [5]], ["vnb", 1, {}, 5]])
def test_malformed_head(fields):
    refused(f.encode(fields)[0] + bytes(60), "sample: stream offset 0: ")


@pytest.mark.parametrize("content, reason", [
    (b"", "empty input, expected a stream"),
    (b"\n", "stream offset 0: not a stream of vnb (it starts with 0a)"),
    (b"Hello, world\n" * 99, "stream offset 0: not a stream of vnb (it starts with 48 65 6c 6c 6f)"),
    (b"QFI\xfb" + bytes(999), "not a stream of vnb"),
    (bytes(999), "not a stream of vnb"),
    (b"\x94\xa3vn", "not a stream of vnb"),
    (b"\x94\xa3vnb", "short record: the input ends after 5 bytes of it"),
])
def test_no_stream_at_all(content, reason):
    refused(content, reason)


def test_something_behind_a_segment():
    whole = samples.every_kind()
    refused(whole + b"\n", f"stream offset {len(whole)}: not another segment of vnb")
    refused(whole + bytes(4096), "not another segment of vnb")


@pytest.mark.parametrize("key, value", [
    ("name", 5), ("name", ""), ("name", ".x"), ("name", "../x"), ("name", "a/b"), ("name", "a\0"), ("name", "x" * 256),
    ("name", None), ("size", -0.0), ("size", None), ("size", "5"), ("size", True), ("size", 1 << 63), ("level", 5),
    ("level", "copy"), ("level", None), ("image", []), ("source", "x"),
])
def test_wrong_value_in_disk(key, value):
    if isinstance(value, float):
        with pytest.raises(Error):
            segment(head(), [disk(**{key: value})], WHOLE)
        return
    refused(segment(head(), [disk(**{key: value})], WHOLE), "stream offset")


def test_wrong_disks():
    refused(segment(head(), [disk(), disk()], WHOLE), "two disks are named vda")
    refused(segment(head(), [disk(level="inc")], WHOLE), "its level is inc, in a segment of level full")
    refused(segment(head(), [disk(source={})], WHOLE), "a source, in a segment that holds its data")
    for fields in (["disk", 1, disk()], ["disk", True, disk()], ["disk", 0, 5], ["disk", 0]):
        refused(segment(head(), [], fields), 'malformed frame "disk"')
    refused(segment(head(), DISKS, WHOLE, ["disk", 1, disk("b")]), 'frame "disk" out of order')
    refused(segment(head(), DISKS, ["+x", 5], ["disk", 1, disk("b")]), 'frame "disk" out of order')
    refused(segment(head(), DISKS, WHOLE, ["vnb", 1, head()]), 'frame "vnb" out of order')


def test_a_million_disks():
    """The reader gives up at the limit, whatever follows."""
    disks = [disk(f"d{n}", 0) for n in range(f.MAX_DISKS)]
    assert len(samples.read(segment(head(), disks))[0][1]) == f.MAX_DISKS
    refused(segment(head(), [*disks, disk("one-more", 0)]), "more than 1024 disks")


def test_disks_of_many_bytes():
    disks = [disk(f"d{n}", 0, image={"path": "x" * 200_000}) for n in range(6)]
    refused(segment(head(), disks), "the disks take more than 1048576 bytes")


@pytest.mark.parametrize("frame", [
    ["extent", 0], ["extent", 0, 5], ["extent", 0, []], ["extent", 0, [0, 5]], ["extent", 0, [0, 5, 2], 5],
    ["extent", 0, {"a": 1}], (["extent", 0, [0, 5, 2]], b""), ["extent", "0", [0, 5, 2]], ["extent", 1, [0, 5, 2]],
    ["extent", None, [0, 5, 2]], ["extent", [0], [0, 5, 2]], ["extent", True, [0, 5, 2]],
    ["extent", 0, [0, 5, 1]], ["extent", 0, [0, 5, 4]], ["extent", 0, [0, 5, True]], ["extent", 0, [0, 5, "2"]],
    ["extent", 0, [0, 5, [2]]], ["extent", 0, ["0", 5, 2]], ["extent", 0, [0, "5", 2]], ["extent", 0, [None, 5, 2]],
    ["extent", 0, [0, 0, 2]], ["extent", 0, [0, 101, 2]], ["extent", 0, [101, 1, 2]], ["extent", 0, [100, 1, 2]],
    ["extent", 0, [0, f.MAX_INTEGER, 2]], ["extent", 0, [f.MAX_INTEGER, 1, 2]], ["extent", 0, [0, 5, 0]],
    ["extent", 0, [50, 5, 2, 40, 5, 2]], ["extent", 0, [50, 5, 2, 54, 5, 2]], ["extent", 0, [0, 5, 2, 0, 5, 2]],
    ["extent", 0, [0, -5, 2]], ["extent", 0, [0, 5, 2.0]], ["extent", 0, [True, 5, 2]],
])
def test_wrong_extents(frame):
    content = bytearray()
    fields, payload = frame if isinstance(frame, tuple) else (frame, None)
    try:
        content += segment(head(), DISKS, (fields, payload))
    except f.FrameError:
        # Not even to be encoded: as bytes that a foreign writer may send.
        import msgpack
        from xxhash import xxh3_64_intdigest

        body = b"".join(map(msgpack.packb, fields))
        body = bytes([0x91 + len(fields)]) + body
        start = segment(head(), DISKS, WHOLE).index(f.encode(WHOLE)[0])
        content += segment(head(), DISKS, WHOLE)[:start] + body + struct.pack(">BQ", 0xCF, xxh3_64_intdigest(body))
    with pytest.raises(StreamError):
        samples.read(bytes(content))


def data_frame(disk_, offset, length):
    return f.encode_data(disk_, offset, length, "none", 0, length)[0] + bytes(length)


@pytest.mark.parametrize("disk_, offset, length", [(1, 0, 5), (65535, 0, 5), (0, 96, 5), (0, 100, 1), (0, 1 << 63, 5),
                                                  (0, f.MAX_INTEGER, 5)])
def test_data_outside(disk_, offset, length):
    whole = segment(head(), DISKS, WHOLE)
    start = whole.index(f.encode(WHOLE)[0])
    refused(whole[:start] + data_frame(disk_, offset, length) + whole[start:], f"stream offset {start}")


def test_data_that_goes_back():
    whole = segment(head(), DISKS, WHOLE)
    start = whole.index(f.encode(WHOLE)[0])
    content = whole[:start] + data_frame(0, 50, 5) + data_frame(0, 54, 5) + whole[start:]
    refused(content, "vda: extent at offset 54 comes after offset 55", check_plain=False)


def test_full_disk_with_a_gap():
    refused(segment(head(), DISKS, ["extent", 0, [0, 99, HOLE]]), "vda: 1 bytes of a full disk are missing")
    refused(segment(head(), DISKS, ["extent", 0, [1, 99, ZERO]]), "vda: 1 bytes of a full disk are missing")
    refused(segment(head(), DISKS), "vda: 100 bytes of a full disk are missing")
    refused(segment(head(stage="extents"), DISKS), "vda: 100 bytes of a full disk are missing")
    assert samples.read(segment(head(stage="disks"), DISKS))
    assert samples.read(segment(head("p1", "p0"), [disk(level="inc")]))


def test_frames_of_a_later_stage():
    data_ = [disk(size=8)]
    refused(segment(head(stage="disks"), data_, ["extent", 0, [0, 8, HOLE]]), 'frame "extent" in a segment of disks')
    whole = segment(head(stage="extents"), data_, ["extent", 0, [0, 8, 0]])
    assert samples.read(whole)
    start = whole.index(f.encode(["extent", 0, [0, 8, 0]])[0])
    refused(whole[:start] + data_frame(0, 0, 8), 'frame "data" in a segment of extents')


@pytest.mark.parametrize("stage, wanted, reason", [
    ("disks", "extents", "holds disks where extents are needed: is vnb-extents missing before this stage"),
    ("disks", "data", "holds disks where data are needed: is vnb-read missing before this stage"),
    ("extents", "data", "is vnb-read missing"),
    ("data", "disks", "holds data already, where disks are needed"),
])
def test_segment_of_another_stage(stage, wanted, reason):
    refused(segment(head(stage=stage), []), reason, stage=wanted)
    assert samples.read(segment(head(stage=stage), []), stage=stage)


@pytest.mark.parametrize("frame", [
    (["file"], b"abc"), (["file", 5], b"abc"), (["file", {}], b"abc"), ["file", part()], (["file", part(), 5], b"abc"),
    (["file", part(role=5)], b"abc"), (["file", part(path=5)], b"abc"), (["file", part(path="x" * 4097)], b"abc"),
    (["file", part(mode="x")], b"abc"), (["file", part(size=True)], b"a"), (["file", part(size=2)], b"abc"),
    (["file", part(offset=1)], b"abc"), (["file", part(offset=1)], b"ab"), (["file", part(size=4)], b"abc"),
    (["file", part(size=f.MAX_INTEGER, offset=f.MAX_INTEGER)], b"abc"), (["file", part()], b""),
])
def test_wrong_file(frame):
    with pytest.raises(StreamError):
        samples.read(segment(head(), DISKS, frame, WHOLE))


def test_parts_of_files():
    """A consumer that writes them gets each whole, and one at a time."""
    one, two = (["file", part(size=4)], b"ab"), (["file", part(size=4, offset=2)], b"cd")
    other = (["file", part("kernel", "/k")], b"abc")
    empty = (["file", part(path="/e", size=0)], b"")
    assert samples.read(segment(head(), DISKS, one, two, other, empty, ["+x", 5], other, WHOLE))
    for frames in ([one, WHOLE], [one], [two], [one, other, two], [one, one, two], [one, ["+x", 5], two],
                   [one, (["file", part(path="/else", size=4, offset=2)], b"cd")],
                   [one, (["file", part(size=4, offset=2)], b""), two]):
        refused(segment(head(), DISKS, *frames), "a part is missing")
    refused(segment(head(), DISKS, WHOLE, other), 'frame "file" after the first extent')
    refused(segment(head(), DISKS, WHOLE, ["+x", 5], other), 'frame "file" after the first extent')


SAME = {"role": "kernel", "path": "/k", "mode": 0o600}
DESCRIBED = {"role": "kernel", "path": "/k", "size": 3, "sha256": hashlib.sha256(b"abc").hexdigest()}
IN_BASE = {**DESCRIBED, "base": True}


def test_a_file_of_the_base():
    """It stands where files stand, and the head says which one it is."""
    inc = head("p1", "p0", files=[IN_BASE])
    found = samples.read(segment(inc, DISKS, ["same", SAME], (["file", part()], b"abc"), WHOLE))
    assert found[0][0]["files"] == [IN_BASE]
    refused(segment(inc, DISKS, ["same", SAME], WHOLE, ["same", SAME]), 'frame "same" after the first extent')
    refused(segment(inc, DISKS, ["same", {**SAME, "path": "/other"}], WHOLE), "does not say that the base has it")
    refused(segment(head("p1", "p0", files=[DESCRIBED]), DISKS, ["same", SAME], WHOLE), "does not say that the base")
    refused(segment(head("p1", "p0"), DISKS, ["same", SAME], WHOLE), "does not say that the base has it")
    one = (["file", part(size=4)], b"ab")
    refused(segment(inc, DISKS, one, ["same", SAME], WHOLE), "a part is missing")


def test_what_the_head_describes_is_there_once():
    """But in a catalog, which keeps heads alone."""
    kernel = (["file", part("kernel", "/k")], b"abc")
    full, inc = head(files=[DESCRIBED]), head("p1", "p0", files=[IN_BASE])
    for fields in (full, inc):
        refused(segment(fields, DISKS, WHOLE), "file /k: the head describes this kernel, and the segment lacks it")
        refused(segment(fields, []), "file /k: the head describes this kernel, and the segment lacks it")
        assert samples.read(segment({**fields, "stage": "disks"}, DISKS))
    refused(segment(full, DISKS, kernel, kernel, WHOLE), "file /k: is there twice")
    refused(segment(inc, DISKS, ["same", SAME], ["same", SAME], WHOLE), "file /k: is there twice")


@pytest.mark.parametrize("frame", [
    ["same"], ["same", 5], ["same", {}], ["same", SAME, 5], (["same", SAME], b""), ["same", {**SAME, "mode": "x"}],
    ["same", {**SAME, "role": ""}], ["same", {**SAME, "path": "x" * 4097}], ["same", {**SAME, "mode": True}],
])
def test_wrong_same(frame):
    with pytest.raises((StreamError, f.FrameError, Error)):
        samples.read(segment(head("p1", "p0", files=[IN_BASE]), DISKS, frame, WHOLE))


@pytest.mark.parametrize("files, base", [
    (None, "p0"), ({}, "p0"), ([5], "p0"), ([{}], "p0"), ([{**DESCRIBED, "sha256": "ab"}], "p0"),
    ([{**DESCRIBED, "sha256": DESCRIBED["sha256"].upper()}], "p0"), ([{**DESCRIBED, "size": True}], "p0"),
    ([{**DESCRIBED, "base": False}], "p0"), ([{**DESCRIBED, "base": 1}], "p0"), ([IN_BASE], None),
    ([DESCRIBED, IN_BASE], "p0"), ([{**DESCRIBED, "role": 5}], "p0"), ([{**DESCRIBED, "path": "x" * 4097}], "p0"),
])
def test_wrong_list_of_files(files, base):
    refused(segment(head("p1", base, files=files), DISKS, WHOLE), 'malformed head: "files"')


@pytest.mark.parametrize("payload", [b"xyz", b"ab", b"abcd"])
def test_a_file_is_the_one_that_the_head_describes(payload):
    frames = (["file", part("kernel", "/k", size=len(payload))], payload), WHOLE
    refused(segment(head(files=[DESCRIBED]), DISKS, *frames), "is not the one that the head describes")
    refused(segment(head("p1", "p0", files=[IN_BASE]), DISKS, (["file", part("kernel", "/k")], b"abc"), WHOLE),
            "is not the one that the head describes")
    two = (["file", part("kernel", "/k")], b"ab"), (["file", part("kernel", "/k", offset=2)], b"c"), WHOLE
    assert samples.read(segment(head(files=[DESCRIBED]), DISKS, *two))


@pytest.mark.parametrize("fields, payload", [
    (["index", 0, 1], bytes(32)), (["index", 0, 1, 0], None), (["index", 0, 1, 0], bytes(31)),
    (["index", 0, 2, 0], bytes(32)), (["index", 0, 0, 0], b""), (["index", 1, 1, 0], bytes(32)),
    (["index", "0", 1, 0], bytes(32)), (["index", 0, "x" * 32, 0], b""), (["index", 0, [0] * 3, 0], b""),
    (["index", True, 1, 0], bytes(32)), (["index", 0, 1, 1], bytes(32)), (["index", 0, 1, None], bytes(32)),
    (["index", 0, 1, {}], bytes(32)), (["index", 0, 1, 0, 5], bytes(32)),
])
def test_wrong_index(fields, payload):
    refused(segment(head(), DISKS, WHOLE, (fields, payload)), "index")


def test_tail_must_know_the_index():
    """The same frames, but the tail says that there is no index."""
    refused(segment(head(), DISKS, WHOLE, (["index", 0, 1, 0], bytes(32))), "the tail does not fit the segment")


def test_unknown_frames():
    for frames in ([["x", 5]], [(["x", 5], b"abc")], [["DATA", 5]], [["dat", 5]], [["-x", 5]]):
        content = segment(head(), DISKS, *frames, WHOLE)
        assert len(samples.read(content)[0][2]) == 2
        refused(content, "unknown frame type", consumer=True)
    content = segment(head(), DISKS, ["+x", 5], WHOLE, (["+", 5], b"abc"))
    assert len(samples.read(content, consumer=True)[0][2]) == 3


@pytest.mark.parametrize("change", [
    {"frames": 4}, {"frames": 2}, {"data": 1}, {"zero": 1}, {"hole": 99}, {"stored": 5}, {"digest": 0},
    {"frames": True}, {"frames": "3"}, {"digest": "0"}, {"hole": None},
])
def test_counts_that_differ(change):
    content = segment(head(), DISKS, WHOLE)
    end = samples.read(content)[0][3]
    before = content[: content.index(f.encode(["end", end])[0])]
    end_ = f.encode(["end", {**end, **change}])[0]
    refused(before + end_ + f.encode_tail(len(before) + len(end_) + f.TAIL.size, 0), "")
    assert samples.read(before + f.encode(["end", {**end, "more": 5}])[0]
                        + f.encode_tail(len(before) + len(f.encode(["end", {**end, "more": 5}])[0]) + f.TAIL.size, 0))


@pytest.mark.parametrize("end", [["end", 5], ["end", [5]], ["end", {}], ["end", {}, 5]])
def test_malformed_end(end):
    content = segment(head(), DISKS, WHOLE)
    at = content.index(f.encode(WHOLE)[0]) + len(f.encode(WHOLE)[0])
    refused(content[:at] + f.encode(end)[0] + bytes(60), 'malformed frame "end"')


def test_frames_lost_doubled_swapped():
    frames = [["+x", n] for n in range(4)]
    whole = segment(head(), DISKS, *frames, WHOLE)
    for changed in (frames[1:], [*frames, frames[3]], [frames[1], frames[0], *frames[2:]], [["+x", 9], *frames[1:]]):
        start = whole.index(f.encode(frames[0])[0])
        stop = start + sum(len(f.encode(frame)[0]) for frame in frames)
        content = whole[:start] + b"".join(f.encode(frame)[0] for frame in changed) + whole[stop:]
        refused(content, "digest differs" if len(changed) == 4 else "frames, there were")


def test_wrong_tail():
    content = segment(head(), DISKS, WHOLE)
    for length, back in ((len(content) - 1, 0), (len(content) + 1, 0), (0, 0), (len(content), 1),
                         (f.MAX_INTEGER, f.MAX_INTEGER)):
        refused(content[: -f.TAIL.size] + f.encode_tail(length, back), "the tail does not fit the segment")
    refused(content[: -f.TAIL.size] + content, 'frame "vnb" where the tail must be')
    refused(content[: -f.TAIL.size], "the input ends before the end of the segment")


def frame_of_4_gib(kind, marker):
    body = bytes([0x94, 0xA0 + len(kind)]) + kind + b"\x05"
    return body + struct.pack(">BQ", 0xCF, 0) + bytes([marker]) + b"\xff" * 4


@pytest.mark.parametrize("frame", [
    frame_of_4_gib(b"+x", 0xC6), frame_of_4_gib(b"file", 0xC6),
    f.encode_data(0, 0, 0xFFFFFFFF, "none", 0, 0xFFFFFFFF)[0], f.encode_data(0, 0, 8, "lz4", 0, 0xFFFFFFFF)[0],
    b"\x93\xa2+x\xdb\xff\xff\xff\xff", b"\x93\xa2+x\xdd\xff\xff\xff\xff", b"\x93\xa2+x\xdf\xff\xff\xff\xff",
    b"\x93\xdb\xff\xff\xff\xff", b"\xdd\xff\xff\xff\xff", b"\x93\xa2+x" + b"\x91" * (1 << 20),
    b"\x93\xa2+x" + bytes(99),
    (b"\x93\xa2+x" + b"\xdc\x30\x00" * (1 << 18))[: 1 << 20], b"\x93\xa2+x\xdc\x30\x00" + b"\x90" * (1 << 20),
    b"\x93\xa2+x\xdc\x30\x00" + b"\xdc\x01\x00" + b"\x90" * (1 << 20),
], ids=lambda frame: frame[:12].hex())
def test_lengths_that_lie(frame):
    """4 GiB said and not there, bombs of nesting: refused at once, in little memory."""
    whole = segment(head(), DISKS, WHOLE)
    start = whole.index(f.encode(WHOLE)[0])
    content = whole[:start] + frame + bytes(100)
    program = (
        "import sys, resource; from vnb.format import stream\n"
        "from vnb.base.errors import StreamError\n"
        "resource.setrlimit(resource.RLIMIT_AS, (160 << 20, 160 << 20))\n"
        "try:\n"
        "    for segment in stream.Reader(0, 'stdin'): segment.finish()\n"
        "except StreamError as error: sys.exit(3)\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    run = subprocess.run([sys.executable, "-c", program], input=content, cwd=samples.ROOT, capture_output=True)
    assert run.returncode == 3, run.stderr
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 2


@settings(max_examples=40)
@given(samples.contents())
def test_what_is_written_is_read(segments):
    whole = samples.written_from(segments)
    found = samples.read(whole)
    assert len(found) == len(segments)
    for (head_, disks, frames), (head_read, disks_read, frames_read, end, _length) in zip(segments, found):
        assert (head_, disks) == (head_read, disks_read)
        seen = [("data", *frame[1:3], frame[-1]) if frame[0] == "data" else frame for frame in frames_read]
        assert seen == [("data", *frame[1:]) if frame[0] in ("none", "lz4") else frame for frame in frames]
        assert end["frames"] >= 1 + len(disks) + len(frames)  # and index frames
    assert sum(length for *_, length in found) == len(whole)


def test_pipe_in_small_pieces():
    """A pipe gives what it has: a frame may come a byte at a time."""
    content = samples.every_kind()
    read_end, write_end = os.pipe()

    def feed():
        for at in range(len(content)):
            os.write(write_end, content[at:at + 1])
        os.close(write_end)

    thread = threading.Thread(target=feed, daemon=True)
    thread.start()
    frames = [frame.__class__ for segment_ in stream.Reader(read_end, "pipe") for frame in segment_]
    thread.join()
    os.close(read_end)
    assert len(frames) == len([frame for segment_ in samples.read(content) for frame in segment_[2]])


def test_descriptors_that_do_not_block():
    """ssh leaves them so."""
    content = samples.every_kind() + segment(head("p2"), [disk(size=1 << 22)], ["extent", 0, [0, 1 << 22, HOLE]])
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    os.set_blocking(write_end, False)

    def feed():
        writer = writing.Writer(write_end, "pipe")
        for _ in range(500):
            writer.write(content)
        writer.flush()
        os.close(write_end)

    thread = threading.Thread(target=feed, daemon=True)
    thread.start()
    count = sum(1 for _ in stream.Reader(read_end, "pipe"))
    thread.join()
    os.close(read_end)
    assert count == 500 * 3
