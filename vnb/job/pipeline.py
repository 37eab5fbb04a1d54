# SPDX-License-Identifier: LGPL-2.1-or-later
"""
The command of `vnb-checkpoint run`: started, given the stream, waited for, and ended with all that it has started.

It stays in our process group, so that Ctrl-C, Ctrl-Z and fg reach it as the shell's user expects, and its ssh may ask
for a password. Instead, its orphans become our children: so all that has come of it is found, whatever group it is in.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shlex
import signal
import subprocess
import time

from vnb.base import log, syscalls
from vnb.base.errors import Error
from vnb.job.state import process_table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from typing import Any

    from vnb.job.starter import Starter


TERM_SECONDS = 5  # for a command to end and to clean up; a guest may be waiting for its connections to go
KILL_SECONDS = 5  # what has got SIGKILL ends at once, but where the kernel waits for a server that does not answer
NOT_FOUND = 127  # the shell's status, and ssh's from there, for a program that is not in PATH
STREAM_STAGES = ("vnb-extents", "vnb-read", "vnb-pack", "vnb-verify")  # what writes a stream to standard output
MOST_STAGES = 16
_SHELL = set("\n;&<>(){}`$#\\")  # with these it takes a shell to tell what a line does


def leaves_by_stdout(command: Sequence[str]) -> bool:
    """
    Whether a command (list of words, or of one line for the shell) surely writes its stream to standard output.

    So it is where the quotes around a pipeline were forgotten: the shell has given the rest to others.
    """
    if len(command) == 1:
        if _SHELL & set(command[0]):
            return False  # a stage will tell: see vnb.job.proof
        try:
            command = shlex.split(command[0].rpartition("|")[2])
        except ValueError:
            return False
    name = os.path.basename(command[0]) if command else ""
    return name in STREAM_STAGES and not any(map(re.compile(r"-\w*o").match, command))


def readers_of_stdout() -> list[str]:
    """
    What the processes are that read our standard output, one behind the other, as they were typed.

    It is for a message: of what has not started yet, or belongs to another user, nothing is known.
    """
    found: list[str] = []
    pipe = _pipe(os.getpid(), 1)
    while pipe and len(found) < MOST_STAGES:
        pid = next((pid for pid in process_table() if pid != os.getpid() and _pipe(pid, 0) == pipe), None)
        words = _words(pid) if pid is not None else []
        if pid is None or not words:
            return [*found, "..."]
        found.append(shlex.join(words))
        pipe = _pipe(pid, 1)
    return found


def _pipe(pid: int, fd: int) -> str | None:
    """The pipe that a descriptor of a process is, or None."""
    try:
        name = os.readlink(f"/proc/{pid}/fd/{fd}")
    except OSError:
        return None
    return name if name.startswith("pipe:") else None


def _words(pid: int) -> list[str]:
    """The words of a process's command line; of a script of vnb, without its interpreter."""
    try:
        with open(f"/proc/{pid}/cmdline", encoding="utf-8", errors="replace") as file:
            words = file.read().split("\0")[:-1]
    except OSError:
        return []
    for number, word in enumerate(words[:3]):
        if os.path.basename(word).startswith("vnb-"):
            return [os.path.basename(word), *words[number + 1 :]]
    return words


class CommandFailed(Error):
    """The command has not done what it was started for."""


class Pipeline:
    """
    command: one word is a line for bash, with pipefail; several are a program and its arguments.

    environment: all of it. keeper: it ends the job. what: for messages.
    Raises Error where there is no such program.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], keeper: Starter, what: str) -> None:
        self._keeper = keeper
        self._what = what
        argv = ["bash", "-o", "pipefail", "-c", command[0]] if len(command) == 1 else command
        try:
            self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, env=environment, bufsize=0)
        except OSError as error:
            raise Error(argv[0], error.strerror) from None
        assert self._process.stdin is not None
        self._input = self._process.stdin
        self._fd = os.pidfd_open(self._process.pid)
        syscalls.adopt_orphans()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        if kind is not None:
            self._input.close()  # what reads it, and nothing else, ends by itself
            self.end()
        os.close(self._fd)

    @property
    def stdin(self) -> int:
        """Our end of the pipe to its standard input; it does not block."""
        fd = self._input.fileno()
        os.set_blocking(fd, False)
        return fd

    def wait_to_write(self) -> None:
        """Wait until it takes more of its input. Raises Error where it will not."""
        self._wait(self._input.fileno())

    def wait(self) -> None:
        """Close its input and wait for its end. Raises Error where it fails, or the keeper ends the job."""
        self._input.close()
        self._wait(None)
        status = self._process.wait()
        if status > 0:
            hint = " (a program is not in PATH: on another host that is the PATH of ssh, without what a login adds)"
            raise self.failure(f"the command ended with status {status}{hint if status == NOT_FOUND else ''}")
        if status < 0:
            raise self.failure(f"the command was ended by {signal.Signals(-status).name}")

    def failure(self, reason: str) -> CommandFailed:
        """A CommandFailed for a reason."""
        return CommandFailed(self._what, reason)

    def _wait(self, writable: int | None) -> Any:
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        poll.register(self._keeper.line, select.POLLIN)
        if writable is not None:
            poll.register(writable, select.POLLOUT)
        while True:
            ready = dict(poll.poll())
            if writable in ready:
                return
            if self._fd in ready:
                if writable is None:
                    return
                raise self.failure("the command ended before it had all of its input")
            self._keeper.listen()

    def end(self) -> None:
        """End it, and all that it has started and that still runs."""
        told = set()
        for signum, seconds in ((signal.SIGTERM, TERM_SECONDS), (signal.SIGKILL, KILL_SECONDS)):
            deadline = time.monotonic() + seconds
            while (pids := self._descendants()) and (left := deadline - time.monotonic()) > 0:
                for pid in pids:
                    if (pid, signum) not in told:
                        told.add((pid, signum))
                        _send(pid, signum)
                _wait_for_one(pids, left)
        if pids:
            log.warn(f"{self._what}: of the command, the processes {', '.join(map(str, sorted(pids)))} do not end")
        self._process.poll()

    def _descendants(self) -> list[int]:
        """The ids of all processes that have come of the command, and live. Those of the keeper are not among them."""
        children: dict[int, list[int]] = {}
        for pid, (parent, session) in process_table().items():
            if session != self._keeper.pid:
                children.setdefault(parent, []).append(pid)
        found = list(children.get(os.getpid(), ()))
        for pid in found:
            found += children.get(pid, ())
        return found


def _send(pid: int, signum: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # gone; or of another user, by sudo
        os.kill(pid, signum)
        os.kill(pid, signal.SIGCONT)  # what is stopped gets it no earlier


def _wait_for_one(pids: Collection[int], seconds: float) -> None:
    """Wait until one of these processes has ended, or for these seconds."""
    poll, fds = select.poll(), []
    try:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                fds.append(os.pidfd_open(pid))
                poll.register(fds[-1], select.POLLIN)
        if len(fds) == len(pids):
            poll.poll(1000 * seconds)
    finally:
        for fd in fds:
            os.close(fd)
