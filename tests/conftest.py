# SPDX-License-Identifier: LGPL-2.1-or-later
"""For all tests: the commands of this tree come first in PATH, none waits for ever, stage tests are marked."""

import os
import signal
from pathlib import Path

import pytest

COMMANDS = Path(__file__).resolve().parents[1] / ".venv" / "bin"
LIMIT_SECONDS = int(os.environ.get("VNB_TEST_LIMIT", "240"))  # for a minute at most: what hangs names itself
# Tests of these start no server and no pipeline: `make check` is these. All others beside them are stage tests.
FAST = (
    "test_backupset", "test_cache", "test_chain", "test_checkpoint_usage", "test_codec", "test_completion",
    "test_config", "test_direct", "test_docs", "test_domxml", "test_dump", "test_endpoint",
    "test_export_walk", "test_frame", "test_index", "test_layers", "test_run", "test_source", "test_stream",
    "test_vectors",
)

os.environ["PATH"] = f"{COMMANDS}:{os.environ['PATH']}"


def _too_long(_signum, _stack):
    raise TimeoutError(f"the test has not ended within {LIMIT_SECONDS} seconds")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call():
    before = signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(LIMIT_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent == Path(__file__).parent and not item.path.stem.startswith(FAST):
            item.add_marker("stage")
