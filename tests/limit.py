# SPDX-License-Identifier: LGPL-2.1-or-later
"""No test waits for ever: what hangs fails, and names itself."""

import contextlib
import os
import signal

SECONDS = int(os.environ.get("VNB_TEST_LIMIT", "240"))  # for what takes a minute at most


def _too_long(_signum, _stack):
    raise TimeoutError(f"the test has not ended within {SECONDS} seconds")


@contextlib.contextmanager
def limited():
    """What is done in this context raises TimeoutError after SECONDS."""
    before = signal.signal(signal.SIGALRM, _too_long)
    renew()
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def renew():
    """From now on it is SECONDS again."""
    signal.alarm(SECONDS)
