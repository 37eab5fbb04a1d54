# SPDX-License-Identifier: LGPL-2.1-or-later
"""vnb-apply --update: a copy is at one point with all its disks, whatever happens."""

import contextlib
import json
import os
import shutil
import signal
import subprocess

import applied
import makers
import pytest
import samples
from applied import refused, restored, same, segments_of

from vnb.base.errors import Error
from vnb.format import stream
from vnb.restore.imagedir import EXISTS, ImageDirectory
from vnb.restore.replica import Replay, Standby
from vnb.restore.targets import Recipe, StandbyImage
from vnb.restore.writer import Buffers

PLAN = [
    {"vda": "64k:A 64k:? 64k:- 64k:0", "vdb": "64k:B 64k:C"},
    {"vda": "64k:0 64k:D 64k:E", "vdb": "64k:. 64k:- 64k:F"},
    {"vda": "64k:. 64k:G 64k:-", "vdb": "32k:0 4k:H", "vdc": "64k:I 64k:-"},
    {"vda": "64k:J", "vdb": "64k:.", "vdc": "64k:0 4k:K"},
]
IMAGES = makers.images(PLAN)
FORMATS = pytest.mark.parametrize("format_", ["qcow2", "raw"])


@pytest.fixture(scope="module")
def segments():
    return segments_of(PLAN, spec="lz4")


def check(directory, number, tmp_path, format_="qcow2"):
    """The copy is at this point of the plan, and nothing else is there."""
    state = json.loads((directory / ".vnb-apply.state").read_text())
    assert state["point"] == makers.point(number)
    names = [f"{name}.{format_}" for name in IMAGES[number]]
    assert sorted(os.listdir(directory)) == sorted([*names, ".vnb-apply.lock", ".vnb-apply.state"])
    for name, content in IMAGES[number].items():
        path = directory / f"{name}.{format_}"
        assert path.read_bytes() == content if format_ == "raw" else same(path, format_, content, tmp_path)


def update(content, directory, *arguments, format_="qcow2"):
    restored(content, "--update", "--format", format_, *arguments, directory)


@FORMATS
def test_one_segment_at_a_time(tmp_path, segments, format_):
    for number, segment in enumerate(segments):
        update(segment, tmp_path / "copy", format_=format_)
        check(tmp_path / "copy", number, tmp_path, format_)


@FORMATS
def test_all_in_one_stream(tmp_path, segments, format_):
    update(b"".join(segments), tmp_path / "copy", format_=format_)
    check(tmp_path / "copy", 3, tmp_path, format_)


def test_what_was_applied_is_passed_over(tmp_path, segments):
    """Twice is the same as once, alone or in front of what is new."""
    copy = tmp_path / "copy"
    update(segments[0] + segments[1], copy)
    before = stamps(copy)
    for content in (segments[1], segments[0], segments[0] + segments[1]):
        update(content, copy)
        assert stamps(copy) == before
    update(b"".join(segments), copy)
    check(copy, 3, tmp_path)


def stamps(directory):
    return {name: os.stat(directory / name).st_mtime_ns for name in os.listdir(directory)}


def test_segments_that_do_not_follow(tmp_path, segments):
    copy = tmp_path / "copy"
    update(segments[0], copy)
    before = stamps(copy)
    holds = f"{copy} holds {makers.point(0)}"
    assert refused(segments[2], "--update", copy) == f"stdin: {makers.point(2)} follows {makers.point(1)}, {holds}"
    later = samples.segment(makers.head(7, parent=None, level="full"), [])
    assert refused(later, "--update", copy) == f"stdin: {makers.point(7)} is a full backup of its own, {holds}"
    old = samples.segment(makers.head(8, parent=None, level="full", created="2020-01-01T00:00:00.000000Z"), [])
    assert refused(old, "--update", copy) == f"stdin: ends at {makers.point(8)}, {holds}"
    other = samples.segment(makers.head(1, uuid="other", domain="vm2"), [])
    assert refused(other, "--update", copy).startswith(f"stdin: {makers.point(1)} is of another domain (vm2, other)")
    assert refused(b"", "--update", copy) == (
        "stdin: empty input, expected a stream: the command before this one has written nothing"
    )
    assert stamps(copy) == before


