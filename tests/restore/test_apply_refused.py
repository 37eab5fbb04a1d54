# SPDX-License-Identifier: LGPL-2.1-or-later
"""What vnb-apply refuses: one line, exit status 1, and nothing is left where the images would have been."""

import os
import shutil

import applied
import makers
import pytest
import samples
from applied import left_behind, mounted, refused, segments_of

from vnb.base.errors import Error, StreamError
from vnb.format import stream
from vnb.restore.imagedir import EXISTS
from vnb.restore.restore import Restore
from vnb.restore.targets import Recipe
from vnb.restore.writer import Buffers

PLAN = [{"vda": "64k:A 64k:- 64k:?", "vdb": "4k:B"}, {"vda": "64k:0 64k:C", "vdb": "4k:."}]


@pytest.fixture
def out(tmp_path):
    """An empty directory, which has to be empty again when the test ends."""
    directory = tmp_path / "out"
    directory.mkdir()
    yield directory
    assert left_behind(directory) == []


@pytest.fixture(scope="module")
def segments():
    return segments_of(PLAN)


def test_empty(out):
    assert refused(b"", out) == (
        "stdin: empty input, expected a stream: the command before this one has written nothing"
    )


def test_text(out):
    line = refused(b"hello, world", out)
    assert line == "stdin: stream offset 0: not a stream of vnb (it starts with 68 65 6c 6c 6f)"


def attempt(content, directory):
    """Apply these bytes within this process, to raw images; raises what a command would say."""
    buffers = Buffers()
    with samples.memory(content) as fd, Restore(str(directory), Recipe("raw"), {}, buffers) as restore:
        for segment in stream.Reader(fd, "stdin", stage="data", consumer=True, pool=buffers):
            restore.apply(segment)
        restore.finish()
        restore.publish()


def small():
    """A full and an increment in few bytes, and where the second one starts."""
    first, second = segments_of([{"a": "100:A 30:0", "b": "9:-"}, {"a": "10:. 20:B 5:0"}], spec="lz4")
    return first + second, len(first)


def test_cut_anywhere(out):
    whole, second = small()
    for cut in range(len(whole)):
        if cut != second:
            with pytest.raises(StreamError):
                attempt(whole[:cut], out)
            assert os.listdir(out) == []
    attempt(whole, out / "made")
    assert sorted(os.listdir(out / "made")) == ["a.raw"]
    shutil.rmtree(out / "made")


def test_flipped_bits(out):
    """Wherever it is, a bit that differs is found before an image gets its name."""
    whole, _ = small()
    for bit in range(0, 8 * len(whole), 3):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(Error):
            attempt(bytes(damaged), out)
        assert os.listdir(out) == []


def test_flipped_bit_of_a_packed_frame(out):
    content = bytearray(segments_of([{"vda": "64k:A"}], spec="lz4", index=False)[0])
    at = content.index(b"lz4") + 40
    content[at] ^= 1
    assert refused(bytes(content), out) == "vda: offset 0: damaged lz4 data (its checksum differs)"


def test_bytes_that_are_not_those_of_the_source(out):
    content = bytearray(segments_of([{"vda": "64k:- 64k:A"}])[0])
    content[content.index(b"AAAAAAAA") + 100] ^= 1
    assert refused(bytes(content), out) == "vda: offset 65536: 65536 bytes differ from what was read from the source"


def test_increment_without_its_full(out, segments):
    assert refused(segments[1], out) == (
        f"stdin: {makers.point(1)} is an increment to {makers.point(0)}, which is not here"
    )


def test_wrong_order(out, segments):
    third = segments_of([*PLAN, {"vda": "64k:D", "vdb": "4k:."}])[2]
    assert refused(segments[0] + third + segments[1], out) == (
        f"stdin: {makers.point(2)} follows {makers.point(1)}, it does not come after {makers.point(0)} "
        "(vnb-cat FILE... finds the order)"
    )


