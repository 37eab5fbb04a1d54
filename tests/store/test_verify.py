# SPDX-License-Identifier: LGPL-2.1-or-later
"""vnb-verify: what is sound passes, byte for byte; what is not is told, a line each."""

import json
import os
import pty
import signal
import subprocess
import sys

import makers
import pytest
import samples
from hypothesis import given, settings
from samples import disk, head, segment

from vnb.base.errors import Error
from vnb.cli import verify
from vnb.cli.progress import Progress
from vnb.format import frame as f
from vnb.format import index, writing
from vnb.format.values import FAILED
from vnb.store import checker

STREAM = samples.every_kind()
VERIFY = [sys.executable, os.path.join(samples.ROOT, "bin", "vnb-verify")]
ENV = {**os.environ, "PYTHONPATH": samples.ROOT}
FINDS = " (vnb-cat FILE... finds the order)"
NOTHING = "empty input, expected a stream: the command before this one has written nothing"
PLAN = [{"vda": "64k:A 64k:- 32k:0", "vdb": "128k:? 64k:0"}, {"vda": "96k:. 64k:B"}, {"vda": "8k:C"}]


def run(*arguments, stdin=b""):
    """(status, stdout, stderr)"""
    done = subprocess.run([*VERIFY, *map(str, arguments)], input=stdin, capture_output=True, env=ENV, timeout=60)
    return done.returncode, done.stdout, done.stderr.decode()


class Output:
    """In the place of a Writer."""

    def __init__(self):
        self.content = bytearray()

    def flush(self):
        pass

    def write(self, header, payload=None):
        self.content += header
        self.content += payload or b""


def filtered(content, threads=0):
    """(what is passed on, the Error or None), in this process."""
    out = Output()

    def fault(error):
        raise error

    with samples.memory(content) as fd:
        try:
            for _ in checker.Checker(fd, "stdin", threads, fault, Progress("none"), out).segments(lambda _: None):
                pass
        except Error as error:
            return bytes(out.content), error
    return bytes(out.content), None


def ends(content):
    """How many segments are whole in what was passed on."""
    return content.count(b"\x94\xa4tail")


@pytest.mark.parametrize("threads", [0, 2])
@settings(max_examples=30)
@given(segments=samples.contents())
def test_what_is_sound_passes_byte_for_byte(segments, threads):
    whole = samples.written_from(segments)
    assert filtered(whole, threads) == (whole, None)


@pytest.mark.parametrize("spec", ["none", "lz4", "lz4:9", "zstd"])
def test_codecs(tmp_path, spec):
    if spec == "zstd":
        pytest.importorskip("zstandard")
    content = b"".join(read(path) for path in makers.make_set(tmp_path, PLAN, spec=spec))
    assert run(stdin=content) == (0, content, "")
    assert run("--threads", 0, stdin=content) == (0, content, "")
    assert run(tmp_path) == (0, b"", "")


def read(path):
    with open(path, "rb") as file:
        return file.read()


def test_stages():
    content = segment(head(stage="disks"), [disk(source={"uri": "x"})]) + segment(
        head("p1", "p0", stage="extents"), [disk(level="inc")], ["extent", 0, [0, 9, 0, 9, 9, 3]])
    assert run(stdin=content) == (0, content, "")


def test_cut_at_every_byte():
    length = samples.read(STREAM)[0][-1]
    for size in range(len(STREAM)):
        out, error = filtered(STREAM[:size])
        assert STREAM.startswith(out)
        if size != length:
            assert error is not None and "\n" not in str(error)
            assert ends(out) == (size > length)


def flips(content):
    """Two bits of each byte (test_stream_damage has them all): what differs here is what becomes of the rest."""
    for at in range(len(content)):
        yield at, at % 8
        yield at, (at + 3) % 8


