# SPDX-License-Identifier: LGPL-2.1-or-later
"""How far a pipeline is: one line on a terminal, JSON lines for programs, nothing else anywhere; and the sum."""

import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import socket
import struct
import subprocess
import sys
import termios

import pytest
import samples
from applied import eventually
from makers import head, images, make_set, point
from samples import disk, written
from xxhash import xxh3_64_intdigest

from vnb.cli.progress import Progress, size_text
from vnb.store import backupset

KiB = 1 << 10
PLAN = [{"vda": "512k:A 256k:- 256k:0", "vdb": "64k:B"}, {"vda": "512k:C", "vdb": "64k:."}]
COLUMNS = 100
WAIT = 30  # seconds, for what must come


@contextlib.contextmanager
def on_terminal(columns=COLUMNS):
    """Yield (our end of a terminal, the end for standard error of commands)."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    try:
        yield ours, theirs
    finally:
        os.close(ours)
        os.close(theirs)


def read_until(fd, pattern, seen=""):
    """What a terminal shows (str) up to where the pattern is found in it."""
    while not re.search(pattern, seen):
        seen += os.read(fd, 65536).decode()
    return seen


def screen(text):
    """The lines (list of str) that are left to be seen of what was written to a terminal."""
    lines = []
    for line in text.split("\n"):
        cells, at = [], 0
        for piece in re.findall(r"\x1b\[K|.|\r", line):
            if piece == "\x1b[K":
                del cells[at:]
            elif piece == "\r":
                at = 0
            else:
                cells[at : at + 1] = [piece]
                at += 1
        lines.append("".join(cells).rstrip())
    return [line for line in lines if line]


def stream_of(*parts):
    """A full segment (bytes) of one disk of as many 256 KiB as there are parts, in pieces: up to each part's end."""
    size = 256 * KiB
    with written() as (writer, content):
        out = writer.segment(head(0), [disk(size=size * len(parts))])
        pieces = []
        for number, letter in enumerate(parts):
            out.data(0, number * size, size, "none", xxh3_64_intdigest(letter * size), letter * size)
            writer.flush()
            pieces.append(len(content()))
        out.end()
        whole = content()
    return [whole[start:end] for start, end in zip([0, *pieces], [*pieces, len(whole)])]


def start(*argv, **options):
    return subprocess.Popen([str(word) for word in argv], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, **options)


def test_one_line_for_a_pipeline(tmp_path):
    """The first command shows it, and the last one sums up; what was shown goes."""
    first, second, end = stream_of(b"a", b"b")
    with on_terminal() as (ours, theirs):
        process = start("bash", "-o", "pipefail", "-c",
                        f"vnb-pack --threads 0 | vnb-verify | vnb-pack -z -o {tmp_path}/set", stderr=theirs)
        process.stdin.write(first)
        process.stdin.flush()
        seen = read_until(ours, r" 50%\|")
        assert re.search(r"\r 50%\|\S+ +\| 256\.0 KiB of data, [0-9.]+ \w+/s, \d\d:\d\d left", seen)
        process.stdin.write(second + end)
        process.stdin.close()
        seen = read_until(ours, "zero, [0-9.]+ s\r\n", seen)
        assert process.wait(WAIT) == 0
    assert seen.count("100%") <= 1
    last, = screen(seen)
    assert re.fullmatch(
        rf"vnb-pack: vm1: {point(0)}: 512\.0 KiB of data, [0-9.]+ KiB stored \([0-9.]+:1\), 0 bytes zero, [0-9.]+ s",
        last,
    )


def test_a_terminal_that_does_not_say_how_wide_it_is():
    """As script(1) makes them, and a serial line: it is taken for one of 80 columns."""
    first, second, end = stream_of(b"a", b"b")
    with on_terminal(0) as (ours, theirs):
        process = start("vnb-verify", stderr=theirs)
        process.stdin.write(first)
        process.stdin.flush()
        seen = read_until(ours, r"50%\|[^\r]* left")
        process.stdin.write(second + end)
        process.stdin.close()
        assert process.wait(WAIT) == 0
    shown = re.findall(r"[^\r\n]*%\|[^\r\n]*left", seen)
    assert shown and all(re.match(r" *\d+%\|\S* *\| \d", line) and len(line) <= 80 for line in shown)


