# SPDX-License-Identifier: LGPL-2.1-or-later
"""
What was committed is there after a power failure: writes, syncs and names come in an order that leaves no other way.

No power is cut here, as in test_power_cut.py, which meets few of the moments: the system calls of each command are
recorded, and of their order follows what a disk may forget after each of them.
"""

import os
import random
import shutil
import subprocess

import ordering
import pytest
from disturbing import Place
from machine import Machine

power = pytest.mark.fault(
    "the power fails after any system call, by the order of the calls: sets, prune, state, restore, update",
    holds=(
        "a file is synced before it gets its final name, and the name after that; nothing is removed before its "
        "replacement is safe"
    ),
)


@pytest.fixture
def saved():
    with Place() as place:
        machine = Machine(place, random.Random(0))
        for _ in range(3):
            machine.write()
            machine.back_up()
        yield machine


def traced(place, script, is_final):
    """The Trace of a script that has to work."""
    log = place.directory / "strace.log"
    done = subprocess.run(
        [*ordering.command(log), "bash", "-c", f"set -o pipefail\n{script}"], env=place.env, cwd=place.directory,
        capture_output=True, text=True, check=False,
    )
    assert done.returncode == 0, done.stderr
    return ordering.Trace(log.read_text(errors="replace"), place.directory, is_final)


def is_segment(path):
    return path.endswith(".vnb") and not os.path.basename(path).startswith(".")


@power
def test_a_backup(saved):
    """The segment, and the directories of a set that is new."""
    script = saved.script.replace(str(saved.set), f"{saved.set}/new/one").replace("--level auto", "--level full")
    trace = traced(saved.place, script, is_segment)
    assert (trace.faults, trace.committed) == ([], 1)


@power
def test_the_state_of_a_job(saved):
    trace = traced(saved.place, saved.script, lambda path: path.endswith("/job.json"))
    assert trace.faults == []
    assert trace.committed > 0


@power
def test_a_prune(saved):
    trace = traced(saved.place, f"vnb-prune --keep-last 2 {saved.set}", is_segment)
    assert (trace.faults, trace.committed) == ([], 1)


@power
@pytest.mark.parametrize("format_", ["qcow2", "raw"])
def test_a_restore(saved, format_):
    """The directory is new, too: a name in it is worth nothing without its own."""
    target = saved.place.directory / "a" / "b"
    script = f"vnb-cat {saved.set} | vnb-apply --format {format_} {target}"
    final = [f"{target}/{name}.{format_}" for name in saved.images]
    trace = traced(saved.place, script, lambda path: path in final)
    assert (trace.faults, trace.committed) == ([], 2)


@power
@pytest.mark.parametrize("format_", ["qcow2", "raw"])
def test_an_update(saved, format_):
    """State and spool; and the image is synced before the state says so."""
    target = saved.place.directory / "copy"
    first = next(iter(saved.truths))
    update = f"vnb-apply --update --format {format_} {target}"
    saved.place.sh(f"vnb-cat --until {first} {saved.set} | {update}")
    images = [f"{name}.{format_}" for name in saved.images]
    final = [f"{target}/{name}" for name in (".vnb-apply.state", ".vnb-apply.spool", *images)]
    trace = traced(saved.place, f"vnb-cat {saved.set} | {update}", lambda path: path in final)
    assert trace.faults == []
    assert trace.committed == 3 * (len(saved.truths) - 1)  # the spool; the state before it, and after all


@power
def test_an_image_written_to_in_place(saved):
    target = saved.place.directory / "disk.raw"
    shutil.copy(saved.truths[next(iter(saved.truths))]["vda"], target)
    script = f"vnb-cat --disk vda {saved.set} | vnb-apply --disk vda={target}"
    trace = traced(saved.place, script, lambda path: path == str(target))
    assert trace.faults == []


LOG = """\
1 openat(AT_FDCWD</d>, "/d/.x", O_WRONLY|O_CREAT, 0600) = 3</d/.x>
1 write(3</d/.x>, "a", 1) = 1
2 fsync(3</d/.x> <unfinished ...>
1 write(4</d/other>, "<", 1) = 1
2 <... fsync resumed>) = 0
1 rename("/d/.x", "/d/x") = 0
1 fsync(5</d>) = 0
1 unlink("/d/y") = 0
1 fsync(5</d>) = 0
"""


@pytest.mark.parametrize("without, fault", [
    ("1 fsync(5</d>) = 0\n", "/d/y goes, and the name /d/x"),
    ("2 fsync(3</d/.x> <unfinished ...>\n", "/d/x has a name, and what line 2: write wrote is not synced"),
])
def test_an_order_that_is_wrong_is_found(without, fault):
    """The trace itself: a test that cannot fail would say nothing."""
    def faults(log):
        return ordering.Trace(log, "/d", lambda path: path in ("/d/x", "/d/y")).faults

    assert faults(LOG) == []
    assert fault in faults(LOG.replace(without, "", 1))[0]
