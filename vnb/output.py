# SPDX-License-Identifier: LGPL-2.1-or-later
"""Standard output, as a Writer that suits what it is."""

import fcntl
import os
import stat

from vnb import proof, stream
from vnb.errors import Error


def stdout():
    """A Writer to standard output, which must not be a terminal. It reports the segments that it writes."""
    if os.isatty(1):
        raise Error("stdout", "is a terminal: will not write a binary stream to it (vnb-dump prints one)")
    if stat.S_ISREG(os.fstat(1).st_mode):
        writer = _to_file()
    else:
        stream.set_pipe_size(1)
        writer = stream.Writer(1)
    writer.report = proof.ReportOfStdout
    return writer


def is_last():
    """Whether no other command reads standard output: it is neither a pipe nor a socket."""
    mode = os.fstat(1).st_mode
    return not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode))


def _to_file():
    from vnb import direct  # most write to pipes, and need no thread

    start = os.lseek(1, 0, os.SEEK_CUR)
    if fcntl.fcntl(1, fcntl.F_GETFL) & os.O_APPEND or start % direct.ALIGNMENT:
        return stream.Writer(1)
    try:
        # Opened once more: whoever has the same descriptor after us does not expect that it is for whole blocks.
        fd = os.open("/proc/self/fd/1", os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return stream.Writer(1)  # we were given what we may not open
    return direct.Stdout(fd, start)