@pytest.mark.parametrize("options, environment", [
    (["--progress", "none"], {}), ([], {"VNB_PROGRESS": "none"}), (["-q"], {}),
])
def test_none_where_it_is_not_wanted(options, environment, tmp_path):
    first, *rest = stream_of(b"a")
    with on_terminal() as (ours, theirs):
        process = start("vnb-pack", *options, "-o", tmp_path / "set", stderr=theirs,
                        env={**os.environ, **environment})
        process.stdin.write(first + b"".join(rest))
        process.stdin.close()
        assert process.wait(WAIT) == 0
        os.set_blocking(ours, False)
        with pytest.raises(BlockingIOError):
            os.read(ours, 1)


def test_none_where_there_is_no_terminal(tmp_path):
    done = subprocess.run(["vnb-pack", "-o", tmp_path / "set"], input=b"".join(stream_of(b"a", b"b")),
                          capture_output=True, timeout=WAIT)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_errors_have_a_line_of_their_own():
    """Of the command that shows how far it is, and of another one meanwhile."""
    first, second, end = stream_of(b"a", b"b")
    with on_terminal() as (ours, theirs):
        process = start("vnb-pack", "--threads", "0", stderr=theirs)
        process.stdin.write(first)
        process.stdin.flush()
        seen = read_until(ours, r" 50%")
        assert subprocess.run(["vnb-cat", "/none/here"], stderr=theirs, timeout=WAIT).returncode == 1
        seen = read_until(ours, "directory\r\n.* 50%", seen)
        process.stdin.write(second + end[:-1])
        process.stdin.close()
        seen = read_until(ours, "short record[^\n]*\n", seen)
        assert process.wait(WAIT) == 1
    another, ours = screen(seen)
    assert another == "vnb-cat: /none/here: No such file or directory"
    assert re.fullmatch(r"vnb-pack: stdin: stream offset \d+: short record: .*", ours)


def test_an_interrupted_one_leaves_no_line(tmp_path):
    first, _, _ = stream_of(b"a", b"b")
    with on_terminal() as (ours, theirs):
        process = start("vnb-pack", "--threads", "0", "-o", tmp_path / "set", stderr=theirs)
        process.stdin.write(first)
        process.stdin.flush()
        seen = read_until(ours, " 50%")
        process.send_signal(signal.SIGINT)
        assert process.wait(WAIT) == -signal.SIGINT
        os.set_blocking(ours, False)
        seen += os.read(ours, 65536).decode()
        process.stdin.close()
    assert screen(seen) == []


def test_without_the_library_there_is_no_line(tmp_path):
    """And nothing else is different. The command that is first waits for data, so the line would come."""
    (tmp_path / "tqdm.py").write_text(f"open({str(tmp_path / 'asked')!r}, 'w').close()\nraise ImportError")
    first, *rest = stream_of(b"a")
    with on_terminal() as (ours, theirs):
        process = start("vnb-pack", "-o", tmp_path / "set", stderr=theirs,
                        env={**os.environ, "PYTHONPATH": str(tmp_path)})
        process.stdin.write(first)
        process.stdin.flush()
        eventually(lambda: (tmp_path / "asked").exists())
        process.stdin.write(b"".join(rest))
        process.stdin.close()
        seen = read_until(ours, "\n")
        assert process.wait(WAIT) == 0
    assert re.match(f"vnb-pack: vm1: {point(0)}: ", seen)


def lines_of(command, **environment):
    """The JSON lines (list) on standard error of a pipeline that succeeds."""
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=WAIT,
                          env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stderr.splitlines()]


def ending(segment):
    segment.finish()
    return segment.end


