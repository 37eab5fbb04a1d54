# SPDX-License-Identifier: LGPL-2.1-or-later
"""A backup of an image that is killed at any moment, in any part."""

import random

import pytest
from killing import Place
from machine import Machine

STAGES = (("vnb-checkpoint",), ("vnb-extents", "vnb-read", "vnb-pack", "qemu-nbd", "qemu-img"))
KILLS = 4


@pytest.fixture(scope="module")
def calls():
    """The system calls of a backup's parts, see Place.profile()."""
    with Place() as place:
        machine = Machine(place, random.Random(0))
        machine.back_up()
        machine.write()
        return place.profile(machine.script, *STAGES)


@pytest.mark.fault(
    "SIGKILL, SIGTERM, SIGINT or SIGPIPE to a part of a backup of an image: `run`, keeper, a stage, qemu-nbd, qemu-img",
    holds="each saved point restores byte for byte, the next increment is right; no partial file, bitmap, server, job",
    rounds=1, share=4,
)
def test_a_backup_that_is_killed(rounds, calls):
    for chance in rounds:
        with Place() as place:
            machine = Machine(place, chance)
            machine.back_up()
            for _ in range(KILLS):
                rounds.fault()
                machine.write()
                truth = machine.truth()
                with place.killed(machine.script, chance, calls) as ended:
                    assert machine.saved(truth) or ended.status != 0
                    machine.write()
                    machine.back_up()
                    machine.check_points(list(machine.truths)[-2:])
            machine.check_points()
