# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Commands fed with hostile input, in forks of this process, guided by the lines of vnb that they reach.

An input that reaches a line none before it has reached is kept and changed further, in all rounds of a test; what is
kept outlives it, see kept.py. All comes from a seed; but what a round does depends on those before it, so a run that
fails leaves its input in a file that the failure names: VNB_INPUT=FILE tries this one alone.
"""

import collections
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

import msgpack
import samples
import servers
from kept import Kept, name_of

import vnb
from vnb.base.errors import StreamError

MiB = 1 << 20
MEMORY = 160 * MiB  # more than this process has: what the largest frames take, decoded, is 134
ADDRESS_SPACE = 1024 * MiB  # more than this process has
LINES = 1 << 16  # of the map of lines that were reached
INPUTS = 20  # of a round: a run has those that were kept before, too
VARIED = 0.2  # of the inputs are sound, as far as the target knows what is: what is refused early reaches little
ACCEPTED = 0.1  # of the inputs at least have to end with status 0, once there were MANY
MANY = 400
PACKAGE = os.path.dirname(vnb.__file__)
TARGET = "target"  # the one directory that a run may write into
FAILED = Path(samples.ROOT) / "build" / "inputs"  # of those that failed: pytest's directories are soon gone


class Reached:
    """Which lines of vnb a run has reached."""

    def __init__(self):
        self._now = mmap.mmap(-1, LINES)  # shared with forks

    def trace(self):
        """Have this process, a fork, write down what it reaches from now on."""
        sys.settrace(self._call)
        threading.settrace(self._call)

    def lines(self):
        """The lines (set of int) that were reached since this was asked the last time."""
        found = {match.start() for match in re.finditer(b"\1", self._now)}
        self._now[:] = bytes(LINES)
        return found

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

    name (str); module; argv (list of str). corpus: sound inputs, of any kind that msgpack knows. change: function
    (chance, input) -> a hostile one, made of it. place: function (input, directory) -> its standard input (bytes),
    once what the command reads is in the directory, where it will run and may write into target/ alone. vary: function
    (chance, input of the corpus) -> another sound one.
    """

    def __init__(self, name, module, argv, corpus, change, place, vary=lambda _, input_: input_):
        self.name = name
        self.module = module
        self.argv = argv
        self.corpus = corpus
        self.change = change
        self.place = place
        self.vary = vary

    def packed(self, input_):
        """An input as bytes, for a file."""
        return input_ if isinstance(input_, bytes) else msgpack.packb(input_, unicode_errors="surrogateescape")

    def unpacked(self, content):
        """The input that packed() made these bytes of."""
        if isinstance(self.corpus[0], bytes):
            return content
        return msgpack.unpackb(content, unicode_errors="surrogateescape", strict_map_key=False)


class Fuzzer:
    """
    Runs a Target in a directory (Path), again and again. kept (Kept): what was found before.

    failed (Path): a directory for inputs that fail.
    statuses (Counter): how the runs have ended.
    """

    def __init__(self, target, directory, kept=None, failed=FAILED):
        self.kept = Kept() if kept is None else kept
        self.statuses = collections.Counter()
        self._target = target
        self._directory = directory
        self._failed = failed
        self._reached = Reached()

    def fuzz(self, rounds, inputs=INPUTS):
        """Try what is kept, and then so many inputs in each of the Rounds."""
        for input_ in self._target.corpus:
            self.kept.known |= self._run(input_, rounds)
        for content in self.kept.earlier:
            self.kept.add(content, self._run(self._target.unpacked(content), rounds))
        for chance in rounds:
            for _ in range(inputs):
                input_ = self._next(chance)
                lines = self._run(input_, rounds)
                self.kept.add(self._target.packed(input_), lines)
        accepted, tried = self.statuses[0], self.statuses.total()
        assert tried < MANY or accepted >= tried * ACCEPTED, f"only {accepted} of {tried} inputs were not refused"

    def again(self, path, rounds):
        """Try the input in a file alone."""
        self._run(self._target.unpacked(Path(path).read_bytes()), rounds)

    def _next(self, chance):
        if chance.random() < VARIED:
            return self._target.vary(chance, chance.choice(self._target.corpus))
        found = self.kept.recent() if chance.random() < 0.5 else self.kept.all()
        at = chance.randrange(len(found) + len(self._target.corpus))
        input_ = self._target.corpus[at - len(found)] if at >= len(found) else self._target.unpacked(found[at])
        return self._target.change(chance, input_)

    def _run(self, input_, rounds):
        """Run it on an input, which is a fault of these Rounds; the lines that it reached (set)."""
        rounds.fault()
        target, reached = self._target, self._reached
        here = self._directory / "run"
        shutil.rmtree(here, ignore_errors=True)
        here.mkdir()
        (here / TARGET).mkdir(0o700)
        stdin = target.place(input_, here)
        before = tree(here)
        base = resident()

        def prepare():
            os.chdir(here)
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + ADDRESS_SPACE, size + ADDRESS_SPACE))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            reached.trace()

        done = servers.forked(target.name, target.module, *target.argv, stdin=stdin, prepare=prepare)
        fault = fault_of(target.name, done, base)
        if fault is None and tree(here) != before:
            fault = f"it wrote outside its target: {sorted(tree(here).symmetric_difference(before))}"
        if fault is None and done.status in (1, 2) and (left := finished(here / TARGET)):
            fault = f"it failed, and left {left}"
        if fault is not None:
            (here / "stdin").write_bytes(stdin)
            content = target.packed(input_)
            self._failed.mkdir(parents=True, exist_ok=True)
            path = self._failed / name_of(content)
            path.write_bytes(content)
            rounds.input = path
            raise AssertionError(f"{' '.join([target.name, *target.argv])} < stdin, in {here}: {fault}\n"
                                 f"VNB_INPUT={path} has it again")
        self.statuses[done.status] += 1
        return reached.lines()


def fault_of(name, done, base=0):
    """What a run (servers.Done) has done that it must not, whatever its input, or None. base: bytes not its own."""
    lines = done.err.splitlines()
    if "Traceback" in done.err:
        return f"traceback: {done.err[-3000:]}"
    if done.status not in (0, 1, 2, 3):
        return f"status {done.status}: {done.err[-3000:]}"
    if done.status in (1, 3) and not lines:
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
