# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where private directories for sockets and the like are made: where nobody else can put another in their place."""

from __future__ import annotations

import errno
import os
import stat
import tempfile

from vnb.base.errors import Error, os_error

MOST_LINKS = 40  # on the way to a file, as the kernel has it


def runtime_directory() -> str:
    """XDG_RUNTIME_DIR, if it is ours as it has to be (sudo -E leaves another's), else temporary_directory()."""
    path = os.environ.get("XDG_RUNTIME_DIR")
    return path if path and _weak_point(path) is None else temporary_directory()


def temporary_directory() -> str:
    """The path of the directory for temporary files: TMPDIR, or the system's. Raises Error if it is another user's."""
    path = tempfile.gettempdir()
    try:
        weak = _weak_point(path)
    except OSError as error:
        raise os_error(path, error) from None
    if weak is None:
        return path
    through = "" if weak == path else f", through {weak}"
    raise Error(path, f"another user can replace what is made in it{through}: set TMPDIR to a directory of your own")


def _weak_point(path: str) -> str | None:
    """
    The first directory or link on the way to a directory, or this itself, in which others can replace what is there.

    None if only we, and root, can rename and remove what we make in it: whoever can do that with any part of the way
    can lead us elsewhere between two steps. Raises OSError.
    """
    at, ahead, links = "/", _names(os.path.join(os.getcwd(), path)), 0
    while True:
        found = os.lstat(at)
        is_link = stat.S_ISLNK(found.st_mode)
        if found.st_uid not in (0, os.geteuid()) or (not is_link and _is_open(found)):
            return at
        if is_link:
            links += 1
            if links > MOST_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            target = os.readlink(at)
            ahead = _names(target) + ahead
            at = "/" if target.startswith("/") else os.path.dirname(at)
        elif ahead:
            name = ahead.pop(0)
            at = os.path.dirname(at) if name == ".." else os.path.join(at, name)
        else:
            return None


def _is_open(found: os.stat_result) -> bool:
    """Whether others than its owner can rename and remove what is in a directory; found: os.stat() of it."""
    if found.st_mode & stat.S_ISVTX:
        return False
    # A user's own group, of the same number, has nobody else in it: umask(2) is 002 for such users.
    is_own = found.st_gid == 0 or found.st_gid == os.getegid() == os.geteuid()
    return bool(found.st_mode & (stat.S_IWOTH if is_own else stat.S_IWOTH | stat.S_IWGRP))


def _names(path: str) -> list[str]:
    return [name for name in path.split("/") if name not in ("", ".")]
