# SPDX-License-Identifier: LGPL-2.1-or-later
"""Connections to libvirt: opened by a URI, with events, and what they say of a host."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import threading
import time

import libvirt

from vnb.base.errors import Error, os_error
from vnb.virt import domxml
from vnb.virt.failures import NoDomain

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


SEES_TO_DATA_FILES = 10_010_000  # version of libvirt
KEEPALIVE_SECONDS, KEEPALIVE_COUNT = 10, 3  # a line is down when nothing has come for so many times so long
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10  # seconds between two questions for what an event tells, too

# libvirt prints each error on stderr itself, unless told not to: we say it, once.
libvirt.registerErrorHandler(lambda _context, _error: None, None)


def default_uri() -> str:
    """libvirt's own default, but the system's daemon for root and the session's for others."""
    return os.environ.get("LIBVIRT_DEFAULT_URI") or ("qemu:///system" if os.geteuid() == 0 else "qemu:///session")


def dotted(version: int) -> str:
    """A version of libvirt or QEMU, as libvirt has it, in its usual form."""
    return f"{version // 1000000}.{version // 1000 % 1000}.{version % 1000}"


def error_of(what: str | None, error: libvirt.libvirtError) -> Error:
    """A libvirtError as an Error, with libvirt's own words; NoDomain where it says that."""
    kind = NoDomain if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN else Error
    return kind(what, error.get_error_message() or str(error))


def is_local_uri(uri: str) -> bool:
    import urllib.parse

    return not urllib.parse.urlsplit(uri).netloc


def open_connection(uri: str, user: str | None, password_file: str | None) -> Any:
    _run_events()
    connection = _open_any(uri, user, password_file)
    if is_local_uri(uri):
        return connection
    # Else a call on a line that is down would wait as long as TCP does, and the keeper would watch over nothing.
    connection.setKeepAlive(KEEPALIVE_SECONDS, KEEPALIVE_COUNT)
    return connection


@functools.cache
def _run_events() -> None:
    """Run libvirt's event loop in a thread, once in a process: events and keepalive messages need it."""
    libvirt.virEventRegisterDefaultImpl()

    def run() -> None:
        while libvirt.virEventRunDefaultImpl() == 0:
            pass

    threading.Thread(target=run, daemon=True).start()


def _open_any(uri: str, user: str | None, password_file: str | None) -> Any:
    if user is None and password_file is None:
        return libvirt.open(uri)

    failed = []  # what is raised in there libvirt prints, with a traceback

    def answer(credentials: list[list[Any]], _data: object) -> int:
        for credential in credentials:
            if credential[0] in (libvirt.VIR_CRED_AUTHNAME, libvirt.VIR_CRED_USERNAME):
                credential[4] = user
            elif credential[0] in (libvirt.VIR_CRED_PASSPHRASE, libvirt.VIR_CRED_NOECHOPROMPT):
                try:
                    credential[4] = _password(password_file)
                except Error as error:
                    failed.append(error)
                    return -1
            else:
                return -1
        return 0

    kinds = [
        libvirt.VIR_CRED_AUTHNAME, libvirt.VIR_CRED_USERNAME, libvirt.VIR_CRED_PASSPHRASE,
        libvirt.VIR_CRED_NOECHOPROMPT,
    ]
    try:
        return libvirt.openAuth(uri, [kinds, answer, None], 0)
    except libvirt.libvirtError:
        if failed:
            raise failed[0] from None
        raise


def _password(path: str | None) -> str:
    """The first line of a file: a password has no place among the arguments, where everybody can read it."""
    if path is None:
        raise Error("--password-file", "libvirt asks for a password, and none is given")
    try:
        with open(path, encoding="utf-8") as file:
            return file.readline().rstrip("\n")
    except OSError as error:
        raise os_error(path, error) from None
    except UnicodeDecodeError:
        raise Error(path, "is not UTF-8") from None


class Patience:
    """How long to wait for something, with polls that become rare: each may be an error in a daemon's log."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self._pause: float = FIRST_PAUSE

    @property
    def is_over(self) -> bool:
        return time.monotonic() > self._end

    def next_pause(self) -> float:
        """Seconds until the next question."""
        pause, self._pause = self._pause, min(2 * self._pause, LONGEST_PAUSE)
        return pause


class Host:
    """
    A libvirt, for domains that are not there yet. uri, user, password_file: as Domain has them. Raises Error.
    """

    def __init__(self, uri: str | None, user: str | None = None, password_file: str | None = None) -> None:
        self.uri = uri or default_uri()
        try:
            self._connection = open_connection(self.uri, user, password_file)
        except libvirt.libvirtError as error:
            raise error_of(self.uri, error) from None

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(libvirt.libvirtError):
            self._connection.close()

    @property
    def is_local(self) -> bool:
        """Whether paths in a domain's XML are paths of this host."""
        return is_local_uri(self.uri)

    def refuse_to_replace(self, name: str, uuid: str) -> None:
        """
        Raise Error where a domain is in the way of a definition with this name and uuid (str, "" for a new one).

        A domain with the same uuid is meant to be replaced, but not while it runs.
        """
        try:
            for domain in self._connection.listAllDomains():
                if uuid and domain.UUIDString() == uuid:
                    if domain.isActive():
                        raise Error(domain.name(), "is running: shut it down before it is replaced")
                elif domain.name() == name:
                    raise Error(name, f"there is such a domain at {self.uri} already: give another name with --name")
        except libvirt.libvirtError as error:
            raise error_of(self.uri, error) from None

    def define(self, name: str, xml: str) -> None:
        """Define a domain. name: for messages."""
        try:
            self._connection.defineXML(xml)
        except libvirt.libvirtError as error:
            raise error_of(name, error) from None

    def user_for_data_files(self, xml: str) -> tuple[int, int] | None:
        """
        (uid, gid) that QEMU runs as for a domain (its XML), where libvirt does not see to data files of qcow2 images.

        It does so from version 10.10 on, and before it gives QEMU the qcow2 file alone: None then, and where libvirt
        does not say who QEMU is.
        """
        try:
            if self._connection.getLibVersion() >= SEES_TO_DATA_FILES:
                return None
            label = domxml.qemu_user(xml) or domxml.default_qemu_user(self._connection.getCapabilities())
        except libvirt.libvirtError as error:
            raise error_of(self.uri, error) from None
        match = re.fullmatch(r"\+?(\d+):\+?(\d+)", label or "", re.ASCII)
        return match and (int(match[1]), int(match[2]))

    def refresh_pool(self, directory: str, say: Callable[[str], None]) -> None:
        """Have the storage pools that are in a directory see what is new there. It is a favour: failures are said."""
        try:
            for pool in self._connection.listAllStoragePools(libvirt.VIR_CONNECT_LIST_STORAGE_POOLS_ACTIVE):
                path = domxml.pool_path(pool.XMLDesc())
                if path and os.path.realpath(path) == os.path.realpath(directory):
                    pool.refresh()
        except libvirt.libvirtError as error:
            if error.get_error_code() != libvirt.VIR_ERR_NO_SUPPORT:  # a libvirt without any storage driver
                say(f"{directory}: cannot refresh the storage pool: {error.get_error_message()}")
