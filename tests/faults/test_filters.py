# SPDX-License-Identifier: LGPL-2.1-or-later
"""An NBD server that fails now and then, and is slow: nbdkit's filters error and delay, on what is read and written."""

import re
import subprocess

import makers
import pytest
import servers
from servers import DEADLINE, nbdkit, serve

KiB, MiB = 1 << 10, 1 << 20
SIZE = 2 * MiB
ERRORS = ("EPERM", "EIO", "ENOMEM", "EINVAL", "ENOSPC", "ESHUTDOWN")
RATES = ("0.3%", "3%", "30%", "100%")  # of what there are hundreds; and all of it
FAULT = pytest.mark.fault(
    "an NBD server fails or is slow when it reads, lists extents, writes or zeroes (nbdkit's filters)",
    holds=(
        "everything is done, and right byte for byte; or the command that met the error prints it in a line, and "
        "the set has nothing"
    ), rounds=5,
)
pytestmark = servers.needs_nbdkit


def failing(chance, requests, delays):
    """Arguments of nbdkit for errors in some of these requests, and delays."""
    found = ["--filter=error", "--filter=delay"]
    for request in requests:
        if chance.random() < 0.5:
            found += [f"error-{request}={chance.choice(ERRORS)}", f"error-{request}-rate={chance.choice(RATES)}"]
    return found + [f"delay-{delay}={chance.choice([1, 5])}ms" for delay in delays if chance.random() < 0.3]


def blocks(chance):
    """[(length, content)] of a disk, as tests/makers.py has them."""
    found, left = [], SIZE
    while left:
        length = min(left, chance.choice([4 * KiB, 12 * KiB, 64 * KiB, 200 * KiB]))
        found.append((length, chance.choice([chance.randbytes(length), "A", "0", "-", "-"])))
        left -= length
    return found


def run(script, directory):
    """(status, lines on standard error) of a pipeline, each of a stage and no two of one."""
    done = subprocess.run(["bash", "-c", f"set -o pipefail\n{script}"], cwd=directory, stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, timeout=DEADLINE, check=False)
    lines = done.stderr.splitlines()
    stages = [re.fullmatch(r"(vnb-[a-z]+): \S.*", line) for line in lines]
    assert all(stages) and len({stage[1] for stage in stages}) == len(lines), done.stderr
    assert done.returncode in (0, 1) and bool(lines) == (done.returncode != 0), (done.returncode, done.stderr)
    return done.returncode, lines


@FAULT
def test_what_is_read(tmp_path, rounds):
    for chance in rounds:
        here = tmp_path / str(rounds.number)
        here.mkdir()
        image = here / "image"
        with open(image, "wb") as file:
            for _, length, content in makers.extents(blocks(chance)):
                if content != "-":
                    file.write(bytes(length) if content == "0" else makers.content_of(content, 0, length, 0))
                else:
                    file.seek(length, 1)
            file.truncate(SIZE)
        faults = failing(chance, ["pread", "extents"], ["read", "extents"])
        options = f"--requests {chance.choice([1, 4, 16])} --request-size {chance.choice(['4k', '64k', '512k'])}"
        with nbdkit(*faults[:2], "file", image, *faults[2:]) as server:
            status, lines = run(f"vnb-extents '{server.uri}' | vnb-read {options} | vnb-pack -z -o set", here)
        saved = list((here / "set").glob("*"))  # hidden ones, too
        assert len(saved) == (status == 0), (faults, lines, saved)
        if status == 0:
            assert run("vnb-cat set | vnb-apply --format raw restored", here) == (0, [])
            restored, = (here / "restored").glob("*.raw")
            assert restored.read_bytes() == image.read_bytes(), faults


@FAULT
def test_what_is_written(tmp_path, rounds):
    """What has failed is said; then the disk is nobody's, and the next run makes it right."""
    for chance in rounds:
        plan = [{"vda": blocks(chance)}, {"vda": [(length, chance.choice([".", content]))
                                                 for length, content in blocks(chance)]}]
        here = tmp_path / str(rounds.number)
        makers.make_set(here / "set", plan, spec=chance.choice(["none", "lz4"]))
        expected = makers.images(plan)[-1]["vda"]
        image = here / "image"
        image.write_bytes(b"x" * SIZE)
        faults = failing(chance, ["pwrite", "zero", "trim"], ["write", "zero", "trim"])
        apply = "vnb-cat {} set | vnb-apply --disk 'vda={}'"
        with serve("nbdkit", "--foreground", *faults[:2], "file", image, *faults[2:]) as server:
            status, lines = run(apply.format(chance.choice(["", "--merge"]), server.uri), here)
        assert status or image.read_bytes() == expected, faults
        if status:
            with serve("nbdkit", "--foreground", "file", image) as server:
                assert run(apply.format("", server.uri), here) == (0, []), (faults, lines)
            assert image.read_bytes() == expected, (faults, lines)
