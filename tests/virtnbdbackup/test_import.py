# SPDX-License-Identifier: LGPL-2.1-or-later
"""vnb-import on directories as virtnbdbackup leaves them, made here: facts of its format, own code."""

import json
import os
import subprocess
import zlib

import pytest
import samples
from hypothesis import given, settings
from hypothesis import strategies as st
from peer_files import CPT, DOMAIN, SIZE, backup, data_file, meta, noise
from samples import applied

from vnb.base.errors import Error
from vnb.cli.progress import Progress
from vnb.format.values import FAILED
from vnb.virtnbdbackup import conversion, datafile
from vnb.virtnbdbackup import directory as peer

pytestmark = pytest.mark.usefixtures("utc")

NAMELESS = "<domain><devices><disk/></devices></domain>"


def imported(directory, *words):
    """The stream that vnb-import writes; raises AssertionError with what it says."""
    done = command(directory, *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def command(directory, *words):
    done = subprocess.run(["vnb-import", *words, str(directory)], capture_output=True)
    done.stderr = done.stderr.decode()
    return done


def refused(directory, reason, *words):
    done = command(directory, *words)
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert reason in lines[-1], done.stderr
    assert "Traceback" not in done.stderr
    if done.stdout:  # what there is of a segment has no end
        with pytest.raises(Error):
            samples.read(done.stdout)


def partly(directory, reason, *points):
    """All but these checkpoints' points are imported, and each of these has its line."""
    done = command(directory)
    assert done.returncode == 3, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.endswith(": not imported")]
    assert len(lines) == len(points)
    assert reason in lines[0]
    assert all(any(f"{point}.data: " in line for line in lines) for point in points), lines
    return [head["point"].partition(".")[2] for head, *_ in samples.read(done.stdout)]


@pytest.mark.parametrize("compressed", [False, True, 2])
def test_each_point(tmp_path, compressed):
    states = backup(tmp_path, compressed, ("vda", "vdb"))
    for checkpoint, state in states.items():
        assert applied(imported(tmp_path, "--until", checkpoint)) == state
    content = imported(tmp_path)
    assert applied(content) == state
    heads = [segment[0] for segment in samples.read(content)]
    assert [head["point"] for head in heads] == [f"20260131T1{number}0000.{CPT}.{number}" for number in range(3)]
    assert [head["parent"] for head in heads] == [None, *(head["point"] for head in heads[:2])]
    assert {head["checkpoint"] for head in heads} == {None}
    assert [(head["level"], head["domain"], head["uuid"]) for head in heads] == [
        ("full", "vm", "u-1"), ("inc", "vm", "u-1"), ("inc", "vm", "u-1")
    ]
    assert applied(imported(tmp_path, "--until", "2026-01-31T11")) == states[f"{CPT}.1"]
    assert applied(imported(tmp_path, "--until", heads[1]["point"])) == states[f"{CPT}.1"]


@given(st.lists(st.tuples(st.integers(1, 40_000), st.sampled_from(["data", "zero"])), min_size=1, max_size=8),
       st.integers(100, 50_000), st.booleans())
@settings(max_examples=40)
def test_extents_of_any_length(tmp_path_factory, runs, chunk, compressed):
    directory = tmp_path_factory.mktemp("any")
    extents, image = [], b""
    for number, (length, kind) in enumerate(runs):
        content = noise(length, number) if kind == "data" and number % 2 else b"x" * length
        extents.append((len(image), content if kind == "data" else length))
        image += content if kind == "data" else bytes(length)
    data_file(directory / "vda.full.data", meta(virtualSize=len(image), compressed=compressed), extents, chunk)
    ((source,),) = [point.files for point in peer.Directory(str(directory)).points]
    with samples.written() as (writer, content):
        out = writer.segment(samples.head(), [samples.disk("vda", len(image))])
        with datafile.Input(source.path) as file:
            conversion.Copy(source, file, out, 0).run()
        out.end()
        assert applied(content())["vda"] == image