def test_bits_flipped():
    """What is passed on is sound, and does not look whole."""
    length = samples.read(STREAM)[0][-1]
    for at, bit in flips(STREAM):
        damaged = bytearray(STREAM)
        damaged[at] ^= 1 << bit
        out, error = filtered(damaged)
        assert error is not None and "\n" not in str(error)
        assert STREAM.startswith(out) and len(out) <= at
        assert ends(out) == (at >= length)
        assert b'\x93\xa3end' not in out[length if at >= length else 0:]


def test_damaged_stream_on_the_command_line():
    damaged = bytearray(STREAM)
    at = STREAM.index(b"12345678")
    damaged[at + 5] ^= 8
    frame = at - f.DATA_HEADER_SIZES["none"]
    line = (f"vnb-verify: stdin: stream offset {frame}: a: offset 100: "
            "40 bytes differ from what was read from the source\n")
    assert run(stdin=bytes(damaged)) == (1, STREAM[:frame], line)
    assert run("--threads", 0, stdin=bytes(damaged)) == (1, STREAM[:frame], line)
    assert run() == (1, FAILED, f"vnb-verify: stdin: {NOTHING}\n")
    assert run(stdin=b"text\n") == (
        1, FAILED, "vnb-verify: stdin: stream offset 0: not a stream of vnb (it starts with 74 65 78 74 0a)\n"
    )


def test_next_stage_refuses_what_is_left():
    damaged = bytearray(STREAM)
    damaged[STREAM.index(b"12345678")] ^= 1
    _, out, _ = run(stdin=bytes(damaged))
    with pytest.raises(Error):
        samples.read(out)


def chain_of(*numbers):
    segments = [segment(head("p0"), [disk(size=9)], ["extent", 0, [0, 9, 3]])]
    segments += [segment(head(f"p{n}", f"p{n - 1}"), [disk(size=9, level="inc")]) for n in range(1, 5)]
    return b"".join(segments[number] for number in numbers)


@pytest.mark.parametrize("numbers, line", [
    ((0, 1, 2), None), ((0,), None), ((1, 2, 3), None), ((3,), None),
    ((0, 2), "p2 follows p1, it does not come after p0"), ((1, 0), "p0 is a full backup of its own, it does not come"),
    ((0, 1, 1), "p1 follows p0, it does not come after p1"), ((0, 0), "p0 is a full backup of its own"),
    ((0, 2, 1), "p2 follows p1"), ((2, 1), "p1 follows p0"),
])
def test_order_of_segments(numbers, line):
    """A stream of several segments means: apply them in this order. It may begin with an increment."""
    content = chain_of(*numbers)
    status, out, err = run(stdin=content)
    if line is None:
        assert (status, out, err) == (0, content, "")
    else:
        assert status == 1 and content.startswith(out) and ends(out) < len(numbers)
        assert err.startswith(f"vnb-verify: stdin: {line}") and err.count("\n") == 1


def test_files_are_verified_as_they_would_be_restored(tmp_path):
    """Each by itself by vnb-apply, all of them in any order by vnb-cat; --each asks for less."""
    path = tmp_path / "all.vnb"
    parts = {number: tmp_path / f"{number}.vnb" for number in range(3)}
    for number, part in parts.items():
        part.write_bytes(chain_of(number))
    assert run(*parts.values()) == run(parts[2], parts[0], parts[1]) == (0, b"", "")
    for numbers, operands, lines in (
        ((0, 1, 2), (), []),
        ((0, 2), (), ["p2 follows p1, it does not come after p0" + FINDS, "gap: p2 needs p1, which is not here"]),
        ((0, 2), (parts[1],), ["p2 follows p1, it does not come after p0" + FINDS]),
        ((1, 0), (), ["p0 is a full backup of its own, it does not come after p1" + FINDS]),
        ((0, 1, 1), (), [
            "p1 follows p0, it does not come after p1" + FINDS, f"{path} and {path} claim the same id id-p1",
        ]),
        ((1, 2), (), ["gap: p1 needs p0, which is not here"]),
        ((0, 1, 2), (parts[1],), [f"{path} and {parts[1]} claim the same id id-p1"]),
    ):
        path.write_bytes(chain_of(*numbers))
        status, _, err = run(path, *operands)
        assert [line.split(": ", 2)[2] for line in err.splitlines()] == lines
        assert status == (1 if lines else 0)
        assert run("--each", path, *operands) == (0, b"", "")
    path.write_bytes(segment(head(stage="extents"), [disk(size=50)], ["extent", 0, [0, 50, 0]]))
    assert run(path) == (1, b"", f"vnb-verify: {path}: holds no data, but extents\n")


