# SPDX-License-Identifier: LGPL-2.1-or-later
"""vnb-prune: what is kept, that it restores, and that nothing that happens midway changes that."""

import datetime
import os
import random
import re
import shutil
import subprocess
import tempfile
import time

import makers
import pytest
import samples
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import applied

from vnb.base import log
from vnb.base.errors import Error
from vnb.cli import prune
from vnb.format import index, writing
from vnb.format.frame import HOLE
from vnb.store import backupset, chain, pruned

pytestmark = pytest.mark.usefixtures("utc")

SIZE = 4096
START = datetime.datetime(2025, 11, 3, 12, tzinfo=datetime.timezone.utc)  # a Monday
PERIODS = ("last", "daily", "weekly", "monthly", "yearly")


def created(hours):
    return (START + datetime.timedelta(hours=hours)).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def segment(directory, point, parent, hours, level=None, seed=0, spec="lz4", **fields):
    """Store a segment of one disk: 8 blocks if it is full, else some of them. Returns its path."""
    generator = random.Random(f"{point} {seed}")
    level = level or ("inc" if parent else "full")
    fields = {"checkpoint": None if level in ("diff", "copy") else point, **fields}
    head = samples.head(point, parent, level=level, created=created(hours), id=f"{point}-{level}-{seed}", **fields)
    path = os.path.join(directory, backupset.file_name(head))
    os.makedirs(directory, mode=0o700, exist_ok=True)
    with open(path, "wb") as file:
        out = writing.Writer(file.fileno(), path).segment(head, [samples.disk("a", SIZE, "inc" if parent else "full")])
        builder = index.Builder(out)
        for at in range(0, SIZE, 512):
            kind = generator.choice(["data", "data", "hole", "clean"])
            if kind == "data":
                samples.data(out, 0, at, bytes([generator.randrange(1, 256)]) * 512, spec, builder)
            elif kind == "hole" or not parent:
                samples.extents(out, 0, [at, 512, HOLE], builder)
        builder.finish()
        out.end()
    return path


def chain_of(directory, count, hours=24, **options):
    """A full and increments, p0, p1, ... with so many hours in between."""
    for number in range(count):
        segment(directory, f"p{number}", f"p{number - 1}" if number else None, number * hours, **options)


def contents(directory, points=None):
    """{point: what it restores to}, by the slow model."""
    segments = backupset.segments([str(directory)])
    result = {}
    for point in points or chain.points(segments):
        content = b""
        for each in chain.path(segments, "set", point):
            content += each.frame_at(0, each.length)
        result[point] = applied(content)
        for each in segments:
            each.close()
    return result


def points(directory):
    return sorted(each.head["point"] for each in backupset.segments([str(directory)]))


def names(directory):
    """Of all files but the one for vnb-checkpoint; without the ids of those that were merged."""
    return sorted(re.sub(r"\.[0-9a-f]{12}\.vnb$", ".vnb", name) for name in os.listdir(directory)
                  if name != pruned.PRUNED)


def run(directory, dry_run=False, **counts):
    args = {f"--keep-{period}": str(counts[period]) if period in counts else None for period in PERIODS}
    log.begin("vnb-prune")
    prune.main({**args, "--dry-run": dry_run, "--progress": None, "SET": str(directory)})


def command(*words, **options):
    return subprocess.run(["vnb-prune", *map(str, words)], capture_output=True, text=True, **options)


def kept_by(made, counts):
    """The points that restic's words keep, in another way: made is {point: datetime}."""
    ordered = sorted(made, key=lambda point: (made[point], point))
    groups = {
        "last": lambda moment, point: point,
        "daily": lambda moment, point: moment.strftime("%Y-%m-%d"),
        "weekly": lambda moment, point: moment.strftime("%G %V"),
        "monthly": lambda moment, point: moment.strftime("%Y-%m"),
        "yearly": lambda moment, point: moment.strftime("%Y"),
    }
    kept = set()
    for period, count in counts.items():
        newest = {}
        for point in ordered:
            newest[groups[period](made[point], point)] = point
        periods = list(newest.values())
        if count:
            kept.update(periods[-count:])
        if len(periods) < count:
            kept.add(ordered[0])
    return kept


@st.composite
def sets(draw):
    """[(point, parent, hours, level)]: trees of points, several fulls in it, diffs that are leaves."""
    made = []
    hours = 0
    for number in range(draw(st.integers(1, 9))):
        hours += draw(st.sampled_from([1, 12, 24, 24 * 7, 24 * 40]))
        parents = [point for point, _, _, level in made if level != "diff"]
        recent = parents[-1:] * 5  # mostly a chain
        parent = draw(st.sampled_from([None, *recent, *parents])) if parents else None
        level = draw(st.sampled_from(["inc", "inc", "diff"])) if parent else "full"
        made.append((f"p{number}", parent, hours, level))
    return made


