# SPDX-License-Identifier: LGPL-2.1-or-later
"""vnb-cat: a chain from a set, in order, up to a point, some disks; and nothing of what is damaged."""

import os
import random
import shutil
import signal
import subprocess
from pathlib import Path

import makers
import pytest
import samples
from servers import DEADLINE, command, forked

from vnb.cli import apply as vnb_apply
from vnb.cli import cat, pack
from vnb.format import stream
from vnb.store import backupset, chain, saved_segment

PLAN = [
    {"vda": "300k:A 64k:? 1M:- 64k:0", "vdb": "64k:B 64k:0"},
    {"vda": "10k:. 20k:C 200k:. 100k:0 40k:?", "vdb": "1k:. 512:?"},
    {"vda": "15k:. 4k:? 1k:0", "vdb": "", "vdc": "64k:D"},
    {"vda": "1M:. 64k:E", "vdc": "5k:. 1k:F"},
]
POINTS = [makers.point(number) for number in range(len(PLAN))]


@pytest.fixture
def saved(tmp_path):
    """A set; its files are named so that their order says nothing, and so are their times."""
    directory = tmp_path / "set"
    paths = makers.make_set(str(directory), PLAN)
    for number, path in enumerate(paths):
        os.utime(path, (5 - number, 5 - number))
        os.rename(path, directory / f"{(7 * number + 3) % 5}.vnb")
    return directory


def path_of(directory, number):
    """The file that holds a point."""
    (path,) = [path for path in directory.iterdir() if saved_segment.segments_in_file(path)[0].head["point"]
               == POINTS[number]]
    return path


def run(*arguments):
    return forked("vnb-cat", cat, *arguments)


def heads(output):
    return [head for head, *_ in samples.read(output)]


def points(output):
    return [head["point"] for head in heads(output)]


def apply(output):
    """{disk: its bytes} after all segments of a stream were applied, each if it may follow."""
    images, follow = {}, chain.Follow("test")
    for head, disks, frames, _, _ in samples.read(output):
        follow.accept(head, disks)
        images = {disk["name"]: images.get(disk["name"], bytearray()) for disk in disks}
        for disk in disks:
            images[disk["name"]].extend(bytes(disk["size"] - len(images[disk["name"]])))
        for frame in frames:
            image = images[disks[frame[1]]["name"]]
            if frame[0] == "data":
                image[frame[2] : frame[2] + frame[3]] = frame[7]
            else:
                for offset, length in zip(frame[2][0::3], frame[2][1::3]):
                    image[offset : offset + length] = bytes(length)
    return images


def test_order_comes_from_parents(saved):
    output = run(saved).ok()
    assert points(output) == POINTS
    assert apply(output) == makers.images(PLAN)[-1]


def test_the_very_frames(saved):
    """Compressed ones stay as they are, and so does the id: it is the same segment."""
    whole = run("--until", POINTS[0], saved).ok()
    (head, disks, frames, _, _), = samples.read(path_of(saved, 0).read_bytes())
    assert samples.read(whole)[0][:3] == (head, disks, frames)


@pytest.mark.parametrize("number", range(len(PLAN)))
def test_until_a_point(saved, number):
    output = run("--until", POINTS[number], saved).ok()
    assert points(output) == POINTS[: number + 1]
    assert apply(output) == makers.images(PLAN)[number]


@pytest.mark.parametrize(
    "until, count", [("2026-01-31T12:00:01Z", 2), ("2026-01-31Z", 4), ("2026-01-31T12:00:01.5Z", 2), ("2026", 4)],
)
def test_until_a_time(saved, until, count):
    assert points(run("--until", until, saved).ok()) == POINTS[:count]


def test_until_what_is_not_there(saved):
    said = "no restore point x (vnb-dump --list has them), nor is that a time such as 2026-01-31T12:00"
    assert run("--until", "x", saved).failed(f"vnb-cat: {saved}: {said}") == b""
    assert run("--until", "2025", saved).failed(f"vnb-cat: {saved}: no restore point is as old as 2025: "
                                             "the oldest is of 2026-01-31T12:00:00.000000Z") == b""


