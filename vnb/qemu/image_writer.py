# SPDX-License-Identifier: LGPL-2.1-or-later
"""Image files through QEMU's own tools: qemu-img makes and resizes them, a private qemu-nbd writes them."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import tempfile

from vnb.base.errors import Error, os_error
from vnb.base.processes import run
from vnb.base.syscalls import WriteBack
from vnb.base.tempdir import temporary_directory
from vnb.nbd.connection import Lost
from vnb.nbd.sinks import MAX_CLUSTER, Nbd
from vnb.qemu.qemu_nbd import QemuNbd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any

    from vnb.format.types import Bytes


# QEMU takes a buffer for each request and gives it back, and glibc asks the kernel for each one of this size: half of
# a restore was page faults. With these it keeps the memory, at most as much as was ever in flight at once.
_TUNABLES = "glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=268435456"
_SECTOR = 512  # bytes: the sizes of images are multiples of it
_CLUSTER_BITS = 20  # where the header of a qcow2 image has them (4 bytes, big-endian)


def create(path: str, what: str, format_: str, size: int, options: dict[str, str]) -> None:
    """
    Make an image. path: absolute, so that QEMU takes it for a file. options: as qemu-img's -o.

    what: stands for it in messages. A data_file is made beside it. Raises Error.
    """
    _qemu_img(["create", "-q", "-f", format_, *_options(options), "--", path, str(size)], path, what)


def resize(path: str, what: str, format_: str, size: int, preallocate: bool = False) -> None:
    """Have an image at least so large: what is added reads as zeroes. Nobody may have it open. Raises Error."""
    size = -(-size // _SECTOR) * _SECTOR
    if json.loads(_qemu_img(["info", "--output=json", "-f", format_, "--", path], path, what))["virtual-size"] >= size:
        return  # it was done, by one that was killed then
    how = ["--preallocation=falloc"] if preallocate else []
    _qemu_img(["resize", "-q", "-f", format_, *how, "--", path, str(size)], path, what)


def amend(path: str, what: str, format_: str, options: dict[str, str]) -> None:
    """Change settings (dict of str, see create()) of an image, and make that durable. Raises Error."""
    with _synced(path, what):
        _qemu_img(["amend", "-q", "-f", format_, *_options(options), "--", path], path, what)


def compress(source: str, path: str, what: str, format_: str, options: dict[str, str]) -> None:
    """
    Make an image with compressed clusters of a raw one, and make it durable. options: see create().

    What reads as zeroes in source is not in the image. Raises Error.
    """
    with _synced(path, what):
        how = ["-q", "-c", "-W", "-f", "raw", "-O", format_, *_options(options)]
        _qemu_img(["convert", *how, "--", source, path], path, what)


@contextlib.contextmanager
def _synced(path: str, what: str) -> Iterator[None]:
    """Make a file durable that somebody else writes meanwhile."""
    try:
        # Opened before, so that no error of what is written to it is told to somebody else.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise os_error(what, error) from None


def settings(info: Any) -> dict[str, str]:
    """
    Settings, as qemu-img's -o has them, of an image of which `qemu-img info --output=json` said this.

    info comes from a stream: what makes no sense is left out, and what qemu-img refuses can be overridden.
    data_file is "on" where the data was outside.
    """
    if not isinstance(info, dict) or info.get("format") != "qcow2":
        return {}
    data = info.get("format-specific")
    data = data.get("data") if isinstance(data, dict) else None
    data = data if isinstance(data, dict) else {}
    found = {}
    if _is_power_of_2(info.get("cluster-size"), 512, 2 << 20):
        found["cluster_size"] = str(info["cluster-size"])
    if data.get("compat") in ("0.10", "1.1"):
        found["compat"] = data["compat"]
    if data.get("compression-type") in ("zlib", "zstd") and found.get("compat") == "1.1":
        found["compression_type"] = data["compression-type"]
    if _is_power_of_2(data.get("refcount-bits"), 1, 64) and found.get("compat") == "1.1":
        found["refcount_bits"] = str(data["refcount-bits"])
    for key in ("lazy-refcounts", "extended-l2", "data-file-raw"):
        if data.get(key) is True:
            found[key.replace("-", "_")] = "on"
    if isinstance(data.get("data-file"), str):
        found["data_file"] = "on"
    return found


def _is_power_of_2(value: object, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high and value & (value - 1) == 0


def _options(options: dict[str, str]) -> list[str]:
    # A comma within a value is written twice.
    text = ",".join(f"{key}={value.replace(',', ',,')}" for key, value in options.items())
    return ["-o", text] if text else []


def _qemu_img(arguments: Sequence[str], path: str, what: str) -> bytes:
    """Run it; gives its standard output. what: stands for path in messages. Raises Error."""
    try:
        return run(what, "qemu-img", *arguments)
    except Error as error:
        raise Error(error.what, _without(path, error.reason)) from None


class Server:
    """
    A qemu-nbd with one image, for one connection that nobody else can have. Ends when that is closed.

    path: absolute. what: stands for it in messages.
    connection: connected before the server runs; whatever becomes of us, it sees the end of it.
    """

    def __init__(self, path: str, what: str, format_: str, unsafe: bool, discard: bool) -> None:
        self._path = path
        self._what = what
        listener, self.connection = _private_connection()
        cache, discards = "unsafe" if unsafe else "writeback", "unmap" if discard else "ignore"
        options = [f"--cache={cache}", f"--discard={discards}", "--detect-zeroes=off"]
        self._child: Any = None
        try:
            with listener:
                # What it had not written when we die is written again.
                self._child = QemuNbd(path, format_, options, listener, environment=_environment())
            if not self._child.has_spoken(self.connection.fileno()):
                raise Error(what, "qemu-nbd does not answer")
        except BaseException:
            if self._child is not None:
                self._child.end()
            self.connection.close()
            raise

    def wait(self) -> None:
        """Wait until it has closed the image and ended, after the connection was closed. Raises Error."""
        if self._child.process.wait():
            raise Error(self._what, _without(self._path, str(self._child.failure())))

    def kill(self) -> None:
        """End it at once; harmless when it has ended. From any thread."""
        self._child.process.kill()

    def close(self) -> None:
        """Let go of it, once it has ended or was killed."""
        self._child.end()
        self.connection.close()


class Image(Nbd):
    """
    The content of an image file, through a qemu-nbd of its own. See Nbd.

    name: the disk, what: the image, both for messages. path: of the image, absolute.
    new: if we do not finish nobody wants the file, so QEMU need not order its writes for that.
    keep: zeroes stay allocated. outside: paths of files that hold its data.
    """

    def __init__(
        self, name: str, path: str, what: str, format_: str, new: bool = False, keep: bool = False,
        outside: Sequence[str] = (),
    ) -> None:
        self._files: list[int] = []
        try:
            for file in (path, *outside):
                self._files.append(os.open(file, os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            self._close_files()
            raise os_error(what, error) from None
        self._write_back = WriteBack(self._files[-1])
        self._server: Any = None
        try:
            self._server = Server(path, what, format_, unsafe=new, discard=not keep)
            super().__init__(name, what, "", self._server.connection, keep, alone=True)
            self.cluster = _cluster_size(self._files[0], format_)
        except BaseException as error:
            better = self._explained(error) if isinstance(error, Lost) else error
            self.close()
            raise better from None

    def write(self, offset: int, plain: Bytes, done: Callable[[], None]) -> None:
        super().write(offset, plain, done)
        self._write_back.count(len(plain))

    def _start(self, *request: Any) -> None:
        with self._explaining():  # to begin a request is enough to hear that the connection is lost
            super()._start(*request)

    def poll(self) -> None:
        with self._explaining():
            super().poll()

    def finish(self) -> None:
        with self._explaining():
            super().finish()
        self._server.wait()
        try:
            for file in self._files:
                os.fsync(file)
        except OSError as error:
            raise os_error(self.name, error) from None

    def abort(self) -> None:
        if self._server is not None:
            self._server.kill()
        super().abort()

    def close(self) -> None:
        super().close()
        if self._server is not None:
            self._server.close()
        self._close_files()

    def _close_files(self) -> None:
        while self._files:
            os.close(self._files.pop())

    @contextlib.contextmanager
    def _explaining(self) -> Iterator[None]:
        try:
            yield
        except Lost as error:
            raise self._explained(error) from None

    def _explained(self, error: Error) -> Error:
        """The Error that tells why the connection was lost: qemu-nbd ends when it is, and says more than libnbd."""
        super().close()
        try:
            self._server.wait()
        except Error as better:
            return better
        return error


def _cluster_size(fd: int, format_: str) -> int:
    """Bytes of an image's clusters: as its header has them, if it is of a format that has any."""
    if format_ != "qcow2":
        return 1
    bits = int.from_bytes(os.pread(fd, 4, _CLUSTER_BITS), "big")
    return 1 << bits if 9 <= bits <= 21 else MAX_CLUSTER


def _private_connection() -> tuple[socket.socket, socket.socket]:
    """(listening socket, socket connected to it): their path was in a directory of ours and is gone."""
    listener, connection = (socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(2))
    try:
        with tempfile.TemporaryDirectory(prefix="vnb-apply.", dir=temporary_directory()) as directory:
            path = os.path.join(directory, "s")
            listener.bind(path)
            listener.listen(1)
            connection.connect(path)
    except OSError as error:
        listener.close()
        connection.close()
        raise Error(tempfile.gettempdir(), f"cannot make a socket: {error.strerror or error}") from None
    return listener, connection


def _environment() -> dict[str, str]:
    tunables = os.environ.get("GLIBC_TUNABLES")
    return {"GLIBC_TUNABLES": f"{tunables}:{_TUNABLES}" if tunables else _TUNABLES}


def _without(path: str, words: str) -> str:
    """What QEMU says after the name of the image, which may be a name that the user never saw."""
    if "Is another process using the image" in words:
        return "is in use: another process has its locks (is its domain running)"
    for marker in (f"'{path}': ", f"{path}: "):
        words = words.rpartition(marker)[2]
    return words
