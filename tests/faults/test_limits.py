# SPDX-License-Identifier: LGPL-2.1-or-later
"""All that reads or changes a set, with few file descriptors, little memory, or files that may not grow: ulimit(1)."""

import contextlib
import re
import shutil
import subprocess

import makers
import nbd
import pytest
from applied import processes_with
from servers import DEADLINE, needs_nbdkit, needs_qemu

PLAN = [
    {"vda": "200k:? 300k:A 500k:-", "vdb": "64k:B 200k:-"}, {"vda": "64k:?", "vdb": "4k:C"},
    {"vda": "64k:. 64k:?", "vdb": "4k:. 8k:0"}, {"vda": "200k:D 8k:0", "vdb": "64k:. 100k:?"},
]
IMAGES = makers.images(PLAN)
POINTS = [makers.point(number) for number in range(len(PLAN))]
KEPT = 2  # points that a prune leaves
CASES = {}  # name: (script, check)
FAULT = pytest.mark.fault(
    "a restore, update, prune, merge, verify, map or cat has few file descriptors, little memory or small files "
    "(ulimit)",
    holds=(
        "exits with 0, 1 or 2; prints only lines of its own; after status 0 the result is right, and a file that "
        "has its name is complete"
    ), rounds=2,
    share=0.5,
)
# What Python and its modules need to start is below the lower ends, what the work needs below the upper ones.
FILES, SIZES = ("n", 5, 16), ("f", 1, 1200)
# Of what has no threads: Python waits for ever for one that found no memory to begin (Thread.start(), 3.11).
MEMORY = ("v", 24_000, 32_000)


def case(script, *limits):
    """The function says what has to hold when the script has run, in a directory with a set, with one of the limits."""
    def add(check):
        CASES[check.__name__] = script, limits, check
        return check

    return add


def sh(script, directory, limit=""):
    """(status, what was said) of a script."""
    done = subprocess.run(["bash", "-c", f"set -o pipefail\n{limit}\n{script}"], cwd=directory,
                          stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEADLINE, check=False)
    return done.returncode, done.stderr


def check_said(status, said):
    """What failed says so, in lines of its own, and nothing else says anything."""
    lines = said.splitlines()
    assert status in (0, 1, 2) and bool(lines) == (status != 0), (status, said)
    assert all(re.fullmatch(r"vnb-[a-z]+: \S.*", line) for line in lines), said


def named(directory, pattern="*"):
    """The files with final names, by name without what follows the first dot of it."""
    return {path.name.partition(".")[0]: path for path in directory.glob(pattern) if path.name[0] != "."}


def is_right(path, expected):
    """Whether an image holds these bytes."""
    if path.suffix == ".raw":
        return path.read_bytes() == expected
    plain = path.parent.parent / "plain"
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, plain], check=True, timeout=DEADLINE)
    return plain.read_bytes() == expected


def check_point(here, set_, number):
    """A point of a set restores byte for byte."""
    script = f"vnb-cat --until {POINTS[number]} {set_} | vnb-apply --format raw restored"
    assert sh(script, here) == (0, "")
    assert all(is_right(here / "restored" / f"{name}.raw", image) for name, image in IMAGES[number].items())
    shutil.rmtree(here / "restored")


@case("vnb-verify --threads 4 set", FILES)
def verify(here, status):
    check_point(here, "set", -1)


@case("vnb-cat set > out", FILES, SIZES, MEMORY)
def cat(here, status):
    assert sh("vnb-cat set > all", here) == (0, "")
    assert ((here / "out").read_bytes() == (here / "all").read_bytes()) == (status == 0)


def restored(here, status):
    images = named(here / "target")
    assert len(images) == 2 or status != 0
    assert all(is_right(path, IMAGES[-1][name]) for name, path in images.items())
    if status == 0:
        assert not list((here / "target").glob(".*"))


@case("vnb-cat set | vnb-apply --format raw target", FILES, SIZES)
def restore_raw(here, status):
    restored(here, status)


