# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Runs a pipeline and kills a part of it, at a random moment or at its nth system call of a kind, or has such a call fail.

The moment is soon over for what takes a tenth of a second, most of it for starting; the calls are where it matters.
Nobody needs to send SIGPIPE: most of what runs ignores it. What causes it does harm, a reader that goes away.

Which moments and calls there are says a run that nothing is done to, see Place.usual(). All the same some faults come
too late, and Ended.hit says which.
"""

import collections
import contextlib
import dataclasses
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from lab import KiB, clear, marked, wait_for

from vnb.format import stream, writing

SIGNALS = ("KILL", "TERM", "INT")
# What changes something that others see: the order of these is what a crash may come between.
CALLS = (
    "fsync,fdatasync", "rename,renameat,renameat2,link,linkat", "unlink,unlinkat,rmdir", "flock", "mkdir", "openat",
    "write,writev,pwrite64,pwritev,pwritev2", "ftruncate,fallocate", "sendto,sendmsg", "read,pread64,preadv",
    "execve,clone,clone3,fork,vfork",
)
# What may fail where a file system has no room, is mounted read-only, or its disk is broken.
CHANGES = (
    "fsync,fdatasync", "rename,renameat,renameat2,link,linkat", "unlink,unlinkat,rmdir", "mkdir",
    "write,writev,pwrite64,pwritev,pwritev2", "ftruncate,fallocate",
)
ERRORS = ("ENOSPC", "EIO", "EROFS", "EDQUOT")
LAST = 40  # calls of a kind that a fault may hit: those before are of a program that starts
MOMENTS = 0.2  # how many are killed at a moment
READERS = 0.2  # how many have a reader that goes away
LIMITS = {"-n": (6, 54, 1), "-v": (64 * KiB, 576 * KiB, 8 * KiB)}  # of ulimit: least, most, how exactly
DEADLINE = 60


@dataclasses.dataclass
class Usual:
    """
    What a script does that nothing is done to.

    calls (dict): {(stage, system call): how many, the most that one of its threads makes}: strace counts for each
    thread and each call alone. seconds (float): how long it takes; sizes (list of int): bytes in each of its pipes.
    """

    calls: dict
    seconds: float
    sizes: list

    def stages(self):
        return sorted({stage for stage, _ in self.calls})

    def call(self, chance, stage, groups):
        """A call of one of these groups by chance, that a stage makes, and its number."""
        found = [[call for call in group.split(",") if (stage, call) in self.calls] for group in groups]
        call = chance.choice(chance.choice([calls for calls in found if calls]))
        return call, by_chance(chance, self.calls[stage, call])


class Ended:
    """
    A pipeline that has ended. status (int): minus the signal; said (str); fault (str): what was done to it; hit (bool):
    that was in time.

    As a context it adds that to an error which is raised there.
    """

    def __init__(self, status, said, fault, hit):
        self.status = status
        self.said = said
        self.fault = fault
        self.hit = hit

    def ok(self):
        """It has worked."""
        assert self.status == 0, f"{self.fault}: status {self.status}: {self.said}"

    def __enter__(self):
        return self

    def __exit__(self, _type, error, _traceback):
        if error is not None:
            error.add_note(f"{self.fault}: status {self.status}: {self.said}")


class Place:
    """
    Where pipelines run, a directory with a short name: sockets are in it. With it goes all that was started there.

    directory (Path); env (dict): with this tree's commands first, and a mark.
    """

    def __enter__(self):
        self.directory = Path(tempfile.mkdtemp(prefix="vnb-f-", dir="/var/tmp"))  # noqa: S108 -- /tmp may be memory
        self.env = {
            **os.environ, "VNB_LAB": str(self.directory), "VNB_STATE_DIR": str(self.directory / "state"),
            "TMPDIR": str(self.directory),
        }
        return self

    def __exit__(self, *_):
        clear(str(self.directory))

    def sh(self, script, env=None):
        """Run a script that has to work; what it printed (str)."""
        done = subprocess.run(
            ["bash", "-c", f"set -o pipefail\n{script}"], env={**self.env, **(env or {})}, cwd=self.directory,
            capture_output=True, text=True, timeout=DEADLINE, check=False,
        )
        assert done.returncode == 0, f"{script}: exit status {done.returncode}\n{done.stderr}"
        return done.stdout

    def usual(self, script, *stages, before=lambda: None, times=1, only=None):
        """
        Run a script that works, for what is Usual: plainly, and for each group of stages looked at by strace.

        stages (tuples of names of programs): each is looked at with its children, so none in a group may be the child
        of another. before: is called before each run. times: where what there is to do differs from run to run, so many
        of them say how many calls there are at least. only (dict): {stage: paths}, calls on others do not count.
        """
        seconds, sizes = self._plain(script, before)
        runs = [self._calls(script, stages, before, only or {}) for _ in range(times)]
        calls = {key: min(run[key] for run in runs) for key in set.intersection(*map(set, runs))}
        return Usual(calls, seconds, sizes)

    def _plain(self, script, before):
        before()
        sizes = self._new("sizes")
        first, *others = script.split(" | ")
        copied = first + "".join(f" | tee {sizes}/{number} | {other}" for number, other in enumerate(others))
        start = time.monotonic()
        self.sh(copied)
        seconds = time.monotonic() - start
        found = [(sizes / str(number)).stat().st_size for number in range(len(others))]
        shutil.rmtree(sizes)
        return seconds, found

    def _calls(self, script, stages, before, only):
        found = collections.defaultdict(int)
        for group in stages:
            before()
            logs = self._new("logs")
            for stage in group:
                self._wrap(stage, f"-o {logs}/{stage}.$$ {paths(only, stage)}-e trace={','.join(CALLS)}")
            self._ended(self._start(script, wrapped=True), "nothing").ok()
            for log in logs.iterdir():
                for (_, call), count in counted(log).items():
                    key = log.name.partition(".")[0], call
                    found[key] = max(found[key], count)
            shutil.rmtree(logs)
            shutil.rmtree(self.directory / "wrappers")
        return found

    def killed(self, script, chance, usual):
        """
        Run a script and kill one of its stages by chance, or have one lose its reader; an Ended.

        It ends, with all that belongs to it, whatever was done.
        """
        kind = chance.random()
        if kind < MOMENTS:
            return self._killed_at_a_moment(script, chance, usual)
        if kind < MOMENTS + READERS and usual.sizes:
            return self._reader_goes(script, chance, usual)
        stage = chance.choice(usual.stages())
        return self._injected(script, stage, *usual.call(chance, stage, CALLS), f"signal=SIG{chance.choice(SIGNALS)}")

    def failed(self, script, chance, usual, only=None):
        """
        Run a script and have a system call of one of its stages fail, or all from that one on; as killed().

        only (dict): as usual() was told; of these stages just calls on these paths may fail.
        """
        changes = {call for group in CHANGES for call in group.split(",")}
        stage = chance.choice(sorted({stage for stage, call in usual.calls if call in changes}))
        call, number = usual.call(chance, stage, CHANGES)
        fault = f"error={chance.choice(ERRORS)}"
        return self._injected(script, stage, call, number, fault, chance.choice(["", "+"]), only or {})

    def needs(self, script, before):
        """What is the least of each of LIMITS that a script works with, about; before() is called before each try."""
        found = {}
        for option, (low, high, step) in LIMITS.items():
            while high - low > step:
                middle = (low + high) // 2
                before()
                process = self._start(f"ulimit {option} {middle}\n{script}")
                process.communicate(timeout=DEADLINE)
                low, high = (low, middle) if process.returncode == 0 else (middle, high)
            found[option] = high
        return found

    def meanwhile(self, script, disturb):
        """Run a script, and have a function of its process (Popen) do something that it names; as killed()."""
        process = self._start(script)
        return self._ended(process, disturb(process), lambda: process.returncode != 0)

    def limited(self, script, chance, needs):
        """
        Run a script with few file descriptors, or little memory for each of its processes; as killed().

        needs: what needs() said. Just below that it fails late, and that is where it matters.
        """
        option = chance.choice(sorted(LIMITS))
        least, _, step = LIMITS[option]
        limit = max(least, needs[option] - step * chance.choice([1, 2, 4, 8, 16]))
        process = self._start(f"ulimit {option} {limit}\n{script}")
        return self._ended(process, f"ulimit {option} {limit}", lambda: process.returncode != 0)

    def _injected(self, script, stage, call, number, fault, and_on="", only=None):
        """Run a script with a fault, as strace(1) has them, injected into a system call of a stage."""
        logs = self._new("logs")
        self._wrap(stage, f"-o {logs}/$$ {paths(only or {}, stage)}-e trace={call} "
                          f"-e inject={call}:{fault}:when={number}{and_on}")
        try:
            return self._ended(
                self._start(script, wrapped=True), f"{stage}: {fault} at {call} number {number}{and_on}",
                lambda: any(max(counted(log).values(), default=0) >= number for log in logs.iterdir()),
            )
        finally:
            shutil.rmtree(logs)
            shutil.rmtree(self.directory / "wrappers")

    def _wrap(self, stage, options):
        """Have strace in the place of a program; as a grandchild, since servers are known by their process id."""
        wrappers = self.directory / "wrappers"
        wrappers.mkdir(exist_ok=True)
        wrapper = wrappers / stage
        wrapper.write_text(f'#!/bin/sh\nexec strace -D -f -qq {options} {shutil.which(stage)} "$@"\n')
        wrapper.chmod(0o755)

    def _killed_at_a_moment(self, script, chance, usual):
        signum, moment = chance.choice(SIGNALS), chance.uniform(0, usual.seconds)
        process = self._start(script)
        time.sleep(moment)

        def running():
            return {stage: pids for stage in usual.stages() if (pids := sorted(self.processes(stage)))}

        found = wait_for(lambda: running() or process.poll() is not None and {"nothing": []}, "a stage, or the end")
        stage = chance.choice(sorted(found))
        hit = False
        if found[stage]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(chance.choice(found[stage]), getattr(signal, f"SIG{signum}"))
                hit = True
        return self._ended(process, f"{stage}: SIG{signum} after {moment:.3f} seconds", lambda: hit)

    def _reader_goes(self, script, chance, usual):
        """Run a script where the reader of one of its pipes goes away before the end, and has passed on what it had."""
        number = chance.randrange(len(usual.sizes))
        count = chance.randrange(usual.sizes[number])
        sign = self.directory / "went"
        # The one byte more says that there was more to read.
        reader = f"(head -c {count}; head -c 1 | cmp -s - /dev/null || touch {sign})"
        parts = script.split(" | ")
        writer = parts[number].rpartition("'")[2]
        parts.insert(number + 1, reader)
        try:
            return self._ended(
                self._start(" | ".join(parts)), f"{writer}: its reader goes away after {count} bytes", sign.exists,
            )
        finally:
            sign.unlink(missing_ok=True)

    def _new(self, name):
        """A new directory."""
        path = self.directory / name
        path.mkdir()
        return path

    def _start(self, script, wrapped=False):
        path = f"{self.directory}/wrappers:{self.env['PATH']}" if wrapped else self.env["PATH"]
        return subprocess.Popen(
            ["bash", "-c", f"set -o pipefail\n{script}"], env={**self.env, "PATH": path}, cwd=self.directory,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )

    def _ended(self, process, fault, hit=lambda: False):
        """Wait for the end of all; hit: says then whether it was in time."""
        try:
            _, said = process.communicate(timeout=DEADLINE)
        except subprocess.TimeoutExpired as error:
            error.add_note(f"{fault}: what runs: {self.processes()}")
            raise
        wait_for(lambda: not self.processes(), f"the end of all processes, {fault}")
        check_said(said, fault)
        return Ended(process.returncode, said, fault, hit())

    def processes(self, program=""):
        """The ids and arguments of the processes that were started here: all, or those of a program."""
        found = {}
        for pid in marked(str(self.directory)):
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            # A script of ours is the second word, after its interpreter. Nothing at all: it ends.
            if any(words) and any(os.path.basename(word) == program.encode() for word in words[:2]) or not program:
                found[pid] = b" ".join(words).decode(errors="replace")
        return found


def check_said(said, fault):
    """What a pipeline has said has no traceback, unless of a Python that was interrupted while it started."""
    is_starting = "KeyboardInterrupt" in said and "_find_and_load" in said
    assert "Traceback" not in said or is_starting, f"{fault}: {said}"


def by_chance(chance, count):
    """The number of a call, of so many: one of the last ones."""
    return count - chance.randrange(min(count, LAST))


def paths(only, stage):
    """The options of strace that have it look at calls on these paths alone."""
    return "".join(f"-P {path} " for path in only.get(stage, ()))


def counted(log):
    """How often each thread made each system call, (thread, call): count, by a log of strace's (Path)."""
    made = re.findall(r"^(\d+) +(\w+)\(", log.read_text(errors="replace"), re.M)
    if made and made[0][1] == "execve":
        del made[0]  # strace's own, of what it is to look at
    return collections.Counter(made)


def hidden(directory):
    """The names (set) of what is there and has no final name."""
    return {path.name for path in directory.iterdir() if path.name.startswith(".")}


def named(directory):
    """The images, or segments, with a final name in a directory, if that is there."""
    return sorted(path for path in directory.glob("*") if not path.name.startswith("."))


def rewrite(path, **changes):
    """Change fields of the head of a segment in a file."""
    with open(path, "rb") as old, open(path.with_suffix(".new"), "wb") as new:
        for segment in stream.Reader(old.fileno(), str(path)):
            writer = writing.Writer(new.fileno(), str(path))
            out = writer.segment({**segment.head, **changes}, segment.disks)
            for frame in segment:
                out.frame(frame)
            out.end()
            writer.flush()
    path.with_suffix(".new").rename(path)
