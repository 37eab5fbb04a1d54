# SPDX-License-Identifier: LGPL-2.1-or-later
"""Damage is local: a damaged file in a set costs the restore points that need it, and nothing else, in any command."""

import os
import random
import shutil
import subprocess

import makers
import pytest
import samples
from samples import applied
from servers import DEADLINE, command, forked, qemu_img, qemu_io

from vnb.cli import cat, dump, prune, verify
from vnb.store import backupset, chain, saved_disk, saved_segment, storing

# Two fulls, each with increments: the names are as vnb gives them.
PLAN = [{"vda": "64k:A 64k:- 32k:0"}, {"vda": "96k:. 32k:B"}, {"vda": "8k:C"}]
POINTS = [f"vnb.main.2026010{day}T120000.000Z.00000{day}" for day in range(1, 7)]
LEVELS = ["full", "inc", "inc", "full", "inc", "inc"]
FOREIGN = "x.vnb"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """(a set, {point: what it restores to})"""
    directory = tmp_path_factory.mktemp("sound") / "set"
    directory.mkdir()
    for number, point in enumerate(POINTS):
        after = number % 3
        parent = POINTS[number - 1] if after else None
        head = makers.head(after, id=f"id-{number}", point=point, parent=parent, checkpoint=point,
                           created=f"2026-01-0{number + 1}T12:00:00.000000Z")
        (made,) = makers.make_set(directory / "one", PLAN[: after + 1], spec="lz4")[after:]
        (segment,) = saved_segment.segments_in_file(made)
        content = rewritten(segment.open(), head)
        (directory / f"{point}.{LEVELS[number]}.vnb").write_bytes(content)
        shutil.rmtree(directory / "one")
    segments = backupset.segments([str(directory)])
    return directory, {point: restored(segments, point) for point in POINTS}


def rewritten(segment, head):
    """The bytes of a segment with another head, indexed."""
    from vnb.cli import pack, progress

    with samples.written() as (writer, content):
        pack.Packer(None, False, 0, pack.Pool()).pack(segment, head, writer, progress.Progress("none"))
        return content()


def restored(segments, point):
    return applied(b"".join(each.frame_at(0, each.length) for each in chain.path(segments, "set", point)))


@pytest.fixture
def saved(sound, tmp_path):
    return shutil.copytree(sound[0], tmp_path / "set")


def path_of(directory, number):
    return directory / f"{POINTS[number]}.{LEVELS[number]}.vnb"


def flip(path, at, count=1):
    """Damage bytes of a file where it is, as dd conv=notrunc would."""
    with open(path, "r+b") as file:
        content = bytearray(file.read())
        for offset in range(at, at + count):
            content[offset % len(content)] ^= 0x55
        file.seek(0)
        file.write(content)


def cut(path, size):
    os.truncate(path, size)


# How a file is damaged so that heads are enough to see it, and whether its own head can still be read.
WAYS = {
    "its first frame": (lambda path: flip(path, 10), False),
    "its first bytes": (lambda path: flip(path, 0, 5), False),
    "its disk": (lambda path: flip(path, path.read_bytes().index(b"\xa4disk") + 8), False),
    "cut in the middle": (lambda path: cut(path, path.stat().st_size // 2 + 300), True),
    "cut at the tail": (lambda path: cut(path, path.stat().st_size - 1), True),
    "its tail": (lambda path: flip(path, path.stat().st_size - 20), True),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b"\0"), True),
    "cut in the head": (lambda path: cut(path, 30), False),
    "empty": (lambda path: cut(path, 0), False),
    "zeroes": (lambda path: path.write_bytes(bytes(path.stat().st_size)), False),
    "text": (lambda path: path.write_text("x\n"), False),
    "a directory": (lambda path: (path.unlink(), path.mkdir()), False),
    "a FIFO": (lambda path: (path.unlink(), os.mkfifo(path)), False),
    "a link to nowhere": (lambda path: (path.unlink(), path.symlink_to("nowhere")), False),
    "a link in a circle": (lambda path: (path.unlink(), path.symlink_to(path.name)), False),
}


@pytest.fixture(params=WAYS)
def way(request):
    return WAYS[request.param][0]


def run(name, module, *words):
    done = forked(name, module, *words)
    assert "Traceback" not in done.err and done.status in (0, 1), repr(done)
    return done


