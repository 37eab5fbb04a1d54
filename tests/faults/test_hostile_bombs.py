# SPDX-License-Identifier: LGPL-2.1-or-later
"""Small inputs that ask for much: each command says no, or takes no more memory than for any other input."""

import os
import struct
import subprocess
from pathlib import Path

import mutation
import peer_files
import pytest
import samples
import servers
from fuzzing import fault_of
from makers import make_set
from xxhash import xxh3_64_intdigest

from vnb.format import frame as f
from vnb.virtnbdbackup import datafile

MiB = 1 << 20
PYTHON = 26 * MiB  # what it takes itself
SECONDS = 60  # of processor time: what it takes is a few
ADDRESS_SPACE = 2048 * MiB
BOMB = pytest.mark.fault(
    "each command reads a bomb: a few bytes that decompress to many, nest deeply or name large numbers",
    holds="refuses it, or takes no more memory than for other input",
)
ODD_FILE = pytest.mark.fault(
    "a FIFO, a socket, a device or a link stands in the place of a saved file",
    holds="prints an error in a line, and does not wait",
)
COMMANDS = [
    ["vnb-verify"], ["vnb-dump"], ["vnb-dump", "--json"], ["vnb-pack", "-o", "target/set"], ["vnb-config"],
    ["vnb-apply", "--format", "raw", "target/images"],
]
ON_SETS = [
    ["vnb-cat"], ["vnb-cat", "--merge"], ["vnb-cat", "--base"], ["vnb-verify"], ["vnb-dump", "--list"],
    ["vnb-dump", "--map"], ["vnb-prune", "--keep-last", "1"], ["vnb-map", "--run", "true"],
]


def run(directory, *argv, stdin=b""):
    """Run a command in a directory, with limits; a servers.Done, which has done nothing that it must not."""
    measured = directory / "peak"  # a child's own measure begins with the memory of its parent, and time(1) has little
    limits = ["prlimit", f"--cpu={SECONDS}", f"--as={ADDRESS_SPACE}", "--"]
    done = subprocess.run(["/usr/bin/time", "-q", "-f", "%M", "-o", measured, *limits, *argv], input=stdin,
                          capture_output=True, cwd=directory, timeout=servers.DEADLINE, check=False)
    peak = int(measured.read_text()) << 10
    measured.unlink()
    done = servers.Done(done.returncode, done.stdout, done.stderr.decode(), peak)
    fault = fault_of(argv[0], done, PYTHON)
    assert fault is None, f"{' '.join(argv)}: {fault}"
    return done


def data(offset, length, codec, packed, disk=0):
    """A data frame of length bytes, which it says these packed ones are."""
    return [["data", disk, offset, length, codec, 5], xxh3_64_intdigest(packed).to_bytes(8, "big") + packed]


def sound(frames, size):
    """A stream of one full segment with these frames, whose disk is as large as they say."""
    return mutation.stream_of([
        [["vnb", 1, samples.head()], None], [["disk", 0, samples.disk(size=size)], None], *frames,
        [["end", {}], None], [["tail", 0, 0], None],
    ])


def lz4_bomb():
    """lz4 that says 64 KiB and has 16 MiB."""
    from lz4.block import compress

    return sound([data(0, 65536 + 70_000, "lz4", compress(bytes(16 * MiB), store_size=False))], 65536 + 70_000)


def zstd_bomb(said=None):
    """zstd of 64 MiB that says so, or says nothing, in a frame of 64 KiB."""
    import zstandard

    packed = zstandard.ZstdCompressor(write_content_size=said is not None).compress(bytes(64 * MiB))
    return sound([data(0, 65536, "zstd", packed)], 65536)


def zstd_window():
    """A window of 128 MiB: that much memory, for a few bytes."""
    import zstandard

    parameters = zstandard.ZstdCompressionParameters(window_log=27, write_content_size=False)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return sound([data(0, 65536, "zstd", compressor.compress(bytes(65536)) + compressor.flush())], 65536)


def sound_zeroes():
    """A gigabyte of zeroes in sound lz4: all of it is written, and little of it is ever here."""
    from lz4.block import compress

    packed, plain = compress(bytes(f.MAX_DATA), store_size=False), xxh3_64_intdigest(bytes(f.MAX_DATA))
    frames = [data(number * f.MAX_DATA, f.MAX_DATA, "lz4", packed) for number in range(256)]
    for frame in frames:
        frame[0][5] = plain
    return sound(frames, 256 * f.MAX_DATA)


def raw_frame(body):
    """The bytes of a frame with a sound sum, whatever is in it."""
    return body + struct.pack(">BQ", 0xCF, xxh3_64_intdigest(body))


def nested(depth):
    """A head in which arrays are in arrays."""
    return raw_frame(b"\x94\xa3vnb\x01" + b"\x81\xa1x" + b"\x91" * depth + b"\x90")


