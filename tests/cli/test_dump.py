# SPDX-License-Identifier: LGPL-2.1-or-later
"""vnb-dump as it is used: what it prints, of what is sound and of what is not."""

import json
import os
import signal
import subprocess
import sys

import makers
import pytest
import samples
from samples import disk, head, segment

from vnb.format import frame as f
from vnb.format.values import FAILED

STREAM = samples.every_kind()
DUMP = [sys.executable, os.path.join(samples.ROOT, "bin", "vnb-dump")]
ENV = {**os.environ, "PYTHONPATH": samples.ROOT, "PYTHONUNBUFFERED": ""}
PLAN = [{"vda": "64k:A 64k:- 32k:0", "vdb": "128k:? 64k:0"}, {"vda": "96k:. 64k:B"}, {"vda": "8k:C"}]


def dump(*arguments, stdin=b""):
    """(status, stdout, stderr)"""
    done = subprocess.run([*DUMP, *map(str, arguments)], input=stdin, capture_output=True, env=ENV, timeout=60)
    return done.returncode, done.stdout.removesuffix(FAILED).decode(), done.stderr.decode()


def test_for_people():
    status, out, err = dump(stdin=STREAM)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "segment p0 (stdin, stream offset 0)"
    for line in (
        "disk 0 a: 300 bytes, full",
        "file nvram /v: 3 bytes, mode 600",
        'frame +x: [{"k": [1, null, true]}]',
        "frame +y: [7], 7 bytes of payload",
        "               0              140 data         2           61 a lz4,none",
        "             240               60 hole                        a",
        "a                  140              100               60               61    2.30",
        "frames 13, bytes 940, index 5 rows in 2 frames",
        "segment p1 (stdin, stream offset 940)",
        "  parent       p0",
        "chain p0 (full)",
        "   -> p1 (inc)",
    ):
        assert line in lines


def test_extents_become_runs():
    content = segment(head(stage="extents"), [disk(size=4000)],
                      ["extent", 0, [0, 1000, 0, 1000, 500, 3, 1500, 500, 3]],
                      ["extent", 0, [2000, 1000, 3, 3000, 1000, 2]])
    _, out, _ = dump(stdin=content)
    assert [line.split() for line in out.splitlines() if line.endswith(" vda")] == [
        ["0", "1000", "data", "vda"], ["1000", "2000", "hole", "vda"], ["3000", "1000", "zero", "vda"],
    ]
    _, out, _ = dump("--brief", stdin=content)
    assert not [line for line in out.splitlines() if line.endswith(" vda")]
    assert ["vda", "1000", "1000", "2000", "0", "-"] in [line.split() for line in out.splitlines()]


def test_sets_and_files(tmp_path):
    paths = makers.make_set(tmp_path / "set", PLAN, spec="lz4")
    for arguments in ([tmp_path / "set"], paths):
        status, out, err = dump(*arguments)
        assert (status, err) == (0, "")
        assert [line for line in out.splitlines() if line.startswith("segment ")] == [
            f"segment {makers.point(n)} ({path}, stream offset 0)" for n, path in enumerate(paths)
        ]
    status, out, err = dump("--json", tmp_path / "set")
    assert (status, err) == (0, "")
    done = subprocess.run([*DUMP, "--from-json"], input=out.encode(), capture_output=True, env=ENV)
    assert done.stdout == b"".join(open(path, "rb").read() for path in paths)  # noqa: SIM115
    (tmp_path / "empty").mkdir()
    assert dump(tmp_path / "empty") == (1, "", f"vnb-dump: {tmp_path}/empty: no segment here\n")
    assert dump(tmp_path / "none") == (1, "", f"vnb-dump: {tmp_path}/none: No such file or directory\n")


def test_list(tmp_path):
    paths = makers.make_set(tmp_path / "set", PLAN)
    left = tmp_path / "set" / "left.vnb"
    left.write_bytes(segment(head("fork", makers.point(0), uuid=makers.head(0)["uuid"]), []))
    status, out, err = dump("--list", tmp_path / "set")
    assert (status, err) == (0, "")
    assert out.split("\n\n")[1].splitlines() == [
        f"latest: {makers.point(2)}, from 3 segments", f"also restorable: fork ({left})",
    ]
    rows = [line.split() for line in out.splitlines()[1:5]]
    assert [row[0] for row in rows] == ["fork", *(makers.point(n) for n in range(3))] or rows[0][0] == makers.point(0)
    assert max(map(len, out.splitlines())) < 140
    os.unlink(paths[1])
    status, out, err = dump("--list", tmp_path / "set")
    assert status == 1 and makers.point(2) in out
    assert err == (
        f"vnb-dump: {tmp_path}/set: gap: {makers.point(2)} needs {makers.point(1)}, which is not here; "
        f"--until {makers.point(0)} is the newest that can be restored\n"
    )
    assert f"cannot be restored: {makers.point(2)} needs {makers.point(1)}, which is not here\n" in out


