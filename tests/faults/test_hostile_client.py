# SPDX-License-Identifier: LGPL-2.1-or-later
"""A client of vnb-map that asks for anything: beyond the end, nothing, more than there is; or that talks nonsense."""

import contextlib
import signal
import socket

import makers
import mutation
import nbd
import pytest
from mapping import mapped
from servers import DEADLINE

PLAN = [{"vda": "64k:? 64k:A 100k:- 17:B 513:?"}, {"vda": "10k:. 3:C 60k:0 100k:. 5:D"}]
REQUESTS = 200  # of one round
FAULT = pytest.mark.fault(
    f"a client of vnb-map asks for any range, or sends what is no request; {REQUESTS} times",
    holds="the bytes of the disk, or an error; others are served on", share=0.1,
)


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
        assert map_.process.poll() is None
        status, said = map_.end()
        assert status == -signal.SIGTERM and all(line.startswith("vnb-map: ") for line in said.splitlines()), said


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
            near = chance.choice([0, 64 << 10, 10 << 10, size, chance.randrange(size)])
            offset = max(0, chance.choice([near, near + 1, near - 1, near - 512, *mutation.NUMBERS]))
            length = chance.choice([0, 1, 2, 511, 4096, 70_001, size, size + 1, 1 << 25, (1 << 25) + 1])
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
