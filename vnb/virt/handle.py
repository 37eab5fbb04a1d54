# SPDX-License-Identifier: LGPL-2.1-or-later
"""A domain of libvirt by a connection of its own: what all that is asked of it stands on."""

from __future__ import annotations

import contextlib
import re

import libvirt

from vnb.base import waiting
from vnb.virt.connection import default_uri, error_of, is_local_uri, open_connection
from vnb.virt.failures import NoDomain

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_UUID = re.compile(r"[0-9A-Fa-f]{8}(-?[0-9A-Fa-f]{4}){3}-?[0-9A-Fa-f]{12}")
WAITS = {  # what libvirt's functions wait for
    "backupBegin": "libvirt and QEMU to begin the job", "abortJob": "libvirt and QEMU to end the job",
    "fsFreeze": "the guest agent to freeze the file systems", "fsThaw": "the guest agent to thaw the file systems",
    "guestInfo": "the guest agent to describe the guest",
}


class Handle:
    """
    A domain, looked up anew: the daemon may have been restarted since the last time.

    uri: None for the default. name: a name or a UUID. user, password_file: what libvirt's authentication asks for.
    Raises Error, as all methods do.
    """

    def __init__(self, uri: str | None, name: str, user: str | None = None, password_file: str | None = None) -> None:
        self.uri = uri or default_uri()
        self.what = name
        try:
            with waiting.on(f"libvirt at {self.uri} to answer"):
                self._connection = open_connection(self.uri, user, password_file)
        except libvirt.libvirtError as error:
            raise error_of(self.uri, error) from None
        try:
            with waiting.on(f"libvirt at {self.uri} to answer"):
                self._domain: Any = waiting.Told(self._look_up(name), WAITS, "libvirt to answer")
            self.name = self._domain.name()
            self.uuid = self._domain.UUIDString()
        except libvirt.libvirtError as error:
            raise error_of(name, error) from None

    def _look_up(self, name: str) -> Any:
        """libvirt's domain of a name or a UUID; NoDomain only where libvirt says so: it may be away."""
        looks = [self._connection.lookupByName]
        if _UUID.fullmatch(name):
            looks.append(self._connection.lookupByUUIDString)
        for look in looks:
            try:
                return look(name)
            except libvirt.libvirtError as error:
                if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
                    raise
        raise NoDomain(name, f"no such domain at {self.uri} (virsh -c {self.uri} list --all shows those that are)")

    def close(self) -> None:
        """Let go of the connection, which the domain holds, too."""
        self._domain = None
        with contextlib.suppress(libvirt.libvirtError):  # the daemon was faster
            self._connection.close()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, function: str, *args: Any) -> Any:
        """function(*args) of libvirt's domain object, its error as an Error."""
        try:
            return getattr(self._domain, function)(*args)
        except libvirt.libvirtError as error:
            raise error_of(self.what, error) from None

    @property
    def is_active(self) -> bool:
        """Whether it runs; a transient one is not even known when it does not."""
        try:
            return bool(self.call("isActive"))
        except NoDomain:
            return False

    @property
    def id(self) -> int:
        """libvirt's number of this run of the domain, as it was when the domain was looked up; -1 where it was off."""
        return self.call("ID")

    @property
    def is_persistent(self) -> bool:
        return bool(self.call("isPersistent"))

    def xml(self, inactive: bool = False) -> str:
        """The domain's XML, live or as it will be at the next start, without its secrets."""
        return self.call("XMLDesc", libvirt.VIR_DOMAIN_XML_INACTIVE if inactive else 0)

    def call_connection(self, function: str, *args: Any) -> Any:
        """function(*args) of libvirt's connection object, its error as an Error."""
        try:
            return getattr(self._connection, function)(*args)
        except libvirt.libvirtError as error:
            raise error_of(self.uri, error) from None

    @property
    def is_local(self) -> bool:
        """Whether paths in the domain's XML are paths of this host."""
        return is_local_uri(self.uri)

    @property
    def is_paused(self) -> bool:
        return self.call("state")[0] == libvirt.VIR_DOMAIN_PAUSED
