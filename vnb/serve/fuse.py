# SPDX-License-Identifier: LGPL-2.1-or-later
"""Restore points as files, by nbdfuse."""

from __future__ import annotations

import contextlib
import os
import subprocess

from vnb.base.errors import os_error
from vnb.base.processes import PATIENCE, Child, wait_for


class Fuse(Child):
    """
    nbdfuse, serving an export as a file, path. The file is made, and removed in the end.

    directory: private.
    """

    def __init__(self, path: str, uri: str, directory: str, debug: bool) -> None:
        self.path = path
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDONLY | os.O_CLOEXEC, 0o600))
        except OSError as error:
            raise os_error(path, error) from None
        try:
            fifo = os.path.join(directory, f"{os.path.basename(path)}.pid")
            os.mkfifo(fifo, 0o600)
            self._fifo = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            super().__init__(
                ["nbdfuse", f"--pidfile={fifo}", path, uri], "nbdfuse", debug=debug
            )
        except BaseException:
            os.unlink(path)
            raise

    def ready(self) -> None:
        """Wait until the file can be read. Raises Error."""
        assert self.fd is not None
        if wait_for([self.fd, self._fifo]) == self.fd:
            raise self.failure()

    def end(self) -> None:
        """Unmount; whoever still has the file open can read on until nbdkit ends, a moment later."""
        if self.fd is None:
            return
        for lazy in ([], ["-z"]):
            if self.wait(0):
                break
            done = subprocess.run(
                ["fusermount3", "-u", *lazy, self.path], stdin=subprocess.DEVNULL, capture_output=True, check=False
            )
            if done.returncode == 0 and not lazy:
                self.wait(PATIENCE)
        super().end()
        os.close(self._fifo)
        with contextlib.suppress(OSError):
            os.unlink(self.path)
