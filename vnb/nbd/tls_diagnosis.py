# SPDX-License-Identifier: LGPL-2.1-or-later
"""Why a connection with TLS fails: libnbd says only that it does. Asked when it has, nothing else is decided here."""

from __future__ import annotations

import os
import socket
import ssl
import struct
import time
import urllib.parse

from vnb.nbd.endpoint import NBD_PORT

SECONDS = 10  # for the server to answer; it did so when the connection failed

# Of the handshake, which is in the NBD protocol's document, section "Newstyle negotiation".
_GREETING = struct.Struct(">8s8sH")
_OPTION = struct.Struct(">8sII")
_REPLY = struct.Struct(">QIII")
_REFUSED = "the server ended the connection: it may not take our certificate"
_STARTTLS, _ACK = 5, 1


def why(uri: str) -> str | None:
    """What is wrong with TLS at an NBD URI with certificates, or None: not known."""
    parts = urllib.parse.urlsplit(uri)
    directory = dict(urllib.parse.parse_qsl(parts.query)).get("tls-certificates")
    if parts.scheme != "nbds" or directory is None:
        return None
    try:
        context = ssl.create_default_context(cafile=os.path.join(directory, "ca-cert.pem"))
        ours = os.path.join(directory, "client-cert.pem")
        if os.path.exists(ours):
            context.load_cert_chain(ours, os.path.join(directory, "client-key.pem"))
    except OSError as error:
        needed = "ca-cert.pem, client-cert.pem and client-key.pem are needed"
        return f"{directory}: {needed}: {error.strerror or error}"
    try:
        with socket.create_connection((parts.hostname, parts.port or NBD_PORT), SECONDS) as connection:
            if not _starttls(connection):
                return "the server has no TLS"
            with context.wrap_socket(connection, server_hostname=parts.hostname) as secure:
                # With TLS 1.3 a client learns only here whether the server takes its certificate.
                return None if secure.recv(1) else _REFUSED
    except ssl.SSLCertVerificationError as error:
        return f"the server's certificate is refused: {error.verify_message}"
    except (ssl.SSLEOFError, ConnectionResetError):
        return _REFUSED
    except ssl.SSLError as error:
        return f"TLS fails: {(error.reason or str(error)).lower().replace('_', ' ')}"
    except OSError:
        return None


def _starttls(connection: socket.socket) -> bool:
    """Whether the server begins TLS when it is asked to."""
    _read(connection, _GREETING.size)
    connection.sendall(struct.pack(">I", 1) + _OPTION.pack(b"IHAVEOPT", _STARTTLS, 0))
    return bool(_REPLY.unpack(_read(connection, _REPLY.size))[2] == _ACK)


def _read(connection: socket.socket, size: int) -> bytes:
    deadline = time.monotonic() + SECONDS
    found = b""
    while len(found) < size:
        connection.settimeout(max(0.1, deadline - time.monotonic()))
        part = connection.recv(size - len(found))
        if not part:
            raise ConnectionResetError
        found += part
    return found
