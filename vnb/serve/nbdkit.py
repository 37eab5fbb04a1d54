# SPDX-License-Identifier: LGPL-2.1-or-later
"""nbdkit with our plugin."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import sys

import vnb
from vnb.base.errors import Error
from vnb.base.processes import Child

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

    from vnb.serve.address import Address


PLUGIN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "nbdkit_plugin.py")
THREADS = 1  # of nbdkit for each connection: with more, 1.32 aborts when a client dies; more connections are faster
HIGH = 10  # descriptors that a child inherits stay clear of 3, where it gets the socket


class Nbdkit(Child):
    """
    nbdkit with the plugin, serving saved disks at an address.

    choice: what to serve, see vnb.serve.nbdkit_plugin. directory: private. options: nbdkit's own.
    log: what goes wrong with a request is for the system's log, not for our standard error.
    """

    def __init__(
        self, address: Address, choice: dict[str, Any], directory: str, options: Sequence[str], debug: bool,
        log: bool = False,
    ) -> None:
        self._status, status = _high(os.pipe())
        inherited = [status] if log else [status, *_high([os.dup(2)])]
        choice = {
            **choice,
            "status": status,
            "stderr": None if log else inherited[1],
            "parent": os.getpid(),
            "debug": debug,
        }
        path = os.path.join(directory, "choice")
        with open(path, "w", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            json.dump(choice, file)
        try:
            super().__init__(
                ["nbdkit", "--foreground", f"--threads={THREADS}", *options]
                + (["--verbose"] if debug else [])
                + ["python", PLUGIN, f"choice={path}"],
                "nbdkit, with nbdkit-plugin-python",
                listener=address.listener,
                keep=inherited,
                environment={"PYTHONPATH": _python_path(), "GLIBC_TUNABLES": _tunables()},
                ending=signal.SIGKILL,  # at SIGTERM it waits for its clients to go; it has nothing to put in order
                debug=debug,
            )
        finally:
            for fd in inherited:
                os.close(fd)

    def reason(self, lines: list[str]) -> str:
        """nbdkit goes on after its message, and Python before its own."""
        exceptions = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)]
        return (exceptions or [line for line in lines if line.startswith("nbdkit: ")] or lines)[0]

    def ready(self) -> dict[str, Any]:
        """
        Wait until it serves. Returns a dict: disks (name: size), default (name or None), point, damaged.

        Raises Error.
        """
        said = b""
        while part := os.read(self._status, 65536):
            said += part
        os.close(self._status)
        if not said:
            raise self.failure()
        answer = json.loads(said)
        if "reason" in answer:
            raise Error(answer["what"], answer["reason"], answer["where"])
        return answer


def _high(fds: Iterable[int]) -> list[int]:
    """The same descriptors with higher numbers; the old ones are closed."""
    moved = []
    for fd in fds:
        moved.append(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, HIGH))
        os.close(fd)
    return moved


def _python_path() -> str:
    """
    Where this Python finds vnb and what it needs, for the Python in nbdkit: we may run from a virtual environment.

    Not where it finds its own library: nbdkit's Python may be another.
    """
    ours = os.path.dirname(os.path.dirname(os.path.abspath(vnb.__file__)))
    return os.pathsep.join([ours, *(path for path in sys.path if path.endswith("-packages"))])


def _tunables() -> str:
    """
    How nbdkit's memory is kept: frames come and go in all its threads, and glibc would ask the kernel for each of them,
    or have a heap for each thread. It is a tenth of the time, and a third of the memory.
    """
    ours = "glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=268435456:glibc.malloc.arena_max=1"
    theirs = os.environ.get("GLIBC_TUNABLES")
    return f"{theirs}:{ours}" if theirs else ours
