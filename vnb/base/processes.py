# SPDX-License-Identifier: LGPL-2.1-or-later
"""Other programs: run to their end, or started, waited for by events, and ended."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from collections.abc import Collection, Mapping, Sequence

from vnb.base import waiting
from vnb.base.errors import Error, one_line

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from typing import BinaryIO


END_SECONDS = 30  # for a qemu-nbd that was told to end; it has nothing to write
PATIENCE = 10  # seconds that a program gets to end before it is killed
# For a server to open its image and to say something. A qemu-nbd that gets SIGTERM while it starts forgets that, and
# listens to nobody (QEMU 7.2).
START_SECONDS = 45
PACKAGES = {"qemu-img": "qemu-utils", "qemu-nbd": "qemu-utils", "ssh": "openssh-client"}  # of Debian
NOT_FOUND = 127  # the shell's status for a program that is not there

# Who was killed before setpriv asked to be told of that is not our parent any more: then it is too late to start.
_START = 'test "$PPID" = "$0" || exit; exec "$@"'
# It is handed the listening socket as systemd does it: as descriptor 3, with its own number beside it.
_LISTEN = 'test "$PPID" = "$0" || exit; LISTEN_PID=$$ LISTEN_FDS=1 exec "$@" 3<&0 </dev/null'


class Child:
    """
    A program. name: for messages. package: what to install where it is missing.

    listener: handed over as systemd does it. keep: descriptors that it inherits.
    environment: in addition. directory: where it runs, by default where we do.
    stderr: descriptor for its standard error. talk: process.stdin and process.stdout are pipes to it.
    ending (signal): what ends it; it also gets that when we die, SIGKILL included, but no signal to our process group.
    Its standard error is kept, and told when it fails, unless debug or stderr.
    """

    def __init__(
        self, command: Sequence[str], package: str, listener: socket.socket | None = None, keep: Collection[int] = (),
        environment: Mapping[str, str] | None = None, directory: str | None = None,
        ending: signal.Signals = signal.SIGTERM, debug: bool = False, stderr: int | None = None, talk: bool = False,
    ) -> None:
        self.name = command[0]
        self.fd: int | None = None
        self._package = package
        self._ending = ending
        # Read when it is dead, so it goes where it cannot block.
        self._stderr = None if debug or stderr is not None else os.memfd_create("stderr", os.MFD_CLOEXEC)
        script = _START if listener is None else _LISTEN
        try:
            self.process = subprocess.Popen(
                ["setpriv", "--pdeathsig", ending.name[len("SIG") :], "--", "sh", "-c", script, str(os.getpid()),
                 *command],
                stdin=subprocess.PIPE if talk else subprocess.DEVNULL if listener is None else listener.fileno(),
                stdout=subprocess.PIPE if talk else subprocess.DEVNULL,
                stderr=self._stderr if stderr is None else stderr,
                pass_fds=keep,
                env={**os.environ, **(environment or {})},
                cwd=directory,
                start_new_session=True,
                bufsize=0,
            )
        except OSError as error:
            if self._stderr is not None:
                os.close(self._stderr)
            raise self._not_started(error.strerror) from None
        self.fd = os.pidfd_open(self.process.pid)  # readable when it has ended

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def failure(self) -> Error:
        """The Error that says why it ended: its last words. It has ended, or is about to."""
        status = self.process.wait()
        lines = self.words().decode(errors="replace").strip().splitlines()
        if status == NOT_FOUND:
            return self._not_started("not found")
        if lines:
            return Error(self.name, self.reason(lines).removeprefix(f"{self.name}: "))
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        return Error(self.name, f"it {how}")

    def words(self) -> bytes:
        """The end of what it has said, when it has ended."""
        if self._stderr is None:
            return b""
        size = os.fstat(self._stderr).st_size
        return os.pread(self._stderr, 4096, max(0, size - 4096))

    def reason(self, lines: list[str]) -> str:
        """The line that says why it failed, of all that it said."""
        return lines[-1]

    def end(self) -> None:
        """End it, and wait until it has ended; harmless when it has."""
        if self.fd is None:
            return
        if self.process.poll() is None:
            self.process.send_signal(self._ending)
            self.process.send_signal(signal.SIGCONT)  # one that was stopped does not hear it
            if not self.wait(PATIENCE):
                self.process.kill()
        self.process.wait()
        self._close()

    def has_spoken(self, fd: int) -> bool:
        """
        Wait until a server speaks on a connection, or ends; False where it does neither for a long time.
        """
        assert self.fd is not None
        return wait_for([fd, self.fd], START_SECONDS) is not None

    def wait(self, seconds: float | None) -> bool:
        """Whether it ends within this time."""
        assert self.fd is not None
        return wait_for([self.fd], seconds) is not None

    def _close(self) -> None:
        if self._stderr is not None:
            os.close(self._stderr)
            self._stderr = None
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None

    def _not_started(self, reason: str | None) -> Error:
        return Error(self.name, f"{reason} (it is in the package {self._package})")


def wait_for(fds: Sequence[int], seconds: float | None = None) -> int | None:
    """The first of these descriptors that is readable, or closed at its other end; None when the time is over."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    deadline = None if seconds is None else time.monotonic() + seconds
    while True:
        left = None if deadline is None else max(0, 1000 * (deadline - time.monotonic()))
        ready = {fd for fd, _ in poll.poll(left)}
        for fd in fds:
            if fd in ready:
                return fd
        if deadline is not None and time.monotonic() >= deadline:
            return None


def run(what: str | None, *argv: str) -> bytes:
    """Run a program, give its standard output; Error with its words where it fails. what: the object of that Error."""
    # Not pipes: what it leaves behind in the background would keep them open.
    with _memory("stdout") as stdout, _memory("stderr") as stderr:
        try:
            with waiting.on(f"{argv[0]}, about {what}"):
                done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, check=False)
        except OSError as error:
            package = f" (it is in the package {PACKAGES[argv[0]]})" if argv[0] in PACKAGES else ""
            raise Error(argv[0], f"{error.strerror}{package}") from None
        if done.returncode:
            stderr.seek(0)
            said = " ".join(stderr.read().decode(errors="replace").strip().splitlines())
            raise Error(what, one_line(said) or f"{argv[0]} ended with status {done.returncode}")
        stdout.seek(0)
        return stdout.read()


def _memory(name: str) -> BinaryIO:
    return open(os.memfd_create(name, os.MFD_CLOEXEC), "w+b")


def end(pid: int) -> None:
    """Have a process end, and wait for it; harmless where it is gone."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        signal.pidfd_send_signal(fd, signal.SIGTERM)
        signal.pidfd_send_signal(fd, signal.SIGCONT)  # one that was stopped does not hear it
        if not select.select([fd], [], [], END_SECONDS)[0]:
            signal.pidfd_send_signal(fd, signal.SIGKILL)
            select.select([fd], [], [], END_SECONDS)
    except ProcessLookupError:
        return
    finally:
        os.close(fd)
