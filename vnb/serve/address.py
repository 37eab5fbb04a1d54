# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where vnb-map listens: a private directory, a unix socket, a TCP port."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import stat
import tempfile
from urllib.parse import quote

from vnb.base import locks
from vnb.base.errors import Error, os_error
from vnb.base.tempdir import runtime_directory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator


PREFIX = "vnb-map."  # of the names of private directories
LOCK = "lock"  # the file in them that a living vnb-map has locked


@contextlib.contextmanager
def private_directory() -> Iterator[str]:
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


def _remove_directories(above: str) -> None:
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
def directory(path: str) -> Iterator[str]:
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

    def __init__(self, listener: socket.socket, scheme: str, authority: str, query: str = "") -> None:
        self.listener = listener
        self.where = listener.getsockname()
        self._parts = scheme, authority, query

    def uri(self, export: str = "") -> str:
        """The NBD URI of an export."""
        scheme, authority, query = self._parts
        return f"{scheme}://{authority}/{quote(export, safe='@:')}{query}"

    def close(self) -> None:
        """We are not the one who listens: when the server has died, clients shall not wait for it."""
        self.listener.close()


@contextlib.contextmanager
def unix_address(path: str) -> Iterator[Address]:
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


def _remove_abandoned(path: str) -> None:
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
def tcp_address(text: str, host: str, port: int, tls: bool) -> Iterator[Address]:
    """The Address of a TCP port; 0 is one that is free. text: as the user typed it. tls: for the URI."""
    try:
        family, *_, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.create_server(where[:2], family=family)
    except OSError as error:
        is_name = isinstance(error, socket.gaierror)
        raise Error(text, error.strerror if is_name else os.strerror(error.errno or 0)) from None
    with listener:
        shown = f"[{host}]" if ":" in host else host
        yield Address(listener, "nbds" if tls else "nbd", f"{shown}:{listener.getsockname()[1]}")