def test_some_disks(saved):
    """Their numbers change, and so it is another segment: it has another id, and the same point."""
    output = run("--disk", "vdc", "--disk", "vda", saved).ok()
    found = samples.read(output)
    assert points(output) == POINTS
    assert [[disk["name"] for disk in disks] for _, disks, *_ in found] == [["vda"], ["vda"], ["vda", "vdc"],
                                                                           ["vda", "vdc"]]
    ids = [head["id"] for head in heads(output)]
    assert not {f"id-{number}" for number in (0, 1, 2)} & set(ids)
    assert ids[3] == "id-3"
    assert run("--disk", "vda", "--disk", "vdc", saved).ok() == output
    assert apply(output) == makers.images(PLAN)[-1]
    output = run("--disk", "vdb", "--until", POINTS[2], saved).ok()
    assert apply(output) == {"vdb": makers.images(PLAN)[2]["vdb"]}


def test_a_disk_that_the_point_does_not_have(saved):
    """Its older data is of no use to anybody, so the default leaves it out."""
    assert all(disk["name"] != "vdb" for _, disks, *_ in samples.read(run(saved).ok()) for disk in disks)
    assert run("--disk", "vdb", saved).failed(f"vnb-cat: --disk: no disk vdb at restore point {POINTS[3]}") == b""
    said = f"vnb-cat: --disk: no disk w, x at restore point {POINTS[3]}"
    assert run("--disk", "x", "--disk", "w", saved).failed(said) == b""


def test_files_and_sets_as_operands(saved, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    shutil.move(path_of(saved, 2), other / "x.vnb")
    single = tmp_path / "any name"
    shutil.move(path_of(saved, 1), single)
    operands = [single, saved, other]
    random.Random(5).shuffle(operands)
    assert points(run(*operands).ok()) == POINTS
    done = run(saved, other)
    said = f"{POINTS[2]} needs {POINTS[1]}, which is not here; --until {POINTS[0]} is the newest that can be restored"
    assert done.failed(f"vnb-cat: the chain: gap: {said}") == b""


def test_segments_that_cat_put_into_one_file(saved, tmp_path):
    one = tmp_path / "one"
    one.write_bytes(b"".join(path_of(saved, number).read_bytes() for number in range(4)))
    assert run(one).ok() == run(saved).ok()
    assert run("--until", POINTS[1], one).ok() == run("--until", POINTS[1], saved).ok()


def test_its_output_is_a_file_like_any_other(saved, tmp_path):
    again = tmp_path / "again"
    again.write_bytes(run(saved).ok())
    assert run(again).ok() == run(saved).ok()


def test_other_files_in_a_set_are_passed_over(saved):
    (saved / "README").write_text("mine")
    (saved / ".x.vnb.1234.partial").write_bytes(b"half")
    assert points(run(saved).ok()) == POINTS


def fork(saved, created, point="fork"):
    """Put a second increment to point 1 into a set."""
    head = makers.head(
        2, id=f"id-{point}", point=point, checkpoint=None, created=created, parent=POINTS[1], level="diff",
    )
    (saved / f"{point}.vnb").write_bytes(samples.segment(head, [
        samples.disk("vda", 1460 << 10, "inc"), samples.disk("vdb", 128 << 10, "inc")]))


def test_what_lies_off_the_path_is_told_to_those_who_ask(saved):
    """A diff, or what a crash between storing and committing leaves: nothing is wrong with it."""
    fork(saved, "2026-01-31T12:00:02.500000Z")
    done = run(saved)
    assert points(done.out) == POINTS
    assert (done.status, done.err) == (0, "")
    more = f"{saved}: 1 other restore points are not needed for {POINTS[3]} (vnb-dump --list has them)\n"
    assert more in run("-v", saved).err
    fork(saved, "2026-01-31T12:00:09.000000Z")
    done = run(saved)
    assert points(done.out) == [*POINTS[:2], "fork"]
    assert (done.status, done.err) == (0, "")
    assert points(run("--until", POINTS[3], saved).ok()) == POINTS


# What is wrong with a set


def test_a_gap(saved):
    path_of(saved, 1).unlink()
    said = f"{POINTS[2]} needs {POINTS[1]}, which is not here; --until {POINTS[0]} is the newest that can be restored"
    assert run(saved).failed(f"vnb-cat: {saved}: gap: {said}") == b""
    assert points(run("--until", POINTS[0], saved).ok()) == POINTS[:1]


def test_nothing(tmp_path):
    assert run(tmp_path).failed(f"vnb-cat: {tmp_path}: no segment here") == b""
    assert run(tmp_path / "x").failed(f"vnb-cat: {tmp_path}/x: No such file or directory") == b""
    (tmp_path / "x").touch()
    assert run(tmp_path / "x").failed(f"vnb-cat: {tmp_path}/x: empty file, expected a stream") == b""
    (tmp_path / "x").write_text("text\n")
    done = run(tmp_path / "x")
    assert done.status == 1
    assert done.err.startswith(f"vnb-cat: {tmp_path}/x: ")


def test_a_file_that_nobody_could_write_to_the_end(saved):
    """It has, or may have, the latest restore point: nothing older takes its place."""
    path = path_of(saved, 3)
    content = path.read_bytes()
    for keep in (1, 40, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:keep])
        done = run(saved)
        assert (done.status, done.out) == (1, b"")
        assert done.err.startswith(f"vnb-cat: {saved}: the latest restore point") and str(path) in done.err
        assert done.err.endswith(f"; --until {POINTS[2]} is the newest that can be restored\n")
        assert done.err.count("\n") == 1
        assert points(run("--until", POINTS[2], saved).out) == POINTS[:3]