def test_increment_without_a_copy(tmp_path, segments):
    line = refused(segments[1], "--update", tmp_path / "copy")
    assert line == f"stdin: {makers.point(1)} is an increment to {makers.point(0)}, which is not here"
    assert not (tmp_path / "copy").exists()


def test_older_segments_that_lead_to_the_copy(tmp_path):
    """The copy was made from a merged full: the increments of which it was made are not known here."""
    merged = samples.segment(makers.head(1, parent=None, level="full"), [])
    full = samples.segment(makers.head(0), [])
    increments = [samples.segment(makers.head(number), []) for number in (1, 2)]
    update(merged, tmp_path / "copy")
    update(full + b"".join(increments), tmp_path / "copy")
    assert json.loads((tmp_path / "copy/.vnb-apply.state").read_text())["point"] == makers.point(2)


@pytest.mark.parametrize("cut", [1, 34, 100, 800, -1, -34, -200])
def test_connection_that_breaks(tmp_path, segments, cut):
    """In the middle of an increment: all disks stay at the point before."""
    copy = tmp_path / "copy"
    update(segments[0], copy)
    before = stamps(copy)
    assert refused(segments[1][:cut], "--update", copy).startswith("stdin: stream offset ")
    assert stamps(copy) == before
    update(segments[1], copy)
    check(copy, 1, tmp_path)


