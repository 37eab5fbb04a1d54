# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Runs a pipeline and kills a part of it, at a random moment or at its nth system call of a kind, or has such a call fail.

The moment is soon over for what takes a tenth of a second, most of it for starting; the calls are where it matters.
"""

import collections
import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from lab import KiB, clear, marked, wait_for

SIGNALS = ("KILL", "TERM", "INT", "PIPE")
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
FEW = 12  # calls on the files of a job's state
MOMENTS = 0.2  # how many are killed at a moment
LONGEST = 0.5  # seconds that a pipeline takes, about
DEADLINE = 60


class Ended:
    """
    A pipeline that has ended. status (int): minus the signal; said (str); fault (str): what was done to it.

    As a context it adds that to an error which is raised there.
    """

    def __init__(self, status, said, fault):
        self.status = status
        self.said = said
        self.fault = fault

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

    directory (Path); env (dict): with this tree's commands first, and a mark. only (dict): stage: list of paths, see
    failed().
    """

    def __enter__(self):
        self.only = {}
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

    def profile(self, script, *stages):
        """
        Run a script that works, once for each of these groups of stages, to see which system calls they make.

        {(stage, group of CALLS): how many, the most that one of its processes makes}. stages (tuples of names of
        programs): each is looked at with its children, so none in a group may be the child of another.
        """
        found = collections.defaultdict(int)
        for group in stages:
            logs = self.directory / "logs"
            logs.mkdir()
            for stage in group:
                self._wrap(stage, f"-o {logs}/{stage}.$$ -e trace={','.join(CALLS)}")
            self._ended(self._start(script, wrapped=True), "nothing").ok()
            for log in logs.iterdir():
                count = collections.Counter(re.findall(r"^(\d+) +(\w+)\(", log.read_text(errors="replace"), re.M))
                for calls in CALLS:
                    for pid in {pid for pid, _ in count}:
                        key = log.name.partition(".")[0], calls
                        found[key] = max(found[key], sum(count[pid, call] for call in calls.split(",")))
            shutil.rmtree(logs)
            shutil.rmtree(self.directory / "wrappers")
        return {key: count for key, count in found.items() if count}

    def killed(self, script, chance, calls):
        """
        Run a script and kill one of its stages by chance; an Ended. calls: what profile() said.

        It ends, with all that belongs to it, whatever was done.
        """
        stage = chance.choice(sorted({stage for stage, _ in calls}))
        signum = chance.choice(SIGNALS)
        if chance.random() < MOMENTS:
            return self._killed_at_a_moment(script, stage, signum, chance.uniform(0, LONGEST))
        group = chance.choice(sorted(group for other, group in calls if other == stage))
        return self._injected(script, stage, group, f"signal=SIG{signum}", by_chance(chance, calls[stage, group]))

    def failed(self, script, chance, calls):
        """
        Run a script and have a system call of one of its stages fail, or all from that one on; as killed().

        Of a stage in self.only just calls on these paths may fail.
        """
        stage, group = chance.choice(sorted(key for key in calls if key[1] in CHANGES))
        number = chance.randint(1, FEW) if stage in self.only else by_chance(chance, calls[stage, group])
        number = f'{number}{chance.choice(["", "+"])}'
        return self._injected(script, stage, group, f"error={chance.choice(ERRORS)}", number)

    def limited(self, script, chance, _calls):
        """Run a script with few file descriptors, or little memory for each of its processes; as killed()."""
        limit = chance.choice([f"-n {chance.randint(6, 24)}", f"-v {chance.randint(200, 500) * KiB}"])
        return self._ended(self._start(f"ulimit {limit}\n{script}"), f"ulimit {limit}")

    def meanwhile(self, script, disturb):
        """Run a script, and have a function of its process (Popen) do something that it names; as killed()."""
        process = self._start(script)
        return self._ended(process, disturb(process))

    def _injected(self, script, stage, group, fault, number):
        """Run a script with a fault, as strace(1) has them, injected into a call of a stage."""
        only = "".join(f"-P {path} " for path in self.only.get(stage, ()))
        self._wrap(stage, f"-o /dev/null {only}-e trace={group} -e inject={group}:{fault}:when={number}")
        try:
            return self._ended(self._start(script, wrapped=True), f"{stage}: {fault} at {group} number {number}")
        finally:
            shutil.rmtree(self.directory / "wrappers")

    def _wrap(self, stage, options):
        """Have strace in the place of a program; as a grandchild, since servers are known by their process id."""
        wrappers = self.directory / "wrappers"
        wrappers.mkdir(exist_ok=True)
        wrapper = wrappers / stage
        wrapper.write_text(f'#!/bin/sh\nexec strace -D -f -qq {options} {shutil.which(stage)} "$@"\n')
        wrapper.chmod(0o755)

    def _killed_at_a_moment(self, script, stage, signum, moment):
        process = self._start(script)
        time.sleep(moment)
        for pid in sorted(self.processes(stage))[:1]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, getattr(signal, f"SIG{signum}"))
        return self._ended(process, f"{stage}: SIG{signum} after {moment:.3f} seconds")

    def _start(self, script, wrapped=False):
        path = f"{self.directory}/wrappers:{self.env['PATH']}" if wrapped else self.env["PATH"]
        return subprocess.Popen(
            ["bash", "-c", f"set -o pipefail\n{script}"], env={**self.env, "PATH": path}, cwd=self.directory,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )

    def _ended(self, process, fault):
        try:
            _, said = process.communicate(timeout=DEADLINE)
        except subprocess.TimeoutExpired as error:
            error.add_note(f"{fault}: what runs: {self.processes()}")
            raise
        wait_for(lambda: not self.processes(), f"the end of all processes, {fault}")
        check_said(said, fault)
        return Ended(process.returncode, said, fault)

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
