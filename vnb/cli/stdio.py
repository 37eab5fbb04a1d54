# SPDX-License-Identifier: LGPL-2.1-or-later
"""Standard input as a stream, and pipes made larger."""

from __future__ import annotations

import fcntl
import os
import stat

from vnb.base import log
from vnb.base.errors import Error, Followed
from vnb.format.stream import Reader

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


F_SETPIPE_SZ, F_GETPIPE_SZ = 1031, 1032  # of linux/fcntl.h; Python has them from 3.10 on
PIPE_SIZE = 1 << 20  # the most that a user may ask for (fs.pipe-max-size); see formats/extent-stream.md


def stdin(
    stage: str | None = None, consumer: bool = False, pool: Any = None, wait: Any = None, example: str | None = None,
) -> Reader:
    """
    A Reader of standard input; see Reader. A terminal is refused: nobody types a stream. Its run is ours.

    example: a command line with a stream, for whoever has none.
    """
    if os.isatty(0):
        raise Error("stdin", f"is a terminal, expected a stream{f', as in {example}' if example else ''}")
    set_pipe_size(0)
    return Reader(0, "stdin", stage, consumer, pool, begun=log.take_run, wait=wait)


def set_pipe_size(fd: int) -> None:
    """Make a pipe larger, if fd is one and the system lets us: only speed depends on it."""
    try:
        if fcntl.fcntl(fd, F_GETPIPE_SZ) < PIPE_SIZE:
            fcntl.fcntl(fd, F_SETPIPE_SZ, PIPE_SIZE)
    except OSError:
        return


def said_by_another(error: BaseException) -> bool:
    """Whether the command that writes our standard input has failed, and so has said why: we need not say it again."""
    return isinstance(error, Followed) and not stat.S_ISREG(os.fstat(0).st_mode)