def test_first_copy_that_breaks(tmp_path, segments):
    refused(segments[0][:-1], "--update", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_bytes_that_are_not_those_of_the_source(tmp_path):
    """Found before the first of them is applied: a spool with a fault in it could never be finished."""
    first, second = segments_of([{"vda": "128k:A"}, {"vda": "64k:B 64k:C"}])
    copy = tmp_path / "copy"
    update(first, copy)
    before = stamps(copy)
    damaged = bytearray(second)
    damaged[second.index(b"CCCCCCCC") + 9] ^= 4
    line = refused(bytes(damaged), "--update", copy)
    assert line == "vda: offset 65536: 65536 bytes differ from what was read from the source"
    assert stamps(copy) == before


def test_image_that_was_changed(tmp_path, segments):
    """Somebody started a machine on it: increments to the source's blocks would make a mixture."""
    copy = tmp_path / "copy"
    update(segments[0], copy)
    os.utime(copy / "vdb.qcow2")
    line = refused(segments[1], "--update", copy)
    assert line == f"{copy}/vdb.qcow2: was changed since it was brought to {makers.point(0)}"
    (copy / "vdb.qcow2").unlink()
    assert refused(segments[1], "--update", copy) == line


def test_new_disk_whose_name_is_taken(tmp_path, segments):
    copy = tmp_path / "copy"
    update(segments[0] + segments[1], copy)
    (copy / "vdc.qcow2").write_bytes(b"precious")
    assert refused(segments[2], "--update", copy) == f"{copy}/vdc.qcow2: {EXISTS}"
    assert (copy / "vdc.qcow2").read_bytes() == b"precious"
    (copy / "vdc.qcow2").unlink()
    update(segments[2], copy)
    check(copy, 2, tmp_path)


def test_disk_that_is_dropped(tmp_path):
    plan = [{"vda": "64k:A", "vdb": "64k:B"}, {"vda": "64k:C"}, {"vda": "64k:D"}]
    first, second, third = segments_of(plan)
    copy = tmp_path / "copy"
    update(first, copy)
    done = applied.apply(second, "--update", copy)
    assert done.returncode == 0
    assert done.stderr == f"vnb-apply: vdb: not part of restore point {makers.point(1)}: vdb.qcow2 stays as it is\n"
    (copy / "vdb.qcow2").unlink()
    update(third, copy)
    assert same(copy / "vda.qcow2", "qcow2", b"D" * 65536, tmp_path)


@FORMATS
@pytest.mark.parametrize("changed", [False, True])
def test_disk_that_was_dropped_and_comes_back(tmp_path, format_, changed):
    """Left out of one backup: the next one has all of it, and what stayed of it is replaced, unless it has changed."""
    plan = [{"vda": "64k:A", "vdb": "64k:B"}, {"vda": "64k:C"}, {"vda": "64k:D"}, {"vda": "64k:.", "vdb": "64k:E"}]
    segments = segments_of(plan)
    copy = tmp_path / "copy"
    for segment in segments[:3]:
        assert applied.apply(segment, "--update", "--format", format_, copy).returncode == 0
    path = copy / f"vdb.{format_}"
    if changed:
        path.write_bytes(b"precious")
        assert refused(segments[3], "--update", "--format", format_, copy) == f"{path}: {EXISTS}"
        assert path.read_bytes() == b"precious"
        return
    update(segments[3], copy, format_=format_)
    assert same(path, format_, b"E" * 65536, tmp_path)
    assert same(copy / f"vda.{format_}", format_, b"D" * 65536, tmp_path)


@FORMATS
def test_disk_that_comes_as_a_whole(tmp_path, format_):
    """Its bitmap was lost, or it is smaller now."""
    copy = tmp_path / "copy"
    first = segments_of([{"vda": "1M:A", "vdb": "64k:B"}])[0]
    second = segments_of([{}, {"vda": "64k:C 64k:-", "vdb": "4k:D 60k:."}], known=["vdb"])[1]
    update(first, copy, format_=format_)
    update(second, copy, format_=format_)
    assert same(copy / f"vda.{format_}", format_, b"C" * 65536 + bytes(65536), tmp_path)
    assert same(copy / f"vdb.{format_}", format_, b"D" * 4096 + b"B" * 61440, tmp_path)


IN_USE = "is in use: another process has its locks (is its domain running)"
HOW = pytest.mark.parametrize("second, known", [
    ({"vda": "4k:C", "vdb": "4k:D"}, ["vda", "vdb"]),  # written where it is
    ({"vda": "4k:C", "vdb": "64k:. 4k:D"}, ["vda", "vdb"]),  # and grows first
    ({"vda": "4k:C", "vdb": "64k:D"}, ["vda"]),  # comes as a whole, and is replaced
], ids=["in place", "grows", "whole"])


@FORMATS
@HOW
def test_image_that_a_machine_runs_on(tmp_path, format_, second, known):
    """Nothing is written beneath it, nor is it taken away from it; the other disk stays at its point, too."""
    copy = tmp_path / "copy"
    content = segments_of([{"vda": "64k:A", "vdb": "64k:B"}])[0]
    after = segments_of([{"vda": "64k:.", "vdb": "64k:."}, second], known=known)[1]
    update(content, copy, format_=format_)
    before = stamps(copy)
    with applied.qemu_nbd(tmp_path, "-f", format_, copy / f"vdb.{format_}"):
        line = refused(after, "--update", "--format", format_, copy)
        assert line == f"{copy}/vdb.{format_}: {IN_USE}"
        assert stamps(copy) == before
    update(after, copy, format_=format_)
    assert same(copy / f"vda.{format_}", format_, b"C" * 4096 + b"A" * 61440, tmp_path)


def test_data_file_that_is_in_use(tmp_path):
    """Where the bytes of the guest are."""
    copy = tmp_path / "copy"
    first, second = segments_of([{"vda": "64k:A"}, {"vda": "4k:B"}])
    options = ["--image-options", "data_file=on,data_file_raw=on"]
    update(first, copy, *options)
    before = stamps(copy)
    with applied.qemu_nbd(tmp_path, "-f", "raw", copy / "vda.data"):
        assert refused(second, "--update", *options, copy) == f"{copy}/vda.data: {IN_USE}"
    assert stamps(copy) == before
    update(second, copy, *options)


@FORMATS
def test_disk_that_comes_back_while_a_machine_runs_on_it(tmp_path, format_):
    plan = [{"vda": "64k:A", "vdb": "64k:B"}, {"vda": "64k:C"}, {"vda": "64k:.", "vdb": "64k:E"}]
    segments = segments_of(plan)
    copy = tmp_path / "copy"
    for segment in segments[:2]:
        assert applied.apply(segment, "--update", "--format", format_, copy).returncode == 0
    with applied.qemu_nbd(tmp_path, "-f", format_, copy / f"vdb.{format_}"):
        assert refused(segments[2], "--update", "--format", format_, copy) == f"{copy}/vdb.{format_}: {IN_USE}"
    update(segments[2], copy, format_=format_)
    assert same(copy / f"vdb.{format_}", format_, b"E" * 65536, tmp_path)


@pytest.mark.parametrize("second", ["64k:B", "64k:. 64k:B"])
def test_existing_target_that_a_machine_runs_on(tmp_path, second):
    """It does not grow either."""
    copy, file = tmp_path / "copy", tmp_path / "file"
    file.write_bytes(bytes(65536))
    segments = segments_of([{"vda": "64k:A"}, {"vda": second}])
    options = ["--disk", f"vda=raw:{file}"]
    update(segments[0], copy, *options)
    with applied.qemu_nbd(tmp_path, "-f", "raw", file):
        assert refused(segments[1], "--update", *options, copy) == f"raw:{file}: {IN_USE}"
    assert file.read_bytes() == b"A" * 65536
    update(segments[1], copy, *options)


def test_machine_that_is_started_meanwhile(tmp_path, monkeypatch):
    """While the new image of a disk that comes as a whole is made: the old one stays, and the next run replaces it."""
    copy = tmp_path / "copy"
    first = segments_of([{"vda": "64k:A"}])[0]
    second = segments_of([{}, {"vda": "64k:B"}], known=[])[1]
    run(first, copy)
    finish = Replay.finish
    with contextlib.ExitStack() as machine:
        def start(replay):
            finish(replay)
            machine.enter_context(applied.qemu_nbd(tmp_path, "-f", "raw", copy / "vda.raw"))

        monkeypatch.setattr(Replay, "finish", start)
        with pytest.raises(Error) as raised:
            run(second, copy)
        assert str(raised.value) == f"{copy}/vda.raw: {IN_USE}"
        assert (copy / "vda.raw").read_bytes() == b"A" * 65536
    monkeypatch.undo()
    run(second, copy)
    assert (copy / "vda.raw").read_bytes() == b"B" * 65536


def test_no_machine_starts_on_a_raw_copy_that_is_written(tmp_path):
    path = tmp_path / "vda.raw"
    path.write_bytes(bytes(65536))
    with ImageDirectory(str(tmp_path)) as directory:
        target = StandbyImage(directory, "vda", Recipe("raw"), ["vda.raw"]).open(65536)
        argv = ["qemu-io", "-f", "raw", "-c", "write 0 512", path]
        done = subprocess.run(argv, capture_output=True, check=False)
        assert b'Failed to get "write" lock' in done.stderr
        target.close()
        subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)