def test_list_of_several_sets(tmp_path):
    """One set has one domain: each gets a table, with its name, and files have one together."""
    paths = makers.make_set(tmp_path / "a", PLAN)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.vnb").write_bytes(segment(head("other", domain="vm2", uuid="u-2"), []))
    (tmp_path / "c").mkdir()
    status, out, err = dump("--list", tmp_path / "a", tmp_path / "b", tmp_path / "c", paths[0])
    assert (status, err) == (1, f"vnb-dump: {tmp_path}/c: no segment here\n")
    titles = [line for line in out.splitlines() if line.startswith(str(tmp_path))]
    assert titles == [
        f"{tmp_path}/a: vm1 ({makers.head(0)['uuid']})", f"{tmp_path}/b: vm2 (u-2)",
        f"{paths[0]}: vm1 ({makers.head(0)['uuid']})",
    ]
    assert [line for line in out.splitlines() if line.startswith("latest")] == [
        f"latest: {makers.point(2)}, from 3 segments", "latest: other, from 1 segment",
        f"latest: {makers.point(0)}, from 1 segment",
    ]


@pytest.mark.parametrize("arguments", [[], ["--brief"], ["--json"], ["--json", "--no-payload"]])
@pytest.mark.parametrize("content, reason", [
    (b"", "stdin: empty input, expected a stream"),
    (b"Hello", "stdin: stream offset 0: not a stream of vnb (it starts with 48 65 6c 6c 6f)"),
    (STREAM[:500], "stdin: stream offset 488: short record: expected 40 bytes, got 0"),
    (STREAM[:-1], "stdin: stream offset 1290: short record: the input ends after 32 bytes of it"),
])
def test_damaged(arguments, content, reason):
    """What is sound is printed, then the one line."""
    content = content if not content.startswith(STREAM[:9]) else content
    status, out, err = dump(*arguments, stdin=content)
    assert status == 1 and err.count("\n") == 1
    assert err.split(": ", 2)[:2] == reason.replace("stdin", "vnb-dump: stdin", 1).split(": ", 2)[:2]
    if content.startswith(STREAM[:99]):
        assert "p0" in out


def test_frames_behind_one_that_does_not_fit():
    """One stage is debugged alone: what it wrote after its mistake is seen as well."""
    content = segment(head(), [disk(size=100)], ["extent", 0, [0, 50, 3]], ["extent", 0, [40, 60, 3]], ["+x", 5])
    status, out, err = dump("--json", stdin=content)
    assert [json.loads(line)["frame"] for line in out.splitlines()] == [
        "vnb", "disk", "extent", "extent", "+x", "end", "tail",
    ]
    at = content.index(f.encode(["extent", 0, [40, 60, 3]])[0])
    assert (status, err) == (
        1, f"vnb-dump: stdin: stream offset {at}: vda: extent at offset 40 comes after offset 50\n"
    )


def test_malformed_frames_are_shown_as_they_are():
    frames = [["disk"], ["disk", 5, {}, 7], ["extent", 5], ["data"], ["end", 5]]
    for fields in frames[1:3] + frames[4:]:
        status, out, _ = dump("--json", stdin=segment(head(), [], fields))
        shown = json.loads(out.splitlines()[1])
        assert status == 1
        assert shown["frame"] == fields[0]
        assert shown.get("elements", fields[1:]) == fields[1:]


def test_damaged_payload_is_told_and_shown():
    content = bytearray(STREAM)
    content[content.index(b"12345678")] ^= 1
    for arguments in ([], ["--json"]):
        status, out, err = dump(*arguments, stdin=bytes(content))
        at = STREAM.index(b"12345678") - f.DATA_HEADER_SIZES["none"]
        assert status == 1
        assert err == (f"vnb-dump: stdin: stream offset {at}: a: offset 100: "
                       "40 bytes differ from what was read from the source\n")
        assert "p1" in out  # it went on


def test_one_bad_file_of_several(tmp_path):
    paths = makers.make_set(tmp_path, PLAN)
    os.truncate(paths[1], 300)
    status, out, err = dump("--brief", tmp_path)
    assert status == 1 and err.startswith(f"vnb-dump: {paths[1]}: stream offset ") and err.count("\n") == 1
    assert f"segment {makers.point(2)}" in out


