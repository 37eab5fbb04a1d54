# SPDX-License-Identifier: LGPL-2.1-or-later
"""vnb-apply onto NBD servers, good ones and bad ones."""

import contextlib
import shutil
import socket
import subprocess

import applied
import makers
import pytest
from applied import nbdkit, refused, restored, segments_of
from xxhash import xxh3_64_intdigest

from vnb.base.errors import Error
from vnb.format import writing
from vnb.nbd import connections
from vnb.restore import targets

PLAN = [{"vda": "64k:A 64k:- 64k:0 64k:? 512k:B 1M:-"}, {"vda": "32k:0 64k:C 32k:- 64k:0 4k:. 4k:D 200k:."}]
EXPECTED = makers.images(PLAN)[-1]["vda"]
SIZE = len(EXPECTED)

pytestmark = pytest.mark.skipif(not shutil.which("nbdkit"), reason="nbdkit is not installed")


@pytest.fixture(scope="module")
def content():
    return b"".join(segments_of(PLAN, frame_size=512 << 10))


@pytest.fixture
def image(tmp_path):
    """A file that is full of what has to go."""
    path = tmp_path / "image"
    path.write_bytes(b"x" * SIZE)
    return path


@pytest.mark.parametrize("options", [
    [],
    ["--filter=nozero"],
    ["--filter=nozero", "zeromode=notrim"],
    ["--filter=blocksize-policy", "blocksize-maximum=64k", "blocksize-minimum=512", "blocksize-preferred=4k",
     "blocksize-error-policy=error"],
    ["--filter=nozero", "--filter=blocksize-policy", "blocksize-maximum=64k", "blocksize-minimum=512",
     "blocksize-preferred=4k", "blocksize-error-policy=error"],
    ["--filter=noparallel"],
    ["--mask-handshake=0"],
    ["--filter=delay", "delay-write=20ms", "delay-zero=50ms"],
])
def test_servers_that_differ(tmp_path, content, image, options):
    filters = [option for option in options if option.startswith("--")]
    values = [option for option in options if not option.startswith("--")]
    with nbdkit(tmp_path, *filters, "file", image, *values) as (uri, _):
        restored(content, "--disk", f"vda={uri}")
    assert image.read_bytes() == EXPECTED


@pytest.mark.parametrize("request_, offset", [("pwrite", 0), ("zero", 65536)])
@pytest.mark.parametrize("number, words", [("EIO", "Input/output error"), ("ENOSPC", "No space left on device")])
def test_errors(tmp_path, content, image, request_, offset, number, words):
    options = [f"error-{request_}={number}", f"error-{request_}-rate=100%"]
    with nbdkit(tmp_path, "--filter=noparallel", "--filter=error", "file", image, *options) as (uri, _):
        line = refused(content, "--disk", f"vda={uri}")
    assert line == f"vda: offset {offset}: {words}"