def lost_with(number):
    """The restore points that need one."""
    return [point for other, point in enumerate(POINTS) if other // 3 == number // 3 and other >= number]


@pytest.mark.parametrize("number", [1, 5])
def test_what_does_not_need_it_works_in_every_command(saved, sound, way, number):
    path = path_of(saved, number)
    way(path)
    lost = lost_with(number)
    for point in POINTS:
        done = run("vnb-cat", cat, "--until", point, saved)
        if point in lost:
            assert (done.status, done.out) == (1, b"") and done.err.count("\n") == 1
            continue
        assert done.status == 0 and applied(done.out) == sound[1][point]
        assert done.err.count("\n") == 1 and done.err.startswith(f"vnb-cat: {path}: ") and ": left out" in done.err
    whole = [point for point in POINTS if point not in lost]
    latest = run("vnb-cat", cat, "--point", saved)
    if number < 3:
        assert (latest.status, latest.out.decode()) == (0, f"{POINTS[5]}\n")
    else:
        assert (latest.status, latest.out) == (1, b"") and latest.err.count("\n") == 1
        assert str(path) in latest.err and f"--until {whole[-1]} is the newest that can be restored" in latest.err
    assert run("vnb-cat", cat, "--base", saved).out.decode() == f"{whole[-1]}\n"
    listed = run("vnb-dump", dump, "--list", saved)
    assert listed.status == (0 if number < 3 else 1)
    assert ": left out" in listed.err.splitlines()[0] and all(point in listed.out.decode() for point in whole)
    for point in lost:
        if point != POINTS[number]:
            assert f"cannot be restored: {point} needs {POINTS[number]}, which is " in listed.out.decode()
    assert run("vnb-dump", dump, "--map", saved).status == 0
    run("vnb-dump", dump, "--brief", saved)
    images = saved_disk.Images([str(saved)], until=whole[-1])
    assert images.names() == ["vda", *(f"vda@{point}" for point in reversed(whole[:-1]))]
    assert [file.name for file in images.damaged] == [str(path)]
    for name, point in zip(images.names(), reversed(whole)):
        disk = images.open(name)
        content = bytearray(disk.size)
        disk.read_into(memoryview(content), 0)
        assert bytes(content) == bytes(sound[1][point]["vda"])
    checked = run("vnb-verify", verify, saved)
    assert checked.status == 1 and str(path) in checked.err
    assert not [line for line in checked.err.splitlines() if str(path) not in line and "gap" not in line]
    head = makers.head(0, id="new", point="vnb.main.20260201T120000.000Z.aaaaaa", created="2026-02-01T12:00:00.000000Z")
    with storing.Store(str(saved), head, [samples.disk()]):
        pass  # a full is always taken


@pytest.mark.parametrize("seed", range(8))
def test_any_damage_anywhere(saved, sound, seed):
    """Also in data, files and indexes, which heads do not tell: no command ends in a traceback or in wrong bytes."""
    generator = random.Random(seed)
    bad = generator.sample(range(6), generator.choice([1, 2]))
    for number in bad:
        path = path_of(saved, number)
        size = path.stat().st_size
        for _ in range(generator.choice([1, 3])):
            if generator.randrange(4):
                flip(path, generator.randrange(size), generator.choice([1, 8, 100]))
            else:
                cut(path, generator.randrange(size))
                break
    if generator.randrange(2):
        (saved / FOREIGN).write_bytes(generator.randbytes(generator.choice([0, 3, 500])))
    lost = {point for number in bad for point in lost_with(number)}
    for point in POINTS:
        done = run("vnb-cat", cat, "--until", point, saved)
        merged = run("vnb-cat", cat, "--merge", "--until", point, saved)
        assert done.status == (1 if point in lost else 0) or applied(done.out) == sound[1][point]
        if merged.status == 0:
            assert applied(merged.out) == sound[1][point]
    for words in ([], ["--point"], ["--base"], ["--head"], ["--until", "2026-01-02"]):
        run("vnb-cat", cat, *words, saved)
    for words in (["--list"], ["--map"], ["--brief"], ["--json"]):
        run("vnb-dump", dump, *words, saved)
    whole = [point for point in POINTS if point not in lost]
    before = sorted(os.listdir(saved))
    _, damaged = backupset.readable([str(saved)])
    run("vnb-prune", prune, "--keep-last", "2", saved)
    assert all(os.path.exists(file.name) for file in damaged)
    for point in whole[-1:]:
        done = run("vnb-cat", cat, "--until", point, saved)
        assert applied(done.out) == sound[1][point]
    run("vnb-verify", verify, "--quarantine", saved)
    assert not [name for name in before if name not in os.listdir(saved) and name == FOREIGN
                and f"{FOREIGN}.damaged" not in os.listdir(saved)]
    segments, damaged = backupset.readable([str(saved)])
    assert damaged == []
    for point in chain.restorable(segments):
        assert restored(segments, point) == sound[1][point]
    assert all(" gap: " in line for line in run("vnb-verify", verify, saved).err.splitlines())


@pytest.mark.parametrize("number", [1, 4])
def test_nothing_goes_that_a_damaged_segment_needs(saved, sound, way, number):
    """A sound copy of it may come back: then all that needs it can be restored again."""
    path = path_of(saved, number)
    content = path.read_bytes()
    way(path)
    done = run("vnb-prune", prune, "--keep-last", "1", saved)
    assert done.status == 0 and f"vnb-prune: {path}: " in done.err
    assert os.path.lexists(path)
    if path.is_dir():
        path.rmdir()
    else:
        path.unlink()
    path.write_bytes(content)
    segments, damaged = backupset.readable([str(saved)])
    assert damaged == []
    for point in [*lost_with(number), *([POINTS[5]] if number < 3 else [])]:
        assert restored(segments, point) == sound[1][point]


def test_a_damaged_file_that_needs_nothing_stops_no_pruning(saved):
    (saved / FOREIGN).write_text("x\n")
    assert run("vnb-prune", prune, "--keep-last", "1", saved).status == 0
    left = [name for name in os.listdir(saved) if name.endswith(".vnb")]
    assert FOREIGN in left and len(left) == 2


def test_dry_run_says_why_it_stays(saved):
    path = path_of(saved, 1)
    cut(path, path.stat().st_size - 1)
    done = run("vnb-prune", prune, "--dry-run", "--keep-last", "1", saved)
    lines = done.out.decode().splitlines()
    assert [line.split("Z", 1)[0].split()[0] for line in lines] == ["keep", "leave", "merge", "merge", "keep"]
    assert lines[0].endswith(f"base of {path.name}, which is damaged")
    assert lines[1].endswith(f"needs {POINTS[1]}, which is damaged ({path})")


def test_what_comes_back_is_not_refused_for_its_damaged_name(saved, sound):
    path = path_of(saved, 1)
    content = path.read_bytes()
    cut(path, len(content) - 1)
    done = command("vnb-pack", "-o", saved, stdin=content)
    assert done.status == 1 and done.err.endswith(f"; vnb-verify --quarantine {saved} sets it aside\n")
    assert command("vnb-verify", "--quarantine", saved).status == 1
    assert command("vnb-pack", "-o", saved, stdin=content).ok() == b""
    segments = backupset.segments([str(saved)])
    assert sorted(chain.restorable(segments)) == POINTS


def test_a_file_without_the_right_to_read_it(saved, monkeypatch):
    """It is no damage of the file: nobody is told to set it aside."""
    denied = str(path_of(saved, 1))
    opened = saved_segment.open_file

    def refused(path):
        if path == denied:
            raise backupset.os_error(path, PermissionError(13, "Permission denied"))
        return opened(path)

    for module in (backupset, saved_segment):
        monkeypatch.setattr(module, "open_file", refused)
    done = run("vnb-cat", cat, "--point", saved)
    assert (done.status, done.out.decode()) == (0, f"{POINTS[5]}\n")
    assert done.err == f"vnb-cat: {denied}: Permission denied: left out\n"
    assert run("vnb-cat", cat, "--point", "--until", POINTS[2], saved).status == 1
    assert run("vnb-verify", verify, "--quarantine", saved).status == 1
    assert os.path.exists(denied)


def test_too_many_open_files_are_no_damage(saved, monkeypatch):
    def refused(path):
        raise backupset.os_error(path, OSError(24, "Too many open files"))

    monkeypatch.setattr(backupset, "open_file", refused)
    done = run("vnb-cat", cat, saved)
    assert (done.status, done.err) == (1, f"vnb-cat: {path_of(saved, 0)}: Too many open files\n")


def test_a_file_that_goes_while_the_set_is_read(saved, monkeypatch):
    """vnb-prune removes it when what takes its place is there, which the first listing may not have."""
    paths = backupset.paths
    content = path_of(saved, 1).read_bytes()
    calls = []

    def changing(directory):
        found = paths(directory)
        calls.append(found)
        if len(calls) == 1:
            path_of(saved, 1).unlink()
            (saved / "merged.vnb").write_bytes(content)
        return found

    monkeypatch.setattr(backupset, "paths", changing)
    segments, damaged = backupset.readable([str(saved)])
    assert len(calls) == 2 and damaged == []
    assert sorted(chain.restorable(segments)) == POINTS


def test_a_segment_of_another_domain(saved, sound):
    (saved / FOREIGN).write_bytes(samples.segment(samples.head("q", domain="vm2", uuid="u-2"), []))
    done = run("vnb-cat", cat, saved)
    assert done.status == 1 and "two domains: " in done.err
    assert applied(run("vnb-cat", cat, "--until", POINTS[4], saved).out) == sound[1][POINTS[4]]
    head = makers.head(1, id="new", point="n", parent=POINTS[5], created="2026-02-01T12:00:00.000000Z")
    with storing.Store(str(saved), head, [samples.disk("vda", 160 << 10, "inc")]):
        pass


def test_heads_alone_are_no_backups(saved, sound):
    """What vnb-cat --head wrote into a set has the restore point's name, and may not take its place."""
    (saved / FOREIGN).write_bytes(run("vnb-cat", cat, "--head", saved).out)
    done = run("vnb-cat", cat, saved)
    assert done.status == 0 and applied(done.out) == sound[1][POINTS[5]]
    assert done.err == f"vnb-cat: {saved / FOREIGN}: holds no data, but disks: left out; move it out of the set\n"


def test_some_of_several_segments_in_one_file(saved, sound):
    """What can be found from the tails can be used; who removes the file would remove what is damaged."""
    whole = [path_of(saved, number).read_bytes() for number in range(6)]
    joined = saved / FOREIGN
    joined.write_bytes(b"".join(whole[:4]))
    for number in range(4):
        path_of(saved, number).unlink()
    flip(joined, len(whole[0]) + 10)
    for point in (POINTS[0], POINTS[3], POINTS[5]):
        assert applied(run("vnb-cat", cat, "--until", point, saved).out) == sound[1][point]
    assert run("vnb-cat", cat, "--until", POINTS[1], saved).status == 1
    assert run("vnb-prune", prune, "--keep-last", "1", saved).status == 0
    assert joined.exists()


def test_a_restore_names_what_is_damaged_once(saved, tmp_path):
    path = path_of(saved, 1)
    cut(path, path.stat().st_size - 1)
    done = command("vnb-restore", "--no-config", "--progress", "none", saved, tmp_path / "out")
    assert done.status == 0 and done.err.count(str(path)) == 1
    path = path_of(saved, 5)
    cut(path, path.stat().st_size - 1)
    done = command("vnb-restore", "--no-config", "--progress", "none", saved, tmp_path / "out2")
    assert done.status == 1 and f"--until {POINTS[4]} is the newest that can be restored" in done.err
    assert not (tmp_path / "out2").exists()


def test_backups_go_on(tmp_path):
    """An increment starts from what can be restored; where nothing can, auto becomes a full, and says why."""
    disk, saved = tmp_path / "vda.qcow2", tmp_path / "set"
    qemu_img("create", "-q", "-f", "qcow2", disk, "4M")

    def backup(level):
        pattern = len(os.listdir(saved)) + 1 if saved.exists() else 1
        qemu_io(disk, f"write -P {pattern} {64 * pattern}k 64k")
        return command(
            "vnb-checkpoint", "run", "--image", f"vda={disk}", "--state-dir", tmp_path / "state", "--level", level,
            "--set", saved, "--", f"vnb-extents | vnb-read | vnb-pack -o {saved}",
        )

    def content():
        out = tmp_path / "out"
        assert command("bash", "-c", f"set -o pipefail; vnb-cat {saved} | vnb-apply --format raw {out}").status == 0
        qemu_img("convert", "-f", "qcow2", "-O", "raw", disk, tmp_path / "now")
        same = (out / "vda.raw").read_bytes() == (tmp_path / "now").read_bytes()
        shutil.rmtree(out)
        return same

    for _ in range(3):
        assert backup("auto").status == 0
    *_, before, last = sorted(saved.iterdir())
    cut(last, last.stat().st_size - 1)
    done = backup("auto")
    assert done.status == 0 and f"{last}: " in done.err and f"increment since {before.name[:-8]}\n" in done.err
    assert content()
    full, *_ = sorted(saved.iterdir())
    flip(full, 10)
    done = backup("inc")
    assert done.status == 1 and "a full backup is needed first" in done.err and full.name in done.err
    done = backup("auto")
    assert done.status == 0 and "full backup: " in done.err and f"damaged: {full.name}" in done.err
    assert content()
    assert backup("full").status == 0
    assert backup("auto").status == 0
    assert content()
    assert subprocess.run(["vnb-verify", "-q", saved], capture_output=True, timeout=DEADLINE).returncode == 1