def test_a_file_and_the_set_that_it_goes_on_from(tmp_path):
    (tmp_path / "set").mkdir()
    for number in range(2):
        (tmp_path / "set" / f"{number}.vnb").write_bytes(chain_of(number))
    (tmp_path / "x.vnb").write_bytes(chain_of(2))
    assert run(tmp_path / "set", tmp_path / "x.vnb") == (0, b"", "")
    (tmp_path / "set" / "0.vnb").unlink()
    status, _, err = run(tmp_path / "set", tmp_path / "x.vnb")
    assert (status, err) == (1, f"vnb-verify: {tmp_path}/set: gap: p1 needs p0, which is not here\n")


def test_unknown_frames_pass():
    content = segment(head(), [], ["x", 5], (["+x", 5], b"abc"))
    assert run(stdin=content) == (0, content, "")


def test_nothing_to_a_terminal(tmp_path):
    path = tmp_path / "x.vnb"
    for content, status in ((STREAM, 0), (STREAM[:-1], 1)):
        path.write_bytes(content)
        ours, theirs = pty.openpty()
        with open(path, "rb") as stdin:
            process = subprocess.Popen(VERIFY, stdin=stdin, stdout=theirs, stderr=subprocess.PIPE, env=ENV)
        os.close(theirs)
        err = process.communicate(timeout=60)[1]
        with pytest.raises(OSError):
            os.read(ours, 1)
        os.close(ours)
        assert (process.returncode, err.count(b"\n")) == (status, status)


def test_reader_that_goes_away():
    content = segment(head(), [disk(size=1 << 20)], *([["+x", "x" * 200_000]] * 50), ["extent", 0, [0, 1 << 20, 3]])
    with samples.memory(content) as fd:
        process = subprocess.Popen(VERIFY, stdin=fd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENV)
        assert process.stdout.read(1) == b"\x94"
        process.stdout.close()
        assert process.wait(60) == -signal.SIGPIPE
        assert process.stderr.read() == b""
        process.stderr.close()


def test_full_device():
    with open("/dev/full", "wb") as full:
        done = subprocess.run(VERIFY, input=STREAM, stdout=full, stderr=subprocess.PIPE, env=ENV)
    assert (done.returncode, done.stderr) == (1, b"vnb-verify: stdout: No space left on device\n")


@pytest.mark.parametrize("signum, line", [(signal.SIGINT, ""), (signal.SIGTERM, "vnb-verify: ended by SIGTERM\n")])
@pytest.mark.parametrize("operands", [0, 1, 2])
def test_signal_while_it_waits(tmp_path, signum, line, operands):
    """Also where other threads wait."""
    reads = [os.pipe() for _ in range(max(1, operands))]
    paths = [f"/dev/fd/{ours}" for ours, _ in reads] if operands else []
    process = subprocess.Popen(
        [*VERIFY, "--json", *paths] if operands else VERIFY, stdin=reads[0][0], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=ENV, pass_fds=[ours for ours, _ in reads],
    )
    part = chain_of(0)
    for ours, theirs in reads:
        os.close(ours)
        os.write(theirs, part + part[:50])
    first = process.stdout.readline() if operands else process.stdout.read(5)
    assert first
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err.decode()) == (-signum, line)
    for _, theirs in reads:
        os.close(theirs)


