# SPDX-License-Identifier: LGPL-2.1-or-later
"""vnb-cat --merge as it is used: into a set, from a point, to a point, some disks, and what is refused."""

import os
import signal
import subprocess

import makers
import pytest
import samples
from samples import applied

from vnb.format.values import FAILED
from vnb.store import backupset, chain

PLAN = [
    {"vda": "64k:A 64k:B 64k:-", "vdb": "32k:C 32k:0"},
    {"vda": "32k:. 64k:D", "vdb": "32k:0"},
    {"vda": "192k:. 64k:E", "vdb": "64k:."},
    {"vda": "16k:F", "vdb": "48k:. 16k:G"},
]


@pytest.fixture(params=["none", "lz4"])
def set_(tmp_path, request):
    makers.make_set(tmp_path / "set", PLAN, spec=request.param)
    return tmp_path / "set"


def sh(script, check=True):
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {script}"], capture_output=True, check=False)
    done.stderr = done.stderr.decode()
    assert not check or (done.returncode, done.stderr) == (0, "")
    return done


def images(number):
    return {name: bytes(image) for name, image in makers.images(PLAN)[number].items()}


@pytest.mark.parametrize("number", range(4))
def test_a_full_one_of_each_point(set_, number):
    content = sh(f"vnb-cat --merge --until {makers.point(number)} {set_}").stdout
    assert applied(content) == images(number)
    ((head, _, _, _, _),) = samples.read(content)
    wanted = makers.head(number, level="full", parent=None)
    assert {**head, "id": None} == {**wanted, "id": None}


def test_a_synthetic_full_that_the_chain_goes_on_from(set_, tmp_path):
    """In a set of its own, where the increments that come later may be stored."""
    new = tmp_path / "new"
    sh(f"vnb-cat --merge --until {makers.point(1)} {set_} | vnb-pack -z -o {new}")
    for number in (2, 3):
        sh(f"vnb-pack -o {new} < {backupset.paths(str(set_))[number]}")
    assert applied(sh(f"vnb-cat {new}").stdout) == images(3)
    assert sh(f"vnb-cat --base {new}").stdout.decode().strip() == makers.point(3)


def test_an_alternative_in_the_same_set(set_):
    sh(f"vnb-cat --merge --until {makers.point(2)} {set_} | vnb-pack -o {set_}")
    path = chain.path(backupset.segments([str(set_)]), "set")
    assert [segment.head["level"] for segment in path] == ["full", "inc"]
    assert applied(sh(f"vnb-cat --until {makers.point(3)} {set_}").stdout) == images(3)
    os.unlink(backupset.paths(str(set_))[0])
    assert applied(sh(f"vnb-cat --until {makers.point(3)} {set_}").stdout) == images(3)


def test_a_part_in_the_middle(set_, tmp_path):
    middle = tmp_path / "middle.vnb"
    sh(f"vnb-cat --merge --from {makers.point(0)} --until {makers.point(2)} {set_} > {middle}")
    ((head, disks, _, _, _),) = samples.read(middle.read_bytes())
    assert (head["level"], head["parent"], head["point"]) == ("inc", makers.point(0), makers.point(2))
    assert [disk["level"] for disk in disks] == ["inc", "inc"]
    first, _, _, last = backupset.paths(str(set_))
    assert applied(sh(f"vnb-cat {first} {middle} {last}").stdout) == images(3)
    # What is there in two ways gives the same.
    assert applied(sh(f"cat {first} {middle} {last}").stdout) == images(3)


def test_times_name_points_too(set_):
    done = sh(f"vnb-cat --merge --from 2026-01-31T12:00:01 --until 2026-01-31T12:00:02 {set_}")
    ((head, _, _, _, _),) = samples.read(done.stdout)
    assert (head["parent"], head["point"]) == (makers.point(1), makers.point(2))


def test_some_disks(set_):
    content = sh(f"vnb-cat --merge --disk vdb {set_}").stdout
    assert applied(content) == {"vdb": images(3)["vdb"]}


@pytest.mark.parametrize("words, reason", [
    ("--from {2} --until {1}", "vnb-cat: --from: {2} is not on the way to {1}"),
    ("--from nowhere", "vnb-cat: {set}: no restore point nowhere (vnb-dump --list has them), "
     "nor is that a time such as 2026-01-31T12:00"),
    ("--disk vdx", "vnb-cat: --disk: no disk vdx at restore point {3}"),
])
def test_what_is_refused(set_, words, reason):
    points = [makers.point(number) for number in range(4)]
    done = sh(f"vnb-cat --merge {words.format(*points)} {set_}", check=False)
    assert (done.returncode, done.stdout) == (1, FAILED)
    assert done.stderr == reason.format(*points, set=set_) + "\n"


def test_nothing_new_is_no_failure(set_):
    """Whoever brings a copy up to date every night has nothing to do in some of them."""
    done = sh(f"vnb-cat --merge --from {makers.point(3)} {set_}", check=False)
    assert (done.returncode, done.stdout) == (4, b"")
    assert done.stderr == f"vnb-cat: {set_}: nothing to do: {makers.point(3)} is the last restore point\n"
    done = sh(f"vnb-cat --merge --from {makers.point(1)} --until {makers.point(1)} {set_}", check=False)
    said = f"{makers.point(1)} is the last restore point by {makers.point(1)}"
    assert done.stderr == f"vnb-cat: {set_}: nothing to do: {said}\n"
    assert done.returncode == 4


def test_from_without_merge_is_wrong_usage(set_):
    done = sh(f"vnb-cat --from {makers.point(0)} {set_}", check=False)
    assert done.returncode == 2


def test_damage_leaves_a_stream_without_an_end(set_):
    path = backupset.paths(str(set_))[3]
    with open(path, "r+b") as file:
        content = file.read()
        at = content.index(b"\x98\xa4data") + 70
        file.seek(at)
        file.write(bytes([content[at] ^ 1]))
    done = sh(f"vnb-cat --merge {set_} | vnb-pack -o {set_}", check=False)
    assert done.returncode == 1
    assert f"vnb-cat: {path}: vda: offset 0: " in done.stderr
    assert len(os.listdir(set_)) == 4


def test_the_reader_goes_away(set_):
    done = subprocess.run(["bash", "-c", f"vnb-cat --merge {set_} | head -c 1 > /dev/null; exit ${{PIPESTATUS[0]}}"],
                          capture_output=True, text=True, check=False)
    assert done.returncode in (0, 128 + signal.SIGPIPE)
    assert done.stderr == ""


def test_a_full_disk(set_):
    done = sh(f"vnb-cat --merge {set_} > /dev/full", check=False)
    assert (done.returncode, done.stderr) == (1, "vnb-cat: stdout: No space left on device\n")
