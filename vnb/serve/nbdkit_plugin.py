# SPDX-License-Identifier: LGPL-2.1-or-later
"""
The server of vnb-map: a plugin that nbdkit runs in a Python of its own; see nbdkit-python-plugin(3).

vnb-map hands over what is to be served in a file (parameter "choice", JSON):

    operands, until, disks, all_points, cache   see vnb.store.saved_disk.Images
    status    a descriptor: JSON says what is served, when it is, or why it can't be
    stderr    a descriptor: lines for people; null: they go to the system's log
    parent    the process to end with
    debug     keep nbdkit's own messages

nbdkit makes a message of several lines, a traceback, of every failed request. So its stderr is closed when
it is ready, and what a user has to know is said here, once.
"""

from __future__ import annotations

import builtins
import ctypes
import errno
import json
import os
import resource
import signal
import syslog
import threading
import traceback

import nbdkit

from vnb.base.errors import Error, one_line, os_error
from vnb.format import frame as f
from vnb.store.saved_disk import MAX_EXTENTS, Images

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from vnb.store.saved_disk import Image


API_VERSION = 2
PREFERRED = 512 * f.KiB  # request size: that of most frames, so that one read serves one request
MAXIMUM = 32 * f.MiB  # request size: NBD's own limit for those that do not ask
PR_SET_PDEATHSIG = 1
GIL_LOCKED = 0  # PyGILState_STATE: whoever called has the lock already, and keeps it
MANY_LINES = 10_000  # said already: then lines may come again

choice: Any = None
images: Any = None
answer: Any = None
told: set[str] = set()
lock = threading.Lock()
thread = threading.local()
at_thread_exit = getattr(ctypes.CDLL(None), "__cxa_thread_atexit_impl", None)  # what C++ has for it; not in every libc


class Failed(Exception):
    """A request failed, and it has been told why. nbdkit never frees it (400 bytes): it must not hold anything."""


def config(key: str, value: str) -> None:
    """Called for each parameter."""
    global choice
    if key != "choice":
        raise Failed(f"unknown parameter {key}")
    with builtins.open(value) as file:
        choice = json.load(file)


def thread_model() -> Any:
    """Any number of requests at once."""
    return nbdkit.THREAD_MODEL_PARALLEL


def keep_thread_state() -> None:
    """
    Keep what Python has for this thread of nbdkit's until the thread ends.

    Else it is made for each request, with a stack that is mapped and unmapped: half of the time of a small read.
    """
    if at_thread_exit is None or hasattr(thread, "is_kept"):
        return
    thread.is_kept = True
    ctypes.pythonapi.PyGILState_Ensure()
    at_thread_exit(thread_ended, None, ctypes.c_void_p(1))  # an address that is in no library: none is to be kept open


@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def thread_ended(_: object) -> None:
    """A thread that called keep_thread_state() is about to end: let go of its state."""
    ctypes.pythonapi.PyGILState_Release(GIL_LOCKED)


def get_ready() -> None:
    """Open everything that is to be served at once, or say why not, and end."""
    global answer, images
    # Each segment of a chain is an open file, and a chain may be longer than the usual 1024.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        images = Images(*(choice[key] for key in ("operands", "until", "disks", "all_points", "cache")))
        sizes = {name: images.open(name).size for name in images.disks}
        damaged = [file.line for file in images.damaged]
        answer = {"disks": sizes, "default": images.default, "point": images.point, "damaged": damaged}
    except (Error, OSError) as error:
        error = error if isinstance(error, Error) else os_error(error.filename, error)
        reply({"what": error.what, "reason": str(error.reason), "where": error.where})
        os._exit(1)


def after_fork() -> None:
    """Called when connections are about to be accepted: nbdkit has nothing to say any more."""
    # With a socket handed over nbdkit asks for SIGTERM when its parent dies, and then waits for its clients to go.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != choice["parent"]:
        os._exit(1)
    reply(answer)
    os.close(choice["status"])
    if not choice["debug"]:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        os.close(null)


def reply(message: object) -> None:
    """Tell vnb-map how it went."""
    with builtins.open(choice["status"], "w", closefd=False) as file:
        json.dump(message, file)


def list_exports(_readonly: object, _is_tls: object) -> list[str]:
    """Called for clients that ask what is here."""
    own, names = choice["export_name"], images.names()
    return names if own is None else [own, *(name for name in names if name != own)]


def default_export(_readonly: object, _is_tls: object) -> str:
    """The name behind the empty name; without one, open() says what is missing."""
    return images.default or ""


def open(_readonly: object) -> Any:
    """Called for a new connection."""
    return told_if_failed(lambda: images.open(export_name()))


def export_name() -> str:
    """What the client calls it: any bytes. Raises Error."""
    try:
        name = nbdkit.export_name()
        return "" if name == choice["export_name"] else name
    except UnicodeDecodeError:
        raise Error("a client", "asked for an export whose name is not UTF-8") from None


def get_size(image: Image) -> int:
    """Bytes of the export."""
    return image.size


def export_description(image: Image) -> str:
    """For people."""
    return f'{image.name} of {one_line(image.head["domain"])} at {image.head["point"]}'


def block_size(_image: Image) -> tuple[int, int, int]:
    """Any offset and length will do."""
    return 1, PREFERRED, MAXIMUM


def can_multi_conn(_image: Image) -> bool:
    """All connections see the same, and nothing changes."""
    return True


def can_cache(_image: Image) -> Any:
    """Prefetching unpacks frames for readers that come."""
    return nbdkit.CACHE_NATIVE


def pread(image: Image, buf: Any, offset: int, _flags: int) -> None:
    """Fill buf."""
    keep_thread_state()
    try:
        image.read_into(buf, offset)
    except Exception as error:
        tell(error)
        buf = None
    if buf is None:
        nbdkit.set_error(errno.EIO)
        raise Failed


def cache(image: Image, count: int, offset: int, _flags: int) -> None:
    """Prefetch; what fails here fails again when it is read."""
    try:
        image.prefetch(offset, count)
    except Error as error:
        tell(error)


def extents(image: Image, count: int, offset: int, flags: int) -> Any:
    """The extents of a range, or of its start; QEMU asks for one at a time."""
    most = 1 if flags & nbdkit.FLAG_REQ_ONE else MAX_EXTENTS
    return told_if_failed(lambda: image.extents(offset, count, most))


def told_if_failed(function: Callable[[], Any]) -> Any:
    """What function returns; what goes wrong is said, and the request fails."""
    try:
        return function()
    except Exception as error:
        tell(error)
    nbdkit.set_error(errno.EIO)
    raise Failed


def tell(error: Exception) -> None:
    """Say once what went wrong."""
    if isinstance(error, MemoryError):
        error = Error(None, "out of memory")
    expected = isinstance(error, Error)
    # Python 3.9 wants all three.
    stack = [] if expected else traceback.format_exception(type(error), error, error.__traceback__)
    line = f"vnb-map: {error}" if expected else "".join(stack).rstrip()
    with lock:
        if line in told:
            return
        if len(told) >= MANY_LINES:
            told.clear()
        told.add(line)
    if choice["stderr"] is None:
        syslog.openlog("vnb-map", syslog.LOG_PID, syslog.LOG_DAEMON)
        syslog.syslog(syslog.LOG_ERR, line.removeprefix("vnb-map: "))
        return
    try:
        os.write(choice["stderr"], f"{line}\n".encode())
    except OSError:
        return  # nobody listens: the request fails all the same