def test_a_long_lz4_frame_is_unpacked_in_pieces(tmp_path):
    """virtnbdbackup's are of up to 32 MiB."""
    content = noise(3 << 20) + bytes(6 << 20) + noise(1 << 20, 1)
    data_file(tmp_path / "vda.full.data", meta(virtualSize=len(content), compressed=2), [(0, content)], 32 << 20)
    ((_, _, frames, _, _),) = samples.read(imported(tmp_path))
    assert b"".join(frame[7] for frame in frames) == content
    assert max(frame[3] for frame in frames) == datafile.PIECE


def test_what_was_saved_beside_the_disks(tmp_path):
    backup(tmp_path)
    (tmp_path / f"vm_VARS.fd.{CPT}.1").write_bytes(b"nvram" * 10)
    (tmp_path / f"vda.{CPT}.1.qcow.json").write_text('{"format": "qcow2"}')
    segment = samples.read(imported(tmp_path))[1]
    files = [(frame[1]["role"], frame[1]["path"], frame[2]) for frame in segment[2] if frame[0] == "File"]
    nvram = "nvram", "/var/lib/nvram/vm_VARS.fd", b"nvram" * 10
    assert files == [nvram, ("image-info", "vda", b'{"format": "qcow2"}')]
    assert segment[0]["domain_xml"] == DOMAIN
    assert segment[1][0]["image"] == {"format": "qcow2", "path": "/images/a.qcow2"}


def test_differential_backups_are_leaves(tmp_path):
    states = backup(tmp_path, disks=("vda", "vdb"))
    for disk, seconds, day in (("vda", 1769900000, 1), ("vdb", 1769900001, 1), ("vda", 1769990000, 2),
                               ("vdb", 1769990000, 2)):
        header = meta(disk, 3, date=f"2026-02-0{day}T12:00:00", parent=2)
        data_file(tmp_path / f"{disk}.diff.{seconds}.data", header, [(0, b"%d" % seconds)])
    (tmp_path / "vmconfig.1769900007.xml").write_text(DOMAIN)
    points = peer.Directory(str(tmp_path)).points
    leaves = [point for point in points if point.level == "diff"]
    assert [[file.disk for file in point.files] for point in leaves] == [["vda", "vdb"], ["vda", "vdb"]]
    assert {point.head["parent"] for point in leaves} == {points[2].head["point"]}
    assert leaves[0].head["domain_xml"] == DOMAIN
    state = applied(imported(tmp_path, "--until", leaves[0].head["point"]))
    expected = bytearray(states[f"{CPT}.2"]["vda"])
    expected[:10] = b"1769900000"
    assert state["vda"] == expected


