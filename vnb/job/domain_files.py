# SPDX-License-Identifier: LGPL-2.1-or-later
"""The files of a domain beside its disks, read for a backup: from this host, or through ssh from the domain's."""

from __future__ import annotations

import hashlib
import os
import stat

from vnb.base.errors import Error, os_error
from vnb.format.frame import MiB

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from vnb.base.ssh import Host


PART = MiB  # bytes of a file in one frame
LARGEST = 64 * MiB  # of a file: it is held in memory, and no firmware or kernel is larger


def describe(path: str, host: Host | None = None) -> tuple[int, int, str]:
    """
    (mode, size, SHA-256 as hexadecimal digits) of a regular file of at most LARGEST bytes. Raises Error.

    host: where the file is, None for here.
    """
    if host is not None:
        mode, size, sha256 = host.describe(path)
    else:
        try:
            with _opened(path) as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise Error(path, "is not a regular file")
                mode, size = stat.S_IMODE(status.st_mode), status.st_size
                sha256 = "" if size > LARGEST else _sha256(iter(lambda: file.read(PART), b""))
        except OSError as error:
            raise os_error(path, error) from None
    if size > LARGEST:
        raise Error(path, f"has more than {LARGEST} bytes")
    return mode, size, sha256


def read(path: str, host: Host | None = None) -> tuple[int, list[bytes]]:
    """(mode, list of parts) of a regular file, or of a block device, which an nvram may be. Raises Error."""
    if host is not None:
        mode, content = host.read(path, LARGEST)
        return mode, [content[at : at + PART] for at in range(0, len(content), PART)] or [b""]
    try:
        with _opened(path) as file:
            status = os.fstat(file.fileno())
            if not (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
                raise Error(path, "is neither a regular file nor a block device")
            parts = []
            while part := file.read(PART):
                parts.append(part)
                if len(parts) * PART > LARGEST:
                    raise Error(path, f"has more than {LARGEST} bytes")
            return stat.S_IMODE(status.st_mode), parts or [b""]
    except OSError as error:
        raise os_error(path, error) from None


def is_content(parts: Iterable[bytes], sha256: str) -> bool:
    """Whether the parts of a file are the content of which this is the SHA-256."""
    return _sha256(parts) == sha256


def _sha256(parts: Iterable[bytes]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()


def _opened(path: str) -> Any:
    # A FIFO in the place of a file must not be waited for.
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
