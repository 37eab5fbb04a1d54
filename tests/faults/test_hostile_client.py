# SPDX-License-Identifier: LGPL-2.1-or-later
"""A client of vnb-map that asks for anything: beyond the end, nothing, more than there is; or that talks nonsense."""

import contextlib
import signal
import socket
from pathlib import Path

import makers
import mutation
import nbd
import pytest
from mapping import mapped
from servers import DEADLINE

PLAN = [{"vda": "64k:? 64k:A 100k:- 17:B 513:?"}, {"vda": "10k:. 3:C 60k:0 100k:. 5:D"}]
REQUESTS = 200  # of one round
FAULT = pytest.mark.fault(
    "vnb-map gets a request for any range, or bytes that are no request",
    holds="answers with the bytes of the disk, or an error; goes on serving others", share=0.3,
)
WRITES = pytest.mark.fault(
    "`vnb-map --writable` gets a request to write, zero or trim any range, with any flags",
    holds="all clients read back the same bytes as from a model; the set is as it was, byte for byte", share=0.3,
)
KNOWN = {"write": nbd.CMD_FLAG_FUA, "zero": nbd.CMD_FLAG_FUA | nbd.CMD_FLAG_NO_HOLE, "trim": nbd.CMD_FLAG_FUA}


@pytest.fixture
def served(tmp_path, monkeypatch):
    """(URI of vda, its socket, its bytes) of a vnb-map that lives through the test."""
    runtime = tmp_path / "runtime"
    runtime.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    makers.make_set(str(tmp_path / "set"), PLAN)
    image = bytes(makers.images(PLAN)[-1]["vda"])
    with mapped("--socket", tmp_path / "s", tmp_path / "set", lines=1) as map_:
        uri = f"nbd+unix:///vda?socket={tmp_path}/s"
        yield uri, tmp_path / "s", image
        assert connected(uri).pread(len(image), 0) == image
        check_end(map_)


def check_end(map_):
    """It serves to its end, and has said nothing but lines of its own."""
    assert map_.process.poll() is None
    status, said = map_.end()
    assert status == -signal.SIGTERM and all(line.startswith("vnb-map: ") for line in said.splitlines()), said


@pytest.fixture
def writable(tmp_path, monkeypatch):
    """(URI, its bytes) of vda in a vnb-map that takes writes; its set stays as it is."""
    runtime = tmp_path / "runtime"
    runtime.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    paths = makers.make_set(str(tmp_path / "set"), PLAN, spec="lz4")
    before = [Path(path).read_bytes() for path in paths]
    with mapped("--writable", "--disk", "vda", "--socket", tmp_path / "s", tmp_path / "set") as map_:
        yield map_.lines[0], bytes(makers.images(PLAN)[-1]["vda"])
        check_end(map_)
    assert sorted(map(str, (tmp_path / "set").iterdir())) == sorted(paths)
    assert [Path(path).read_bytes() for path in paths] == before


def any_range(chance, size):
    """(offset, length), within a disk of this size or not."""
    near = chance.choice([0, 64 << 10, 10 << 10, size, chance.randrange(size)])
    offset = max(0, chance.choice([near, near + 1, near - 1, near - 512, *mutation.NUMBERS]))
    return offset, chance.choice([0, 1, 2, 511, 4096, 70_001, size, size + 1, 1 << 25, (1 << 25) + 1])


def connected(uri):
    client = nbd.NBD()
    client.set_strict_mode(0)  # it sends what it is told to
    client.add_meta_context("base:allocation")
    client.connect_uri(uri)
    return client


@FAULT
def test_any_range(rounds, served):
    uri, _, image = served
    size = len(image)
    for chance in rounds:
        client = connected(uri)
        for _ in range(REQUESTS):
            rounds.fault()
            offset, length = any_range(chance, size)
            is_inside = 0 < length <= size - offset
            try:
                if chance.random() < 0.3:
                    client.block_status(min(length, size), min(offset, (1 << 63) - 1), lambda *_: 0)
                else:
                    found = client.pread(length, min(offset, (1 << 63) - 1))
                    assert is_inside and found == image[offset : offset + length]
            except nbd.Error:
                assert not is_inside, (offset, length)
                if client.aio_is_dead() or client.aio_is_closed():
                    client = connected(uri)


@WRITES
def test_any_write(rounds, writable):
    uri, image = writable
    model = bytearray(image)
    size = len(model)
    for chance in rounds:
        client = connected(uri)
        for _ in range(REQUESTS):
            rounds.fault()
            offset, length = any_range(chance, size)
            if chance.random() < 0.5:  # else most are outside
                offset = chance.randrange(size)
                length = chance.randint(1, min(size - offset, chance.choice([1, 600, 70_001])))
            offset = min(offset, (1 << 63) - 1)
            flags = chance.choice([0, 0, nbd.CMD_FLAG_FUA, nbd.CMD_FLAG_NO_HOLE, chance.randrange(1 << 16)])
            is_inside = 0 < length <= size - offset
            what = chance.choice(["write", *KNOWN])
            content = bytes(length) if what == "zero" else chance.randbytes(1) * length
            before = bytes(model[offset : offset + length])
            try:
                if what == "write":
                    client.pwrite(content, offset, flags)
                elif what == "zero":
                    client.zero(length, offset, flags)
                else:
                    client.trim(length, offset, flags)
                    # What was trimmed may read as it did, or as zeroes; from now on it is that.
                    content = client.pread(length, offset)
                    assert all(new in (0, old) for new, old in zip(content, before))
                assert is_inside, (what, offset, length, flags)
                model[offset : offset + length] = content
            except nbd.Error:
                is_known = not flags & ~KNOWN[what] and (what != "zero" or client.can_zero())  # nbdkit 1.32 can't
                assert not (is_inside and is_known), (what, offset, length, flags)
                if client.aio_is_dead() or client.aio_is_closed():
                    client = connected(uri)
        assert client.pread(size, 0) == connected(uri).pread(size, 0) == model


@FAULT
def test_a_name_that_is_no_text(served):
    """The end of served looks at what the server has said."""
    uri, path, _ = served
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        client.sendall(b"\0\0\0\3IHAVEOPT\0\0\0\1\0\0\0\3vd\xff")
        while client.recv(4096):
            pass
    connected(uri).shutdown()


@FAULT
def test_what_is_no_request(rounds, served):
    """A client that breaks off, or says what the protocol does not know, takes nobody along."""
    _, path, _ = served
    for chance in rounds:
        for _ in range(REQUESTS // 4):
            rounds.fault()
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(path))
                option = b"\0\0\0\3IHAVEOPT\0\0\0\1\0\0\0\3vda"
                request = b"\x25\x60\x95\x13" + bytes(10) + bytes(10) + b"\0\1\0\0"
                client.sendall(mutation.mutated_bytes(chance, option + request * 3))
                client.shutdown(socket.SHUT_WR)
                client.settimeout(DEADLINE)
                # Until it was let go of: else those that nobody serves any more fill the queue of the socket.
                with contextlib.suppress(ConnectionError):
                    while client.recv(1 << 16):
                        pass
