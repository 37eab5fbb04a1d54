# SPDX-License-Identifier: LGPL-2.1-or-later
"""vnb-pack: the same stream, smaller and indexed; and files of a set that are complete or not there."""

import contextlib
import fcntl
import os
import re
import signal
import stat
import subprocess
from pathlib import Path

import makers
import pytest
import samples
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import DEADLINE, command, forked

from vnb.cli import pack
from vnb.cli.progress import Progress
from vnb.format import stream
from vnb.store import saved_segment

PLAN = [
    {"vda": "300k:A 64k:? 1M:- 64k:0 100:B 50k:?", "vdb": "64k:B 64k:0"},
    {"vda": "10k:. 20k:C 200k:. 100k:0 40k:? 3k:-", "vdb": "1k:. 512:?"},
    {"vda": "15k:. 4k:? 1k:0", "vdb": ""},
]

needs_mounts = pytest.mark.skipif(
    os.geteuid() != 0 or subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode,
    reason="needs a mount namespace",
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The plan's segments (bytes), without an index, as vnb-read makes them."""
    paths = makers.make_set(str(tmp_path_factory.mktemp("saved")), PLAN, index=False, frame_size=32 << 10)
    return [Path(path).read_bytes() for path in paths]


def run(*arguments, stdin):
    return forked("vnb-pack", pack, *arguments, stdin=stdin)


def plain(content):
    """What a stream says of its disks, whatever it is packed as."""
    return [
        (head, disks, [(*frame[:4], frame[5], frame[7]) if frame[0] == "data" else frame for frame in frames])
        for head, disks, frames, _, _ in samples.read(content)
    ]


def codecs(content):
    return {frame[4] for _, _, frames, _, _ in samples.read(content) for frame in frames if frame[0] == "data"}


def all_rows(path):
    """{disk: its rows} of each segment in a file: as the index has them, and as the frames do."""
    found = []
    for scan in (False, True):
        rows = []
        for segment in saved_segment.segments_in_file(path):
            if scan:
                segment._last_index = 0
            rows.append([list(disk.lookup(0, 1 << 62)) for disk in segment.rows()])
            segment.close()
        found.append(rows)
    return found


@pytest.mark.parametrize(
    "options, expected",
    [
        ([], {"none"}), (["-z"], {"lz4", "none"}), (["--compress", "lz4:9"], {"lz4", "none"}),
        (["--compress", "zstd"], {"zstd", "none"}), (["--compress", "none"], {"none"}),
    ],
)
@pytest.mark.parametrize("threads", [0, 1, 3])
def test_the_same_disks(saved, tmp_path, options, expected, threads):
    stdin = b"".join(saved)
    output = run(*options, "--threads", threads, stdin=stdin).ok()
    assert plain(output) == plain(stdin)
    assert codecs(output) == expected
    path = tmp_path / "packed.vnb"
    path.write_bytes(output)
    index, scan = all_rows(path)
    assert index == scan
    assert [len(rows) for rows in index[0]] == [17, 3]


def test_packed_frames_stay_as_they_are(saved):
    """Each was held against its checksum, and unpacking is held against the hash."""
    once = run("-z", stdin=saved[0]).ok()
    assert run("--compress", "zstd", stdin=once).ok() == once
    assert run(stdin=once).ok() == once
    assert run("--compress", "none", stdin=once).ok() == run(stdin=saved[0]).ok()


@given(st.lists(st.tuples(st.sampled_from("A?0-."), st.integers(1, 9)), max_size=40), st.booleans())
@settings(max_examples=30)
def test_the_index_says_what_the_frames_say(tmp_path_factory, runs, small):
    """Also where it comes in several frames, and where disks take turns."""
    directory = tmp_path_factory.mktemp("index")
    first, second = (" ".join(f"{length}:{content}" for content, length in part) for part in (runs, runs[::-1]))
    # In an increment, for which an extent need not be there at all.
    paths = makers.make_set(str(directory), [{"vda": "360:A", "vdb": "360:-"}, {"vda": first, "vdb": second}],
                            index=False, frame_size=5)
    contents = [Path(path).read_bytes() for path in paths]
    path = directory / "packed"
    with contextlib.ExitStack() as stack:
        if small:
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            patch.setattr("vnb.format.index.FRAME_ROWS", 3)
        path.write_bytes(run(stdin=b"".join(contents)).ok())
    index, scan = all_rows(path)
    assert index == scan


def test_a_set_holds_what_the_stream_held(saved, tmp_path):
    """Several segments in one stream are several files, each of which explains itself."""
    directory = tmp_path / "new" / "set"
    before = os.umask(0)
    try:
        run("-z", "-o", directory, stdin=b"".join(saved)).ok()
    finally:
        os.umask(before)
    paths = sorted(directory.iterdir())
    assert [path.name for path in paths] == [
        f"{makers.point(number)}.{'inc' if number else 'full'}.vnb" for number in range(3)
    ]
    assert [path.read_bytes() for path in paths] == [run("-z", stdin=content).ok() for content in saved]
    assert {stat.S_IMODE(path.stat().st_mode) for path in paths} == {0o600}
    assert {stat.S_IMODE(path.stat().st_mode) for path in (directory, directory.parent)} == {0o700}


def test_another_run_adds_to_the_set(saved, tmp_path):
    for content in saved:
        run("-o", tmp_path, stdin=content).ok()
    assert len(list(tmp_path.iterdir())) == 3


# What a set does not take


def holds(directory):
    """Names of all files in a directory, hidden ones too."""
    return sorted(os.listdir(directory))


def test_a_segment_twice(saved, tmp_path):
    run("-o", tmp_path, stdin=saved[0]).ok()
    path = tmp_path / holds(tmp_path)[0]
    run("-o", tmp_path, stdin=saved[0]).failed(f"vnb-pack: {tmp_path}: segment id-0 is already here ({path})")
    assert holds(tmp_path) == [path.name]


def waiting(*options):
    """A vnb-pack whose standard input stays open."""
    return subprocess.Popen(["vnb-pack", *map(str, options)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def test_an_increment_without_its_parent_is_refused_before_data_is_read(saved, tmp_path):
    run("-o", tmp_path, stdin=saved[0]).ok()
    with waiting("-o", tmp_path) as child:
        child.stdin.write(saved[2][: saved[2].index(b"\x94\xa6extent")])  # there is one frame after the disks
        child.stdin.flush()
        err = child.stderr.read().decode()  # it ends although its input does not
        assert child.wait(DEADLINE) == 1
    assert err == (
        f"vnb-pack: {tmp_path}: does not hold {makers.point(1)}, the base of {makers.point(2)}\n"
    )
    assert len(holds(tmp_path)) == 1


def test_another_domain(saved, tmp_path):
    run("-o", tmp_path, stdin=saved[0]).ok()
    other = samples.segment(samples.head(domain="vm2", uuid="u-2"), [samples.disk(size=0)])
    run("-o", tmp_path, stdin=other).failed(
        f"vnb-pack: {tmp_path}: is a set of domain vm1 (7f3d6a52-8c3e-4d0e-9d55-4b1d5f4f5b11), not of vm2 (u-2)"
    )
    assert len(holds(tmp_path)) == 1


def test_the_second_of_two_segments_is_damaged(saved, tmp_path):
    """The first was complete and stays, as it would with two runs."""
    stdin = bytearray(saved[0] + saved[1])
    stdin[-100] ^= 1
    done = run("-o", tmp_path, stdin=bytes(stdin))
    assert done.status == 1
    assert holds(tmp_path) == [f"{makers.point(0)}.full.vnb"]


@pytest.mark.parametrize("cut", [1, 34, 200, 200_000])
def test_what_is_cut_is_not_stored(saved, tmp_path, cut):
    done = run("-o", tmp_path, stdin=saved[0][:-cut])
    assert done.status == 1
    assert re.match(r"vnb-pack: stdin: stream offset \d+: .*the input ends|.*short record", done.err)
    assert holds(tmp_path) == []


def test_what_is_not_what_was_read_is_not_stored(saved, tmp_path):
    for options in ([], ["-z"]):
        stdin = bytearray(saved[0])
        stdin[stdin.index(b"\x98\xa4data") + 2000] ^= 64
        run(*options, "-o", tmp_path, stdin=bytes(stdin)).failed(
            "vnb-pack: vda: offset 0: 32768 bytes differ from what was read from the source"
        )
        assert holds(tmp_path) == []


@pytest.mark.parametrize(
    "signum, said",
    [(signal.SIGTERM, "vnb-pack: ended by SIGTERM\n"), (signal.SIGINT, ""), (signal.SIGKILL, "")],
)
@pytest.mark.parametrize("options", [[], ["-z"]])
def test_a_signal_leaves_nothing_in_the_set(saved, tmp_path, signum, said, options):
    """What SIGKILL leaves behind, hidden, the next run removes."""
    with waiting("-o", tmp_path, *options) as child:
        child.stdin.write(saved[0][:200_000])
        child.stdin.flush()
        partial = wait_for_partial(tmp_path)
        child.send_signal(signum)
        assert child.wait(DEADLINE) == -signum
        assert child.stderr.read().decode() == said
    assert holds(tmp_path) == ([partial] if signum == signal.SIGKILL else [])
    run("-o", tmp_path, stdin=saved[0]).ok()
    assert holds(tmp_path) == [f"{makers.point(0)}.full.vnb"]


def wait_for_partial(directory, number=1):
    """The name of a file that a vnb-pack writes, once it and as many others are there, and it is locked."""
    script = 'until [ "$(ls -A "$0" | wc -l)" -ge "$1" ]; do :; done; ls -A "$0"'
    name = command("sh", "-c", script, directory, str(number)).ok().decode().split()[0]
    fd = os.open(directory / name, os.O_RDONLY)
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
                fcntl.flock(fd, fcntl.LOCK_UN)
            except BlockingIOError:
                return name
    finally:
        os.close(fd)


def test_two_at_once(saved, tmp_path):
    """Neither holds the other up, and one of them stores it."""
    with waiting("-o", tmp_path) as one, waiting("-o", tmp_path) as two:
        for child in (one, two):
            child.stdin.write(saved[0][:-1])
            child.stdin.flush()
        wait_for_partial(tmp_path, 2)  # so that neither finds at its start that the segment is already here
        results = []
        for child in (one, two):
            child.stdin.write(saved[0][-1:])
            child.stdin.close()
            results.append((child.stderr.read(), child.wait(DEADLINE)))
    (path,) = tmp_path.iterdir()
    assert sorted(results) == [
        (b"", 0), (f"vnb-pack: {tmp_path}: segment id-0 is already here ({path})\n".encode(), 1),
    ]


def mounted(directory, options, script):
    """Run a script in bash with a file system of its own mounted at a directory; nobody else sees it."""
    return command("unshare", "--mount", "bash", "-c",
                   f'mount -t tmpfs -o "$1" none "$0" && cd / && {script}', directory, options)


@needs_mounts
@pytest.mark.parametrize("options", ["", "-z"])
def test_a_full_disk(tmp_path, options):
    plan = [{"vda": "4M:?"}]
    (path,) = makers.make_set(str(tmp_path / "source"), plan, index=False)
    (tmp_path / "mnt").mkdir()
    done = mounted(tmp_path / "mnt", "size=2m",
                   f'{{ vnb-pack {options} -o "$0/set" < {path}; s=$?; ls -A "$0/set"; exit $s; }}')
    file = tmp_path / "mnt" / "set" / f"{makers.point(0)}.full.vnb"
    assert done.failed(f"vnb-pack: {file}: No space left on device") == b""


@needs_mounts
def test_a_set_that_cannot_be_written(saved, tmp_path):
    path = tmp_path / "full.vnb"
    path.write_bytes(saved[0])
    (tmp_path / "mnt").mkdir()
    done = mounted(tmp_path / "mnt", "ro", f'vnb-pack -o "$0" < {path}')
    assert done.status == 1
    assert re.fullmatch(f"vnb-pack: {tmp_path}/mnt/.*: Read-only file system\n", done.err)
    done = mounted(tmp_path / "mnt", "ro", f'vnb-pack -o "$0/set" < {path}')
    assert done.failed(f"vnb-pack: {tmp_path}/mnt/set: Read-only file system") == b""


def test_a_file_where_the_set_should_be(saved, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    run("-o", tmp_path / "file", stdin=saved[0]).failed(f"vnb-pack: {tmp_path}/file: Not a directory")
    run("-o", tmp_path / "file" / "set", stdin=saved[0]).failed(f"vnb-pack: {tmp_path}/file/set: Not a directory")


def test_a_limit_on_the_size_of_files(saved, tmp_path):
    path = tmp_path / "full.vnb"
    path.write_bytes(saved[0])
    done = command("bash", "-c", f"ulimit -f 64; vnb-pack -o {tmp_path}/set < {path}")
    assert done.failed(f"vnb-pack: {tmp_path}/set/{makers.point(0)}.full.vnb: File too large") == b""
    assert holds(tmp_path / "set") == []


def test_a_reader_that_closes_the_pipe(saved):
    with waiting("-z") as child:
        child.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write(saved[0])
            child.stdin.close()
        assert child.stderr.read() == b""
        assert child.wait(DEADLINE) == -signal.SIGPIPE


def test_zstd_that_is_not_installed(saved, tmp_path):
    """It is optional. Nothing is read, and nothing is made."""
    (tmp_path / "zstandard.py").write_text("raise ImportError")
    done = command("env", f"PYTHONPATH={tmp_path}", "vnb-pack", "--compress", "zstd", "-o", tmp_path / "set",
                   stdin=saved[0])
    done.failed("vnb-pack: zstd: this codec needs the Python package zstandard (Debian: python3-zstandard)")
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["--compress", "gzip"], '--compress: "gzip" is not none, lz4[:LEVEL] or zstd[:LEVEL]'),
        (["--compress", "lz4:17"], "--compress: level 17 is not within 0-16"),
        (["--threads", "65"], '--threads: "65" is not a number within 0-64'),
        (["-z", "--compress", "none"], "--compress contradicts -z"),
        (["file"], 'unexpected operand "file"'),
    ],
)
def test_wrong_usage(arguments, reason):
    done = command("vnb-pack", *arguments)
    assert (done.status, done.out) == (2, b"")
    assert done.err.splitlines()[:2] == [f"vnb-pack: {reason}", "Usage:"]


def test_a_payload_is_given_back_once(saved):
    """Lost buffers cost time, those given back twice would mix up the data of two frames."""
    class Strict:
        def __init__(self):
            self.out = {}

        def take(self, size):
            view = memoryview(bytearray(size))
            self.out[id(view.obj)] = view.obj
            return view

        def give(self, view):
            del self.out[id(view.obj)]

    stdin = run("-z", stdin=b"".join(saved)).ok()
    for compress, unpack in ((None, False), (None, True), (pack.codec.compressor("lz4"), False)):
        pool = Strict()
        packer = pack.Packer(compress, unpack, 2, pool)
        with samples.memory(stdin) as fd, samples.written() as (writer, _):
            for segment in stream.Reader(fd, "sample", stage="data", pool=pool):
                packer.pack(segment, segment.head, writer, Progress("none"))
        assert pool.out == {}
