# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Every command on hostile input: status 0 to 3, lines of its own on standard error, memory that is bounded, and
nothing outside its target. fuzzing.py has how it is fed, corpus/ what it begins with.
"""

import os
import random
import shutil
import sys
from pathlib import Path

import fuzzing
import kept
import mutation
import peer_files
import pytest
import samples
import servers
from fuzzing import TARGET, Fuzzer, Target, program
from job_records import record as job_record
from rounds import INPUT, Rounds

from vnb.base.errors import Error
from vnb.cli import apply, cat, config, dump, extents, import_virtnbdbackup, pack, prune, read, verify
from vnb.format import heads
from vnb.job.record import Added, Phase, Record, Server
from vnb.job.state import JobDirectory
from vnb.store import saved_disk
from vnb.store.catalog import Catalog
from vnb.virt import domxml

FAULT = pytest.mark.fault(
    "a command reads hostile input: streams, sets, XML, JSON, files of virtnbdbackup",
    holds=(
        "exits with 0 to 3; prints only lines of its own; memory stays bounded; writes nothing outside its target"
    ), share=0.8,
)
EARLIER = kept.load()
REAL = {path.stem: path.read_bytes() for path in sorted(Path(__file__).with_name("corpus").glob("*.vnb"))}
CHAIN = REAL["full"] + REAL["inc"]
SAVED = [CHAIN, REAL["full"], REAL["copy"], samples.every_kind(required=False)]
OTHERS = [frame for content in (samples.every_kind(), *REAL.values()) for frame in mutation.frames_of(content)]


def of_stream(name, module, *argv, corpus=SAVED):
    """A Target that reads a stream."""
    return Target(name, module, argv, corpus, change_stream, lambda content, _: content, mutation.varied_stream)


def of_set(name, module, *argv, target="set"):
    """A Target that reads a set, whose files have names that mean nothing. target: where the set is."""

    def place(content, directory):
        (directory / target).mkdir(exist_ok=True)
        (directory / target / "a.vnb").write_bytes(content)
        return b""

    return Target(name, module, argv, [CHAIN, REAL["copy"]], change_stream, place, mutation.varied_stream)


def change_stream(chance, content):
    return mutation.mutated_stream(chance, content, OTHERS)


def lines():
    """vnb-dump --from-json."""
    corpus = [servers.command("vnb-dump", "--json", stdin=content).ok() for content in (CHAIN, REAL["copy"])]

    def change(chance, content):
        lines = content.decode(errors="surrogateescape").splitlines()
        at = chance.randrange(len(lines))
        lines[at] = mutation.mutated_json(chance, lines[at])
        return "\n".join(lines).encode(errors="surrogateescape")

    def vary(chance, content):
        return "\n".join(mutation.varied_json(chance, content.decode().splitlines())).encode()

    return Target("vnb-dump", dump, ["--from-json"], corpus, change, lambda content, _: content, vary)


def imported(directory):
    """vnb-import of a directory as virtnbdbackup leaves it."""
    corpus = []
    for compressed in (False, True):
        path = directory / f"corpus-{compressed}"
        peer_files.backup(path, compressed=compressed, sizes=(700, 2000), chunk=512)
        corpus.append({file.name: file.read_bytes() for file in path.iterdir()})

    def place(files, directory):
        path = directory / "backup"
        path.mkdir()
        for name, content in files.items():
            (path / name).write_bytes(content)
        return b""

    return Target("vnb-import", import_virtnbdbackup, ["backup"], corpus, mutation.mutated_backup, place)


def copy(directory):
    """vnb-apply --update of a copy whose state is not what was left there."""
    made = directory / "copy"
    argv = ["--update", "--format", "raw"]
    servers.command("vnb-apply", *argv, made, stdin=REAL["full"]).ok()
    state = (made / ".vnb-apply.state").read_text()

    def change(chance, input_):
        state, content = input_
        if chance.random() < 0.7:
            return mutation.mutated_json(chance, state), content
        return state, change_stream(chance, content)

    def place(input_, directory):
        state, content = input_
        path = directory / TARGET / ".copy"  # it stays when vnb-apply fails
        shutil.copytree(made, path)
        (path / ".vnb-apply.state").write_text(state, errors="surrogateescape")
        return content

    def vary(chance, input_):
        return input_[0], mutation.varied_stream(chance, input_[1])

    corpus = [(state, REAL["inc"]), (state, CHAIN)]
    return Target("vnb-apply", apply, [*argv, f"{TARGET}/.copy"], corpus, change, place, vary)


def record():
    """What is left of a job, as vnb-checkpoint finds it."""

    def place(text, directory):
        path = directory / TARGET / "jobs" / "u"
        path.mkdir(parents=True, mode=0o700)
        (path / "job.json").write_text(text, errors="surrogateescape")
        return b""

    def main(_args):
        try:
            assert isinstance(JobDirectory(TARGET, "u").load(), Record)
        finally:
            shutil.rmtree(f"{TARGET}/jobs")

    left = {"frozen": 7, "servers": [Server(5, 6)], "added": [Added("vda", "/image")]}
    corpus = [job_record(kind="running", phase=Phase.RUNNING, **left).text()]
    return Target("x", program("", main), [], corpus, mutation.mutated_json, place)


def read_everywhere(_args):
    """What vnb-map does for its clients."""
    images = saved_disk.Images(["set"])
    failed = None
    for name in images.names():
        try:
            opened = images.open(name)
            for offset in {0, 1, 4095, 4096, opened.size // 2, max(0, opened.size - 1)}:
                length = min(70_001, opened.size - offset)
                if length > 0:
                    opened.read_into(memoryview(bytearray(length)), offset)
                    opened.extents(offset, length, 100)
        except Error as error:
            failed = error
    if failed is not None:
        raise failed


def begin_from(_args):
    """What vnb-checkpoint does with a set."""
    catalog = Catalog("set")
    segments = catalog.segments()
    uuid = segments[0].head["uuid"] if segments else "u"  # what is damaged is left out
    for segment in catalog.of_domain(uuid, "vm"):
        heads.new("vm", "u", "inc", "disks", parent=segment.head["point"], after=segment.head["created"])
        if segment.head.get("checkpoint_xml"):
            domxml.bitmaps(domxml.checkpoint_of(segment.head["checkpoint_xml"], ["vda"], ["vda"]))


TARGETS = {
    "pack": lambda _: of_stream("vnb-pack", pack, "-z"),
    "pack-set": lambda _: of_stream("vnb-pack", pack, "-o", f"{TARGET}/set"),
    "apply": lambda _: of_stream("vnb-apply", apply, "--format", "raw", TARGET),
    "apply-qcow2": lambda _: of_stream("vnb-apply", apply, TARGET),
    "verify": lambda _: of_stream("vnb-verify", verify),
    "dump": lambda _: of_stream("vnb-dump", dump),
    "dump-json": lambda _: of_stream("vnb-dump", dump, "--json", corpus=[*SAVED, REAL["extents"]]),
    "dump-from-json": lambda _: lines(),
    "dump-map": lambda _: of_set("vnb-dump", dump, "--map", "set"),
    "config": lambda _: of_stream("vnb-config", config, "--disk-dir", TARGET, "-o", f"{TARGET}/domain.xml"),
    "cat": lambda _: of_set("vnb-cat", cat, "set"),
    "cat-merge": lambda _: of_set("vnb-cat", cat, "--merge", "set"),
    "verify-set": lambda _: of_set("vnb-verify", verify, "set"),
    "prune": lambda _: of_set("vnb-prune", prune, "--keep-daily", "1", f"{TARGET}/.set", target=f"{TARGET}/.set"),
    "map": lambda _: of_set("vnb-map", program("SET", read_everywhere), "set"),
    "catalog": lambda _: of_set("x", program("SET", begin_from), "set"),
    "import": imported,
    "copy": copy,
    "record": lambda _: record(),
}


def fuzz(target, name, directory, rounds):
    """Try what was kept for a target of this name, and more; a soak keeps what it has found."""
    found = kept.Kept(EARLIER[name])
    fuzzer = Fuzzer(target, directory, found)
    if INPUT:
        fuzzer.again(INPUT, rounds)
        return
    fuzzer.fuzz(rounds)
    if rounds.is_soak:
        kept.store(name, found.least())


@FAULT
@pytest.mark.parametrize("target", TARGETS)
def test_command(tmp_path, rounds, target):
    fuzz(TARGETS[target](tmp_path), target, tmp_path, rounds)


@FAULT
@pytest.mark.parametrize("name, module, stage", [("vnb-extents", extents, "disks"), ("vnb-read", read, "extents")])
def test_command_with_a_server(tmp_path, rounds, name, module, stage):
    # With more threads nbdkit 1.32 aborts when a client dies: then nothing is tried any more.
    with servers.nbdkit("--threads=1", "memory", "256K") as server:
        # A kept input finds the server of any run: it names a link beside the directory of a run.
        (tmp_path / "s").symlink_to(server.uri.partition("socket=")[2])
        content = mutation.with_uri(REAL[stage], "nbd+unix:///?socket=../s")
        fuzz(of_stream(name, module, corpus=[content]), name, tmp_path, rounds)
        assert server.process.poll() is None, server.log.read_text()


def fail(how):
    """A program that does what none must."""
    if how == "traceback":
        raise ZeroDivisionError
    if how == "memory":
        bytearray(200 << 20)
    if how == "outside":
        Path("outside").touch()
    if how == "left":
        Path(TARGET, "left").touch()
        raise Error("x", "no")
    if how == "terminal":
        sys.stderr.write("\x1b[2J\n")
    if how == "silent":
        os._exit(1)


@pytest.mark.parametrize("how, said", [
    ("traceback", "ZeroDivisionError"), ("memory", "it took "), ("outside", "outside its target: [('outside'"),
    ("left", "it failed, and left"), ("terminal", "no line of its own"), ("silent", "it failed without a word"),
])
def test_what_is_not_right_is_seen(tmp_path, how, said):
    rounds = Rounds("x", count=1)
    with pytest.raises(AssertionError) as caught:
        Fuzzer(of_stream("x", program("", lambda _: fail(how))), tmp_path, failed=tmp_path).fuzz(rounds)
    assert said in str(caught.value)
    assert rounds.again() == f"VNB_INPUT={rounds.input}" and rounds.input.read_bytes() == SAVED[0]


def steps(corpus=b"0"):
    """From a 0 step by step to a 3, which fails: by chance alone it would take longer."""
    def main(_args):
        content = sys.stdin.read()
        if content >= "1":
            domxml.parse("<a/>", "x")
            if content >= "2":
                domxml.sizes("<a/>")
                if content >= "3":
                    raise ZeroDivisionError

    def change(chance, content):
        return str(max(0, min(int(content) + chance.choice([-1, 1]), 3))).encode()

    return Target("x", program("", main), [], [corpus], change, lambda content, _: content)


def test_what_reaches_more_is_kept_over_all_rounds(tmp_path):
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        Fuzzer(steps(), tmp_path, failed=tmp_path).fuzz(Rounds("x", count=60), inputs=1)


def test_a_run_begins_with_what_was_kept_and_an_input_alone_is_tried_again(tmp_path):
    fuzzer = Fuzzer(steps(), tmp_path, failed=tmp_path)
    (tmp_path / "input").write_bytes(b"3")
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        fuzzer.again(tmp_path / "input", Rounds("x", count=1))
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        Fuzzer(steps(), tmp_path, kept.Kept([b"2", b"3"]), tmp_path).fuzz(Rounds("x", count=0))


def test_the_smallest_inputs_are_kept_and_none_that_can_be_missed(tmp_path):
    found = kept.Kept()
    found.known = {1}
    for content, lines in ((b"long", {1, 2, 3}), (b"ab", {1, 2}), (b"c", {3}), (b"d", {1}), (b"larger", {4, 5}),
                           (b"less", {4}), (bytes(kept.LARGEST + 1), {9})):
        found.add(content, lines)
    assert found.least() == [b"larger", b"c", b"ab"]
    assert found.recent() == [b"long", b"larger", bytes(kept.LARGEST + 1)]
    archive = tmp_path / "kept.tar.xz"
    kept.store("a", found.least(), archive)
    kept.store("b", [b"x"], archive)
    kept.store("a", [b"c"], archive)
    assert kept.load(archive) == {"a": [b"c"], "b": [b"x"]}
    kept.store("b", [b"y", *(random.Random(seed).randbytes(kept.LARGEST) for seed in range(4))], archive)
    assert [len(content) for content in kept.load(archive)["b"]] == [1, kept.LARGEST, kept.LARGEST]
    assert archive.stat().st_size < kept.LIMIT


def test_where_all_is_refused_that_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzzing, "MANY", 20)

    def main(_args):
        raise Error("x", "no")

    with pytest.raises(AssertionError, match="only 0 of 20 inputs were not refused"):
        Fuzzer(of_stream("x", program("", main), corpus=[b"x"]), tmp_path).fuzz(Rounds("x", count=1), inputs=19)


@pytest.mark.parametrize("content", [CHAIN, REAL["copy"], samples.every_kind(required=False)])
def test_what_is_varied_is_sound(content):
    """And it is not the same again and again."""
    made = {mutation.varied_stream(random.Random(seed), content) for seed in range(30)}
    assert len(made) > 20
    for variant in made:
        assert samples.read(variant)