COUNTS = st.dictionaries(st.sampled_from(PERIODS), st.integers(0, 3), min_size=1).filter(lambda c: any(c.values()))


@given(sets(), COUNTS)
@settings(max_examples=60)
def test_what_is_kept_is_what_the_words_mean_and_restores(made, counts):
    with tempfile.TemporaryDirectory() as directory:
        for point, parent, hours, level in made:
            segment(directory, point, parent, hours, level)
        before = contents(directory)
        moments = {point: START + datetime.timedelta(hours=hours) for point, _, hours, _ in made}
        parents = {parent for _, parent, _, _ in made}
        latest = max((point for point in moments if point not in parents), key=moments.get)
        tips = [point for point, _, _, level in made if level != "diff"]
        expected = kept_by(moments, counts) | {latest, tips[-1]}
        files = names(directory)
        run(directory, dry_run=True, **counts)
        assert names(directory) == files
        run(directory, **counts)
        after = contents(directory)
        assert expected <= set(after)
        assert after == {point: before[point] for point in after}
        assert len(names(directory)) == len(after)  # no alternatives, no lock, nothing that is not finished
        segments = backupset.segments([directory])
        children = [each.head["parent"] for each in segments]
        for point in set(after) - expected:
            assert children.count(point) > 1  # it stays since several need it
        again = names(directory), [each.head["id"] for each in segments]
        run(directory, **counts)
        assert again == (names(directory), [each.head["id"] for each in backupset.segments([directory])])


def test_dropped_points_are_merged_into_a_full_one(tmp_path):
    chain_of(tmp_path, 5)
    before = contents(tmp_path)
    run(tmp_path, last=2)
    assert names(tmp_path) == ["p3.full.vnb", "p4.inc.vnb"]
    assert contents(tmp_path) == {point: before[point] for point in ("p3", "p4")}


def test_dropped_points_in_the_middle_are_merged_into_an_increment(tmp_path):
    """The merged one takes the place of the increment it brings up to date."""
    chain_of(tmp_path, 4, hours=24 * 366)
    segment(tmp_path, "p4", "p3", 24 * 366 * 3 + 1)
    before = contents(tmp_path)
    run(tmp_path, yearly=9)
    assert names(tmp_path) == ["p0.full.vnb", "p1.inc.vnb", "p2.inc.vnb", "p4.inc.vnb"]
    heads = {each.head["point"]: each.head for each in backupset.segments([str(tmp_path)])}
    assert heads["p4"]["parent"] == "p2"
    assert contents(tmp_path) == {point: before[point] for point in ("p0", "p1", "p2", "p4")}


def test_the_next_increment_continues(tmp_path):
    chain_of(tmp_path, 4)
    run(tmp_path, last=1)
    (kept,) = backupset.segments([str(tmp_path)])
    assert (kept.head["point"], kept.head["checkpoint"], kept.head["parent"]) == ("p3", "p3", None)
    assert chain.newest_base([kept]) is kept
    segment(tmp_path, "p4", "p3", 200)
    contents(tmp_path, ["p4"])


def test_the_parent_of_the_next_increment_is_kept_behind_a_diff(tmp_path):
    chain_of(tmp_path, 2)
    segment(tmp_path, "d", "p0", 60, level="diff")
    before = contents(tmp_path)
    run(tmp_path, last=1)
    assert {"d", "p1"} <= set(points(tmp_path))
    assert contents(tmp_path)["d"] == before["d"]


def test_each_chain_keeps_its_next_parent(tmp_path):
    segment(tmp_path, "a0", None, 0, chain="a")
    segment(tmp_path, "a1", "a0", 1, chain="a")
    segment(tmp_path, "b0", None, 2, chain="b")
    run(tmp_path, last=1)
    assert names(tmp_path) == ["a1.full.vnb", "b0.full.vnb"]


def test_a_point_that_several_start_from_stays_until_one_does(tmp_path):
    segment(tmp_path, "p0", None, 0)
    for number in (1, 2, 3):
        segment(tmp_path, f"d{number}", "p0", number, level="diff")
    segment(tmp_path, "p1", "p0", 4)
    run(tmp_path, last=2)
    assert names(tmp_path) == ["d3.diff.vnb", "p0.full.vnb", "p1.inc.vnb"]
    run(tmp_path, last=1)
    assert names(tmp_path) == ["p1.full.vnb"]