def test_pipe_as_operand():
    ours, theirs = os.pipe()
    os.write(theirs, STREAM)
    os.close(theirs)
    done = subprocess.run([*VERIFY, f"/dev/fd/{ours}"], pass_fds=[ours], capture_output=True, env=ENV)
    os.close(ours)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def faults(*operands, threads=0):
    """The lines of vnb-verify SET_OR_FILE..., in this process."""
    report = verify._Report(False)
    lines = []
    report.fault = lambda error: lines.append(str(error))
    verify._operands(list(map(str, operands)), threads, report, Progress("none"))
    return lines


def joined(tmp_path, **options):
    """(path of three segments in one file, where they start)"""
    contents = [read(path) for path in makers.make_set(tmp_path / "set", PLAN, **options)]
    path = tmp_path / "joined.vnb"
    path.write_bytes(b"".join(contents))
    return path, [0, len(contents[0]), len(contents[0]) + len(contents[1])]


def test_bits_of_a_set_flipped(tmp_path):
    """Index and tail too, which no other reader of a stream needs."""
    path = tmp_path / "x.vnb"
    content = samples.every_kind()
    path.write_bytes(content)
    assert faults(tmp_path) == []
    with open(path, "r+b", buffering=0) as file:
        for at, bit in flips(content):
            os.pwrite(file.fileno(), bytes([content[at] ^ 1 << bit]), at)
            found = faults(tmp_path)
            assert found and all("\n" not in line and line.startswith(str(tmp_path)) for line in found)
            os.pwrite(file.fileno(), content[at:at + 1], at)


@pytest.mark.parametrize("threads", [0, 3])
def test_it_goes_on_with_the_next_segment(tmp_path, threads):
    path, starts = joined(tmp_path)
    content = read(path)
    ends_ = [*starts[1:], len(content)]
    for bad in range(3):
        for at in (starts[bad], starts[bad] + 100, ends_[bad] - 40, ends_[bad] - 1):
            damaged = bytearray(content)
            damaged[at] ^= 1
            path.write_bytes(damaged)
            line, *links = faults(path, threads=threads)
            assert all(f"{path}: gap: " in line for line in links)  # where a head is lost, so is what needs it
            offset = int(line.split(": ")[1].removeprefix("stream offset "))
            assert starts[bad] <= offset < ends_[bad]
    damaged = bytearray(content)
    for at in starts:
        damaged[at + 100] ^= 1
    path.write_bytes(damaged)
    assert len(faults(path, threads=threads)) == 3


def test_each_damaged_payload_is_told(tmp_path):
    """So that it is known what is lost."""
    path, starts = joined(tmp_path, spec="lz4")
    content = bytearray(read(path))
    (one, *_) = [segment_.rows() for segment_ in verify.backupset.segments([str(path)])]
    expected = []
    for number, rows in enumerate(one):
        for offset, _length, position, size in rows.lookup(0, f.MAX_OFFSET):
            if position:
                content[position + size - 1] ^= 1
                expected.append((position, f"vd{'ab'[number]}: offset {offset}"))
    path.write_bytes(content)
    found = faults(path, threads=2)
    assert len(found) == len(expected) == 3
    for line, (position, where) in zip(found, sorted(expected)):
        assert line.startswith(f"{path}: stream offset {position}: {where}: ")


