# SPDX-License-Identifier: LGPL-2.1-or-later
"""vnb-map in tests: run it, wait until it is ready, and see that nothing of it is left."""

import contextlib
import os
import re
import select
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

DEADLINE = 60  # seconds that anything may take before a test fails instead of hanging: other tests sync disks


class Map:
    """A vnb-map that runs. lines (list of str): what it printed when it was ready."""

    def __init__(self, *arguments, **options):
        self.process = subprocess.Popen(
            ["vnb-map", *map(str, arguments)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, **options,
        )
        self.lines = []

    def ready(self, count=1):
        """Wait for count lines; returns them."""
        deadline = time.monotonic() + DEADLINE
        said = b""
        fd = self.process.stdout.fileno()
        while said.count(b"\n") < count:
            assert select.select([fd], [], [], max(0, deadline - time.monotonic()))[0], "vnb-map is not ready"
            part = os.read(fd, 4096)
            assert part, f"vnb-map has ended: {self.process.stderr.read()}"
            said += part
        self.lines = said.decode().splitlines()
        return self.lines

    def stderr_line(self):
        """The next line on its standard error."""
        assert select.select([self.process.stderr], [], [], DEADLINE)[0], "nothing on stderr"
        return self.process.stderr.readline()

    def end(self, signum=signal.SIGTERM):
        """End it by a signal; returns (status, what it said on stderr)."""
        self.process.send_signal(signum)
        _, stderr = self.process.communicate(timeout=DEADLINE)
        return self.process.returncode, stderr


@contextlib.contextmanager
def mapped(*arguments, lines=1, **options):
    """A Map that is ready, and is ended."""
    served = Map(*arguments, **options)
    try:
        served.ready(lines)
        yield served
    finally:
        if served.process.poll() is None:
            served.process.terminate()
        with served.process:
            served.process.wait(DEADLINE)


@contextlib.contextmanager
def sign(path):
    """A function that waits until somebody has written to the FIFO at path."""
    os.mkfifo(path)
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:

        def wait():
            assert select.select([fd], [], [], DEADLINE)[0], "no sign"

        yield wait
    finally:
        os.close(fd)


def run(*command, **options):
    """subprocess.run with what tests want of it."""
    return subprocess.run(
        [str(word) for word in command], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEADLINE,
        **options,
    )


def example(word, places):
    """The one example of the manual with this word in it, as a script. places: {what stands there: what is meant}."""
    page = Path(__file__).parents[1].joinpath("man", "vnb-map.1").read_text()
    text = re.search(r"^\.Sh EXAMPLES\n(.*?)^\.Sh ", page, re.DOTALL | re.MULTILINE)[1]
    scripts = re.findall(r"^\.Bd -literal.*?\n(.*?)^\.Ed$", text, re.DOTALL | re.MULTILINE)
    (script,) = (script.replace("\\e", "\\") for script in scripts if word in script)
    for place, meant in places.items():
        assert place in script, place
        script = script.replace(place, str(meant))
    return script


def copy(uri, path):
    """The bytes of an export, by nbdcopy."""
    done = run("nbdcopy", uri, path)
    assert done.returncode == 0, done.stderr
    with open(path, "rb") as file:
        return file.read()


def processes_in(session):
    """Command lines of processes whose environment says that they belong to this test."""
    marker = f"VNB_TEST={session}".encode()
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/environ", "rb") as environ:
            if marker in environ.read().split(b"\0"):
                with open(f"/proc/{pid}/cmdline", "rb") as cmdline:
                    found.append(cmdline.read().replace(b"\0", b" ").decode())
    return found

needs_fuse = pytest.mark.skipif(
    not (os.access("/dev/fuse", os.R_OK | os.W_OK) and shutil.which("nbdfuse")), reason="no nbdfuse or /dev/fuse here"
)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts")
QEMU = "qemu-system-x86_64"
WORKED, FAILED = 0x10, 0x20  # what the guest says in the end; QEMU makes 2 * n + 1 its exit status of it
# A boot sector: it sends the text in sector 2 to the serial port, and then writes that sector to sector 3.
BOOT = bytes.fromhex(
    "31c0 8ed8 8ec0 8ed0 bc007c"  # xor ax, ax; mov ds, es, ss, ax; mov sp, 0x7c00
    "52"  # push dx             the BIOS leaves the drive in dl
    "b80102 bb007e b90200 b600 cd13"  # mov ax, 0x0201; bx, 0x7e00; cx, 2; dh, 0; int 0x13: read
    "721f"  # jc failed
    "be007e baf803"  # mov si, 0x7e00; dx, 0x3f8
    "ac 84c0 7403 ee ebf8"  # next: lodsb; test al, al; jz +3; out dx, al; jmp next
    "5a"  # pop dx
    "b80103 b90300 b600 cd13"  # mov ax, 0x0301; cx, 3; dh, 0; int 0x13: write
    "7204"  # jc failed
    "b010 eb02"  # mov al, WORKED; jmp end
    "b020"  # failed: mov al, FAILED
    "baf400 ee f4 ebfd"  # end: mov dx, 0xf4; out dx, al; hlt; jmp $-1
).ljust(510, b"\0") + b"\x55\xaa"