def test_an_alternative_that_nobody_needs_goes(tmp_path):
    chain_of(tmp_path, 2)
    segment(tmp_path, "p1", None, 24, level="full")
    before = contents(tmp_path)["p1"]
    run(tmp_path, last=1)
    assert names(tmp_path) == ["p1.full.vnb"]
    assert contents(tmp_path)["p1"] == before


def test_what_cannot_be_restored_is_left_alone_and_counts_for_nothing(tmp_path, capsys):
    chain_of(tmp_path, 3)
    segment(tmp_path, "x1", "x0", 100)
    segment(tmp_path, "x2", "x1", 101)
    run(tmp_path, last=1)
    assert names(tmp_path) == ["p2.full.vnb", "x1.inc.vnb", "x2.inc.vnb"]
    said = capsys.readouterr().err.splitlines()
    assert said == [f"vnb-prune: {tmp_path}: {x}: left alone: needs x0, which is not here" for x in ("x1", "x2")]


def test_segments_in_one_file_stay_together(tmp_path):
    """A file goes when nothing in it is needed; the merged segment has a file of its own."""
    chain_of(tmp_path, 3)
    paths = backupset.paths(str(tmp_path))
    with open(tmp_path / "all.vnb", "wb") as file:
        for path in paths:
            with open(path, "rb") as one:
                shutil.copyfileobj(one, file)
            os.unlink(path)
    before = contents(tmp_path)
    run(tmp_path, last=2)
    assert names(tmp_path) == ["all.vnb", "p1.full.vnb"]
    assert contents(tmp_path) == before


def test_a_merged_segment_has_a_name_of_its_own(tmp_path):
    """An increment that took the name of the one it replaces would be passed over by copies by name and size."""
    chain_of(tmp_path, 4)
    segment(tmp_path, "d", "p0", 50)  # p0 stays, so what is merged is an increment
    before = set(os.listdir(tmp_path))
    run(tmp_path, last=1, yearly=1)
    merged = set(os.listdir(tmp_path)) - before - {pruned.PRUNED}
    assert [len(name.split(".")) for name in merged] == [4]
    for name in merged:
        (found,) = backupset.segments([str(tmp_path / name)])
        assert found.head["id"][:12] in name and backupset.is_name_of(name, found.head)


def test_damage_in_what_is_merged_leaves_all_there(tmp_path):
    chain_of(tmp_path, 4, spec="none")
    with open(tmp_path / "p3.inc.vnb", "r+b") as file:
        content = file.read()
        at = content.index(b"\x98\xa4data") + 120
        file.seek(at)
        file.write(bytes([content[at] ^ 1]))
    files = names(tmp_path)
    with pytest.raises(Error, match="differ"):
        run(tmp_path, last=1)
    assert names(tmp_path) == files


def test_a_merged_set_stays_packed_as_it_was(tmp_path):
    """What is left of a cut frame is compressed as the frame was."""
    for spec in ("none", "lz4"):
        directory = tmp_path / spec
        segment(directory, "p0", None, 0, spec=spec)
        segment(directory, "p1", "p0", 1, spec=spec)
        run(directory, last=1)
        ((_, _, frames, _, _),) = samples.read(next(directory.glob("p1.full.*")).read_bytes())
        assert {frame[4] for frame in frames if frame[0] == "data"} == {spec}


def test_a_segment_that_comes_meanwhile_keeps_what_it_needs(tmp_path, monkeypatch):
    chain_of(tmp_path, 4)
    before = contents(tmp_path)
    store = prune.store

    def store_and_be_interrupted(*arguments):
        store(*arguments)
        segment(tmp_path, "late", "p1", 300)

    monkeypatch.setattr(prune, "store", store_and_be_interrupted)
    run(tmp_path, last=1)
    assert names(tmp_path) == ["late.inc.vnb", "p0.full.vnb", "p1.inc.vnb", "p3.full.vnb"]
    assert contents(tmp_path, ["p1", "p3"]) == {point: before[point] for point in ("p1", "p3")}
    contents(tmp_path, ["late"])


def test_two_at_once(tmp_path):
    chain_of(tmp_path, 2)
    with prune.only_one(str(tmp_path)), pytest.raises(Error, match="another vnb-prune is at work here"):
        run(tmp_path, last=1)
    assert names(tmp_path) == ["p0.full.vnb", "p1.inc.vnb"]
    run(tmp_path, last=1)
    assert names(tmp_path) == ["p1.full.vnb"]


CALLS = ("rename", "unlink", "fsync", "writev", "open")


