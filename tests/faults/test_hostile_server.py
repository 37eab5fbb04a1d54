# SPDX-License-Identifier: LGPL-2.1-or-later
"""An NBD server that lies: of sizes, extents, lengths, offsets, or that sends anything at all. liar.py is one."""

import random
import struct

import fuzzing
import mutation
import pytest
import servers
from liar import Liar

from vnb.cli import extents, read
from vnb.format import frame as f

SIZE = 1 << 20
LIES = 12  # of one round
FAULT = pytest.mark.fault(
    "an NBD server returns wrong sizes, extents, lengths or offsets",
    holds="prints an error in a line, or believes the server; takes no more memory than for other servers", share=0.3,
)


def extents_of(uri):
    return servers.forked("vnb-extents", extents, uri)


def read_from(stream, uri):
    return servers.forked("vnb-read", read, stdin=mutation.with_uri(stream, uri))


def runs_of(stream):
    """All extents of a stream (bytes), as one flat list."""
    return [word for fields, _ in mutation.frames_of(stream) if fields[0] == "extent" for word in fields[2]]


@pytest.fixture(scope="module")
def asked():
    """What vnb-extents gives of a server that does not lie (bytes): for vnb-read."""
    with Liar(SIZE, lambda _, message: message) as server:
        done = extents_of(server.uri)
        assert runs_of(done.ok()) == [0, 4096, f.DATA, 4096, SIZE - 4096, f.HOLE]
        frames = mutation.frames_of(read_from(done.out, server.uri).ok())
        assert ["data", 0, 0, 4096] in [fields[:4] for fields, _ in frames]
    return done.out


@FAULT
@pytest.mark.parametrize("stage", ["extents", "read"])
def test_any_lie(rounds, asked, stage):
    for chance in rounds:
        for _ in range(LIES):
            rounds.fault()
            number, said = chance.randrange(12), []

            def lie(name, message, number=number, said=said, chance=chance):
                said.append(name)
                if len(said) != number + 1:
                    return message
                return mutation.mutated_bytes(chance, message)

            with Liar(SIZE, lie) as server:
                base = fuzzing.resident()
                done = extents_of(server.uri) if stage == "extents" else read_from(asked, server.uri)
            fault = fuzzing.fault_of(f"vnb-{stage}", done, base)
            assert fault is None, (said[: number + 1], fault)


def status(*entries, kind=5, context=5, length=None):
    """What a reply of block status becomes (function): entries are (length, flags)."""
    def lie(name, message):
        if name != "extents":
            return message
        payload = struct.pack(">I", context) + b"".join(struct.pack(">II", *entry) for entry in entries)
        return message[:6] + struct.pack(">H", kind) + message[8:16] + struct.pack(
            ">I", len(payload) if length is None else length) + payload

    return lie


def export(size):
    """A lie of the size of the export."""
    return lambda name, message: message[:22] + struct.pack(">Q", size) + message[30:] if name == "export" else message


def blocks(*sizes):
    """A lie of the sizes of blocks."""
    return lambda name, message: message[:22] + struct.pack(">III", *sizes) if name == "block size" else message


LIED = {
    "extents of no length": (status((0, 0), (0, 3)), 1),
    "no extent": (status(), 1),
    "an extent beyond the end": (status((0xFFFFFFFF, 0)), None),  # a newer libnbd refuses it
    "extents beyond the end": (status(*[(0xFFFFFFFF, 3)] * 1000), None),
    "another context": (status((4096, 0), context=6), 1),
    "flags that nobody knows": (status((SIZE, 0xFFFFFFFC)), 0),
    "a reply of 2 GiB": (status((SIZE, 0), length=1 << 31), 1),
    "a reply of a kind that nobody knows": (status((SIZE, 0), kind=99), 1),
    "a size of 2^63": (export(1 << 63), 1),
    "a size of 2^64 - 1": (export((1 << 64) - 1), 1),
    "blocks of nothing": (blocks(0, 0, 0), None),
    "blocks that are no power of 2": (blocks(3, 5, 7), None),
    "blocks larger than the export": (blocks(1 << 16, 1 << 20, 0xFFFFFFFF), None),
}


@FAULT
@pytest.mark.parametrize("what", LIED)
def test_a_lie(what):
    lie, status_ = LIED[what]
    with Liar(SIZE, lie) as server:
        base = fuzzing.resident()
        done = extents_of(server.uri)
    assert fuzzing.fault_of("vnb-extents", done, base) is None, fuzzing.fault_of("vnb-extents", done, base)
    assert status_ is None or done.status == status_, done
    if done.status == 0:
        *_, offset, length, _ = runs_of(done.out)
        assert offset + length == SIZE


@FAULT
@pytest.mark.parametrize("change", [
    lambda data: data[:20] + struct.pack(">Q", SIZE) + data[28:],  # of another offset
    lambda data: data[:16] + struct.pack(">I", 8 + 100) + data[20:128],  # less than was asked for
    lambda data: data[:16] + struct.pack(">I", 8 + 65536) + data[20:28] + bytes(65536),  # more
    lambda data: data[:8] + bytes(8) + data[16:],  # to nobody's request
    lambda data: data[:6] + struct.pack(">H", 2) + data[8:16] + struct.pack(">IQI", 12, 0, 1 << 31),  # a hole of 2 GiB
    lambda data: data[:4] + struct.pack(">HH", 1, 0) + data[8:16] + struct.pack(">I", 0),  # done, and nothing came
])
def test_data_that_was_not_asked_for(asked, change):
    with Liar(SIZE, lambda name, message: change(message) if name == "data" else message) as server:
        base = fuzzing.resident()
        done = read_from(asked, server.uri)
    assert fuzzing.fault_of("vnb-read", done, base) is None, fuzzing.fault_of("vnb-read", done, base)
    assert done.status == 1


def test_the_same_chance_tells_the_same_lies():
    lies = [mutation.mutated_bytes(random.Random(7), b"an NBD message") for _ in range(2)]
    assert lies[0] == lies[1] != b"an NBD message"