def test_one_error_in_many_requests(tmp_path):
    """Each answer is looked at, in flight with others as it is: a lost write is a lost disk."""
    trigger, image = tmp_path / "trigger", tmp_path / "image"
    content = segments_of([{"vda": "32M:?"}], index=False)[0]
    image.write_bytes(bytes(32 << 20))
    options = ["error-pwrite=EIO", "error-pwrite-rate=100%", f"error-pwrite-file={trigger}"]
    with nbdkit(tmp_path, "--filter=error", "--filter=delay", "file", image, *options, "delay-write=1ms") as (uri, _):
        process = applied.start("--disk", f"vda={uri}")
        process.stdin.write(content[: len(content) // 2])
        process.stdin.flush()
        trigger.touch()
        _, stderr = process.communicate(content[len(content) // 2 :], timeout=applied.DEADLINE)
    assert process.returncode == 1
    assert stderr.decode().startswith("vnb-apply: vda: offset ")
    assert stderr.decode().endswith(": Input/output error\n")


def script(path, flush):
    """A server that takes all, and does this when it is asked to flush; None for one that can't."""
    cases = {
        "get_size": f"echo {SIZE}", "can_write": "exit 0", "can_zero": "exit 3", "can_flush": "exit 0",
        "pread": "head -c $3 /dev/zero", "pwrite": "cat >/dev/null", "flush": flush, "*": "exit 2",
    }
    if flush is None:
        del cases["can_flush"], cases["flush"]
    body = "\n".join(f"{method}) {action};;" for method, action in cases.items())
    path.write_text(f"#!/bin/sh\ncase $1 in\n{body}\nesac\n")
    path.chmod(0o700)
    return path


def test_flush_that_fails(tmp_path, content):
    """All was taken, and none of it is on a disk."""
    with nbdkit(tmp_path, "sh", script(tmp_path / "script", "echo EIO >&2; exit 1")) as (uri, _):
        assert refused(content, "--disk", f"vda={uri}") == "vda: Input/output error"


def test_server_without_flush(tmp_path, content):
    with nbdkit(tmp_path, "sh", script(tmp_path / "script", None)) as (uri, _):
        done = applied.apply(content, "--disk", f"vda={uri}")
    assert done.returncode == 0
    words = "the NBD server does not support flush: data that it has taken may be lost if it crashes"
    assert done.stderr == f"vnb-apply: {uri}: {words}\n"


def test_read_only_export(tmp_path, content, image):
    with nbdkit(tmp_path, "-r", "file", image) as (uri, _):
        assert refused(content, "--disk", f"vda={uri}") == f"{uri}: the export is read-only"


def test_export_that_is_too_small(tmp_path, content, image):
    with nbdkit(tmp_path, "memory", SIZE - 512) as (uri, _):
        assert refused(content, "--disk", f"vda={uri}") == f"{uri}: has {SIZE - 512} bytes, disk vda needs {SIZE}"


def test_export_that_is_too_small_later(tmp_path):
    plan = [{"vda": "64k:A"}, {"vda": "64k:. 64k:B"}]
    with nbdkit(tmp_path, "memory", 64 << 10) as (uri, _):
        line = refused(b"".join(segments_of(plan)), "--disk", f"vda={uri}")
        assert line == f"{uri}: has 65536 bytes, disk vda needs 131072"


def test_no_server(tmp_path, content):
    uri = f"nbd+unix:///?socket={tmp_path}/nothing"
    assert refused(content, "--disk", f"vda={uri}") == f"{uri}: cannot connect: No such file or directory"


def test_no_such_export(tmp_path, content, image):
    with applied.qemu_nbd(tmp_path, "-f", "raw", "-x", "other", image) as uri:
        line = refused(content, "--disk", f"vda={uri}")
        assert line.startswith(f"{uri}: cannot connect: ")


@pytest.mark.parametrize("uri", ["nbd:", "nbd://", "nbds+unix:///", "nbd+unix:///", "nbd+vsock://x"])
def test_malformed_uri(content, uri):
    assert refused(content, "--disk", f"vda={uri}").startswith(f"{uri}: cannot connect: ")


def test_server_killed(tmp_path, content, image):
    """In the middle, with requests that it will never answer."""
    with slow_server(tmp_path, image) as (uri, server, writes):
        process = applied.start("--disk", f"vda={uri}")
        process.stdin.write(content[:-40])
        process.stdin.flush()
        applied.eventually(writes)
        server.kill()
        _, stderr = process.communicate(content[-40:], timeout=applied.DEADLINE)
    assert process.returncode == 1
    assert stderr.decode().startswith("vnb-apply: vda: ")
    assert "connection" in stderr.decode() and stderr.count(b"\n") == 1


def test_interrupted_while_a_server_does_not_answer(tmp_path, content, image):
    """Nobody waits for it then."""
    with slow_server(tmp_path, image) as (uri, _, writes):
        process = applied.start("--disk", f"vda={uri}")
        process.stdin.write(content)
        process.stdin.close()
        process.stdin = None
        applied.eventually(writes)
        process.terminate()
        _, stderr = process.communicate(timeout=10)
    assert (process.returncode, stderr) == (-15, b"vnb-apply: ended by SIGTERM\n")


def test_interrupted_while_connecting(tmp_path, content):
    """A server that accepts and says nothing."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen(1)
        process = applied.start("--disk", f"vda=nbd+unix:///?socket={tmp_path}/socket")
        process.stdin.write(content)
        connection, _ = listener.accept()
        process.terminate()
        _, stderr = process.communicate(timeout=10)
        connection.close()
    assert (process.returncode, stderr) == (-15, b"vnb-apply: ended by SIGTERM\n")


def test_a_server_that_never_greets(tmp_path, monkeypatch):
    """It may have as many clients as it takes: nobody knows for how long."""
    monkeypatch.setattr(connections, "PATIENCE", 0.3)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen(1)
        uri = f"nbd+unix:///?socket={tmp_path}/socket"
        with pytest.raises(Error) as raised:
            targets.Export("vda", uri).open(4096)
    assert str(raised.value) == (
        f"{uri}: cannot connect: no greeting within 0.3 seconds: the server may have as many clients as it takes"
    )


def test_tls(tmp_path, content, image):
    """With keys that both know; and not without."""
    keys = tmp_path / "keys"
    keys.write_text(f"vnb:{bytes(range(32)).hex()}\n")
    with nbdkit(tmp_path, "--tls=require", f"--tls-psk={keys}", "file", image) as (uri, _):
        assert "cannot connect" in refused(content, "--disk", f"vda={uri}")
        secure = uri.replace("nbd+unix:///", "nbds+unix://vnb@/") + f"&tls-psk-file={keys}"
        restored(content, "--disk", f"vda={secure}")
    assert image.read_bytes() == EXPECTED


@contextlib.contextmanager
def slow_server(tmp_path, image):
    """An nbdkit that answers no write for a long time; (URI, process, function: whether it was asked for one)."""
    log = tmp_path / "log"
    options = ["--filter=log", "--filter=delay", "file", image, "delay-write=1000000ms", f"logfile={log}"]
    with nbdkit(tmp_path, *options) as (uri, process):
        yield uri, process, lambda: log.exists() and " Write " in log.read_text()


def test_memory_does_not_grow_with_the_requests(tmp_path):
    """libnbd's own Buffer, once it was written from, is never freed."""
    count = 100_000
    with nbdkit(tmp_path, "null", count * 4096) as (uri, _), open(tmp_path / "stream", "w+b") as file:
        out = writing.Writer(file.fileno()).segment(
            makers.head(0), [{"name": "vda", "size": count * 4096, "level": "full"}])
        block = b"A" * 4096
        for number in range(count):
            out.data(0, number * 4096, 4096, "none", xxh3_64_intdigest(block), block)
        out.end()
        file.seek(0)
        # A child of ours would begin with our own peak, so another program measures it.
        done = subprocess.run(["/usr/bin/time", "-f", "%M", *applied.COMMAND, "--disk", f"vda={uri}"], stdin=file,
                              stderr=subprocess.PIPE, env=applied.environment(), check=True)
    assert int(done.stderr.split()[-1]) < 64 << 10  # of 1024 bytes
