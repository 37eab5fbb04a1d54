# SPDX-License-Identifier: LGPL-2.1-or-later
"""For all tests: the commands of this tree come first in PATH, none waits for ever, slow ones are marked."""

import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

import limit
import pytest
from host import host  # noqa: F401 - a fixture
from machines import lab, linux, no_machines, vm  # noqa: F401 - fixtures; one laboratory for all folders

COMMANDS = Path(__file__).resolve().parents[1] / ".venv" / "bin"
# Tests of these start no server and no pipeline: `make check` is these. All others beside them are stage tests.
FAST = (
    "test_backupset", "test_block_status", "test_buffers", "test_cache", "test_chain", "test_checkpoint_usage",
    "test_codec", "test_completion", "test_config", "test_direct", "test_docs", "test_domxml", "test_dump",
    "test_endpoint", "test_fault_table", "test_frame", "test_index", "test_log", "test_output", "test_overlay",
    "test_rooms", "test_run", "test_scale", "test_settings", "test_source", "test_speed", "test_state", "test_stream",
    "test_vectors",
)
# These wait for agents that hang and for scratch files that fill up, and leave the processors to others.
PATIENT = ("test_checkpoint_freeze", "test_checkpoint_keeper", "test_from_virtnbdbackup")

# Servers and mkfs are where not every user's PATH goes.
os.environ["PATH"] = f"{COMMANDS}:{os.environ['PATH']}:/usr/sbin:/sbin"
os.environ["VNB_CONFIG"] = ""  # nor does a vnb.ini of whoever runs the tests count, or how they like what is said
for name in ("VNB_LOG_LEVEL", "VNB_LOG_FORMAT", "VNB_PROGRESS", "VNB_RUN"):
    os.environ.pop(name, None)

# What a test leaves among the temporary files of the host fails the run. Those of pytest itself stay where they were.
os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
TEMPORARY = Path(tempfile.mkdtemp(prefix="vnb-tests."))
os.environ["TMPDIR"] = tempfile.tempdir = str(TEMPORARY)
made_by, left = {}, []  # id of the test after which it was first seen, by name; the names at the end

# Who runs the tests under nohup(1), or in the background of a script, ignores signals; what they start must not.
for signum, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(signum) is signal.SIG_IGN:
        signal.signal(signum, handler)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call():
    with limit.limited():
        yield


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        folder = item.path.parent
        if folder == here / "live" or "lab" in item.fixturenames:
            item.add_marker("live")
            if item.path.stem in PATIENT:
                item.add_marker("patient")
        elif not item.path.stem.startswith(FAST):
            item.add_marker("stage")


def pytest_runtest_logfinish(nodeid):
    for name in os.listdir(TEMPORARY):
        made_by.setdefault(name, nodeid)


def pytest_sessionfinish(session):
    left[:] = sorted(os.listdir(TEMPORARY))
    shutil.rmtree(TEMPORARY)
    if left:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    for name in left:
        terminalreporter.write_line(f"FAILED {made_by.get(name)}: left {name} among the temporary files", red=True)


@pytest.fixture
def killed(tmp_path_factory, monkeypatch):
    """For tests that kill: what has no chance to remove its temporary files makes them in a directory of pytest's."""
    directory = str(tmp_path_factory.mktemp("temporary"))
    monkeypatch.setenv("TMPDIR", directory)
    monkeypatch.setattr(tempfile, "tempdir", directory)


@pytest.fixture
def utc(monkeypatch):
    """Local time is UTC."""
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()