def test_other_options(tmp_path, segments):
    copy = tmp_path / "copy"
    update(segments[0], copy)
    line = refused(segments[1], "--update", "--format", "raw", copy)
    assert line == f"{copy}: was made with other options, and needs the same again: --format qcow2"


def test_only_one_disk(tmp_path, segments):
    copy = tmp_path / "copy"
    for segment in segments[:2]:
        update(segment, copy, "--disk", "vdb")
    assert [name for name in os.listdir(copy) if not name.startswith(".")] == ["vdb.qcow2"]
    assert same(copy / "vdb.qcow2", "qcow2", IMAGES[1]["vdb"], tmp_path)


def test_onto_what_exists(tmp_path, segments):
    """A disk that grew needs a larger file; one that cannot grow is refused while nothing has happened."""
    copy, file = tmp_path / "copy", tmp_path / "file"
    file.write_bytes(b"x" * len(IMAGES[0]["vdb"]))
    options = ["--disk", "vda", "--disk", f"vdb={file}"]
    for segment in segments:
        update(segment, copy, *options)
    assert same(copy / "vda.qcow2", "qcow2", IMAGES[3]["vda"], tmp_path)
    assert file.read_bytes() == IMAGES[3]["vdb"]


def test_export_that_is_too_small_for_what_follows(tmp_path, segments):
    if not shutil.which("nbdkit"):
        pytest.skip("nbdkit is not installed")
    copy = tmp_path / "copy"
    with applied.nbdkit(tmp_path, "memory", len(IMAGES[0]["vdb"])) as (uri, _):
        update(segments[0], copy, "--disk", f"vdb={uri}")
        line = refused(segments[1], "--update", "--disk", f"vdb={uri}", copy)
        assert line == f'{uri}: has 131072 bytes, disk vdb needs {len(IMAGES[1]["vdb"])}'
        assert not (copy / ".vnb-apply.spool").exists()


