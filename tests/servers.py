# SPDX-License-Identifier: LGPL-2.1-or-later
"""
NBD servers and commands in tests: real ones, waited for by events, and nothing left behind.

A server is given a socket that already listens (systemd's socket activation, which nbdkit and qemu-nbd know): a client
may connect at once, there is nothing to wait for.
"""

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest

from vnb.cli import runner
from vnb.format.values import FAILED

DEADLINE = 60  # seconds that anything may take before a test fails instead of hanging
TESTS = Path(__file__).resolve().parent

needs_nbdkit = pytest.mark.skipif(shutil.which("nbdkit") is None, reason="not installed: nbdkit")
needs_qemu = pytest.mark.skipif(shutil.which("qemu-nbd") is None, reason="not installed: qemu-nbd, qemu-img")


class Server:
    """A server that runs. uri (str); process (Popen); log (Path): what it said."""

    def __init__(self, directory, *command):
        path = Path(directory) / "nbd.sock"
        self.log = Path(directory) / "log"
        self.uri = f"nbd+unix:///?socket={path}"
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening, open(self.log, "wb") as log:
            listening.bind(str(path))
            listening.listen(64)
            self.process = subprocess.Popen(
                # The shell's own process becomes the server, so the number is right. The kernel ends it with us.
                ["bash", "-c", 'LISTEN_PID=$$ exec "$@" 3<&"$FD"', "bash", "setpriv", "--pdeathsig", "KILL", *command],
                env={**os.environ, "LISTEN_FDS": "1", "FD": str(listening.fileno())}, pass_fds=[listening.fileno()],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )

    def kill(self):
        self.process.kill()
        self.process.wait(DEADLINE)


@contextlib.contextmanager
def serve(*command):
    """A Server that is ended."""
    with tempfile.TemporaryDirectory(prefix="vnb-test.") as directory:
        server = Server(directory, *map(str, command))
        try:
            yield server
        finally:
            server.kill()


def nbdkit(*arguments):
    return serve("nbdkit", "--foreground", "--readonly", *arguments)


def planned(size, extents=None, filters=(), options=(), **plan):
    """nbdkit with the disk of tests/plugin.py."""
    plan = {"size": size, "extents": extents, **plan}
    return nbdkit(*(f"--filter={name}" for name in filters), "python", TESTS / "plugin.py",
                  f"plan={json.dumps(plan)}", *options)


def qemu_nbd(*arguments):
    return serve("qemu-nbd", "--persistent", "--read-only", "--shared=8", *arguments)


def qemu_img(*arguments):
    subprocess.run(["qemu-img", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL, timeout=DEADLINE)


def qemu_io(image, *commands):
    """Write to a qcow2 image as a guest would. commands: of qemu-io."""
    arguments = [word for command in commands for word in ("-c", command)]
    subprocess.run(["qemu-io", "-f", "qcow2", *arguments, str(image)], check=True, stdout=subprocess.DEVNULL,
                   timeout=DEADLINE)


class Done:
    """
    What became of a command. status (int): minus the signal; out (bytes); err (str).

    peak (int or None): the most memory it had, in bytes, where that was measured.
    """

    def __init__(self, status, out, err, peak=None):
        self.status = status
        self.out = out
        self.err = err
        self.peak = peak

    def __repr__(self):
        return f"status {self.status}, {len(self.out)} bytes, {self.err!r}"

    def ok(self):
        """Its output, if it did what it should and said nothing."""
        assert (self.status, self.err) == (0, ""), repr(self)
        return self.out

    def failed(self, line):
        """It said this one line and ended with 1; its output."""
        assert (self.status, self.err) == (1, line + "\n"), repr(self)
        return self.out


def command(*argv, stdin=b""):
    """Run a command as a process of its own; a Done."""
    done = subprocess.run(list(map(str, argv)), input=stdin, capture_output=True, timeout=DEADLINE, check=False)
    return Done(done.returncode, done.stdout.removesuffix(FAILED), done.stderr.decode())


@contextlib.contextmanager
def stalled(path):
    """Make a FIFO; gives a function that waits until a server of tests/plugin.py has opened it and stalls."""
    os.mkfifo(path)
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        poll = select.poll()
        poll.register(fd)
        yield lambda: poll.poll(1000 * DEADLINE) or pytest.fail("the server was not asked")
    finally:
        os.close(fd)


def pipe(*commands, stdin=b""):
    """Run commands (lists of arguments), each with the output of the one before; the last one's output."""
    for argv in commands:
        stdin = command(*argv, stdin=stdin).ok()
    return stdin


def forked(name, module, *argv, stdin=b"", prepare=None):
    """
    As command(), in a fork of this process: hundreds of runs would spend their time on starting Python.

    prepare (callable or None): called there first. Its peak has this process's own memory in it.
    """
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(3)]
        files[0].write(stdin)
        files[0].seek(0)
        child = os.fork()
        if child == 0:
            status = 70
            try:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)  # what hangs is to die, not to fail with a word
                signal.alarm(DEADLINE)
                for fd, file in enumerate(files):
                    os.dup2(file.fileno(), fd)
                runner.sys.stdin = open(0, closefd=False)  # noqa: SIM115
                runner.sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
                runner.sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
                if prepare is not None:
                    prepare()
                status = runner.outcome(name, module, list(map(str, argv)))
                runner.sys.stderr.flush()
            except BaseException:
                import traceback

                traceback.print_exc()
                runner.sys.stderr.flush()
            finally:
                os._exit(status)
        _, wait_status, usage = os.wait4(child, 0)
        for file in files[1:]:
            file.seek(0)
        status = os.waitstatus_to_exitcode(wait_status)
        return Done(status, files[1].read(), files[2].read().decode(), usage.ru_maxrss << 10)
