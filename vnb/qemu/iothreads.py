# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Whether a QEMU survives that a client of an export hangs up, where the disk is on an iothread.

There QEMU takes notice of it in the iothread. The mend of CVE-2024-7409 (August 2024) asserts that this is the main
thread, which is true only since QEMU 9.0, and in 8.2.3. So 7.2.14 and later of 7.2 abort, with their guests, and so
does every older one to which a distribution has brought that mend alone: the version does not tell. Nothing makes it
safe, since a client may be killed at any time. So we try it, with the very program that runs the domain, in a process
of its own without a guest.

This file also runs on another host, as a program that needs nothing but Python 3.6: see main(). So it cannot import
annotations from __future__, and types that Python does not know there stand in quotes.
"""

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


SECONDS = 30  # for the whole trial, which takes less than one
ROUNDS = 3  # clients that hang up: QEMU dies a moment after one has
SAFE_SINCE = 8_002_003  # QEMU 8.2.3, as libvirt has versions: for where it cannot be tried
_EXPORT = {"type": "nbd", "id": "export", "node-name": "disk", "name": "disk", "iothread": "thread"}
_ARGUMENTS = (
    "-machine", "none,accel=kvm:tcg", "-nodefaults", "-no-user-config", "-display", "none", "-S", "-qmp", "stdio",
    "-object", "iothread,id=thread", "-blockdev", "driver=null-co,node-name=disk,size=65536",
)


def survives(program: str) -> bool:
    """Try it with a program, the path of a QEMU. Raises OSError or ValueError where that is not possible."""
    with tempfile.TemporaryDirectory(prefix="vnb-iothread.") as directory:
        qemu = subprocess.Popen(
            [program, *_ARGUMENTS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
        )
        timer = threading.Timer(SECONDS, qemu.kill)
        timer.start()
        try:
            is_ready = _try(qemu, f"{directory}/nbd")
            status = qemu.wait()
        finally:
            timer.cancel()
            qemu.kill()
            qemu.wait()
            for pipe in (qemu.stdin, qemu.stdout):
                if pipe is not None:
                    pipe.close()
    if not is_ready or status not in (0, -signal.SIGABRT):
        raise ValueError(f"{program} ended with status {status}")
    return status == 0


def _try(qemu: "Any", path: str) -> bool:
    """Serve a disk on an iothread, have clients come and hang up, end; whether it came to the clients."""
    is_ready = False
    try:
        json.loads(qemu.stdout.readline())  # its greeting
        _ask(qemu, "qmp_capabilities")
        _ask(qemu, "nbd-server-start", addr={"type": "unix", "data": {"path": path}})
        _ask(qemu, "block-export-add", **_EXPORT)
        is_ready = True
        for _ in range(ROUNDS):
            _connect_and_hang_up(path)
        _ask(qemu, "quit")
    except (OSError, ValueError):
        if not is_ready:
            qemu.kill()
    return is_ready


def _ask(qemu: "Any", command: str, **arguments: "Any") -> None:
    """A QMP command that has to work. Raises OSError or ValueError."""
    message = {"execute": command}  # type: dict[str, Any]
    if arguments:
        message["arguments"] = arguments
    qemu.stdin.write(json.dumps(message).encode() + b"\n")
    while True:
        answer = json.loads(qemu.stdout.readline())
        if "error" in answer:
            raise ValueError(answer["error"]["desc"])
        if "return" in answer:
            return


def _connect_and_hang_up(path: str) -> None:
    """As a client does that is killed. It speaks NBD: newstyle without padding, NBD_OPT_EXPORT_NAME."""
    name = _EXPORT["name"].encode()
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(SECONDS)
        client.connect(path)
        client.recv(18, socket.MSG_WAITALL)
        client.sendall(struct.pack(">I8sII", 3, b"IHAVEOPT", 1, len(name)) + name)
        client.recv(10, socket.MSG_WAITALL)


def program_of(uuid: str) -> str:
    """
    The program, also one that was replaced since, of the QEMU that runs a domain, by its uuid. Raises OSError.
    """
    mark = f"\0-uuid\0{uuid}\0".encode()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                if mark in file.read():
                    return f"/proc/{pid}/exe"
        except OSError:
            continue  # it has ended, or is not ours
    raise FileNotFoundError("no QEMU of this domain is seen here")


def find_out(uuid: str, emulator: str) -> bool:
    """
    Whether the QEMU of a domain survives it. Raises OSError or ValueError where that cannot be tried.

    uuid: the domain's. emulator: the program of its XML, for where we may not see which one runs.
    """
    try:
        return survives(program_of(uuid))
    except (OSError, ValueError):
        return survives(emulator)


def main(uuid: str, emulator: str) -> None:
    """On another host: prints what find_out() returns, as JSON."""
    print(json.dumps(find_out(uuid, emulator)))


if __name__ == "__main__":
    main(*sys.argv[1:])
