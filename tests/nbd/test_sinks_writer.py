# SPDX-License-Identifier: LGPL-2.1-or-later
"""The memory between stream and disks is bounded, and a writer that fails tells the thread that reads."""

import os
import threading

import pytest
from xxhash import xxh3_64_intdigest

from vnb.base.errors import Error
from vnb.format import values
from vnb.format.frame import KiB, MiB
from vnb.nbd.sinks import Raw
from vnb.restore.writer import Buffers, Writer


def test_buffers_are_used_again():
    buffers = Buffers(1 * MiB)
    first = buffers.take(100 * KiB)
    assert len(first) == 100 * KiB
    obj = first.obj
    buffers.give(first)
    assert buffers.take(128 * KiB).obj is obj


def test_buffers_of_other_sizes_give_way():
    """What is kept counts: sizes that are not asked for any more must not fill the memory."""
    buffers = Buffers(1 * MiB)
    for view in [buffers.take(64 * KiB) for _ in range(16)]:
        buffers.give(view)
    view = buffers.take(1 * MiB)
    assert len(view) == 1 * MiB
    assert buffers._kept == 0


def test_who_takes_too_much_waits():
    buffers = Buffers(1 * MiB)
    first = buffers.take(1 * MiB)
    taken = threading.Event()
    thread = threading.Thread(target=lambda: (buffers.take(64 * KiB), taken.set()), daemon=True)
    thread.start()
    assert not taken.wait(0.05)
    buffers.give(first)
    assert taken.wait(10)


def test_who_waits_learns_of_a_failure():
    buffers = Buffers(1 * MiB)
    buffers.take(1 * MiB)
    failure = []

    def take():
        try:
            buffers.take(1)
        except Error as error:
            failure.append(error)

    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    buffers.fail(Error("vda", "no"))
    buffers.fail(Error("vda", "a later one"))
    thread.join(10)
    assert str(failure[0]) == "vda: no"


class Broken(Raw):
    """Fails at the second write."""

    def write(self, offset, plain, done):
        if offset:
            raise Error("vda", "broken")
        super().write(offset, plain, done)


def test_failure_reaches_who_reads_and_who_waits(tmp_path):
    buffers = Buffers(1 * MiB)
    fd = os.open(tmp_path / "image", os.O_CREAT | os.O_RDWR)
    writer = Writer(Broken(fd, "vda"), "vda", buffers)
    plain = b"x" * (256 * KiB)
    with pytest.raises(Error, match="broken"):
        for at in range(100):
            view = buffers.take(len(plain))
            view[:] = plain
            data = values.Data(0, at * len(plain), len(plain), "none", xxh3_64_intdigest(plain), view)
            writer.put(data, True)
    writer.start_finish()
    with pytest.raises(Error, match="broken"):
        writer.finish()
    writer.abort()


def test_zeroes_are_bounded_too(tmp_path):
    """Extents wait in the queue like data does: a million of them must not."""
    buffers = Buffers(1 * MiB)
    fd = os.open(tmp_path / "image", os.O_CREAT | os.O_RDWR)
    os.truncate(fd, 1 << 30)
    writer = Writer(Raw(fd, "vda"), "vda", buffers)
    runs = [word for at in range(1000) for word in (at * 1024, 512, 3)]
    for _ in range(20):
        writer.put(values.Extents(0, runs), False)
        assert buffers._used <= 1 * MiB
    writer.start_finish()
    writer.finish()
    assert buffers._used == 0