def spooling(segment, copy):
    """A process that has all of a segment in its spool but the last 40 bytes."""
    process = applied.start("--update", copy)
    process.stdin.write(segment[:-40])
    process.stdin.flush()
    applied.eventually(lambda: list(copy.glob(".vnb-apply.*.partial/.vnb-apply.spool")))
    return process


def test_two_at_a_time(tmp_path, segments):
    copy = tmp_path / "copy"
    update(segments[0], copy)
    process = spooling(segments[1], copy)
    assert refused(segments[1], "--update", copy) == f"{copy}: another vnb-apply works on this copy"
    assert process.communicate(segments[1][-40:], timeout=applied.DEADLINE) == (b"", b"")
    check(copy, 1, tmp_path)


def test_no_room_for_the_spool(tmp_path):
    first, second = segments_of([{"vda": "1M:A"}, {"vda": "1M:?"}])
    with applied.mounted(tmp_path / "copy", "size=2500k"):
        copy = tmp_path / "copy"
        update(first, copy, format_="raw")
        (copy / "other").write_bytes(bytes(1 << 20))
        before = stamps(copy)
        line = refused(second, "--update", "--format", "raw", copy)
        assert line == f"{copy}/.vnb-apply.spool: No space left on device"
        assert stamps(copy) == before


def run(content, directory):
    """Update within this process."""
    buffers = Buffers()
    copy = Standby(str(directory), Recipe("raw"), {}, ["--format raw"], buffers)
    with samples.memory(content) as fd, copy as standby:
        standby.resume()
        for segment in stream.Reader(fd, "stdin", pool=buffers):
            standby.take(segment)
        standby.check_reached()


@pytest.mark.parametrize("start, end", [(0, 1), (1, 2), (2, 4)])
def test_killed_at_every_step(tmp_path, segments, start, end):
    """
    A copy at point start-1 is to be brought to point end-1, and killed at each change on its way.

    Before it goes on, it is at one of the points on its way, with all its disks, or says that it is not finished;
    and it gets to its end from there.
    """
    base = tmp_path / "base"
    if start:
        update(b"".join(segments[:start]), base, format_="raw")
    content = b"".join(segments[start:end])
    count, lived, unfinished = 0, False, 0
    while not lived:
        count += 1
        copy = tmp_path / f"copy-{count}"
        if start:
            # Times are part of the state.
            shutil.copytree(base, copy)
        lived = applied.killed_at(count, run, content, copy)
        if not lived:
            unfinished += (copy / ".vnb-apply.spool").exists()
            consistent(copy)
        run(content, copy)
        check(copy, end - 1, tmp_path, "raw")
        shutil.rmtree(copy)
    assert count > 15
    assert unfinished > 3 or (start, end) == (0, 1)


def consistent(copy):
    """What a killed run left is a point of the plan, if it claims to be."""
    state = copy / ".vnb-apply.state"
    if not state.exists() or (copy / ".vnb-apply.spool").exists():
        return
    point = json.loads(state.read_text())["point"]
    if point is None:
        return
    number = [makers.point(number) for number in range(len(PLAN))].index(point)
    for name, content in IMAGES[number].items():
        assert (copy / f"{name}.raw").read_bytes() == content