MINIMAL = samples.segment(samples.head(), [samples.disk(size=0)])
HEAD = b"\x94\xa3vnb\x01"
BOMBS = {
    "lz4 that is more than it says": lz4_bomb,
    "zstd that is more than it says": lambda: zstd_bomb(said=True),
    "zstd that does not say how much it is": zstd_bomb,
    "zstd with a large window": zstd_window,
    "arrays 17 deep": lambda: nested(17),
    "arrays 900 deep": lambda: nested(900),
    "arrays a million deep": lambda: nested(MiB),
    "a head of 4 GiB": lambda: HEAD + b"\xdb\xff\xff\xff\xff" + bytes(MiB),
    "a map of 4 billion keys": lambda: HEAD + b"\xdf\xff\xff\xff\xff" + b"\xa1x\x01" * MiB,
    "an array of 4 billion": lambda: HEAD + b"\x81\xa1x\xdd\xff\xff\xff\xff" + b"\x01" * 2 * MiB,
    "a frame of 4 billion elements": lambda: b"\xdd\xff\xff\xff\xff\xa3vnb" + b"\x01" * MiB,
    "a name of 1 MiB": lambda: raw_frame(HEAD + b"\x81\xa5point\xdb\x00\x10\x00\x00" + b"x" * MiB),
    "a million empty arrays": lambda: raw_frame(
        HEAD + b"\x81\xa1x\xdc\x00\x50" + 80 * (b"\xdc\x2f\x00" + b"\x90" * 0x2F00)),
    "as many empty arrays as go into disks": lambda: samples.segment(
        samples.head(), [samples.disk(f"d{n}", 0, image={"x": [[]] * 12_000}) for n in range(40)]),
    "a disk of 2^63 - 1 bytes": lambda: sound([[["extent", 0, [0, f.MAX_OFFSET, f.ZERO]], None]], f.MAX_OFFSET),
    "a file of 2^64 - 1 bytes": lambda: sound(
        [[["file", {"role": "nvram", "path": "/v", "mode": 0, "size": f.MAX_INTEGER, "offset": 0}], b"x"]], 0),
    "an index of 2^64 - 1": lambda: samples.segment(
        samples.head(), [samples.disk(size=0)], (["index", 0, 1, 0], b"\xff" * 32)),
}


@BOMB
@pytest.mark.parametrize("name", BOMBS)
def test_bomb(tmp_path, name):
    content = BOMBS[name]()
    for argv in COMMANDS:
        (tmp_path / "target").mkdir(exist_ok=True)
        run(tmp_path, *argv, stdin=content)


@BOMB
def test_much_that_is_sound(tmp_path):
    content = sound_zeroes()
    assert len(content) < 5 * MiB
    (tmp_path / "target").mkdir()
    for argv in COMMANDS[:1] + COMMANDS[-1:]:
        assert run(tmp_path, *argv, stdin=content).status == 0


@BOMB
def test_heads_that_take_much(tmp_path):
    """Each of them is within limits; all of them together would take 240 MiB."""
    (tmp_path / "set").mkdir()
    with open(tmp_path / "set" / "a.vnb", "wb") as file:
        for number in range(300):
            file.write(samples.segment(samples.head(f"p{number}", x=[[]] * 12_000), [samples.disk(size=0)]))
    for argv in ON_SETS[2:4]:
        run(tmp_path, *argv, "set")


@BOMB
@pytest.mark.parametrize("said, status", [(64 * MiB, 0), (1 * MiB, 1)])
def test_imported_lz4_bomb(tmp_path, said, status):
    from lz4.frame import compress

    (tmp_path / "backup").mkdir()
    header = peer_files.meta(virtualSize=said, compressed=True, dataSize=said)
    content = peer_files.data_file(tmp_path / "backup" / "vda.full.data", header, [(0, b"x" * said)], chunk=said)
    if said < 64 * MiB:
        start, end = (content.index(word) for word in (b"data ", b"\r\nstop "))
        content = content[: start + datafile.FRAME_SIZE] + compress(bytes(64 * MiB)) + content[end:]
        (tmp_path / "backup" / "vda.full.data").write_bytes(content)
    done = run(tmp_path, "vnb-import", "backup")
    assert done.status == status
    assert status == 0 or "more lz4 data than its frame says" in done.err


def fifo(path):
    os.mkfifo(path)


def server(path):
    """A socket: nothing that could be opened."""
    import socket

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


ODD = {
    "a FIFO": fifo,
    "a socket": server,
    "a directory": Path.mkdir,
    "a link to an endless device": lambda path: path.symlink_to("/dev/zero"),
    "a link to a terminal": lambda path: path.symlink_to("/dev/tty"),
    "a link to itself": lambda path: path.symlink_to(path),
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a file of a terabyte": lambda path: (path.touch(), os.truncate(path, 1 << 40)),
}


@ODD_FILE
@pytest.mark.parametrize("name", ODD)
def test_no_file_in_a_set(tmp_path, name):
    make_set(str(tmp_path / "set"), [{"vda": "4k:A"}])
    ODD[name](tmp_path / "set" / "b.vnb")
    for argv in ON_SETS:
        done = run(tmp_path, *argv, "set")
        assert "set/b.vnb: " in done.err, argv
        assert done.status == 1 or "left out" in done.err, argv  # what needs no other file goes on without it
    (segment,) = tmp_path.glob("set/*full.vnb")
    assert run(tmp_path, "vnb-pack", "-o", "set", stdin=segment.read_bytes()).status == 1
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == ["b.vnb", segment.name]


@ODD_FILE
@pytest.mark.parametrize("name", [name for name in ODD if name != "a file of a terabyte"])  # that is an image
def test_no_file_to_import(tmp_path, name):
    peer_files.backup(tmp_path / "backup")
    ODD[name](tmp_path / "backup" / "vdb.full.data")
    assert run(tmp_path, "vnb-import", "backup").status == 1
