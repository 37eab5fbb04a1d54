# SPDX-License-Identifier: LGPL-2.1-or-later
"""For all tests: the commands of this tree come first in PATH, and none waits for ever."""

import os
import signal
from pathlib import Path

import pytest

COMMANDS = Path(__file__).resolve().parents[1] / ".venv" / "bin"
LIMIT_SECONDS = 240  # for what takes a minute at most: a test that hangs names itself, and the others run

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
