# SPDX-License-Identifier: LGPL-2.1-or-later
"""Endpoints: where QEMU listens for NBD clients, and the URI by which they come there. Pure, but for choose_port()."""

from __future__ import annotations

import random
import re
import urllib.parse

from vnb.base.errors import UsageError

NBD_PORT = 10809  # registered for it
PATIENCE = 30  # seconds that a server has to take a client; QEMU does nothing else while it is at some commands
PORTS = range(49152, 65536)  # dynamic ports of RFC 6335, section 6
_LISTEN = re.compile(
    r"\[(?P<ipv6>[0-9A-Fa-f:.]+)\](:(?P<port6>[0-9]{1,5}))?|(?P<name>[^:\[\]/\s]*)(:(?P<port>[0-9]{1,5}))?"
    r"|(?P<bare>[0-9A-Fa-f:.]+)"
)
WILDCARDS = ("", "0.0.0.0", "::")  # noqa: S104 -- addresses that clients cannot connect to


class Unix:
    """A unix socket. path: of it on QEMU's host, which is key, its name in a job's record, too."""

    is_tcp = False

    def __init__(self, path: str) -> None:
        self.key = self.path = path

    def attributes(self) -> dict[str, str]:
        """Of the element server in libvirt's backup XML."""
        return {"transport": "unix", "socket": self.path}

    def uri(self, export: str) -> str:
        """The NBD URI of an export."""
        return f"nbd+unix:///{quoted(export)}?{_query('socket', self.path)}"


class Tcp:
    """
    A TCP port.

    address: a name or an address of QEMU's host. port: None for one that is chosen.
    host: what clients connect to where address is a wildcard. tls: clients have to show a certificate, and
    so has QEMU. certificates: the directory with the clients', by default libnbd's.
    """

    is_tcp = True

    def __init__(
        self, address: str, port: int | None, host: str, tls: bool = False, certificates: str | None = None,
    ) -> None:
        self.address = address
        self.is_given = port is not None
        self.port = port
        self.host = host if address in WILDCARDS else address
        self.tls = tls
        self.certificates = certificates
        if not self.is_given:
            self.choose_port()

    def choose_port(self) -> None:
        """Take another port: libvirt wants one to be named, and only trying tells whether it is free."""
        self.port = random.choice(PORTS)  # noqa: S311 -- any will do

    @property
    def key(self) -> str:
        """As libvirt has it, see vnb.virt.domxml.backup_endpoint(): by it a job is known as ours."""
        return f"{self.attributes()['name']}:{self.port}"

    def attributes(self) -> dict[str, str]:
        found = {"transport": "tcp", "name": self.address or "0.0.0.0", "port": str(self.port)}  # noqa: S104
        return {**found, "tls": "yes"} if self.tls else found

    def uri(self, export: str) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        # With nbds there is no connection without TLS, nor to a server whose certificate is not of this host.
        query = f"?{_query('tls-certificates', self.certificates)}" if self.certificates else ""
        return f"{'nbds' if self.tls else 'nbd'}://{host}:{self.port}/{quoted(export)}{query}"


def quoted(export: str) -> str:
    """The name of an export as it stands in a URI."""
    return urllib.parse.quote(export, safe="")


def _query(name: str, path: str) -> str:
    return f"{name}={urllib.parse.quote(path)}"  # a + would not be a space for libnbd


def parse_listen(text: str) -> tuple[str, int | None]:
    """(address, port or None) of ADDRESS[:PORT], where an IPv6 address with a port is in brackets. UsageError."""
    match = _LISTEN.fullmatch(text)
    if match is None or not text:
        raise UsageError("--nbd-listen", f'"{text}" is not ADDRESS[:PORT], or [ADDRESS]:PORT for IPv6')
    port = match["port6"] or match["port"]
    if port is not None and not 0 < int(port) < 65536:
        raise UsageError("--nbd-listen", f'"{port}" is no port')
    return match["ipv6"] or match["name"] or match["bare"] or "", int(port) if port else None
