# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Commands fed with hostile input, in forks of this process, guided by the lines of vnb that they reach.

An input that reaches a line none before it has reached is kept and changed further. All comes from a seed, and a run
that fails leaves its input in a directory that the failure names.
"""

import mmap
import os
import re
import resource
import shutil
import sys
import threading
import types
import zlib
from pathlib import Path

import samples
import servers

import vnb
from vnb.errors import StreamError

MiB = 1 << 20
MEMORY = 160 * MiB  # more than this process has: what the largest frames take, decoded, is less
ADDRESS_SPACE = 1024 * MiB  # more than this process has
LINES = 1 << 16  # of the map of lines that were reached
PACKAGE = os.path.dirname(vnb.__file__)
TARGET = "target"  # the one directory that a run may write into


class Reached:
    """Which lines of vnb were reached, over all runs."""

    def __init__(self):
        self._now = mmap.mmap(-1, LINES)  # shared with forks
        self._ever = 0

    def trace(self):
        """Have this process, a fork, write down what it reaches from now on."""
        sys.settrace(self._call)
        threading.settrace(self._call)

    def news(self):
        """Whether something was reached that never was, since this was asked the last time."""
        now = int.from_bytes(self._now[:], "little")
        self._now[:] = bytes(LINES)
        found = now & ~self._ever
        self._ever |= now
        return found != 0

    def __len__(self):
        return bin(self._ever).count("1")

    def _call(self, frame, _event, _argument):
        code = frame.f_code
        if not code.co_filename.startswith(PACKAGE):
            return None
        base = zlib.crc32(os.path.basename(code.co_filename).encode())
        now = self._now

        def line(frame, _event, _argument):
            now[(base + frame.f_lineno) % LINES] = 1
            return line

        return line(frame, None, None)


class Target:
    """
    A command and how it is fed.

    name (str); module; argv (list of str). corpus: sound inputs, of any kind. change: function (chance, input) -> a
    hostile one, made of it. place: function (input, directory) -> its standard input (bytes),
    once what the command reads is in the directory, where it will run and may write into target/ alone.
    """

    def __init__(self, name, module, argv, corpus, change, place):
        self.name = name
        self.module = module
        self.argv = argv
        self.corpus = corpus
        self.change = change
        self.place = place

    def fuzz(self, directory, chance, inputs):
        """Run it on so many hostile inputs, by chance (random.Random). directory (Path). Returns lines reached."""
        reached = Reached()
        kept = list(self.corpus)
        for input_ in kept:
            self._run(input_, directory, reached)
            reached.news()
        for _ in range(inputs):
            input_ = self.change(chance, chance.choice(kept[-8:] if chance.random() < 0.5 else kept))
            self._run(input_, directory, reached)
            if reached.news():
                kept.append(input_)
        return len(reached)

    def _run(self, input_, directory, reached):
        here = directory / "run"
        here.mkdir()
        (here / TARGET).mkdir(0o700)
        stdin = self.place(input_, here)
        before = tree(here)
        base = resident()

        def prepare():
            os.chdir(here)
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + ADDRESS_SPACE, size + ADDRESS_SPACE))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            reached.trace()

        done = servers.forked(self.name, self.module, *self.argv, stdin=stdin, prepare=prepare)
        fault = fault_of(self.name, done, base)
        if fault is None and tree(here) != before:
            fault = f"it wrote outside its target: {sorted(tree(here).symmetric_difference(before))}"
        if fault is None and done.status and (left := finished(here / TARGET)):
            fault = f"it failed, and left {left}"
        if fault is not None:
            (here / "stdin").write_bytes(stdin)
            raise AssertionError(f"{' '.join([self.name, *self.argv])} < stdin, in {here}: {fault}")
        shutil.rmtree(here)


def fault_of(name, done, base=0):
    """What a run (servers.Done) has done that it must not, whatever its input, or None. base: bytes not its own."""
    lines = done.err.splitlines()
    if "Traceback" in done.err:
        return f"traceback: {done.err[-3000:]}"
    if done.status not in (0, 1, 2):
        return f"status {done.status}: {done.err[-3000:]}"
    if done.status == 1 and not lines:
        return "it failed without a word"
    for line in lines:
        if not re.match(rf"{name}: ", line) or not line.isprintable() or len(line) > 10_000:
            return f"no line of its own: {line[:300]!r}"
    if done.peak is not None and done.peak - base > MEMORY:
        return f"it took {(done.peak - base) // MiB} MiB"
    return None


def tree(directory):
    """What is in a directory, but for the target: a set of (path, mode, size, time)."""
    found = set()
    for path, names, files in os.walk(directory):
        if path == str(directory):
            names.remove(TARGET)
        for name in [*names, *files]:
            status = os.lstat(os.path.join(path, name))
            times = () if name in names else (status.st_size, status.st_mtime_ns)
            found.add((os.path.relpath(os.path.join(path, name), directory), status.st_mode, *times))
    return found


def finished(directory):
    """
    The files in a directory, and in those below that are not hidden, whose names are final.

    But for whole segments: those before the one that is not sound are saved.
    """
    return [str(path) for path in directory.rglob("[!.]*")
            if path.is_file() and not any(part[0] == "." for part in path.relative_to(directory).parts)
            and not (path.suffix == ".vnb" and is_sound(path.read_bytes()))]


def is_sound(content):
    """Whether a stream (bytes) is one, to its end."""
    try:
        return bool(samples.read(content, check_plain=False))
    except StreamError:
        return False


def resident():
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def program(usage, function):
    """What servers.forked() runs as a module: function(args)."""
    return types.SimpleNamespace(__doc__=f"Usage: x {usage}\n", main=function)
