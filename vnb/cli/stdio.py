# SPDX-License-Identifier: LGPL-2.1-or-later
"""Standard input as a stream, and pipes made larger."""

import fcntl
import os
import stat

from vnb.base import log
from vnb.base.errors import Error, Followed
from vnb.format.stream import Reader

PIPE_SIZE = 1 << 20  # the most that a user may ask for (fs.pipe-max-size); see formats/extent-stream.md


def stdin(stage=None, consumer=False, pool=None, wait=None, example=None):
    """
    A Reader of standard input; see Reader. A terminal is refused: nobody types a stream. Its run is ours.

    example (str or None): a command line with a stream, for whoever has none.
    """
    if os.isatty(0):
        raise Error("stdin", f"is a terminal, expected a stream{f', as in {example}' if example else ''}")
    set_pipe_size(0)
    return Reader(0, "stdin", stage, consumer, pool, begun=log.take_run, wait=wait)


def set_pipe_size(fd):
    """Make a pipe larger, if fd is one and the system lets us: only speed depends on it."""
    try:
        if fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ) < PIPE_SIZE:
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
    except OSError:
        return


def said_by_another(error):
    """Whether the command that writes our standard input has failed, and so has said why: we need not say it again."""
    return isinstance(error, Followed) and not stat.S_ISREG(os.fstat(0).st_mode)