def test_lines_of_a_set(tmp_path):
    paths = makers.make_set(tmp_path, PLAN)
    os.truncate(paths[1], os.path.getsize(paths[1]) - 1)
    with open(paths[2], "wb") as file:
        file.write(b"text")
    (tmp_path / "empty.vnb").write_bytes(b"")
    (tmp_path / "notes.txt").write_bytes(b"not ours")
    status, out, err = run(tmp_path, tmp_path / "none", "--threads", 4)
    assert (status, out) == (1, b"")
    assert sorted(err.splitlines()) == sorted([
        f"vnb-verify: {paths[1]}: stream offset {os.path.getsize(paths[1]) - 32}: "
        "short record: the input ends after 32 bytes of it",
        f"vnb-verify: {paths[2]}: stream offset 0: not a stream of vnb (it starts with 74 65 78 74)",
        f"vnb-verify: {tmp_path}/empty.vnb: empty input, expected a stream",
        f"vnb-verify: {tmp_path}/none: No such file or directory",
    ])
    (tmp_path / "sub").mkdir()
    assert run(tmp_path / "sub") == (1, b"", f"vnb-verify: {tmp_path}/sub: no segment here\n")


def test_sound_segments_are_named_when_more_is_to_be_said(tmp_path):
    makers.make_set(tmp_path, PLAN[:2])
    path = tmp_path / f"{makers.point(1)}.inc.vnb"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert run(tmp_path)[2].count("\n") == 1
    lines = run("-v", tmp_path)[2].splitlines()
    assert [line for line in lines if line.endswith(": sound")] == [
        f"vnb-verify: {tmp_path}/{makers.point(0)}.full.vnb: {makers.point(0)}: sound",
    ]
    assert len(lines) == 2


def test_links_of_a_set(tmp_path):
    def write(name, head_, disks=()):
        (tmp_path / f"{name}.vnb").write_bytes(
            segment(head_, disks, *(["extent", n, [0, d["size"], 3]] for n, d in enumerate(disks))))

    write("a", head("p0"), [disk(size=50)])
    write("b", head("p1", "p0"), [disk(size=50, level="inc")])
    assert faults(tmp_path) == []
    write("c", head("p2", "p1", created="2020-01-31T12:00:00.000000Z"), [disk(size=40, level="inc")])
    write("d", head("q1", "q0"))
    write("e", head("r1", "r2"))
    write("f", head("r2", "r1"))
    write("g", head("s", id="id-p0"))
    write("h", head("t", uuid="u-2", domain="other"))
    assert faults(tmp_path) == [
        f"{tmp_path}: {tmp_path}/a.vnb and {tmp_path}/g.vnb claim the same id id-p0",
        f"{tmp_path}: two domains: {tmp_path}/a.vnb is of vm (u-1), {tmp_path}/h.vnb of other (u-2)",
        f"{tmp_path}: circular bases: r1 -> r2 -> r1",
        f"{tmp_path}: p2 is older than p1, which it follows",
        f"{tmp_path}: p2 has changes of disk vda with 40 bytes, less than the 50 before",
        f"{tmp_path}: gap: q1 needs q0, which is not here",
    ]


def test_files_that_do_not_belong_together(tmp_path):
    paths = [tmp_path / name for name in "abcde"]
    for path, head_ in zip(paths, [
        head("p0"), head("p0"), head("q0", uuid="u-2"), head("p2", "p1"), head("p9", id="id-p0"),
    ]):
        path.write_bytes(segment(head_, []))
    assert faults(*paths) == [
        f"the files: {paths[0]} and {paths[1]} claim the same id id-p0",
        f"the files: two domains: {paths[0]} is of vm (u-1), {paths[2]} of vm (u-2)",
        f"the files: {paths[0]} and {paths[4]} claim the same id id-p0",
        "the files: gap: p2 needs p1, which is not here",
    ]
    assert run("--each", *paths) == (0, b"", "")


