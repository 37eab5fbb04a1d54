# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Which one of the commands of a pipeline shows how far it is: the first that asks.

Their standard error is the same file, mostly a terminal, so whoever holds a record lock on that file is the one. Such
a lock is of a process, even where the open file is shared, and it ends with the process, whatever ends that.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator

ERASE = "\r\x1b[K"  # to the line's start, and what is in it goes: ECMA-48, as all terminals in use have it


def claim() -> bool:
    """True if this process may show how far it is, from now on; False if another one does already."""
    try:
        fcntl.lockf(2, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def release() -> None:
    """Leave it to others."""
    with contextlib.suppress(OSError):
        fcntl.lockf(2, fcntl.LOCK_UN)


@contextlib.contextmanager
def hidden() -> Iterator[str]:
    """
    Gives what has to be written in front of a line, in the same write.

    It erases what another process shows in the terminal's last line, which that one draws again some time later.
    """
    erase = ""
    if os.isatty(2):
        if claim():
            release()
        else:
            erase = ERASE
    yield erase
