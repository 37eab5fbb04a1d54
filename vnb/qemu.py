# SPDX-License-Identifier: LGPL-2.1-or-later
"""Image files through QEMU's own tools: qemu-img makes and resizes them, a private qemu-nbd writes them."""

import os
import re
import signal
import socket
import subprocess
import tempfile

from vnb.errors import Error, os_error
from vnb.target import Early, Lost, Nbd

# QEMU takes a buffer for each request and gives it back, and glibc asks the kernel for each one of this size: half of
# a restore was page faults. With these it keeps the memory, at most as much as was ever in flight at once.
_TUNABLES = "glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=268435456"
_NOT_FOUND = 127  # the shell's status for a program that is not there


def create(path, what, format_, size, options=None):
    """
    Make an image. path (str): absolute, so that QEMU takes it for a file. options (dict of str): as qemu-img's -o.

    what (str): stands for it in messages. Raises Error.
    """
    command = ["create", "-q", "-f", format_]
    if options:
        # A comma within a value is written twice.
        command += ["-o", ",".join(f"{key}={value.replace(',', ',,')}" for key, value in options.items())]
    _qemu_img([*command, "--", path, str(size)], path, what)


def resize(path, what, format_, size):
    """Make an image larger: what is added reads as zeroes. Nobody may have it open. Raises Error."""
    _qemu_img(["resize", "-q", "-f", format_, "--", path, str(size)], path, what)


def _qemu_img(arguments, path, what):
    try:
        done = subprocess.run(
            ["qemu-img", *arguments], stdin=subprocess.DEVNULL, capture_output=True, cwd=os.path.dirname(path),
            check=False, env=_environment(),
        )
    except OSError as error:
        raise _not_started("qemu-img", error) from None
    if done.returncode:
        raise Error(what, _last_words(done.stderr, path) or _ended("qemu-img", done.returncode))


class Server:
    """
    A qemu-nbd with one image, for one connection that nobody else can have. Ends when that is closed.

    path (str): absolute. what (str): stands for it in messages.

    connection (socket): connected before the server runs; whatever becomes of us, it sees the end of it.
    """

    def __init__(self, path, what, format_, unsafe, discard):
        self._path = path
        self._what = what
        self._process = None
        # Its standard error is read when it is dead, so it goes where it cannot block.
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
        listener, self.connection = _private_connection()
        command = [
            "qemu-nbd",
            f"--format={format_}",
            f"--cache={'unsafe' if unsafe else 'writeback'}",
            f"--discard={'unmap' if discard else 'ignore'}",
            "--detect-zeroes=off",
            path,
        ]
        try:
            with listener:
                # It is handed the listening socket as systemd does it: as descriptor 3, with its own number beside it.
                self._process = subprocess.Popen(
                    ["sh", "-c", 'LISTEN_PID=$$ LISTEN_FDS=1 exec "$@" 3<&0 </dev/null', "sh", *command],
                    stdin=listener, stdout=subprocess.DEVNULL, stderr=self._stderr, env=_environment(),
                    # Signals to our process group are for us: we decide what becomes of the image.
                    start_new_session=True,
                )
        except OSError as error:
            self._stderr.close()
            self.connection.close()
            raise _not_started("qemu-nbd", error) from None

    def wait(self):
        """Wait until it has closed the image and ended, after the connection was closed. Raises Error."""
        status = self._process.wait()
        if status:
            self._stderr.seek(0)
            words = _last_words(self._stderr.read()[-4096:], self._path) if status != _NOT_FOUND else None
            raise Error(self._what, words or _ended("qemu-nbd", status))

    def kill(self):
        """End it at once; harmless when it has ended. From any thread."""
        process = self._process
        if process is not None:
            process.kill()

    def close(self):
        """Let go of it; kills it if it has not ended."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
            self._stderr.close()
            self.connection.close()


class Image(Nbd):
    """
    The content of an image file, through a qemu-nbd of its own. See Nbd.

    name (str): the disk, what (str): the image, both for messages. path (str): of the image, absolute.
    new (bool): if we do not finish nobody wants the file, so QEMU need not order its writes for that.
    keep (bool): zeroes stay allocated.
    """

    def __init__(self, name, path, what, format_, new=False, keep=False):
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise os_error(what, error) from None
        self._early = Early(self._file)
        self._server = None
        try:
            self._server = Server(path, what, format_, unsafe=new, discard=not keep)
            super().__init__(name, lambda handle: handle.aio_connect_socket(self._server.connection.detach()), keep)
        except BaseException as error:
            better = self._explained(error) if isinstance(error, Lost) else error
            self.close()
            raise better from None

    def write(self, offset, plain, done):
        super().write(offset, plain, done)
        self._early.count(len(plain))

    def poll(self):
        try:
            super().poll()
        except Lost as error:
            raise self._explained(error) from None

    def finish(self):
        try:
            super().finish()
        except Lost as error:
            raise self._explained(error) from None
        self._server.wait()
        try:
            os.fsync(self._file)
        except OSError as error:
            raise os_error(self.name, error) from None

    def abort(self):
        if self._server is not None:
            self._server.kill()
        super().abort()

    def close(self):
        super().close()
        if self._server is not None:
            self._server.close()
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _explained(self, error):
        """The Error that tells why the connection was lost: qemu-nbd ends when it is, and says more than libnbd."""
        self._handle = None
        try:
            self._server.wait()
        except Error as better:
            return better
        return error


def _private_connection():
    """(listening socket, socket connected to it): their path was in a directory of ours and is gone."""
    listener, connection = (socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(2))
    try:
        with tempfile.TemporaryDirectory(prefix="vnb-apply.") as directory:
            path = os.path.join(directory, "s")
            listener.bind(path)
            listener.listen(1)
            connection.connect(path)
    except OSError as error:
        listener.close()
        connection.close()
        raise Error(tempfile.gettempdir(), f"cannot make a socket: {error.strerror or error}") from None
    return listener, connection


def _environment():
    tunables = os.environ.get("GLIBC_TUNABLES")
    return {**os.environ, "GLIBC_TUNABLES": f"{tunables}:{_TUNABLES}" if tunables else _TUNABLES}


def _last_words(said, path):
    lines = said.decode(errors="replace").strip().splitlines()
    if not lines:
        return None
    words = re.sub("^(qemu-img|qemu-nbd|sh): ", "", lines[-1])
    for marker in (f"'{path}': ", f"{path}: "):
        words = words.rpartition(marker)[2]
    return words


def _ended(program, status):
    if status == _NOT_FOUND:
        return f"{program} was not found (Debian: qemu-utils)"
    how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"failed with status {status}"
    return f"{program} {how}"


def _not_started(program, error):
    if isinstance(error, FileNotFoundError):
        return Error(program, "not found (Debian: qemu-utils)")
    return os_error(program, error)
