# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Tests of what happens when something goes wrong: each says what is tried, and what has to hold all the same.

    @pytest.mark.fault("a stage of a backup is killed", holds="each committed point restores", rounds=4)
    def test_killed(rounds):
        for chance in rounds:           # a random.Random
            ...

VNB_SEED (default 1) decides what happens: the same seed, the same course of events, as far as moments can be repeated.
A round that fails says how to have it again, alone: VNB_SEED=1 VNB_ROUND=3. A test without the fixture `rounds` counts
as one round; one that tries several faults in a round, or one that may have no effect, as what it was to hit had ended,
says rounds.fault() for each. Only what had an effect is counted. Tests with the same text are one line of the table.

A test that is guided by what it found in the rounds before has none that is the same alone. What fails there is in a
file, and its failure says how to have that again: VNB_INPUT=FILE. See fuzzing.py.

VNB_SOAK=MINUTES: rounds go on until this time is over, which the tests have in proportion to their `share` (default 1;
a test with parameters has it for each). `make soak` does that, and puts what was tried into README.md here.
Inputs that reach what none before them has are kept by a soak, see kept.py.
"""

import datetime
import json
import os

import pytest
import tables
from rounds import SEED, SOAK_SECONDS, Rounds, Tally

RESULTS = os.environ.get("VNB_SOAK_RESULTS")  # a file for what table.py renders
ROUNDS = pytest.StashKey()
TALLIES = pytest.StashKey()
SECONDS_A_SHARE = pytest.StashKey()
BEGAN = pytest.StashKey()


def pytest_configure(config):
    config.stash[TALLIES] = {}
    config.stash[BEGAN] = datetime.datetime.now(datetime.timezone.utc)


def pytest_report_header():
    return f"faults: VNB_SEED={SEED}" + (f" VNB_SOAK={SOAK_SECONDS / 60:g}" if SOAK_SECONDS else "")


def pytest_collection_finish(session):
    marks = [item.get_closest_marker("fault") for item in session.items if "rounds" in item.fixturenames]
    shares = sum(mark.kwargs.get("share", 1) for mark in marks if mark)
    session.config.stash[SECONDS_A_SHARE] = SOAK_SECONDS / shares if shares else 0


@pytest.fixture
def rounds(request):
    """The Rounds of this test."""
    mark = request.node.get_closest_marker("fault")
    if SOAK_SECONDS:
        seconds = request.config.stash[SECONDS_A_SHARE] * mark.kwargs.get("share", 1)
        found = Rounds(request.node.name, seconds=seconds)
    else:
        found = Rounds(request.node.name, count=mark.kwargs.get("rounds", 1))
    request.node.stash[ROUNDS] = found
    return found


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    mark = item.get_closest_marker("fault")
    if mark is None or report.skipped or (call.when != "call" and not report.failed):
        return
    rounds = item.stash.get(ROUNDS, None)
    what, holds = mark.args[0], mark.kwargs["holds"]
    tally = item.config.stash[TALLIES].setdefault(what, Tally(what, holds))
    if call.when != "teardown":  # what fails then was counted
        tally.tried += max(rounds.faults, int(report.failed)) if rounds else 1
    tally.failed += report.failed
    if report.failed and rounds is not None:
        report.sections.append(("the same again", rounds.again()))


def pytest_sessionfinish(session):
    if RESULTS is None:
        return
    config = session.config
    result = {
        "seed": SEED,
        "asked": round(SOAK_SECONDS / 60),
        "began": config.stash[BEGAN].strftime("%Y-%m-%dT%H:%M:%SZ"),
        "minutes": round((datetime.datetime.now(datetime.timezone.utc) - config.stash[BEGAN]).total_seconds() / 60),
        "versions": tables.versions(),
        "faults": [vars(tally) for tally in config.stash[TALLIES].values()],
    }
    with open(RESULTS, "w", encoding="utf-8") as file:
        json.dump(result, file, indent=1)
        file.write("\n")
