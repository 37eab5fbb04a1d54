# SPDX-License-Identifier: LGPL-2.1-or-later
"""Restore points as devices of the kernel."""

from __future__ import annotations

import contextlib
import os
import re
import stat

from vnb.base.errors import Error
from vnb.base.processes import PATIENCE, Child, run


class Device(Child):
    """qemu-nbd, connecting an export to a device of the kernel, such as /dev/nbd0."""

    MAJOR = 43  # of NBD devices in Linux
    USUAL = 16  # devices that the module makes unless it is told how many
    SYS = "/sys"
    CONNECTED = b" is now connected to "  # with --fork it would say that all is well before it has tried

    def __init__(self, path: str, uri: str, writable: bool, debug: bool) -> None:
        self.path = path
        self._said = b""
        self._debug = debug
        try:
            found = os.stat(path)
        except OSError as error:
            raise Error(path, f"{error.strerror}{self._hint()}") from None
        if not stat.S_ISBLK(found.st_mode) or os.major(found.st_rdev) != self.MAJOR:
            raise Error(path, "is no NBD device")
        pid = f"{self.SYS}/dev/block/{self.MAJOR}:{os.minor(found.st_rdev)}/pid"  # there while the device is connected
        with contextlib.suppress(FileNotFoundError), open(pid) as file:
            raise Error(path, f"is in use by process {file.read().strip()}; qemu-nbd --disconnect frees it")
        self._pipe, pipe = os.pipe()
        try:
            super().__init__(
                ["qemu-nbd", "--verbose", f"--connect={path}", "--format=raw",
                 *([] if writable else ["--read-only"]), uri],
                "qemu-utils",
                stderr=pipe,
            )
        except BaseException:
            os.close(self._pipe)
            raise
        finally:
            os.close(pipe)

    def ready(self) -> None:
        """Wait until the device is connected. Raises Error."""
        while self.CONNECTED not in self._said:
            part = os.read(self._pipe, 4096)
            if self._debug:
                os.write(2, part)
            if not part:
                reason = self.failure().reason.removeprefix(f"Failed to open {self.path}: ")
                raise Error(self.path, reason + self._hint())
            self._said += part

    def words(self) -> bytes:
        """What it has said before it was ready: all that is read."""
        return self._said

    def _hint(self) -> str:
        """What to type, if that is what is missing."""
        number = re.fullmatch(r"/dev/nbd(\d+)", self.path)
        needed = int(number[1]) + 1 if number else 0
        options = f" nbds_max={needed}" if needed > self.USUAL else ""
        if not os.path.exists(f"{self.SYS}/module/nbd"):
            return f" (type: modprobe nbd{options})"
        if number and not os.path.exists(f"{self.SYS}/block/nbd{number[1]}"):
            return f" (type: modprobe -r nbd && modprobe nbd nbds_max={needed})"
        return ""

    def end(self) -> None:
        """Disconnect the device, as qemu-nbd's page has it, and then end it."""
        if self.fd is None:
            return
        if self.process.poll() is None and self.CONNECTED in self._said:
            run(self.path, "qemu-nbd", "--disconnect", self.path)
            self.wait(PATIENCE)
        super().end()
        os.close(self._pipe)
