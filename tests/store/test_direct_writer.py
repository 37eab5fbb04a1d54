# SPDX-License-Identifier: LGPL-2.1-or-later
"""Files written past the page cache."""

import errno
import os
import random
import resource
import signal

import pytest

from vnb.base.errors import Error
from vnb.store.direct_writer import BLOCK, BLOCKS, DirectWriter


def written(path, parts):
    """Write parts (list of bytes, or of pairs of them) to a file; its bytes."""
    fd = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    writer = DirectWriter(fd, str(path))
    for part in parts:
        writer.write(*part) if isinstance(part, tuple) else writer.write(part)
    writer.finish()
    os.close(fd)
    return path.read_bytes()


@pytest.mark.parametrize("size", [0, 1, 4096, BLOCK - 1, BLOCK, BLOCK + 1, BLOCKS * BLOCK, 5 * BLOCK + 4097])
def test_sizes(tmp_path, size):
    data = random.Random(size).randbytes(size)
    assert written(tmp_path / "file", [data]) == data


def test_parts_of_any_size_whose_memory_is_used_again(tmp_path):
    generator = random.Random(5)
    expected = bytearray()
    buffer = bytearray(BLOCK + 4096)

    def parts():
        for _ in range(60):
            header = generator.randbytes(generator.randrange(64))
            payload = memoryview(buffer)[: generator.choice([0, 5, 4096, 65536, 512 << 10, BLOCK + 1])]
            payload[:] = generator.randbytes(len(payload))
            expected.extend(header)
            expected.extend(payload)
            yield header, payload

    assert written(tmp_path / "file", parts()) == expected


def test_a_file_system_without_direct_writes(monkeypatch, tmp_path):
    """Some refuse when they are asked, some when the first write comes."""
    data = bytes(range(256)) * (3 * BLOCK // 256) + b"end"
    real, refused = os.pwrite, []

    def pwrite(fd, view, at):
        import fcntl

        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(at)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd, view, at)

    monkeypatch.setattr(os, "pwrite", pwrite)
    assert written(tmp_path / "file", [data]) == data
    assert refused

    def cannot(fd, wanted):
        if wanted:
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr("vnb.store.direct_writer.set_direct", cannot)
    assert written(tmp_path / "other", [data]) == data


@pytest.mark.parametrize("limit", [1, BLOCK + 1000, 3 * BLOCK])
def test_no_room(tmp_path, limit):
    """Said by the write that meets it or by finish(), once, and nothing hangs."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    fd = os.open(tmp_path / "file", os.O_CREAT | os.O_WRONLY, 0o600)
    writer = DirectWriter(fd, "file")
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
        with pytest.raises(Error, match="file: File too large"):  # noqa: PT012 -- either may say it
            for _ in range(8):
                writer.write(bytes(BLOCK))
            writer.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
        writer.close()
        os.close(fd)


def test_more_after_finish(tmp_path):
    """As the next segment of a stream: behind the rest, which no disk would take by itself."""
    data = random.Random(3).randbytes(7 * BLOCK)
    fd = os.open(tmp_path / "file", os.O_CREAT | os.O_RDWR, 0o600)
    writer = DirectWriter(fd, "file")
    at = 0
    for size in (0, 1, 5000, BLOCK - 1, 1, 2 * BLOCK + 77, 0):
        writer.write(data[at : at + size])
        at += size
        writer.finish()
        assert os.pread(fd, len(data), 0) == data[:at]
    os.close(fd)