def test_two_fulls(out, segments):
    other = samples.segment(makers.head(5, parent=None, level="full"), [])
    assert refused(segments[0] + other, out) == (
        f"stdin: {makers.point(5)} is a full backup of its own, it does not come after {makers.point(0)} "
        "(vnb-cat FILE... finds the order)"
    )


def test_other_domain(out, segments):
    other = samples.segment(makers.head(1, uuid="other", domain="vm2"), [])
    assert refused(segments[0] + other, out).startswith(f"stdin: {makers.point(1)} is of another domain (vm2, other)")


def test_segment_without_data(out):
    content = samples.segment(makers.head(0, stage="extents"), [samples.disk()])
    assert "is vnb-read missing before this stage" in refused(content, out)


def test_newer_version(out, segments):
    content = segments[0].replace(b"\x94\xa3vnb\x01", b"\x94\xa3vnb\x02", 1)
    assert refused(content, out).startswith("stdin: stream offset 0: ")


def test_unknown_frame(out):
    content = samples.segment(makers.head(0), [], ["other", 1])
    assert 'unknown frame type "other"' in refused(content, out)


def test_optional_frame_is_skipped(tmp_path):
    content = samples.segment(makers.head(0), [], ["+other", 1], (["+more", 2], b"payload"))
    applied.restored(content, tmp_path / "new")


@pytest.mark.parametrize("name", ["../vda", "/etc/vda", ".vda", "a/b", ""])
def test_disk_that_would_leave_the_directory(out, name):
    content = samples.segment(makers.head(0), [samples.disk(name, 0)])
    assert "a disk without a name that may be a part of a file name" in refused(content, out)


def test_image_exists(tmp_path, segments):
    out = tmp_path / "out"
    out.mkdir()
    (out / "vdb.qcow2").write_bytes(b"precious")
    assert refused(segments[0], out) == f"{out}/vdb.qcow2: {EXISTS}"
    assert os.listdir(out) == ["vdb.qcow2"]
    assert (out / "vdb.qcow2").read_bytes() == b"precious"


def test_dangling_link_exists(tmp_path, segments):
    """What it points to would be made, somewhere else."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "vda.raw").symlink_to(tmp_path / "elsewhere")
    assert refused(segments[0], "--format", "raw", out) == f"{out}/vda.raw: {EXISTS}"
    assert os.listdir(tmp_path) == ["out"]


def test_image_that_appears_meanwhile(tmp_path, segments):
    """It was not there when we looked. Nothing is ever replaced, and the other disk gets no name either."""
    out = tmp_path / "out"
    process = applied.start(out)
    process.stdin.write(segments[0][:-1])
    process.stdin.flush()
    applied.eventually(lambda: out.exists() and list(out.glob(".*/vdb.qcow2")))
    (out / "vdb.qcow2").write_bytes(b"precious")
    _, stderr = process.communicate(segments[0][-1:], timeout=applied.DEADLINE)
    assert (process.returncode, stderr.decode()) == (1, f"vnb-apply: {out}/vdb.qcow2: File exists\n")
    assert os.listdir(out) == ["vdb.qcow2"]


def test_directory_is_a_file(tmp_path, segments):
    (tmp_path / "out").write_bytes(b"")
    assert refused(segments[0], tmp_path / "out") == f"{tmp_path}/out: Not a directory"
    assert refused(segments[0], tmp_path / "out/sub") == f"{tmp_path}/out: Not a directory"


def test_read_only_directory(tmp_path, segments):
    """A mount, since root may write to directories of any mode."""
    with mounted(tmp_path / "out", "ro"):
        assert refused(segments[0], tmp_path / "out") == f"{tmp_path}/out: Read-only file system"


@pytest.mark.parametrize("format_", ["qcow2", "raw"])
def test_directory_that_is_full(tmp_path, format_):
    with mounted(tmp_path / "out", "size=4m"):
        content = segments_of([{"vda": "1M:?", "vdb": "4M:?"}])[0]
        line = refused(content, "--format", format_, tmp_path / "out")
        assert line.startswith("vd") and line.endswith(": No space left on device")
        assert left_behind(tmp_path / "out") == []
