# SPDX-License-Identifier: LGPL-2.1-or-later
"""Files and directories that are still there after a power failure, with the names in them."""

from __future__ import annotations

import contextlib
import errno
import os

from vnb.base.errors import os_error


def sync_directory(path: str) -> None:
    """Make the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_directories(path: str, mode: int) -> list[str]:
    """
    Make a directory, and those above it, unless they are there; the absolute paths of those made, uppermost first.

    They are durable: else a power failure takes the whole directory away, with the synced files in it. Where one
    cannot be made, none is left.
    """
    missing = []
    above = os.path.abspath(path)
    while not os.path.lexists(above):
        missing.append(above)
        above = os.path.dirname(above)
    if missing and not os.path.isdir(above):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), above)
    made = []
    try:
        for directory in reversed(missing):
            with contextlib.suppress(FileExistsError):  # somebody else was faster
                os.mkdir(directory, mode)
                made.append(directory)
            sync_directory(os.path.dirname(directory))
        if not os.path.isdir(path):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    except OSError:
        for directory in reversed(made):
            with contextlib.suppress(OSError):
                os.rmdir(directory)
        raise
    return made


def write_file(path: str, content: bytes) -> None:
    """Write a file durably, with mode 0600: after a crash it is the old one or the new one, whole. Raises OSError."""
    partial = f"{path}.new"
    with open(partial, "wb", opener=lambda name, flags: os.open(name, flags | os.O_CLOEXEC, 0o600)) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.rename(partial, path)
    sync_directory(os.path.dirname(path) or ".")


def make_private_directory(path: str) -> None:
    """Make a directory, and those above it, with mode 0700, unless it is there. What was made is durable."""
    try:
        make_directories(path, 0o700)
    except OSError as error:
        raise os_error(path, error) from None
