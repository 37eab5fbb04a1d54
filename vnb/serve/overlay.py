# SPDX-License-Identifier: LGPL-2.1-or-later
"""A writable overlay on a restore point, by qemu-nbd."""

import json
import os
import socket
import subprocess
import tempfile
from urllib.parse import quote, unquote, urlsplit

from vnb.base.errors import Error
from vnb.base.processes import Child, wait_for


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
            said = run_tool(path, "qemu-img", "info", "--output=json", "--format=qcow2", "--", path)
            below = json.loads(said).get("backing-filename")
            if below != backing:
                where = urlsplit(below or "")
                below = unquote(where.path[1:]) if where.scheme == "nbd+unix" else below or "nothing"
                raise Error(path, f"belongs on top of {below}, not of {base}")
        else:
            options = ["-q", "-u", "-f", "qcow2", "-F", "raw", "-b", backing]
            mask = os.umask(0o077)
            try:
                run_tool(path, "qemu-img", "create", *options, "--", path, str(size))
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


def run_tool(what, *command):
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
