# SPDX-License-Identifier: LGPL-2.1-or-later
"""A writable overlay on a restore point, by qemu-nbd."""

from __future__ import annotations

import json
import os
import socket
from urllib.parse import quote, unquote, urlsplit

from vnb.base.errors import Error
from vnb.base.processes import run, wait_for
from vnb.qemu.qemu_nbd import QemuNbd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vnb.serve.address import Address



class Overlay(QemuNbd):
    """
    qemu-nbd, serving a qcow2 file that holds what was written, on top of a saved disk.

    path: made if it is not there. base: the export, DISK@POINT, that it belongs to: on top of any other
    its content would make no sense. name: of its own export. size: of the disk. directory: where
    BELOW serves that export.
    """

    BELOW = "vnb-map"  # a relative socket: the image names it, and leads to an error where vnb-map does not run

    def __init__(
        self, address: Address, path: str, base: str, name: str, size: int, directory: str, debug: bool,
    ) -> None:
        path = os.path.abspath(path)
        backing = f"nbd+unix:///{quote(base, safe='@:')}?socket={self.BELOW}"
        if os.path.lexists(path):
            said = run(path, "qemu-img", "info", "--output=json", "--format=qcow2", "--", path)
            below = json.loads(said).get("backing-filename")
            if below != backing:
                where = urlsplit(below or "")
                below = unquote(where.path[1:]) if where.scheme == "nbd+unix" else below or "nothing"
                raise Error(path, f"belongs on top of {below}, not of {base}")
        else:
            options = ["-q", "-u", "-f", "qcow2", "-F", "raw", "-b", backing]
            mask = os.umask(0o077)
            try:
                run(path, "qemu-img", "create", *options, "--", path, str(size))
            finally:
                os.umask(mask)
        super().__init__(
            path, "qcow2", ["--persistent", "--shared=0", f"--export-name={name}", "--discard=unmap"],
            address.listener, patient=True, directory=directory, debug=debug,
        )
        self._where = address.listener.family, address.where

    def ready(self) -> None:
        """Wait until it serves: it greets whoever connects. Raises Error."""
        family, where = self._where
        with socket.socket(family, socket.SOCK_STREAM) as client:
            client.connect(where)
            assert self.fd is not None
            if wait_for([self.fd, client.fileno()]) == self.fd:
                raise self.failure()
