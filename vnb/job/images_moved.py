# SPDX-License-Identifier: LGPL-2.1-or-later
"""Images of disks then and now: the same one, another one, or two that have changed places."""

from __future__ import annotations

import os
import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence



def _inode(path: str | None) -> list[int] | None:
    """What tells an image file from others, whatever its path ([st_dev, st_ino]); None where it is no file of ours."""
    if path is None:
        return None
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    # A device's node is made anew whenever the host starts, its number is the next one that is free.
    return [found.st_dev, found.st_ino] if stat.S_ISREG(found.st_mode) else None


def _is_inode(found: object) -> bool:
    return isinstance(found, list) and len(found) == 2


def are_moved(now: Sequence[list[int]], own: list[int], other: list[int]) -> bool:
    """
    Whether a disk has, now, the file of another disk. now: inodes of its images; own, other: of both disks, then.

    A file system's st_dev may change when it is mounted again, so the numbers alone have to do; except where both disks
    had the same one, as the only files of two file systems do.
    """
    if own in now:
        return False
    return other in now or (other[1] != own[1] and other[1] in [number for _, number in now])