def test_what_no_segment_can_be_is_told_and_passed_over(saved):
    """Unless its name says that it was one, and when: then it may have been the latest restore point."""
    for content in (b"", b"x\n", b"\0" * 100):
        for name, status in (
            ("x.vnb", 0), ("vnb.main.20260131T110000.000Z.4f2a3b.inc.vnb", 0),
            ("vnb.main.20260131T130000.000Z.4f2a3b.inc.vnb", 1),
        ):
            (saved / name).write_bytes(content)
            done = run(saved)
            assert done.status == status and (done.out == b"" if status else points(done.out) == POINTS)
            assert done.err.count("\n") == 1 and str(saved / name) in done.err
            assert ("left out; vnb-verify --quarantine" in done.err) == (status == 0)
            (saved / name).unlink()


def test_a_damaged_file_stops_only_what_needs_it(saved):
    path = path_of(saved, 2)
    path.write_bytes(path.read_bytes()[:-5])
    # What else was in a file that somebody has named is not known.
    for options in ([], ["--until", POINTS[2]], ["--until", "2026-01-31T12:00:01Z"]):
        assert run(*options, saved).status == 1
    path = path.rename(saved / f"{POINTS[2]}.inc.vnb")
    for options in ([], ["--until", POINTS[2]], ["--until", "2026-01-31T12:00:02Z"]):
        done = run(*options, saved)
        assert (done.status, done.out) == (1, b"")
        assert done.err.startswith(f"vnb-cat: {saved}: ") and str(path) in done.err
        assert done.err.endswith(f"; --until {POINTS[1]} is the newest that can be restored\n")
        assert done.err.count("\n") == 1
    for until in (POINTS[1], "2026-01-31T12:00:01Z"):
        done = run("--until", until, saved)
        assert (done.status, points(done.out)) == (0, POINTS[:2])
        assert done.err.startswith(f"vnb-cat: {path}: ")
        assert done.err.endswith(f": left out; vnb-verify --quarantine {saved} sets it aside\n")
        assert done.err.count("\n") == 1
    done = run("--base", saved)
    assert (done.status, done.out) == (0, f"{POINTS[1]}\n".encode())
    # This one's base is in there.
    done = run("--until", POINTS[3], saved)
    assert (done.status, done.out) == (1, b"")
    assert f"gap: {POINTS[3]} needs {POINTS[2]}, which is damaged ({path}); " in done.err


