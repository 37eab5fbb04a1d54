# SPDX-License-Identifier: LGPL-2.1-or-later
"""The list, in a set, of checkpoints whose restore points were dropped."""

from __future__ import annotations

import contextlib
import os

from vnb.base.durable import sync_directory
from vnb.base.errors import Error
from vnb.store.backupset import locked

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable


PRUNED = ".pruned"  # a file of a set: checkpoints whose points were dropped, for vnb-checkpoint
MOST_PRUNED = 1 << 20  # bytes of it that are read


def add_pruned(directory: str, names: Iterable[str]) -> None:
    """Write down, durably, that a set does not need these checkpoints any more. Raises OSError."""
    fd = os.open(
        os.path.join(directory, PRUNED), os.O_CREAT | os.O_APPEND | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with open(fd, "w", encoding="utf-8") as file:
        file.writelines(f"{name}\n" for name in names)
        file.flush()
        os.fsync(fd)
    sync_directory(directory)


def pruned(directory: str) -> set[str]:
    """The checkpoints that a set does not need any more, as far as that was written down."""
    try:
        # Not to wait for whoever may open the other end of a FIFO.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        with open(os.open(os.path.join(directory, PRUNED), flags), encoding="utf-8", errors="replace") as file:
            return set(file.read(MOST_PRUNED).splitlines())
    except OSError:
        return set()


def forget_pruned(directory: str, names: set[str]) -> None:
    """These checkpoints are gone. Where it cannot be written down, they are looked for once more."""
    with contextlib.suppress(OSError, Error), locked(directory):  # vnb-prune adds some while it has that lock
        path = os.path.join(directory, PRUNED)
        rest = pruned(directory) - names
        os.unlink(path)
        if rest:
            add_pruned(directory, sorted(rest))