@pytest.mark.parametrize("number", range(5))
def test_a_crash_at_any_step(tmp_path, number):
    """A child ends before its nth system call that changes something, for every n until it gets to its end."""
    generator = random.Random(number)
    made = [("p0", None)]
    for each in range(1, 8):
        parents = [point for point, _ in made]
        made.append((f"p{each}", generator.choice([None, *parents[-1:] * 6, *parents])))
    counts = {"last": generator.randrange(1, 4), "yearly": generator.randrange(3)}
    first = tmp_path / "first"
    for each, (point, parent) in enumerate(made):
        segment(first, point, parent, each * 24 * generator.choice([1, 100]) if number % 2 else each * 24 * 90)
    before = contents(first)
    shutil.copytree(first, tmp_path / "whole")
    run(tmp_path / "whole", **counts)
    kept = points(tmp_path / "whole")
    for step in range(1000):
        directory = tmp_path / f"step{step}"
        shutil.copytree(first, directory)
        ended = died_at(step, lambda directory=directory: run(directory, **counts))
        assert contents(directory, kept) == {point: before[point] for point in kept}
        run(directory, **counts)
        assert points(directory) == kept
        assert contents(directory) == {point: before[point] for point in kept}
        assert len(names(directory)) == len(kept)
        shutil.rmtree(directory)
        if ended:
            return


def died_at(step, function):
    """Run it in a child that ends at its step-th call of CALLS; True if it came to its end before."""
    pid = os.fork()
    if pid == 0:
        left = step

        def counted(call):
            def replacement(*arguments, **options):
                nonlocal left
                if left == 0:
                    os._exit(1)
                left -= 1
                return call(*arguments, **options)

            return replacement

        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))
        try:
            function()
        except BaseException:
            os._exit(2)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, 1)
    return code == 0


@pytest.mark.parametrize("seed", range(6))
def test_killed_at_a_random_moment(tmp_path, seed):
    generator = random.Random(seed)
    chain_of(tmp_path / "set", 30)
    before = contents(tmp_path / "set", ["p28", "p29"])
    began = time.monotonic()
    shutil.copytree(tmp_path / "set", tmp_path / "timed")
    assert command("--keep-last", 2, tmp_path / "timed").returncode == 0
    usual = time.monotonic() - began
    process = subprocess.Popen(["vnb-prune", "--keep-last", "2", tmp_path / "set"])
    time.sleep(generator.uniform(0.3, 1.05) * usual)
    process.kill()
    process.wait()
    assert contents(tmp_path / "set", ["p28", "p29"]) == before
    assert command("--keep-last", 2, tmp_path / "set").returncode == 0
    assert names(tmp_path / "set") == ["p28.full.vnb", "p29.inc.vnb"]
    assert contents(tmp_path / "set") == before