def test_recover_reads_nothing(tmp_path, segments):
    """For whoever needs the copy now, and has no stream at hand."""
    copy = tmp_path / "copy"
    update(segments[0], copy, format_="raw")
    count = 1
    while not (copy / ".vnb-apply.spool").exists():
        assert not applied.killed_at(count, run, segments[1], copy)
        count += 1
    done = applied.apply(b"not read", "--update", "--resume", "--format", "raw", copy)
    assert (done.returncode, done.stderr) == (
        0, f"vnb-apply: {copy}: going on with {makers.point(1)}, whose update was interrupted\n"
    )
    check(copy, 1, tmp_path, "raw")
    update(b"not read", copy, "--resume", format_="raw")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_stopped_while_it_spools(tmp_path, segments, signum):
    copy = tmp_path / "copy"
    update(segments[0], copy)
    process = spooling(segments[1], copy)
    process.send_signal(signum)
    process.communicate(timeout=applied.DEADLINE)
    assert process.returncode == -signum
    if signum == signal.SIGTERM:
        check(copy, 0, tmp_path)
    update(segments[1], copy)
    check(copy, 1, tmp_path)


def test_usage(tmp_path):
    for arguments in (["--resume", tmp_path], ["--update"], ["--update", "--compress", tmp_path]):
        assert applied.apply(b"", *arguments).returncode == 2


def test_damaged_state(tmp_path, segments):
    copy = tmp_path / "copy"
    update(segments[0], copy)
    for text in ("", "{", "[]", '{"version": 2}'):
        (copy / ".vnb-apply.state").write_text(text)
        line = refused(segments[1], "--update", copy)
        assert line.startswith(f"{copy}/.vnb-apply.state: not the state of a copy")


@pytest.mark.parametrize("path, value", [
    (("point",), ...), (("point",), 5), (("point",), False), (("uuid",), None), (("created",), 5), (("history",), [5]),
    (("left",), []), (("left",), {"../x": {"size": 5, "files": {}}}),
    (("left",), {"x": {"size": 5, "files": {"/x": 1}}}),
    (("history",), None), (("options",), "--format"), (("taking",), None), (("taking",), ["../outside"]),
    (("taking",), [".vnb-apply.state"]), (("disks",), []), (("disks", "../x"), {"size": 5, "files": {}}),
    (("disks", "vda"), {}), (("disks", "vda", "size"), "5"),
    (("disks", "vda", "files"), None), (("disks", "vda", "files"), {"../outside": [1, 2, 3]}),
    (("disks", "vda", "files"), {"": [1, 2, 3]}),
])
def test_state_that_makes_no_sense(tmp_path, segments, path, value):
    """Files that it names are written and removed: none may be outside the copy."""
    copy = tmp_path / "copy"
    update(segments[0], copy)
    state = place = json.loads((copy / ".vnb-apply.state").read_text())
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    if value is ...:
        del place[path[-1]]
    (copy / ".vnb-apply.state").write_text(json.dumps(state))
    line = refused(segments[1], "--update", copy)
    assert line == f"{copy}/.vnb-apply.state: not the state of a copy that this vnb knows"


def test_state_that_is_no_file(tmp_path, segments):
    copy = tmp_path / "copy"
    update(segments[0], copy)
    (copy / ".vnb-apply.state").rename(tmp_path / "state")
    (copy / ".vnb-apply.state").symlink_to(tmp_path / "state")
    assert refused(segments[1], "--update", copy) == f"{copy}/.vnb-apply.state: Too many levels of symbolic links"
    (copy / ".vnb-apply.state").unlink()
    os.mkfifo(copy / ".vnb-apply.state")
    assert "not the state of a copy" in refused(segments[1], "--update", copy)
    (copy / ".vnb-apply.state").unlink()
    (copy / ".vnb-apply.state").write_text('{"version":' + "[" * 100_000)
    assert "not the state of a copy" in refused(segments[1], "--update", copy)
