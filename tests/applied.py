# SPDX-License-Identifier: LGPL-2.1-or-later
"""For the tests of vnb-apply: run it on streams made from plans (tests/makers.py), look at what it made."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import makers
import pytest

from vnb.format import writing

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
COMMAND = [sys.executable, os.path.join(ROOT, "bin", "vnb-apply")]
DEADLINE = 60


def environment():
    """The environment of the programs that are started."""
    return {**os.environ, "PYTHONPATH": ROOT, "LC_ALL": "C.UTF-8"}


def segments_of(plan, known=None, **options):
    """The bytes of each segment of a plan. known: the disks that are increments after the first one."""
    found = []
    before = {}
    for number, (disks, image) in enumerate(zip(plan, makers.images(plan))):
        fd = os.memfd_create("segment")
        try:
            writer = writing.Writer(fd, "sample")
            sizes = {name: len(image[name]) for name in disks}
            makers.write_segment(
                writer, number, disks, sizes, known=before if known is None or not number else known, **options
            )
            writer.flush()
            found.append(os.pread(fd, os.fstat(fd).st_size, 0))
        finally:
            os.close(fd)
        before = image
    return found


def apply(content, *arguments, **options):
    """Run vnb-apply with these bytes on standard input; the CompletedProcess, with stderr as text."""
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)], input=content, capture_output=True, timeout=DEADLINE,
        env=environment(), check=False, **options,
    )
    done.stderr = done.stderr.decode()
    return done


def restored(content, *arguments, **options):
    """Run vnb-apply, which has to succeed and to be silent, but for where data files are."""
    done = apply(content, *arguments, **options)
    said = [line for line in done.stderr.splitlines() if ": its data is in " not in line]
    assert (done.returncode, done.stdout, said) == (0, b"", [])


def refused(content, *arguments, **options):
    """Run vnb-apply, which has to fail with one line on stderr; that line without the command's name."""
    done = apply(content, *arguments, **options)
    assert done.returncode == 1, done
    assert done.stdout == b""
    assert done.stderr.startswith("vnb-apply: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr[len("vnb-apply: ") : -1]


def start(*arguments, **options):
    """Start vnb-apply with a pipe to its standard input."""
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=environment(), **options,
    )


def same(path, format_, expected, tmp_path):
    """Whether an image holds exactly these bytes: by qemu-img compare, and by what qemu-img convert makes of it."""
    plain, copy = tmp_path / "expected.raw", tmp_path / "copy.raw"
    plain.write_bytes(expected)
    qemu_img("compare", "-f", format_, "-F", "raw", path, plain)
    qemu_img("convert", "-f", format_, "-O", "raw", path, copy)
    return copy.read_bytes() == bytes(expected)


def qemu_img(*arguments, **options):
    """Run qemu-img, which has to succeed; what it says."""
    command = ["qemu-img", *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, **options).stdout


def eventually(condition, deadline=DEADLINE):
    """Wait until condition() is true, and return what it gave; for what nobody tells us of."""
    end = time.monotonic() + deadline
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)
    return found


def processes_with(text, program=""):
    """Ids of processes of a program, or any, with a text in their arguments: a test's own directory, say."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                command = file.read()
        except OSError:
            continue
        if os.fsencode(str(text)) in command and command.startswith(program.encode()):
            found.append(int(pid))
    return found


def left_behind(directory):
    """What is in a directory that vnb-apply was to leave empty, and processes that still have to do with it."""
    return [*os.listdir(directory), *processes_with(directory)]


@contextlib.contextmanager
def mounted(path, options, kind="tmpfs"):
    """A small file system in memory, mounted at path as long as the context lasts."""
    path.mkdir()
    done = subprocess.run(["mount", "-t", kind, "-o", options, kind, path], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("mount is not allowed here")
    try:
        yield
    finally:
        subprocess.run(["umount", path], check=True)


@contextlib.contextmanager
def qemu_nbd(tmp_path, *arguments):
    """A qemu-nbd; its URI."""
    socket, ready = tmp_path / "socket", tmp_path / "pid"
    process = subprocess.Popen(["qemu-nbd", "-t", "-k", socket, f"--pid-file={ready}", *map(str, arguments)])
    try:
        eventually(ready.exists)
        yield f"nbd+unix:///?socket={socket}"
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def nbdkit(tmp_path, *arguments):
    """An nbdkit; (URI, process)."""
    socket, ready = tmp_path / "socket", tmp_path / "ready"
    process = subprocess.Popen(
        ["nbdkit", "--foreground", "--exit-with-parent", f"--unix={socket}", f"--pidfile={ready}",
         *map(str, arguments)], stderr=subprocess.DEVNULL,
    )
    try:
        eventually(ready.exists)
        yield f"nbd+unix:///?socket={socket}", process
    finally:
        process.kill()
        process.wait()


STEPS = ("fsync", "rename", "link", "unlink", "pwrite", "write", "writev", "mkdir", "rmdir", "truncate")


def killed_at(count, function, *arguments, prepare=None):
    """
    Call a function in a child process that is killed at its count-th call that changes what is on a disk; whether it
    lived. There is no cleaning up. prepare (callable or None): called there first.
    """
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            if prepare is not None:
                prepare()
            _kill_at(count)
            function(*arguments)
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    assert status in (0, signal.SIGKILL), status
    return status == 0


def _kill_at(count):
    calls = [0]

    def fatal(function):
        def call(*arguments, **options):
            calls[0] += 1
            if calls[0] == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)
        return call

    for name in STEPS:
        setattr(os, name, fatal(getattr(os, name)))
