# SPDX-License-Identifier: LGPL-2.1-or-later
"""vnb-read against real servers: each byte that it should read, and what it says when that fails."""

import errno
import os
import pty
import random
import signal
import subprocess
from unittest import mock

import plugin
import pytest
import samples
from samples import read_disk, with_extents
from servers import DEADLINE, command, nbdkit, needs_nbdkit, planned, serve, stalled

from vnb.cli import read
from vnb.format import frame as f
from vnb.format import stream, values
from vnb.format.frame import DATA, HOLE, ZERO

KiB, MiB = 1 << 10, 1 << 20
NO_SIZE = "is not a size such as 4096, 512k, 10M or 2G, within 4096-4194304"
pytestmark = needs_nbdkit


def expected(offset, length):
    begin = offset % len(plugin.PATTERN)
    return (plugin.PATTERN[begin:] + plugin.PATTERN * (length // len(plugin.PATTERN) + 1))[:length]


def random_extents(seed, size):
    """Extents of all states that tile a disk, at any byte."""
    rng = random.Random(seed)
    extents, offset = [], 0
    while offset < size:
        length = min(size - offset, rng.choice([1, 511, 512, 4096, 70000, 300000]) + rng.randrange(2))
        extents.append([length, rng.choice([0, 0, 1, 2, 3])])
        offset += length
    return extents


@pytest.mark.parametrize(
    "options",
    [
        [], ["--requests", "1"], ["--requests", "1000", "--request-size", "4k"], ["--request-size", "4M"],
        ["--request-size", "64KiB", "--connections", "3", "--requests", "3"],
    ],
)
def test_each_byte_of_a_disk(options):
    extents = random_extents(str(options), 5 * MiB + 77)
    with planned(5 * MiB + 77, extents) as server:
        extents_stream = command("vnb-extents", server.uri).ok()
        order, plains = read_disk(command("vnb-read", *options, stdin=extents_stream).ok())
    assert [offset for offset, _, _ in order] == sorted(offset for offset, _, _ in order)
    offset = 0
    for length, flags in extents:
        for at, plain in plains.items():
            low, high = max(at, offset), min(at + len(plain), offset + length)
            if low < high:
                assert not flags & 2
                assert plain[low - at : high - at] == expected(low, high - low)
        offset += length
    assert sum(map(len, plains.values())) == sum(length for length, flags in extents if not flags & 2)


def test_requests_begin_at_multiples_of_their_size():
    """So frames of two backups of one disk hold the same ranges."""
    with planned(MiB) as server:
        runs = [0, 1000, HOLE, 1000, 300000, DATA, 301000, MiB - 301000, ZERO]
        output = command("vnb-read", "--request-size", "128k", stdin=with_extents((server.uri, MiB, runs))).ok()
    order, _ = read_disk(output)
    assert order == [
        (0, 1000, HOLE), (1000, 130072, DATA), (131072, 131072, DATA), (262144, 38856, DATA),
        (301000, MiB - 301000, ZERO),
    ]


@pytest.mark.parametrize("least, most, lengths", [(1, 4096, 4096), (65536, 65536, 65536), (65536, 1 << 25, 65536)])
def test_the_limits_of_a_server_are_kept(least, most, lengths):
    policy = ["blocksize-error-policy=error", f"blocksize-minimum={least}",
              f"blocksize-preferred={max(least, 4096)}", f"blocksize-maximum={most}"]
    with planned(256 * KiB, None, ["blocksize-policy"], policy) as server:
        stdin = with_extents((server.uri, 256 * KiB, [0, 256 * KiB, DATA]))
        order, _ = read_disk(command("vnb-read", "--request-size", "16k" if least > 1 else "64k", stdin=stdin).ok())
    assert {length for _, length, _ in order} == {lengths}


def test_two_disks_whose_frames_take_turns():
    with planned(MiB) as a, planned(2 * MiB) as b:
        head = samples.head(stage="extents")
        disks = [samples.disk("vda", MiB, source={"uri": a.uri}), samples.disk("vdb", 2 * MiB, source={"uri": b.uri})]
        stdin = samples.segment(
            head, disks, (["file", samples.part()], b"abc"), ["extent", 1, [0, MiB, DATA]],
            ["extent", 0, [0, 5, ZERO, 5, MiB - 5, DATA]], ["+note", 1], ["extent", 1, [MiB, MiB, DATA]],
        )
        output = command("vnb-read", "--request-size", "1M", stdin=stdin).ok()
    ((_, _, frames, _, _),) = samples.read(output)
    assert [frame[:3] for frame in frames] == [
        ("File", samples.part(), b"abc"), ("data", 1, 0), ("extent", 0, [0, 5, ZERO]), ("data", 0, 5),
        ("Other", ["+note", 1], None), ("data", 1, MiB),
    ]
    assert frames[3][7] == expected(5, MiB - 5)


def test_segments_follow_each_other():
    with planned(MiB) as server:
        one = with_extents((server.uri, MiB, [0, MiB, DATA]))
        assert len(samples.read(command("vnb-read", stdin=one + one).ok())) == 2


def test_disks_of_no_bytes_and_no_disks():
    with nbdkit("memory", "0") as server:
        output = command("vnb-read", stdin=with_extents((server.uri, 0, []))).ok()
    assert read_disk(output) == ([], {})
    assert samples.read(command("vnb-read", stdin=with_extents()).ok())[0][1] == []


def test_memory_does_not_grow_with_the_data():
    """libnbd's own Buffer, once it was read into, is never freed."""
    with nbdkit("memory", "96M") as server:
        stdin = with_extents((server.uri, 96 * MiB, [0, 96 * MiB, DATA]))
        # A child of ours would begin with our own peak, so another program measures it.
        done = subprocess.run(["/usr/bin/time", "-f", "%M", "vnb-read", "--request-size", "64k"], input=stdin,
                              stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=True)
    assert int(done.stderr.split()[-1]) < 64 * KiB  # of 1024 bytes


class Blocked(Exception):
    pass


@pytest.mark.parametrize("length", [1, 4096])
def test_extents_that_wait_behind_a_read_are_bounded(length):
    """A server that does not answer must not make the stage take in all of its input."""
    def pipeline(requests):
        made = read.Pipeline(mock.Mock(wait=mock.Mock(side_effect=Blocked)), requests)
        made.begin(mock.Mock(), [mock.Mock(request_size=4096)])
        return made

    made = pipeline(requests=4)
    made.add(values.Extents(0, [0, 4096, DATA]))
    with pytest.raises(Blocked):
        for number in range(1, 1_000_000, length):
            runs = [value for at in range(number, number + length) for value in (4096 * at, 4096, ZERO)]
            made.add(values.Extents(0, runs))
    assert (3 * length + read.LIST) * (len(made.queue) - 1) <= read.MAX_WAITING
    assert len(made.queue) > 4
    made = pipeline(requests=1000)
    with pytest.raises(Blocked):
        made.add(values.Extents(0, [0, 1 << 40, DATA]))
    assert made.bytes_in_flight <= read.MAX_IN_FLIGHT


def test_zeroes_that_are_data_for_the_server():
    """Reads that bring nothing else leave as one extent, as long as they follow each other."""
    size = 4 * MiB + 100
    with nbdkit("data", "@0x100000 1 @0x2fffff 2", f"size={size}") as server:
        runs = [0, 3 * MiB + 4096, DATA, 3 * MiB + 4096, 4096, HOLE, 3 * MiB + 8192, size - 3 * MiB - 8192, DATA]
        stdin = with_extents((server.uri, size, runs), (server.uri, size, runs))
        output = command("vnb-read", stdin=stdin).ok()
    expected = [
        (0, MiB, ZERO), (MiB, MiB // 2, DATA), (3 * MiB // 2, MiB, ZERO), (5 * MiB // 2, MiB // 2, DATA),
        (3 * MiB, 4096, ZERO), (3 * MiB + 4096, 4096, HOLE), (3 * MiB + 8192, size - 3 * MiB - 8192, ZERO),
    ]
    for number in range(2):
        order, plains = read_disk(output, number)
        assert order == expected
        assert plains == {MiB: b"\1".ljust(MiB // 2, b"\0"), 5 * MiB // 2: b"\2".rjust(MiB // 2, b"\0")}


def test_zeroes_without_end_are_told_of_now_and_then(monkeypatch):
    monkeypatch.setattr(read, "MAX_ZEROES", 2 * MiB)
    out = mock.Mock()
    pipeline = read.Pipeline(mock.Mock(), requests=1)
    pipeline.begin(out, [mock.Mock(request_size=MiB)])
    pipeline.add(values.Extents(0, [0, 5 * MiB, DATA]))
    pipeline.drain()
    assert [call.args for call in out.extents.call_args_list] == [
        (0, [0, 2 * MiB, ZERO]), (0, [2 * MiB, 2 * MiB, ZERO]), (0, [4 * MiB, MiB, ZERO]),
    ]


def accepted(server):
    """How many connections nbdkit says, with -v, that it took."""
    return server.log.read_text().count("accepted connection")


@pytest.mark.parametrize("size, options, most", [
    (64 * MiB, [], 4), (64 * MiB, ["--connections", "2"], 2), (64 * MiB, ["--connections", "1"], 1), (MiB, [], 1),
])
def test_connections_are_made_when_there_is_work_for_them(size, options, most):
    with serve("nbdkit", "-f", "-v", "pattern", size) as server:
        stdin = with_extents((server.uri, size, [0, size, DATA]))
        order, _ = read_disk(command("vnb-read", *options, stdin=stdin).ok())
        assert accepted(server) == most
    assert sum(length for _, length, _ in order) == size


@pytest.mark.parametrize("limit", [["--filter=limit", "limit=1"], ["--filter=limit", "limit=2"]])
def test_a_server_that_refuses_more_connections(limit):
    """It said that several are safe, not that it takes them."""
    with serve("nbdkit", "-f", "-v", "pattern", 64 * MiB, *limit) as server:
        stdin = with_extents((server.uri, 64 * MiB, [0, 64 * MiB, DATA]))
        order, _ = read_disk(command("vnb-read", stdin=stdin).ok())
        assert "limit" in server.log.read_text()
    assert sum(length for _, length, _ in order) == 64 * MiB


# What goes wrong with the server


def unfinished(output):
    """Whether a stream stops before its end, and what is there is sound."""
    with pytest.raises(stream.StreamError, match="the input ends before the end of the segment|short record"):
        samples.read(output)
    return True


def test_a_range_that_cannot_be_read():
    with planned(4 * MiB, fail=["pread", 3 * MiB + 5]) as server:
        stdin = with_extents((server.uri, 4 * MiB, [0, 4 * MiB, DATA]))
        done = command("vnb-read", stdin=stdin)
    assert unfinished(done.failed("vnb-read: vda: offset 3145728: Input/output error"))


@pytest.mark.parametrize("connections", [1, 3])
def test_a_server_that_dies_leaves_no_end(connections):
    with planned(64 * MiB, die=["pread", 20 * MiB]) as server:
        stdin = with_extents((server.uri, 64 * MiB, [0, 64 * MiB, DATA]))
        done = command("vnb-read", "--connections", connections, stdin=stdin)
    # Which of the reads in flight were answered before it died is not known.
    assert done.status == 1
    said, _, reason = done.err.rpartition(": ")
    assert reason == "server closed the connection\n"
    assert said.startswith("vnb-read: vda: offset ")
    assert int(said.split()[-1]) in range(4 * MiB, 21 * MiB, 512 * KiB)
    assert unfinished(done.out)


def test_the_disk_whose_server_died_is_named():
    """While another disk's read is waited for."""
    with planned(64 * MiB) as a, planned(64 * MiB, die=["pread", 0]) as b:
        stdin = with_extents((a.uri, 64 * MiB, [0, MiB, DATA, MiB, 63 * MiB, HOLE]),
                             (b.uri, 64 * MiB, [0, 64 * MiB, DATA]))
        done = command("vnb-read", stdin=stdin)
    assert unfinished(done.failed("vnb-read: vdb: offset 0: server closed the connection"))


def test_no_server(tmp_path):
    done = command("vnb-read", stdin=with_extents((f"nbd+unix:///?socket={tmp_path}/x", 5, [0, 5, DATA])))
    said = f"cannot connect to {tmp_path}/x: No such file or directory (has its backup job ended)"
    assert unfinished(done.failed(f"vnb-read: vda: {said}"))


def test_the_size_of_the_stream_and_of_the_export_differ():
    with nbdkit("memory", "1M") as server:
        done = command("vnb-read", stdin=with_extents((server.uri, MiB - 1, [0, MiB - 1, DATA])))
    assert unfinished(done.failed("vnb-read: vda: the export has 1048576 bytes, the stream says 1048575"))


@pytest.mark.parametrize("source", [{}, {"uri": 5}, {"dirty": "x"}])
def test_a_stream_that_does_not_say_where(source):
    stdin = samples.segment(samples.head(stage="extents"), [samples.disk("vda", 5, source=source)],
                            ["extent", 0, [0, 5, DATA]])
    assert command("vnb-read", stdin=stdin).failed(
        "vnb-read: vda: the stream does not say where this disk is exported"
    ) == b""


@pytest.mark.parametrize("signum, said", [(signal.SIGINT, ""), (signal.SIGTERM, "vnb-read: ended by SIGTERM\n")])
def test_a_signal_while_the_server_does_not_answer(tmp_path, signum, said):
    fifo = str(tmp_path / "stalled")
    with (
        stalled(fifo) as wait, planned(MiB, stall=["pread", 5], stalled=fifo) as server,
        subprocess.Popen(["vnb-read"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child,
    ):
        child.stdin.write(with_extents((server.uri, MiB, [0, MiB, DATA])))
        child.stdin.flush()
        wait()
        child.send_signal(signum)
        out, err = child.communicate(timeout=DEADLINE)
    assert (child.returncode, err.decode()) == (-signum, said)
    assert unfinished(out)


# What goes wrong with input and output


def test_a_reader_that_closes_the_pipe():
    """As head(1) does: no line, and the signal that a shell expects."""
    with nbdkit("pattern", "64M") as server:
        stdin = with_extents((server.uri, 64 * MiB, [0, 64 * MiB, DATA]))
        with subprocess.Popen(["vnb-read"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE) as child:
            child.stdin.write(stdin)
            child.stdin.flush()
            assert child.stdout.read(1) == f.HEAD_MAGIC[:1]
            child.stdout.close()
            err = child.stderr.read()
            assert child.wait(DEADLINE) == -signal.SIGPIPE
    assert err == b""


def test_a_full_disk():
    with nbdkit("memory", "1M") as server, open("/dev/full", "wb") as full:
        stdin = with_extents((server.uri, MiB, [0, MiB, DATA]))
        done = subprocess.run(["vnb-read"], input=stdin, stdout=full, stderr=subprocess.PIPE, timeout=DEADLINE,
                              check=False)
    assert (done.returncode, done.stderr) == (1, b"vnb-read: stdout: No space left on device\n")


def test_a_terminal_gets_no_stream():
    primary, terminal = pty.openpty()
    try:
        for options in ({"stdin": terminal, "stdout": subprocess.PIPE}, {"stdin": subprocess.DEVNULL,
                                                                        "stdout": terminal}):
            done = subprocess.run(["vnb-read"], **options, stderr=subprocess.PIPE, timeout=DEADLINE, check=False)
            assert done.returncode == 1
            assert done.stderr.decode() in (
                "vnb-read: stdin: is a terminal, expected a stream\n",
                "vnb-read: stdout: is a terminal: will not write a binary stream to it (vnb-dump prints one)\n",
            )
    finally:
        os.close(primary)
        os.close(terminal)


def test_a_closed_standard_input():
    done = command("bash", "-c", "vnb-read <&-")
    assert done.status == 1
    assert done.err.startswith("vnb-read: stdin: ")
    assert done.err.endswith(f": {os.strerror(errno.EBADF)}\n")


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["--requests", "0"], '--requests: "0" is not a number within 1-1024'),
        (["--requests", "x"], '--requests: "x" is not a number within 1-1024'),
        (["--request-size", "1k"], f'--request-size: "1k" {NO_SIZE}'),
        (["--request-size", "8M"], f'--request-size: "8M" {NO_SIZE}'),
        (["--request-size", "5000"], '--request-size: "5000" is not a power of 2'),
        (["--request-size", "5000ib"], f'--request-size: "5000ib" {NO_SIZE}'),
        (["--connections", "65"], '--connections: "65" is not a number within 1-64'),
        (["x"], 'unexpected operand "x"'),
    ],
)
def test_wrong_usage(arguments, reason):
    done = command("vnb-read", *arguments)
    assert (done.status, done.out) == (2, b"")
    assert done.err.splitlines()[:2] == [f"vnb-read: {reason}", "Usage:"]