def complete(output):
    """The points of the segments that are whole, at the start of a stream that is not."""
    found = []
    with samples.memory(output) as fd, pytest.raises(stream.StreamError):
        for segment in stream.Reader(fd, "sample"):
            segment.finish()
            found.append(segment.head["point"])
    return found


@pytest.mark.parametrize("codec", ["none", "lz4"])
def test_damaged_data_stops_it_before_anything_later(tmp_path, codec):
    """No sum covers a payload, so its hash or the checksum of what is packed is looked at."""
    saved = tmp_path / "set"
    makers.make_set(str(saved), [{"vda": "64k:A"}, {"vda": "64k:B 64k:C"}, {"vda": "1k:D"}], spec=codec)
    path = path_of(saved, 1)
    content = bytearray(path.read_bytes())
    content[content.index(b"\x98\xa4data") + 120] ^= 1
    path.write_bytes(content)
    done = run(saved)
    assert done.status == 1
    reason = "65536 bytes differ from what was read from the source" if codec == "none" else \
        "damaged lz4 data (its checksum differs)"
    assert done.err == f"vnb-cat: {path}: vda: offset 0: {reason}\n"
    assert complete(done.out) == POINTS[:1]
    assert points(run("--until", POINTS[0], saved).ok()) == POINTS[:1]


def test_any_bit(tmp_path):
    """Nothing that is wrong in a file gets out as a whole segment, but for the index, which is not passed on."""
    saved = tmp_path / "set"
    makers.make_set(str(saved), [{"vda": "90:A 30:- 512:?"}, {"vda": "90:B"}], spec="lz4", index=False)
    path = path_of(saved, 0)
    content = path.read_bytes()
    for at in range(0, len(content), 23):
        flipped = bytearray(content)
        flipped[at] ^= 1 << at % 8
        path.write_bytes(flipped)
        done = run(saved)
        assert done.status == 1
        assert done.err.startswith("vnb-cat: ") and str(path) in done.err
        assert done.err.count("\n") == 1
        assert done.out == b"" or complete(done.out) == []


def test_two_domains(saved):
    other = samples.segment(samples.head("q", domain="vm2", uuid="u-2"), [])
    (saved / "z.vnb").write_bytes(other)
    done = run(saved)
    assert (done.status, done.out) == (1, b"")
    assert done.err.startswith(f"vnb-cat: {saved}: two domains: ")
    assert done.err.count("\n") == 1


def test_two_segments_with_one_id(saved):
    """The one that has the name is no copy; of files that somebody names there is none."""
    copy = saved / "a.vnb"
    copy.write_bytes(samples.segment(makers.head(1, id="id-0"), []))
    done = run(saved)
    assert (done.status, points(done.out)) == (0, POINTS)
    assert done.err == (
        f"vnb-cat: {copy}: is a copy of {path_of(saved, 0)}: both have one id: left out; move it out of the set\n"
    )
    done = run(path_of(saved, 0), path_of(saved, 0))
    assert (done.status, done.out) == (1, b"")
    assert "claim the same id id-0" in done.err


def test_a_circle(tmp_path):
    for at, (point, parent) in enumerate([("a", "b"), ("b", "a")]):
        (tmp_path / f"{at}.vnb").write_bytes(samples.segment(samples.head(point, parent), []))
    for options in ([], ["--until", "a"], ["--base"]):
        done = run(*options, tmp_path)
        assert (done.status, done.out) == (1, b"")
        assert done.err.startswith(f"vnb-cat: {tmp_path}: circular bases: ")