@case("vnb-cat set | vnb-apply target", FILES, SIZES)
def restore_qcow2(here, status):
    restored(here, status)


@case("vnb-cat set | vnb-apply --format raw --update copy", FILES, SIZES)
def update(here, status):
    """The copy is at a point, or says that it is not finished; the next run brings it to the last point."""
    if (here / "copy" / ".vnb-apply.spool").exists():
        assert status != 0
    else:
        state = (here / "copy" / ".vnb-apply.state").read_text()
        reached, = (number for number, point in enumerate(POINTS) if f'"point": "{point}"' in state)
        assert reached == len(POINTS) - 1 or status != 0
        assert all(is_right(path, IMAGES[reached][name]) for name, path in named(here / "copy").items())
    assert sh(CASES["update"][0], here)[0] == 0
    assert all(is_right(here / "copy" / f"{name}.raw", image) for name, image in IMAGES[-1].items())


@case(f"vnb-prune --keep-last {KEPT} set", FILES, SIZES, MEMORY)
def prune(here, status):
    assert sh("vnb-verify set", here) == (0, "")
    for number in range(-KEPT, 0):
        check_point(here, "set", number)
    assert len(list((here / "set").glob("*.vnb"))) == KEPT or status != 0
    assert sh(CASES["prune"][0], here)[0] == 0
    assert len(list((here / "set").glob("*.vnb"))) == KEPT


@case("vnb-cat --merge set | vnb-pack --threads 4 -z -o other", FILES, SIZES)
def merge(here, status):
    saved = list((here / "other").glob("*"))
    assert len(saved) == (status == 0)
    if saved:
        check_point(here, "other", -1)


@FAULT
@needs_qemu
@pytest.mark.parametrize("name", CASES)
def test_a_pipeline_with_limits(tmp_path, rounds, name):
    script, limits, check = CASES[name]
    for chance in rounds:
        here = tmp_path / str(rounds.number)
        here.mkdir()
        makers.make_set(here / "set", PLAN, spec="lz4")
        assert sh(f"vnb-cat --until {POINTS[0]} set | vnb-apply --format raw --update copy", here) == (0, "")
        what, least, most = chance.choice(limits)
        limit = f"ulimit -c 0; ulimit -{what} {chance.randint(least, most)}"
        status, said = sh(script, here, limit)
        try:
            check_said(status, said)
            check(here, status)
            assert not processes_with(here)
        except AssertionError as error:
            error.add_note(f"{limit}; {script}: status {status}: {said}")
            raise
        shutil.rmtree(here)


@FAULT
@needs_nbdkit
def test_a_map_with_limits(tmp_path, rounds):
    """Its clients have none: what they read is right, or an error."""
    makers.make_set(tmp_path / "set", PLAN, spec="lz4")
    before = {path: path.read_bytes() for path in (tmp_path / "set").iterdir()}
    image = IMAGES[-1]["vda"]
    for chance in rounds:
        what, least, most = FILES
        limit = f"ulimit -c 0; ulimit -{what} {chance.randint(least, most)}"
        socket = tmp_path / "s"
        with subprocess.Popen(
            ["bash", "-c", f"{limit}; exec vnb-map --disk vda --socket {socket} {tmp_path}/set"],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        ) as process:
            ready = process.stdout.readline()
            if ready:
                client = nbd.NBD()
                with contextlib.suppress(nbd.Error):
                    client.connect_uri(ready.strip())
                    assert client.pread(len(image), 0) == image, limit
                process.terminate()
            _, said = process.communicate(timeout=DEADLINE)
        assert process.returncode in ((1, -15) if ready else (1,)), (limit, said)
        lines = said.splitlines()
        assert lines and all(line.startswith("vnb-map: ") for line in lines), (limit, said)
        assert not processes_with(tmp_path) and not socket.exists(), limit
    assert {path: path.read_bytes() for path in (tmp_path / "set").iterdir()} == before
