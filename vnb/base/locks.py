# SPDX-License-Identifier: LGPL-2.1-or-later
"""flock(2) on open files: taken at once or not at all, or waited for with a word to the user."""

from __future__ import annotations

import fcntl
import threading

from vnb.base import log, waiting

SAY_SECONDS = 5  # of waiting without a word: a lock is held for moments, unless its holder was stopped


def take(fd: int, shared: bool = False) -> None:
    """Take the lock of an open file. Raises BlockingIOError where somebody else has it."""
    fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)


def wait_for(fd: int, name: str, shared: bool = False) -> None:
    """Take the lock of an open file. If that takes long, a note says which file it is. Raises OSError."""
    try:
        take(fd, shared)
        return
    except BlockingIOError:
        pass
    what = f"the lock of {name}, which another process holds (lsof {name})"
    # A keeper passes on what it waits for; any other process says so itself.
    note = None if waiting.is_told() else threading.Timer(SAY_SECONDS, log.note, [f"waiting for {what}"])
    try:
        if note is not None:
            note.daemon = True
            note.start()
        with waiting.on(what):
            fcntl.flock(fd, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
    finally:
        if note is not None:
            note.cancel()