@pytest.mark.parametrize("signum", ["TERM", "INT"])
def test_a_signal_leaves_nothing_unfinished(tmp_path, signum):
    """While it waits for the set's lock, all merged segments are there."""
    import signal

    chain_of(tmp_path, 3)
    with backupset.locked(str(tmp_path)):
        process = subprocess.Popen(["vnb-prune", "--keep-last", "1", tmp_path], stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while not any(name.endswith(".partial") for name in names(tmp_path)) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(getattr(signal, f"SIG{signum}"))
        _, said = process.communicate(timeout=60)
    assert process.returncode == -getattr(signal, f"SIG{signum}")
    assert said == ("vnb-prune: ended by SIGTERM\n" if signum == "TERM" else "")
    assert names(tmp_path) == ["p0.full.vnb", "p1.inc.vnb", "p2.inc.vnb"]


# The command.


def test_dry_run_says_what_would_happen(tmp_path):
    chain_of(tmp_path, 4)
    segment(tmp_path, "fork", "p2", 60)
    done = command("--dry-run", "--keep-last", "1", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "merge 2025-11-03T12:00:00Z full      p0  into p3",
        "merge 2025-11-04T12:00:00Z inc       p1  into p3",
        "merge 2025-11-05T12:00:00Z inc       p2  into p3",
        "drop  2025-11-06T00:00:00Z inc       fork",
        "keep  2025-11-06T12:00:00Z inc->full p3  last, latest, next base",
    ]


@pytest.mark.parametrize("words, reason", [
    ([], "give at least one --keep option a number greater than 0"),
    (["--keep-last", "0"], "give at least one --keep option a number greater than 0"),
    (["--keep-daily", "-1"], '"-1" is not a number within 0-1000000'),
    (["--keep-daily", "many"], '"many" is not a number within 0-1000000'),
])
def test_wrong_usage(tmp_path, words, reason):
    chain_of(tmp_path, 2)
    done = command(*words, tmp_path)
    assert done.returncode == 2
    assert reason in done.stderr.splitlines()[0]
    assert len(names(tmp_path)) == 2


@pytest.mark.parametrize("make, reason", [
    (lambda path: None, "No such file or directory"),
    (lambda path: path.write_text(""), "Not a directory"),
    (lambda path: path.mkdir(), "no segment here"),
    (lambda path: segment(path, "p1", "p0", 0), "no restore point here can be restored"),
    (lambda path: segment(path, "p1", None, 0, stage="disks"), "holds no data, but disks"),
])
def test_what_is_no_set(tmp_path, make, reason):
    path = tmp_path / "set"
    make(path)
    done = command("--keep-last", 1, path)
    assert done.returncode == 1
    assert done.stderr.endswith(f"{reason}\n")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("zone, why", [("UTC", "daily"), ("EAST-1", "oldest for daily")])
def test_periods_end_where_the_local_ones_do(tmp_path, zone, why):
    """23:30 and 00:30 UTC are one day one hour to the east."""
    segment(tmp_path, "p0", None, 11.5)
    segment(tmp_path, "p1", "p0", 12.5)
    done = command("--dry-run", "--keep-daily", "2", tmp_path, env={**os.environ, "TZ": zone})
    assert done.stdout.splitlines()[0].split(None, 4)[4] == why


def test_what_was_dropped_is_written_down_for_vnb_checkpoint(tmp_path):
    """It deletes these checkpoints, and no others: no kept point has them, though a merged one has its last one's."""
    paths = makers.make_set(tmp_path / "set", [{"vda": "64k:A"}, {"vda": "64k:B"}, {"vda": "64k:C"}])
    assert len(paths) == 3
    assert command("--keep-last", 2, tmp_path / "set").returncode == 0
    assert pruned.pruned(tmp_path / "set") == {makers.point(0)}
    assert os.stat(tmp_path / "set" / pruned.PRUNED).st_mode & 0o777 == 0o600
    assert command("--keep-last", 1, tmp_path / "set").returncode == 0
    assert pruned.pruned(tmp_path / "set") == {makers.point(0), makers.point(1)}
    pruned.forget_pruned(tmp_path / "set", {makers.point(1), makers.point(2)})
    assert pruned.pruned(tmp_path / "set") == {makers.point(0)}  # of another chain: whoever commits there drops it
    pruned.forget_pruned(tmp_path / "set", {makers.point(0)})
    assert command("--keep-last", 1, tmp_path / "set").returncode == 0
    assert pruned.PRUNED not in os.listdir(tmp_path / "set")
    pruned.forget_pruned(tmp_path / "set", {makers.point(0)})
    assert pruned.pruned(tmp_path / "set") == set()
    os.mkfifo(tmp_path / "set" / pruned.PRUNED)
    assert pruned.pruned(tmp_path / "set") == set()


@pytest.mark.parametrize("xml, kept", [
    (None, True),
    ("<domain><devices><disk><target dev='vda'/></disk><disk><target dev='vdb'/></disk></devices></domain>", True),
    ("<domain><devices><disk><target dev='vda'/></disk></devices></domain>", False),
    ("<!DOCTYPE x><domain/>", True),
])
def test_the_last_point_with_a_disk_stays_as_long_as_the_machine_has_it(tmp_path, xml, kept, monkeypatch):
    """One backup with --include is no reason to lose the only copy of all other disks."""
    monkeypatch.setattr(makers, "head", lambda number, head=makers.head, **changes: {
        **head(number, **changes), "domain_xml": xml})
    makers.make_set(tmp_path / "set", [{"vda": "64k:A", "vdb": "64k:B"}, {"vda": "64k:C", "vdb": "64k:D"},
                                       {"vda": "64k:E"}, {"vda": "64k:F"}])
    done = command("--dry-run", "--keep-last", 1, tmp_path / "set")
    assert done.stdout.count("keep ") == 2 - (not kept)
    assert ("last with vdb" in done.stdout) == kept
    assert command("--keep-last", 1, tmp_path / "set").returncode == 0
    segments = backupset.segments([str(tmp_path / "set")])
    points = set(chain.points(segments))
    assert points == {makers.point(3), makers.point(1)} if kept else {makers.point(3)}
    for point in points:
        disks = {disk["name"] for disk in chain.path(segments, "set", point)[-1].disks}
        assert disks == ({"vda"} if point == makers.point(3) else {"vda", "vdb"})