def test_nothing_of_a_stream_steers_the_terminal():
    evil = "\x1b]0;evil\x07\x9b2J\u202e\n\x7f"
    content = segment(
        head(domain="vm \u20ac", extra=evil, **{evil: evil}),
        [disk(size=0, image={"format": evil, "path": evil}, x=evil)],
        (["file", samples.part(path=evil)], b"abc"), ["+x", evil, {evil: evil}],
    )
    for arguments in ([], ["--json"], ["--brief"]):
        status, out, err = dump(*arguments, stdin=content)
        assert (status, err) == (0, "")
        assert all(line.isprintable() for line in out.splitlines())
    status, out, err = dump(stdin=content.replace(b"\x94\xa3vnb", b"\x94\xa3vnb", 1)[:-40])
    assert status == 1 and err.count("\n") == 1


def test_very_long_values_are_cut():
    content = segment(head(extra="x" * 100_000), [disk(size=0, image={"path": "y" * 100_000})], ["+x", "z" * 100_000])
    _, out, _ = dump(stdin=content)
    assert max(map(len, out.splitlines())) < 500


def test_reader_that_goes_away():
    """`vnb-dump | head -1`"""
    many = segment(head(stage="extents"), [disk(size=1 << 20)],
                   *(["extent", 0, [n * 16, 16, n % 2 + 2]] for n in range(1 << 16)))
    for arguments in ([], ["--json"]):
        with samples.memory(many) as fd:
            process = subprocess.Popen([*DUMP, *arguments], stdin=fd, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                       env=ENV)
            assert process.stdout.read(1)
            process.stdout.close()
            assert process.wait(60) == -signal.SIGPIPE
            assert process.stderr.read() == b""
            process.stderr.close()


def test_full_device():
    lines = dump("--json", stdin=STREAM)[1].encode()
    for arguments, stdin in ([], STREAM), (["--json"], STREAM), (["--from-json"], lines):
        with open("/dev/full", "wb") as full:
            done = subprocess.run([*DUMP, *arguments], input=stdin, stdout=full, stderr=subprocess.PIPE, env=ENV)
        assert (done.returncode, done.stderr) == (1, b"vnb-dump: stdout: No space left on device\n")


def test_from_json():
    status, out, _ = dump("--json", stdin=STREAM)
    assert status == 0
    done = subprocess.run([*DUMP, "--from-json"], input=out.encode(), capture_output=True, env=ENV)
    assert (done.returncode, done.stdout, done.stderr) == (0, STREAM, b"")
    done = subprocess.run([*DUMP, "--from-json"], input=out.encode()[:-1] + b"x\n", capture_output=True, env=ENV)
    assert (done.returncode, done.stderr) == (1, b"vnb-dump: stdin: line 21: not JSON: Extra data (column 64)\n")
    assert STREAM.startswith(done.stdout)
    assert dump("--from-json") == (1, "", "vnb-dump: stdin: empty input, expected lines of JSON\n")


@pytest.mark.parametrize("arguments", [["--from-json", "--json"], ["--no-payload"], ["--list"], ["--from-json", "x"],
                                       ["--json", "--brief"]])
def test_wrong_usage(arguments):
    status, out, err = dump(*arguments)
    assert (status, out) == (2, "") and err.startswith("vnb-dump: ")


def test_memory_stays_small():
    """A stream of 128 MiB, both ways, in less."""
    program = (
        "import sys; sys.path[:0] = ['tests']; import samples\n"
        "from vnb.format.writing import Writer\n"
        "from xxhash import xxh3_64_intdigest\n"
        "out = Writer(1).segment(samples.head(), [samples.disk(size=1 << 27)])\n"
        "plain = bytes(1 << 20); digest = xxh3_64_intdigest(plain)\n"
        "for n in range(128): out.data(0, n << 20, 1 << 20, 'none', digest, plain)\n"
        "out.end()\n"
    )
    limit = "ulimit -v 120000; exec \"$@\""
    make = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=samples.ROOT, env=ENV)
    to_json = subprocess.Popen(["sh", "-c", limit, "sh", *DUMP, "--json"], stdin=make.stdout, stdout=subprocess.PIPE,
                               env=ENV)
    back = subprocess.Popen(["sh", "-c", limit, "sh", *DUMP, "--from-json"], stdin=to_json.stdout,
                            stdout=subprocess.PIPE, env=ENV)
    for process in (make, to_json):
        process.stdout.close()
    size = 0
    while part := back.stdout.read(1 << 20):
        size += len(part)
    back.stdout.close()
    assert [process.wait(60) for process in (make, to_json, back)] == [0, 0, 0]
    assert size > 1 << 27
