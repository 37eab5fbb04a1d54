# SPDX-License-Identifier: LGPL-2.1-or-later
"""System calls that Python does not have, and what they are for."""

from __future__ import annotations

import functools
import os
import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16  # modes of fallocate(2)
EARLY = 8 << 20  # bytes: written back in such steps, so that the sync at the end has little left to do

_SYNC_FILE_RANGE_WRITE = 2
_PR_SET_CHILD_SUBREAPER = 36


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2), whose modes Python does not have. Raises OSError."""
    _call("fallocate", fd, mode, offset, length)


def adopt_orphans() -> None:
    """From now on a descendant of ours whose parent ends is our child, and not that of init. Raises OSError."""
    _call("prctl", _PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


class WriteBack:
    """
    Has the kernel start to write a file back while more is written to it; nothing for what is no regular file.

    Without it all waits for the sync at the end, where nothing else is left to do meanwhile.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._bytes = 0
        self._useful = stat.S_ISREG(os.fstat(fd).st_mode)

    def count(self, length: int) -> None:
        """length bytes were written."""
        self._bytes += length
        if self._bytes >= EARLY and self._useful:
            self._bytes = 0
            try:
                _call("sync_file_range", self._fd, 0, 0, _SYNC_FILE_RANGE_WRITE)
            except OSError:
                self._useful = False  # only speed depends on it: what is wrong with the file, the sync will say


def _call(name: str, *arguments: int) -> None:
    import ctypes  # most commands need none of it, and all would wait for it

    if _function(name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


@functools.cache
def _function(name: str) -> Any:
    import ctypes

    off_t, number, word = ctypes.c_int64, ctypes.c_int, ctypes.c_ulong
    libc = ctypes.CDLL(None, use_errno=True)
    function = getattr(libc, name + "64", None) or getattr(libc, name)
    function.argtypes = {
        "fallocate": (number, number, off_t, off_t), "sync_file_range": (number, off_t, off_t, ctypes.c_uint),
        "prctl": (number, word, word, word, word),
    }[name]
    return function