def test_a_ledger_of_heads_holds_no_data(tmp_path):
    (tmp_path / "x.vnb").write_bytes(samples.segment(samples.head(stage="disks"), [samples.disk()]))
    assert run(tmp_path).failed(f"vnb-cat: {tmp_path}/x.vnb: holds no data, but disks") == b""
    assert run("--base", tmp_path).ok() == b"p0\n"


# The tip


def test_tip(saved):
    assert run("--base", saved).ok().decode() == f"{POINTS[3]}\n"


def test_tip_of_a_set_without_checkpoints(tmp_path):
    head = samples.head(checkpoint=None, level="copy")
    (tmp_path / "x.vnb").write_bytes(samples.segment(head, [samples.disk(size=0)]))
    said = "no restore point here has a checkpoint: the next backup must be a full one (--level full)"
    assert run("--base", tmp_path).failed(f"vnb-cat: {tmp_path}: {said}") == b""


# Output and options


def test_a_reader_that_closes_the_pipe(saved):
    with subprocess.Popen(["vnb-cat", str(saved)], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        child.stdout.close()
        assert child.stderr.read() == b""
        assert child.wait(DEADLINE) == -signal.SIGPIPE


def test_a_stream_that_ends_between_two_segments_is_refused(saved, tmp_path):
    """Else it would restore an older point, if nobody looks at the exit status of what came before."""
    output = run(saved).ok()
    lengths = [length for *_, length in samples.read(output)]
    cut = output[: sum(lengths[:2])]
    said = f"stdin: stream offset {len(cut)}: the input ends at {POINTS[1]}, but {POINTS[2]} was to follow"
    forked("vnb-apply", vnb_apply, tmp_path / "out", stdin=cut).failed(f"vnb-apply: {said}")
    assert not (tmp_path / "out").exists()
    forked("vnb-pack", pack, "-o", tmp_path / "copy", stdin=cut).failed(f"vnb-pack: {said}")
    assert points(run(tmp_path / "copy").ok()) == POINTS[:2]


def test_the_next_segment_is_named_in_a_stream_and_not_in_a_set(saved, tmp_path):
    output = run("--until", POINTS[2], saved).ok()
    assert [head.get("next") for head in heads(output)] == [POINTS[1], POINTS[2], None]
    (tmp_path / "stream.vnb").write_bytes(output)
    again = run("--until", POINTS[1], tmp_path / "stream.vnb").ok()
    assert [head.get("next") for head in heads(again)] == [POINTS[1], None]
    assert "next" not in heads(run("--until", POINTS[1], "--merge", tmp_path / "stream.vnb").ok())[0]
    forked("vnb-pack", pack, "-o", tmp_path / "copy", stdin=output).ok()
    for path in (tmp_path / "copy").iterdir():
        assert "next" not in samples.read(path.read_bytes())[0][0]


def test_a_full_disk(saved):
    done = command("bash", "-c", f"vnb-cat {saved} > /dev/full")
    assert done.failed("vnb-cat: stdout: No space left on device") == b""
    for option in ("--base", "--point"):
        done = command("bash", "-c", f"vnb-cat {option} {saved} > /dev/full")
        assert done.failed("vnb-cat: stdout: No space left on device") == b""


@pytest.mark.parametrize("arguments", [[], ["--until"], ["--base"], ["--base", "--until", "x", "set"]])
def test_wrong_usage(arguments):
    done = command("vnb-cat", *arguments)
    assert (done.status, done.out) == (2, b"")
    assert done.err.splitlines()[1] == "Usage:"


def test_a_file_that_was_replaced_meanwhile(saved, monkeypatch):
    """Heads are read first, and data when its turn comes."""
    path = path_of(saved, 1)
    some = backupset.some

    def replaced(operands):
        found = some(operands)
        Path(path).write_bytes(path_of(saved, 2).read_bytes())
        return found

    monkeypatch.setattr(backupset, "some", replaced)
    done = run(saved)
    assert done.err == f"vnb-cat: {path}: the file has changed since it was opened\n"
    assert done.status == 1
