# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where private directories for sockets and the like are made: where nobody else can put another in their place."""

import os
import stat
import tempfile

from vnb.errors import Error, os_error


def runtime_directory():
    """XDG_RUNTIME_DIR, if it is ours as it has to be (sudo -E leaves another's), else temporary_directory()."""
    path = os.environ.get("XDG_RUNTIME_DIR")
    return path if path and _is_safe(path) else temporary_directory()


def temporary_directory():
    """The path of the directory for temporary files: TMPDIR, or the system's. Raises Error if it is another user's."""
    path = tempfile.gettempdir()
    try:
        if _is_safe(path):
            return path
    except OSError as error:
        raise os_error(path, error) from None
    raise Error(path, "another user can replace what is made in it: set TMPDIR to a directory of your own")


def _is_safe(path):
    """Whether only we, and root, can rename and remove what we make in a directory. Its group is trusted."""
    found = os.stat(path)
    others = found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX
    return found.st_uid in (0, os.geteuid()) and not others