def test_a_damaged_file_is_set_aside(tmp_path):
    """It keeps its content and gets a name that is no segment's; what is lost with it is said."""
    paths = makers.make_set(tmp_path, [*PLAN, {"vda": "4k:D"}])
    whole = read(paths[2])
    os.truncate(paths[2], len(whole) - 20)
    (tmp_path / "x.vnb").write_text("x\n")
    (tmp_path / "x.vnb.damaged").write_text("an older one")
    assert run(tmp_path)[0] == 1
    assert sorted(os.listdir(tmp_path)) == sorted([*map(os.path.basename, paths), "x.vnb", "x.vnb.damaged"])
    status, out, err = run("--quarantine", tmp_path)
    lines = [line.removeprefix("vnb-verify: ") for line in err.splitlines()]
    assert (status, out) == (1, b"")
    # Two files are checked at a time, and each fault is told at once.
    assert sorted(line.split(": ")[0] for line in lines[:2]) == [paths[2], f"{tmp_path}/x.vnb"]
    assert all("stream offset" in line for line in lines[:2])
    assert lines[2:] == [
        f"{paths[2]}: set aside as {os.path.basename(paths[2])}.damaged",
        f"{tmp_path}/x.vnb: set aside as x.vnb.damaged.1",
        f"{tmp_path}/x.vnb: nothing tells which restore points it had",
        f"{tmp_path}: lost: {makers.point(2)}", f"{tmp_path}: lost: {makers.point(3)}",
    ]
    assert read(f"{paths[2]}.damaged") == whole[:-20]
    assert run("--quarantine", tmp_path) == (
        1, b"", f"vnb-verify: {tmp_path}: gap: {makers.point(3)} needs {makers.point(2)}, which is not here\n")
    os.rename(f"{paths[2]}.damaged", paths[2])
    with open(paths[2], "ab") as file:
        file.write(whole[-20:])
    assert run("--quarantine", tmp_path) == (0, b"", "")


def test_what_says_nothing_of_a_file_sets_nothing_aside(tmp_path, monkeypatch):
    """A codec or a version that is not here, and what cannot be read."""
    pytest.importorskip("zstandard")
    paths = makers.make_set(tmp_path, PLAN, spec="zstd")
    newer = f.encode(["vnb", 2, samples.head("n")])[0]
    (tmp_path / "n.vnb").write_bytes(newer)
    (tmp_path / "s.vnb").symlink_to(tmp_path / "nowhere")
    names = sorted(os.listdir(tmp_path))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    report = verify._Report(False)
    lines = []
    report.fault = lambda error: lines.append(str(error))
    verify._operands([str(tmp_path)], 0, report, Progress("none"), quarantine=True)
    assert any("needs the Python package zstandard" in line for line in lines)
    assert any("a newer vnb is needed" in line for line in lines)
    assert any("No such file" in line for line in lines)
    assert sorted(os.listdir(tmp_path)) == names and len(names) == len(paths) + 2


def with_index(rows, frames=None):
    """A segment of three frames with an index of these rows: lists of four numbers, or of the number of an index."""
    with samples.written() as (writer, content):
        out = writer.segment(head(), [disk(size=100)])
        places = []
        for offset in (0, 10):
            plain = b"x" * 10
            places.append(out.data(0, offset, 10, "none", f.xxh3(plain), plain))
        out.extents(0, [20, 20, 3, 40, 20, 3, 60, 40, 2])
        sound = [[0, 10, *places[0]], [10, 10, *places[1]], [20, 40, 0, 3], [60, 40, 0, 2]]
        for part in rows(sound):
            out.index(0, len(part), b"".join(word.to_bytes(8, "little") for row in part for word in row))
        out.end()
        return content()


def changed(row, word, by):
    def rows(sound):
        sound[row][word] += by
        return [sound]

    return rows


@pytest.mark.parametrize("rows", [
    lambda sound: [sound],
    lambda sound: [sound[:1], sound[1:]],
    lambda sound: [sound[:2], [[20, 20, 0, 3], [40, 20, 0, 3]], sound[3:]],
    lambda sound: [[*sound[:2], [20, 5, 0, 3]], [[25, 35, 0, 3], sound[3]]],
])
def test_index_that_fits(tmp_path, rows):
    """Neighbouring extents may share a row, or not."""
    path = tmp_path / "x.vnb"
    path.write_bytes(with_index(rows))
    assert faults(tmp_path) == []


