# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether somebody else uses a file or a device that is to be written."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import struct

from vnb.base.errors import Error, os_error

# What QEMU locks in images that it has open: a byte for each thing it does or that nobody else may do (file-posix.c).
_QEMU_DOES, _QEMU_DENIES = 100, 200
_QEMU_WRITE, _QEMU_RESIZE = 1, 3
BLKROGET = 0x125E  # whether a block device is read-only: it can be opened for writing all the same


def refuse_if_in_use(fd: int, text: str) -> None:
    """
    Raise Error if a file is used in a way that does not go with writing; keep QEMU out of it as it keeps us.

    fd: open for reading at least, which has the locks as long as it is open. text: what the user typed.
    """
    if _has_loop_device(os.fstat(fd)):
        raise Error(text, "is in use: a loop device is on it")
    try:
        for first in (_QEMU_DOES, _QEMU_DENIES):
            for what in (_QEMU_WRITE, _QEMU_RESIZE):
                fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _lock(fcntl.F_RDLCK, first + what))
        for byte in (_QEMU_DOES + _QEMU_WRITE, _QEMU_DENIES + _QEMU_WRITE):
            found = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _lock(fcntl.F_WRLCK, byte))
            if struct.unpack(_FLOCK, found)[0] != fcntl.F_UNLCK:
                raise Error(text, "is in use: another process has its locks (is its domain running)")
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise Error(text, "is in use: another process has its locks (is its domain running)") from None


def refuse_if_in_use_at(path: str) -> None:
    """Raise Error if there is a file, and it is in use now."""
    try:
        # Not to wait for whoever may open the other end of a FIFO. A link is replaced, not what it leads to.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):
            return
        raise os_error(path, error) from None
    try:
        refuse_if_in_use(fd, path)
    finally:
        os.close(fd)


def _has_loop_device(found: os.stat_result) -> bool:
    """Whether a loop device, which may be mounted and takes no locks, is on a file; found: os.stat() of it."""
    for path in glob.glob("/sys/block/loop*/loop/backing_file"):
        with contextlib.suppress(OSError), open(path, "rb") as file:
            if os.path.samestat(os.stat(file.read().removesuffix(b"\n")), found):
                return True
    return False


_FLOCK = "hhqqi4x"  # struct flock of fcntl(2), with 64 bits of offset


def _lock(type_: int, byte: int) -> bytes:
    return struct.pack(_FLOCK, type_, os.SEEK_SET, byte, 1, 0)
