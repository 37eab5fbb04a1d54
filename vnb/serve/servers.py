# SPDX-License-Identifier: LGPL-2.1-or-later
"""What vnb-map runs: nbdkit with the plugin, qemu-nbd for overlays and devices, nbdfuse for files."""

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from urllib.parse import quote, unquote, urlsplit

from vnb.base import locks
from vnb.base.errors import Error, os_error
from vnb.base.processes import PATIENCE, Child, wait_for
from vnb.base.tempdir import runtime_directory

PLUGIN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "nbdkit_plugin.py")
PREFIX = "vnb-map."  # of the names of private directories
LOCK = "lock"  # the file in them that a living vnb-map has locked
THREADS = 1  # of nbdkit for each connection: with more, 1.32 aborts when a client dies; more connections are faster
HIGH = 10  # descriptors that a child inherits stay clear of 3, where it gets the socket


@contextlib.contextmanager
def private_directory():
    """The path of a directory that only we can enter, for as long as this lasts. Those of the killed are removed."""
    try:
        above = runtime_directory()
        _remove_directories(above)
        while True:
            path = tempfile.mkdtemp(prefix=PREFIX, dir=above)
            lock = os.open(os.path.join(path, LOCK), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            locks.wait_for(lock, path)  # says that we live, see _remove_directories()
            if os.fstat(lock).st_nlink:
                break
            os.close(lock)  # another came between open and flock, and took it for abandoned
    except OSError as error:
        raise os_error(error.filename, error) from None
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _remove_directories(above):
    """Remove private directories of ours whose vnb-map was killed: the lock of a living one can't be had."""
    for name in os.listdir(above):
        if not name.startswith(PREFIX):
            continue
        path = os.path.join(above, name)
        try:
            # Another user's may be a FIFO, on which opening would wait for ever.
            lock = os.open(os.path.join(path, LOCK), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            continue  # another's, or gone, or something else
        try:
            if os.fstat(lock).st_uid == os.geteuid():
                locks.take(lock)
                shutil.rmtree(path, ignore_errors=True)  # it refuses a symbolic link
        except BlockingIOError:
            pass
        finally:
            os.close(lock)


@contextlib.contextmanager
def directory(path):
    """The path of a directory, made private if it was not there, and then removed in the end."""
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        yield path
        return
    except OSError as error:
        raise os_error(path, error) from None
    try:
        yield path
    finally:
        with contextlib.suppress(OSError):
            os.rmdir(path)


class Address:
    """Where a server listens (listener: socket), and how clients find it."""

    def __init__(self, listener, scheme, authority, query=""):
        self.listener = listener
        self.where = listener.getsockname()
        self._parts = scheme, authority, query

    def uri(self, export=""):
        """The NBD URI of an export."""
        scheme, authority, query = self._parts
        return f"{scheme}://{authority}/{quote(export, safe='@:')}{query}"

    def close(self):
        """We are not the one who listens: when the server has died, clients shall not wait for it."""
        self.listener.close()


@contextlib.contextmanager
def unix_address(path):
    """The Address of a Unix socket that only its owner may connect to. It is removed at the end."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        _remove_abandoned(path)
        mask = os.umask(0o177)
        try:
            listener.bind(path)
            listener.listen(socket.SOMAXCONN)  # clients that come when it is full are refused at once
        except OSError as error:
            raise Error(path, error.strerror or str(error)) from None
        finally:
            os.umask(mask)
        ours = os.lstat(path)
        try:
            yield Address(listener, "nbd+unix", "", f"?socket={quote(os.path.abspath(path))}")
        finally:
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(ours, os.lstat(path)):
                    os.unlink(path)


def _remove_abandoned(path):
    """Remove a socket that nobody listens on any more: a server that was killed left it."""
    try:
        if stat.S_ISSOCK(os.lstat(path).st_mode):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
                client.connect(path)
    except ConnectionRefusedError:
        os.unlink(path)
    except OSError:
        return  # bind() says what is the matter


@contextlib.contextmanager
def tcp_address(text, host, port, tls):
    """The Address of a TCP port; 0 is one that is free. text: as the user typed it. tls (bool): for the URI."""
    try:
        family, *_, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.create_server(where[:2], family=family)
    except OSError as error:
        is_name = isinstance(error, socket.gaierror)
        raise Error(text, error.strerror if is_name else os.strerror(error.errno)) from None
    with listener:
        shown = f"[{host}]" if ":" in host else host
        yield Address(listener, "nbds" if tls else "nbd", f"{shown}:{listener.getsockname()[1]}")


class Nbdkit(Child):
    """
    nbdkit with the plugin, serving saved disks at an address.

    choice (dict): what to serve, see vnb.serve.nbdkit_plugin. directory (str): private. options: nbdkit's own.
    log (bool): what goes wrong with a request is for the system's log, not for our standard error.
    """

    def __init__(self, address, choice, directory, options, debug, log=False):
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

    def reason(self, lines):
        """nbdkit goes on after its message, and Python before its own."""
        exceptions = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)]
        return (exceptions or [line for line in lines if line.startswith("nbdkit: ")] or lines)[0]

    def ready(self):
        """
        Wait until it serves. Returns a dict: disks (name: size), default (name or None), point, damaged (list of str).

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


def _high(fds):
    """The same descriptors with higher numbers; the old ones are closed."""
    moved = []
    for fd in fds:
        moved.append(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, HIGH))
        os.close(fd)
    return moved


def _python_path():
    """
    Where this Python finds vnb and what it needs, for the Python in nbdkit: we may run from a virtual environment.

    Not where it finds its own library: nbdkit's Python may be another.
    """
    ours = os.path.dirname(os.path.dirname(PLUGIN))
    return os.pathsep.join([ours, *(path for path in sys.path if path.endswith("-packages"))])


def _tunables():
    """
    How nbdkit's memory is kept: frames come and go in all its threads, and glibc would ask the kernel for each of them,
    or have a heap for each thread. It is a tenth of the time, and a third of the memory.
    """
    ours = "glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=268435456:glibc.malloc.arena_max=1"
    theirs = os.environ.get("GLIBC_TUNABLES")
    return f"{theirs}:{ours}" if theirs else ours


class Overlay(Child):
    """
    qemu-nbd, serving a qcow2 file that holds what was written, on top of a saved disk.

    path (str): made if it is not there. base (str): the export, DISK@POINT, that it belongs to: on top of any other
    its content would make no sense. name (str): of its own export. size (int): of the disk. directory (str): where
    BELOW serves that export.
    """

    BELOW = "vnb-map"  # a relative socket: the image names it, and leads to an error where vnb-map does not run

    def __init__(self, address, path, base, name, size, directory, debug):
        path = os.path.abspath(path)
        backing = f"nbd+unix:///{quote(base, safe='@:')}?socket={self.BELOW}"
        if os.path.lexists(path):
            said = _run(path, "qemu-img", "info", "--output=json", "--format=qcow2", "--", path)
            below = json.loads(said).get("backing-filename")
            if below != backing:
                where = urlsplit(below or "")
                below = unquote(where.path[1:]) if where.scheme == "nbd+unix" else below or "nothing"
                raise Error(path, f"belongs on top of {below}, not of {base}")
        else:
            options = ["-q", "-u", "-f", "qcow2", "-F", "raw", "-b", backing]
            mask = os.umask(0o077)
            try:
                _run(path, "qemu-img", "create", *options, "--", path, str(size))
            finally:
                os.umask(mask)
        super().__init__(
            ["qemu-nbd", "--persistent", "--shared=0",
             f"--export-name={name}", "--format=qcow2", "--discard=unmap", path],
            "qemu-utils",
            listener=address.listener,
            directory=directory,
            debug=debug,
        )
        self._where = address.listener.family, address.where

    def ready(self):
        """Wait until it serves: it greets whoever connects. Raises Error."""
        family, where = self._where
        with socket.socket(family, socket.SOCK_STREAM) as client:
            client.connect(where)
            if wait_for([self.fd, client.fileno()]) == self.fd:
                raise self.failure()


class Fuse(Child):
    """
    nbdfuse, serving an export as a file, path. The file is made, and removed in the end.

    directory (str): private.
    """

    def __init__(self, path, uri, directory, debug):
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

    def ready(self):
        """Wait until the file can be read. Raises Error."""
        if wait_for([self.fd, self._fifo]) == self.fd:
            raise self.failure()

    def end(self):
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


class Device(Child):
    """qemu-nbd, connecting an export to a device of the kernel, such as /dev/nbd0."""

    MAJOR = 43  # of NBD devices in Linux
    USUAL = 16  # devices that the module makes unless it is told how many
    SYS = "/sys"
    CONNECTED = b" is now connected to "  # with --fork it would say that all is well before it has tried

    def __init__(self, path, uri, writable, debug):
        self.path = path
        self._said = b""
        self._debug = debug
        try:
            found = os.stat(path)
        except OSError as error:
            raise Error(path, error.strerror + self._hint()) from None
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

    def ready(self):
        """Wait until the device is connected. Raises Error."""
        while self.CONNECTED not in self._said:
            part = os.read(self._pipe, 4096)
            if self._debug:
                os.write(2, part)
            if not part:
                reason = self.failure().reason.removeprefix(f"Failed to open {self.path}: ")
                raise Error(self.path, reason + self._hint())
            self._said += part

    def words(self):
        """What it has said before it was ready: all that is read."""
        return self._said

    def _hint(self):
        """What to type, if that is what is missing."""
        number = re.fullmatch(r"/dev/nbd(\d+)", self.path)
        needed = int(number[1]) + 1 if number else 0
        options = f" nbds_max={needed}" if needed > self.USUAL else ""
        if not os.path.exists(f"{self.SYS}/module/nbd"):
            return f" (type: modprobe nbd{options})"
        if number and not os.path.exists(f"{self.SYS}/block/nbd{number[1]}"):
            return f" (type: modprobe -r nbd && modprobe nbd nbds_max={needed})"
        return ""

    def end(self):
        """Disconnect the device, as qemu-nbd's page has it, and then end it."""
        if self.fd is None:
            return
        if self.process.poll() is None and self.CONNECTED in self._said:
            _run(self.path, "qemu-nbd", "--disconnect", self.path)
            self.wait(PATIENCE)
        super().end()
        os.close(self._pipe)


def _run(what, *command):
    """Run a program of qemu-utils to its end; what it prints. what (str): the object, for messages. Raises Error."""
    # Not pipes: what it leaves behind in the background would keep them open.
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, check=False)
        except OSError as error:
            raise Error(command[0], f"{error.strerror} (it is in the package qemu-utils)") from None
        if done.returncode:
            stderr.seek(0)
            lines = stderr.read().decode(errors="replace").strip().splitlines()
            status = f"{command[0]} ended with status {done.returncode}"
            raise Error(what, lines[-1].removeprefix(f"{command[0]}: ") if lines else status)
        stdout.seek(0)
        return stdout.read()