def test_lines_for_programs(tmp_path):
    """From one command of the pipeline, and the sum from the one that ends it."""
    make_set(tmp_path / "set", PLAN)
    size = sum(len(image) for image in images(PLAN)[-1].values())
    *shown, last = lines_of(f"vnb-cat {tmp_path}/set | vnb-verify | vnb-apply --format raw {tmp_path}/out",
                            VNB_PROGRESS="json")
    # Whoever is so late that the first one has ended may show it too: of a set as small as this.
    shown = [line for line in shown if line["command"] == "vnb-cat"]
    assert [line["progress"]["percent"] for line in shown] == sorted(line["progress"]["percent"] for line in shown)
    ended = shown[-1]["progress"]
    assert (ended["percent"], ended["left"], ended["domain"], ended["point"]) == (100, 0, "vm1", point(1))
    assert last["command"] == "vnb-apply"
    summary = last["summary"]
    assert (summary["domain"], summary["point"]) == ("vm1", point(1))
    assert ended["data"] == summary["data"] == sum(
        ending(saved.open())["data"] for saved in backupset.segments([tmp_path / "set"])
    )
    assert summary["stored"] <= summary["data"]
    assert summary["data"] + summary["zero"] + summary["hole"] >= size


def test_a_saved_stream_is_shown_by_whoever_reads_it(tmp_path):
    (tmp_path / "full.vnb").write_bytes(b"".join(stream_of(b"a", b"b")))
    lines = lines_of(f"vnb-apply --progress json --format raw {tmp_path}/out < {tmp_path}/full.vnb")
    assert [next(key for key in ("progress", "summary") if key in line) for line in lines][-2:] == [
        "progress", "summary",
    ]
    assert {line["command"] for line in lines} == {"vnb-apply"}


@pytest.mark.parametrize("command", [
    "vnb-verify --progress json {set}", "vnb-cat --merge --progress json {set} | cat > {out}",
    "vnb-prune --keep-last 1 --progress json {set}",
])
def test_saved_segments_are_a_whole(command, tmp_path):
    make_set(tmp_path / "set", PLAN)
    shown = [line["progress"] for line in lines_of(command.format(set=tmp_path / "set", out=tmp_path / "out"))]
    assert shown[-1]["percent"] == 100
    assert {name for line in shown for name in line["disks"]} == {"vda", "vdb"}


def test_wholly_of_the_disks_whatever_their_order():
    """Two disks in parallel, shares of several segments, and a disk of nothing."""
    with written() as (writer, _):
        progress = Progress("none")
        out = writer.segment(head(0), [disk(size=400), disk(name="vdb", size=600), disk(name="vdc", size=0)])
        with progress.segment(out, 0.5):
            assert progress.state() == (0, 0, [])
            out.extents(1, [0, 300, 3])
            assert progress.state() == (0.15, 0, ["vdb"])
            out.data(0, 0, 100, "none", 0, bytes(100))
            assert progress.state() == (0.2, 100, ["vda"])
            out.extents(1, [300, 300, 3])
            out.data(0, 100, 300, "none", 0, bytes(300))
        assert progress.state() == (0.5, 400, [])
        with progress.segment(writer.segment(head(1, parent=point(0)), [disk(size=0)]), 0.5):
            assert progress.state() == (1, 400, [])


@pytest.mark.parametrize("count, text", [
    (0, "0 bytes"), (1023, "1023 bytes"), (1024, "1.0 KiB"), (1536 * KiB, "1.5 MiB"), (1 << 62, "4.0 EiB"),
])
def test_sizes_for_people(count, text):
    assert size_text(count) == text


CLAIM = "import sys; from vnb.base import terminal; print(terminal.claim(), flush=True); sys.stdin.read()"


@pytest.mark.parametrize("kind", ["terminal", "pipe", "file", "socket"])
def test_one_process_has_it(kind, tmp_path):
    """Whatever standard error is, and though the open file is shared."""
    with contextlib.ExitStack() as stack:
        if kind == "terminal":
            _, fd = stack.enter_context(on_terminal())
        elif kind == "pipe":
            ours, fd = os.pipe()
            stack.callback(os.close, ours)
            stack.callback(os.close, fd)
        elif kind == "file":
            fd = stack.enter_context(open(tmp_path / "log", "w")).fileno()
        else:
            ours, theirs = socket.socketpair()
            fd = stack.enter_context(theirs).fileno()
            stack.enter_context(ours)

        def claims():
            return stack.enter_context(subprocess.Popen(
                [sys.executable, "-c", CLAIM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=fd, text=True,
                env={**os.environ, "PYTHONPATH": samples.ROOT},
            ))

        first = claims()
        assert first.stdout.readline() == "True\n"
        second = claims()
        assert second.stdout.readline() == "False\n"
        first.kill()
        first.wait(WAIT)
        assert claims().stdout.readline() == "True\n"