def test_the_checkpoint_says_when(tmp_path):
    """In UTC, unlike the header."""
    backup(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    text = "<domaincheckpoint><creationTime>1769000000</creationTime></domaincheckpoint>"
    (tmp_path / "checkpoints" / f"{CPT}.0.xml").write_text(text)
    assert peer.Directory(str(tmp_path)).points[0].head["created"] == "2026-01-21T12:53:20.000000Z"


def test_a_clock_that_went_back(tmp_path):
    backup(tmp_path)
    data_file(tmp_path / f"vda.inc.{CPT}.1.data", meta("vda", 1, date="2020-01-01T00:00:00"), [(0, b"x")])
    heads = [point.head for point in peer.Directory(str(tmp_path)).points]
    assert [head["created"] for head in heads] == sorted(head["created"] for head in heads)
    assert len({head["created"] for head in heads}) == 3


def test_no_time_after_the_last_one(tmp_path):
    """Each point is younger than the one it starts from, but for the end of all calendars."""
    data_file(tmp_path / "vda.full.data", meta(date="9999-12-31T23:59:59.999999+00:00"), [(0, SIZE)])
    data_file(tmp_path / f"vda.inc.{CPT}.1.data", meta(number=1), [(0, b"a")])
    reason = f"nothing can come after 9999-12-31 23:59:59.999999+00:00, the time of {CPT}.0"
    assert partly(tmp_path, reason, f"inc.{CPT}.1") == [f"{CPT}.0"]


def test_a_file_of_no_year(monkeypatch, tmp_path):
    """A file system may hold times that no calendar has; the one here may not, so stat(2) is told what to say."""
    (tmp_path / "vda.full.data").write_bytes(bytes(SIZE))
    monkeypatch.setattr(datafile.Input, "modified", property(lambda _: 1 << 60, lambda *_: None), raising=False)
    (lost,) = peer.Directory(str(tmp_path)).lost
    assert "has a modification time that is out of range" in str(lost)


def test_a_number_of_other_digits(tmp_path):
    """What Unicode calls a digit need not be one of a number."""
    backup(tmp_path)
    data_file(tmp_path / "vda.diff.²²²²²²²²²².data", meta(number=3, parent=2), [(0, b"abc")])
    (tmp_path / "vmconfig.1769900007.xml").write_text(DOMAIN)
    assert len(samples.read(imported(tmp_path))) == 4


def test_lz4_frames_of_a_byte_each(tmp_path):
    header = meta(virtualSize=5000, compressed=True)
    data_file(tmp_path / "vda.full.data", header, [(0, noise(5000))], chunk=1)
    assert applied(imported(tmp_path)) == {"vda": noise(5000)}


def test_a_raw_image_beside_a_stream(tmp_path):
    backup(tmp_path)
    image = bytes(700_000) + noise(300_000) + bytes(123)
    (tmp_path / "vdb.copy.data").write_bytes(image)
    first = samples.read(imported(tmp_path, "--until", f"{CPT}.0"))
    assert first[0][0]["level"] == "full"
    assert applied(imported(tmp_path, "--until", f"{CPT}.0"))["vdb"] == image
    assert first[0][3]["data"] < 70_000 + 100 + 600_000  # zeroes are not data


def test_a_full_backup_under_the_name_of_an_increment(tmp_path):
    """2.x makes one where the last checkpoint's bitmap is broken."""
    backup(tmp_path)
    header = meta("vda", 3, incremental=False, parentCheckpoint="")
    data_file(tmp_path / f"vda.inc.{CPT}.3.data", header, [(0, b"x" * SIZE)])
    segments = samples.read(imported(tmp_path, "--until", f"{CPT}.3"))
    assert [segment[0]["level"] for segment in segments] == ["full"]


RUN = "[2026-01-31 11:00:00] INFO lib common - printVersion [MainThread]: Version: {} Arguments: virtnbdbackup {}\n"
WROTE = "[2026-01-31 11:00:00] INFO [vda]: Write data to target file: [/b/vda.inc.virtnbdbackup.{}.data.partial].\n"


@pytest.mark.parametrize("version, arguments, doubt", [
    ("1.9.15", "-l inc", False), ("2.0", "-l inc", False), ("2.20", "-l inc", False), ("2.21", "-l inc", True),
    ("2.28", "-l inc -o /b", True), ("2.47", "-l inc --no-sparse-detection", False),
    ("2.47", "-l auto --no-sparse", False), ("2.47", "-l inc --no-sp", False), ("2.47", "--noprogress", True),
    ("3.0", "-l inc", True),
])
def test_doubt_is_said_unless_the_log_knows(tmp_path, version, arguments, doubt):
    """From 2.21 on zeroes are left out, unless the run was told not to look for them; options may be cut short."""
    backup(tmp_path)
    assert "it cannot be known" in command(tmp_path).stderr
    (tmp_path / "backup.inc.01312026110000.log").write_text(RUN.format(version, arguments))
    done = command(tmp_path)
    assert ("it cannot be known" in done.stderr) == doubt
    assert done.returncode == 0
    assert "it cannot be known" not in command(tmp_path, "--until", f"{CPT}.0").stderr


def test_doubt_is_about_the_files_that_a_losing_run_wrote(tmp_path):
    """A log names what its run wrote; one that no log names is judged by all of them."""
    backup(tmp_path)
    log = tmp_path / "backup.inc.01312026110000.log"
    log.write_text(RUN.format("2.47", "-l inc") + WROTE.format(1) + RUN.format("2.20", "-l inc") + WROTE.format(2))
    warning = command(tmp_path).stderr
    assert f"{tmp_path}: 20260131T110000.{CPT}.1: may lack what the guest zeroed" in warning
    assert f"{CPT}.2" not in warning
    log.write_text(RUN.format("2.47", "-l inc --no-sparse-detection") + WROTE.format(1) + "x" * 300_000 + "\n")
    assert command(tmp_path).stderr == ""
    (tmp_path / "backup.inc.01312026120000.log").write_text(RUN.format("2.47", "-l inc") + WROTE.format(1))
    warning = command(tmp_path).stderr
    assert f"{CPT}.1, 20260131T120000.{CPT}.2: may lack" in warning


def test_what_the_agent_said_is_taken_along(tmp_path):
    """2.46 and later save it; a differential backup's file is named after a second of its own."""
    backup(tmp_path)
    for ident in (f"{CPT}.0", f"{CPT}.1", "1769900009"):
        (tmp_path / f"osinfo.{ident}").write_text(json.dumps({"hostname": ident}))
    header = meta(number=3, parent=2, date="2026-02-01T12:00:00")
    data_file(tmp_path / "vda.diff.1769900000.data", header, [(0, b"abc")])
    found = [
        [(frame[1]["path"], json.loads(frame[2])["hostname"]) for frame in frames
         if frame[0] == "File" and frame[1]["role"] == "guest-info"]
        for _, _, frames, *_ in samples.read(imported(tmp_path))
    ]
    assert found == [
        [("guest-info.json", f"{CPT}.0")], [("guest-info.json", f"{CPT}.1")], [], [("guest-info.json", "1769900009")],
    ]


def test_notes_on_what_is_not_there(tmp_path):
    backup(tmp_path)
    (tmp_path / "vm.cpt").write_text(json.dumps([f"{CPT}.{number}" for number in range(5)]))
    (tmp_path / "vda.inc.virtnbdbackup.3.data.partial").write_bytes(b"")
    said = command(tmp_path).stderr
    assert f"no data of {CPT}.3, {CPT}.4: a backup that failed" in said
    assert "vda.inc.virtnbdbackup.3.data.partial: left out" in said


def test_a_gap(tmp_path):
    backup(tmp_path)
    (tmp_path / f"vda.inc.{CPT}.1.data").unlink()
    assert partly(tmp_path, f"starts from {CPT}.1, of which nothing is here", f"inc.{CPT}.2") == [f"{CPT}.0"]


def test_a_circle(tmp_path):
    backup(tmp_path)
    data_file(tmp_path / f"vda.inc.{CPT}.1.data", meta("vda", 1, parent=2), [(0, b"x")])
    assert partly(tmp_path, "circular base", f"inc.{CPT}.1", f"inc.{CPT}.2") == [f"{CPT}.0"]


def test_an_increment_of_a_disk_that_was_left_out_before(tmp_path):
    backup(tmp_path, disks=("vda", "vdb"))
    (tmp_path / f"vdb.inc.{CPT}.1.data").unlink()
    found = partly(tmp_path, "has changes of disk vdb, but nothing before it has", f"inc.{CPT}.2")
    assert found == [f"{CPT}.0", f"{CPT}.1"]


def test_an_increment_that_an_off_machine_wrote_over(tmp_path):
    """It starts from the very checkpoint whose data it has replaced: both are lost, and what was before is not."""
    states = backup(tmp_path)
    data_file(tmp_path / f"vda.inc.{CPT}.2.data", meta(number=2, parent=2), [(0, b"abc")])
    reason = f"starts from {CPT}.2: the data of that was overwritten by a backup of the domain when it was off"
    assert partly(tmp_path, reason, f"inc.{CPT}.2") == [f"{CPT}.0", f"{CPT}.1"]
    assert "no data of" not in command(tmp_path).stderr
    done = command(tmp_path, "--until", f"{CPT}.1")  # the lost one is not asked for
    assert (done.returncode, applied(done.stdout)) == (0, states[f"{CPT}.1"])
    assert "not imported" not in done.stderr
    assert command(tmp_path, "--until", "2026-01-31").returncode == 3
    done = command(tmp_path, "--until", f"{CPT}.2")
    assert (done.returncode, done.stdout) == (1, FAILED)
    assert done.stderr == f"vnb-import: {tmp_path}/vda.inc.{CPT}.2.data: {reason}\n"


@pytest.mark.parametrize("number, left", [(0, 0), (1, 1), (2, 2)])
def test_a_damaged_header_spoils_its_point_and_no_other(tmp_path, number, left):
    """That the other disk's file is sound does not make a point of it."""
    backup(tmp_path, disks=("vda", "vdb"))
    level = f"inc.{CPT}.{number}" if number else "full"
    (tmp_path / f"vdb.{level}.data").write_bytes(b"meta 0")
    done = command(tmp_path)
    assert done.returncode == (3 if left else 1)
    assert f"vdb.{level}.data: " in done.stderr
    assert len(samples.read(done.stdout)) == left if left else done.stdout == FAILED


def test_a_damaged_differential_file_spoils_all_that_it_may_belong_to(tmp_path):
    """Its name says the second in which it was begun, which may be that of either neighbour."""
    backup(tmp_path, disks=("vda", "vdb"))
    for disk, seconds in (("vda", 1769900000), ("vdb", 1769900001), ("vda", 1769990000), ("vdb", 1769990001)):
        header = meta(disk, 3, date=f"2026-02-01T12:00:{seconds % 60:02}", parent=2)
        data_file(tmp_path / f"{disk}.diff.{seconds}.data", header, [(0, b"%d" % seconds)])
    (tmp_path / "vdb.diff.1769900001.data").write_bytes(b"meta 0")
    done = command(tmp_path)
    assert done.returncode == 3
    assert [head["level"] for head, *_ in samples.read(done.stdout)] == ["full", "inc", "inc", "diff"]
    (tmp_path / "vdb.diff.1769990001.data").unlink()
    done = command(tmp_path)
    assert [head["level"] for head, *_ in samples.read(done.stdout)] == ["full", "inc", "inc"]


def test_a_checksum_that_differs(tmp_path):
    backup(tmp_path)
    path = tmp_path / "vda.full.data"
    sound = zlib.adler32(path.read_bytes())
    (tmp_path / "vda.full.data.chksum").write_text(str(sound))
    imported(tmp_path)
    (tmp_path / "vda.full.data.chksum").write_text("{checksum}")
    imported(tmp_path)
    for text in (str(sound ^ 1), "9" * 10_000):
        (tmp_path / "vda.full.data.chksum").write_text(text)
        refused(tmp_path, "is damaged: its checksum is")


@pytest.mark.parametrize("name, changes, reason", [
    ("vda.full.data", {"streamVersion": 3}, "stream version 3, known are 1, 2"),
    ("vda.full.data", {"diskName": "vdb"}, "is of disk vdb, not of vda"),
    ("vda.full.data", {"virtualSize": -1}, "a disk of -1 bytes"),
    ("vda.full.data", {"virtualSize": "9"}, 'no sound "virtualSize"'),
    ("vda.full.data", {"date": "yesterday"}, 'no sound "date"'),
    ("vda.full.data", {"compressed": 1, "compressionMethod": "zip"}, "compressed with zip, known is lz4"),
    ("vda.full.data", {"dataSize": 5}, "the header says 5 bytes of data, there were 3"),
    ("vda.full.data", {"virtualSize": SIZE + 1}, "1 bytes of a full disk are missing"),
    (f"vda.inc.{CPT}.1.data", {"incremental": True}, "does not say what it starts from"),
    (f"vda.inc.{CPT}.1.data", {"incremental": True, "parentCheckpoint": "x"}, f"is of {CPT}.0, not of {CPT}.1"),
    ("vda.inc.data", {}, "not that of a backup of this level"),
    ("vda.full.x.data", {}, "not that of a backup of this level"),
])
def test_headers_that_make_no_sense(tmp_path, name, changes, reason):
    data_file(tmp_path / name, meta(**changes), [(0, b"abc"), (3, SIZE - 3)])
    refused(tmp_path, reason)


@pytest.mark.parametrize("extents, reason", [
    ([(0, b"abc")], "bytes of a full disk are missing"),
    ([(0, b"abc"), (4, SIZE - 4)], "no frame has the 1 bytes at offset 3"),
    ([(0, b"abc"), (2, SIZE - 2)], "overlap or are not in the disk"),
    ([(0, b"abc"), (3, SIZE)], "overlap or are not in the disk"),
])
def test_extents_that_make_no_sense(tmp_path, extents, reason):
    data_file(tmp_path / "vda.full.data", meta(), extents)
    refused(tmp_path, reason)


@pytest.mark.parametrize("compressed", [False, 2])
def test_a_cut_file_is_found_wherever_it_ends(tmp_path, compressed):
    header = meta(virtualSize=300, compressed=compressed)
    content = data_file(tmp_path / "vda.full.data", header, [(0, b"ab" * 50), (100, 50), (150, noise(150))], 64)
    convert(tmp_path)
    for end in range(len(content)):
        (tmp_path / "vda.full.data").write_bytes(content[:end])
        if content[:end].startswith(b"meta "):
            with pytest.raises(Error):
                convert(tmp_path)


@pytest.mark.parametrize("compressed", [False, 2])
def test_any_byte_may_be_wrong(tmp_path, compressed):
    """The format has no checksum of plain data; but never a traceback, and lz4 frames have their own."""
    header = meta(virtualSize=300, compressed=compressed)
    content = data_file(tmp_path / "vda.full.data", header, [(0, b"ab" * 50), (100, 50), (150, noise(150))], 64)
    start = content.index(b"data ")
    for at in range(len(content)):
        for bit in (0, 6) if at % 3 else (3,):
            damaged = bytearray(content)
            damaged[at] ^= 1 << bit
            (tmp_path / "vda.full.data").write_bytes(damaged)
            try:
                state = convert(tmp_path)
            except Error:
                continue
            if compressed and at > start:
                assert state == {"vda": b"ab" * 50 + bytes(50) + noise(150)}


def convert(directory):
    with samples.written() as (writer, content):
        for point in peer.Directory(str(directory)).points:
            point.write(writer, Progress("none"))
        return applied(content())


def test_names_that_would_leave_the_directory(tmp_path):
    data_file(tmp_path / "vda.full.data", meta(checkpointName="../../x"), [(0, b"abc"), (3, SIZE - 3)])
    (point,) = peer.Directory(str(tmp_path)).points
    assert point.made.year == 2026  # no file was sought there


@pytest.mark.parametrize("make, reason", [
    (lambda path: None, "No such file or directory"),
    (lambda path: path.write_text(""), "Not a directory"),
    (lambda path: path.mkdir(), "no backup of virtnbdbackup here"),
    (lambda path: (path.mkdir(), os.mkfifo(path / "vda.full.data")), "not a regular file"),
    (lambda path: (path.mkdir(), (path / "vda.inc.x.data").write_text("image")), "not a stream of virtnbdbackup"),
])
def test_what_is_no_backup(tmp_path, make, reason):
    make(tmp_path / "it")
    refused(tmp_path / "it", reason)


@pytest.mark.parametrize("content", [b"{}", b"[" * 100_000, b"\xff"])
def test_a_list_of_checkpoints_that_is_damaged_costs_nothing(tmp_path, content):
    backup(tmp_path)
    (tmp_path / "vm.cpt").write_bytes(content)
    done = command(tmp_path)
    assert done.returncode == 0
    assert "vm.cpt: is no" in done.stderr
    assert len(samples.read(done.stdout)) == 3


@pytest.mark.parametrize("content, reason", [
    (b"<a", "malformed XML"), (b"\xff", "is not UTF-8"), (NAMELESS.encode(), "has a disk without a name"),
])
def test_a_configuration_that_is_damaged_spoils_the_points_that_need_it(tmp_path, content, reason):
    backup(tmp_path)
    (tmp_path / "vmconfig.a.xml").write_bytes(content)  # no point's
    assert len(samples.read(imported(tmp_path))) == 3
    (tmp_path / f"vmconfig.{CPT}.1.xml").write_bytes(content)
    done = command(tmp_path)
    assert (done.returncode, len(samples.read(done.stdout))) == (3, 1)
    assert reason in done.stderr
    assert f"vda.inc.{CPT}.2.data: starts from {CPT}.1, which cannot be restored: not imported" in done.stderr


def test_a_domain_without_configuration_has_the_name_of_its_list(tmp_path):
    backup(tmp_path)
    for path in tmp_path.glob("vmconfig.*"):
        path.unlink()
    done = command(tmp_path)
    assert "it is taken to be vm" in done.stderr
    assert samples.read(done.stdout)[0][0]["domain"] == "vm"