@pytest.mark.parametrize("rows", [
    lambda sound: [sound[1:]], lambda sound: [sound[:-1]], lambda sound: [sound[:1] + sound[2:]],
    lambda sound: [[*sound, sound[-1]]], lambda sound: [sound, sound], lambda sound: [[*sound, [5, 5, 5, 5]]],
    lambda sound: [[*sound[:2], [20, 40, 0, 2], sound[3]]], lambda sound: [[*sound[:2], [20, 80, 0, 3]]],
    lambda sound: [[*sound[:2], [20, 0, 0, 3], *sound[2:]]], lambda sound: [[sound[1], sound[0], *sound[2:]]],
    *(changed(row, word, by) for row in range(4) for word in range(4) for by in (1, -1, 100)
      if not (row in (0, 2, 3) and word in (0, 2) and by == -1) or row == 1),
])
def test_index_that_does_not_fit(tmp_path, rows):
    path = tmp_path / "x.vnb"
    try:
        path.write_bytes(with_index(rows))
    except OverflowError:
        return
    (line,) = faults(tmp_path)
    assert "index" in line and line.startswith(f"{path}: stream offset ")


def test_large_index(tmp_path):
    """Many frames of it, of several disks, as the Builder writes them."""
    path = tmp_path / "x.vnb"
    with open(path, "wb") as file:
        out = writing.Writer(file.fileno(), "x").segment(head(), [disk("a", 60_000), disk("b", 60_000)])
        builder = index.Builder(out)
        for start in range(0, 60_000, 3000):
            for number in (0, 1):
                runs = [word for n in range(start, start + 3000) for word in (n, 1, 2 + n % 2)]
                out.extents(number, runs)
                builder.extents(number, runs)
        builder.finish()
        out.end()
    assert faults(path) == []


def test_json(tmp_path):
    paths = makers.make_set(tmp_path, PLAN)
    os.truncate(paths[1], os.path.getsize(paths[1]) - 1)
    status, out, err = run("--json", tmp_path)
    assert (status, err) == (1, "")
    lines = sorted(map(json.loads, out.splitlines()), key=lambda line: line["name"])
    assert [line.get("sound") for line in lines] == [True, None, True]
    assert lines[0] == {
        "name": paths[0], "offset": 0, "bytes": os.path.getsize(paths[0]), "point": makers.point(0), "parent": None,
        "level": "full", "id": "id-0", "sound": True,
    }
    assert lines[1]["name"] == paths[1] and lines[1]["offset"] > 0 and lines[1]["fault"].startswith("short record")


@pytest.mark.parametrize("arguments", [["--json"], ["--threads", "x"], ["--threads", "65"], ["--nonsense"]])
def test_wrong_usage(arguments):
    status, out, err = run(*arguments)
    assert (status, out) == (2, b"") and err.startswith("vnb-verify: ")


def test_memory_stays_small():
    """A stream of 128 MiB in less, packed and not."""
    program = (
        "import sys; sys.path[:0] = ['tests']; import samples\n"
        "from vnb.format import codec, writing\n"
        "from xxhash import xxh3_64_intdigest\n"
        "out = writing.Writer(1).segment(samples.head(), [samples.disk(size=1 << 27)])\n"
        "plain = bytes(1 << 19); digest = xxh3_64_intdigest(plain); pack = codec.compressor('lz4')\n"
        "for n in range(256):\n"
        "    name, payload = pack(plain) if n % 2 else ('none', plain)\n"
        "    out.data(0, n << 19, 1 << 19, name, digest, payload)\n"
        "out.end()\n"
    )
    make = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=samples.ROOT, env=ENV)
    command = ["/usr/bin/time", "-f", "%M", *VERIFY]
    done = subprocess.run(command, stdin=make.stdout, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=ENV)
    make.stdout.close()
    assert make.wait(60) == 0
    assert done.returncode == 0
    assert int(done.stderr) < 64 << 10


