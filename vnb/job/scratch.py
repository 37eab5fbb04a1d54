# SPDX-License-Identifier: LGPL-2.1-or-later
"""Room for the scratch of a job: the old data that the guest overwrites while its disks are read."""

from __future__ import annotations

import os

from vnb.base.errors import Error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from vnb.job.source import Source


def check_room(
    source: Source, disk: str, directory: str, options: dict[str, Any], warn: Callable[[str], Any]
) -> None:
    """
    Raise Error where a job could not begin, or would be ended at once; warn of what may happen.

    directory: for the scratch of a disk. options: scratch_dir, and reserve, the bytes that have to be left there.
    """
    if options["scratch_dir"] and source.is_local and not os.path.isdir(directory):
        raise Error("--scratch-dir", f"{directory}: no such directory (QEMU's user has to be able to write there)")
    try:
        free = source.room(directory)
    except OSError:
        return  # QEMU will say so
    if free is not None and free < options["reserve"]:
        raise Error(
            source.name, f"the scratch directory {directory} has {free} bytes left, and with less than "
            f"{options['reserve']} the job would be ended: see --scratch-dir and --scratch-reserve"
        )
    used = source.allocated([disk])[disk]
    if free is not None and free < used:
        warn(
            f"{source.name}: {disk}: the scratch directory {directory} has {free} bytes left, "
            f"the disk has {used} bytes of data"
        )
