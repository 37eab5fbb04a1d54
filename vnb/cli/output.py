# SPDX-License-Identifier: LGPL-2.1-or-later
"""Standard output, as a Writer that suits what it is."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import select
import socket
import stat
import sys
import termios

from vnb.base.buffers import beside
from vnb.base.errors import Error
from vnb.cli.stdio import set_pipe_size
from vnb.format import values, writing
from vnb.job import proof

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


_made = []  # the Writer to standard output, once there is one
_MEMORY_DEVICES = 1  # the major number of /dev/null and its like, which never block


def stdout(wait: Any = None) -> Any:
    """
    A Writer to standard output, which must not be a terminal. It reports the segments that it writes.

    wait: is given a descriptor and an event of poll(2) that has to be waited for, where nobody takes
    what is written; a stage that has other things to do meanwhile does them there. None: it just waits.
    """
    if os.isatty(1):
        raise Error("stdout", "is a terminal: will not write a binary stream to it (vnb-dump prints one)")
    if stat.S_ISREG(os.fstat(1).st_mode):
        writer = _to_file(wait)
    else:
        set_pipe_size(1)
        writer = writing.Writer(1, wait=wait, put=None if wait is None else _put(wait))
    writer.report = proof.ReportOfStdout
    _made.append(writer)
    return writer


def tell_of_failure() -> None:
    """
    Tell the command that reads our stream that we have failed, and said why: it need not say that there is no stream.

    Nothing is told where a part of a stream has been written, or where a file would keep it.
    """
    if is_last() or any(writer.offset for writer in _made):
        return
    with contextlib.suppress(OSError):  # nobody reads it any more
        poll = select.poll()
        poll.register(1, select.POLLOUT)
        if poll.poll(0):
            os.write(1, values.FAILED)


def unread(fd: int) -> int:
    """Bytes in a pipe or socket, by the end that writes to it, that nobody has read yet; 0: not known."""
    request = termios.TIOCOUTQ if stat.S_ISSOCK(os.fstat(fd).st_mode) else termios.FIONREAD
    try:
        return int.from_bytes(fcntl.ioctl(fd, request, bytes(4)), sys.byteorder)
    except OSError as error:
        if error.errno in (errno.ENOTTY, errno.EINVAL):
            return 0
        raise


def _put(wait):
    """
    A function that writes some of a list of bytes-like to standard output, and gives their count; it does not block.

    The flag for that belongs to all who have the same pipe, and others are not prepared for it: so a pipe is opened
    once more, and a socket is told it each time.
    """
    found = os.fstat(1)
    if stat.S_ISSOCK(found.st_mode):
        connection = socket.socket(fileno=os.dup(1))
        return lambda parts: connection.sendmsg(parts, (), socket.MSG_DONTWAIT)
    if stat.S_ISFIFO(found.st_mode):
        try:
            return functools.partial(os.writev, os.open("/proc/self/fd/1", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC))
        except OSError:
            return functools.partial(_put_a_little, wait)  # another user's pipe, no /proc, or nobody reads it any more
    if stat.S_ISCHR(found.st_mode) and os.major(found.st_rdev) == _MEMORY_DEVICES:
        return functools.partial(os.writev, 1)
    return lambda parts: beside(lambda: os.writev(1, parts), wait)


def _put_a_little(wait, parts):
    """So much is sure to be taken when a pipe is ready."""
    wait(1, select.POLLOUT)
    return os.writev(1, [parts[0][: select.PIPE_BUF]])


def is_last() -> bool:
    """Whether no other command reads standard output: it is neither a pipe nor a socket."""
    mode = os.fstat(1).st_mode
    return not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode))


def _to_file(wait):
    from vnb.store import direct_writer  # most write to pipes, and need no thread

    start = os.lseek(1, 0, os.SEEK_CUR)
    if not (fcntl.fcntl(1, fcntl.F_GETFL) & os.O_APPEND or start % direct_writer.ALIGNMENT):
        try:
            # Opened once more: whoever has the same descriptor after us does not expect that it is for whole blocks.
            return direct_writer.Stdout(os.open("/proc/self/fd/1", os.O_WRONLY | os.O_CLOEXEC), start, wait)
        except OSError:
            pass  # we were given what we may not open
    return writing.Writer(1, put=None if wait is None else lambda parts: beside(lambda: os.writev(1, parts), wait))
