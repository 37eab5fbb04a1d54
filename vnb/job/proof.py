# SPDX-License-Identifier: LGPL-2.1-or-later
"""
The proof that a segment was taken whole, where no set can be asked for it.

A command may end well without having read anything. So the stages of a pipeline write down what they do with the
data of a segment, a line each, in a file of the job's directory that has the segment's id in its name:

    begun vnb-pack 4711       process 4711 has the head of the segment
    taken vnb-pack 4711       it has passed on the segment to its end, or stored it, without an error

A commit needs a `taken`, and none that has `begun` without it. `run` names the file to its command in VNB_TAKEN; where
that is not set, a stage looks for the file in the state directory. A stage on another host, or of another user,
finds no file, and writes nothing down.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat

from vnb.base import log
from vnb.base.errors import Error, os_error
from vnb.job.statedir import default_directory, job_directory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any


FILE = "VNB_TAKEN"  # the variable with the file's path, for commands that are no stages of vnb, too
STDOUT = "VNB_RUN_STDOUT"  # the variable that says which pipe or socket is the standard output of run
SUFFIX = ".taken"
MAX_SIZE = 1 << 20  # bytes of the file that are looked at: a line for each stage, and perhaps for each try
_ID = re.compile(r"[0-9a-f]{32}")
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class Report:
    """
    What this process does with a segment. head: of the segment. Nothing is written where nobody waits for it.
    """

    def __init__(self, head: Mapping[str, Any]) -> None:
        self._path = _path(head) if head["stage"] == "data" else None
        self._write("begun")

    def taken(self) -> None:
        """The segment was passed on to its end, or is stored."""
        self._write("taken")

    def _write(self, word: str) -> None:
        if self._path is None:
            return
        with contextlib.suppress(OSError):  # without the line nothing is committed
            fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                os.write(fd, f"{word} {log.command()} {os.getpid()}\n".encode())
            finally:
                os.close(fd)


class ReportOfStdout(Report):
    """The same for a segment that goes to standard output. Raises Error where that is run's own and a pipe."""

    def __init__(self, head: Mapping[str, Any]) -> None:
        pipe = pipe_of_stdout()
        if pipe is not None and pipe == os.environ.get(STDOUT) and is_of_run(head):
            raise Error(
                "stdout", "this pipe leads out of vnb-checkpoint run, which cannot see what becomes of the stream: "
                "the whole pipeline behind -- has to be in quotes"
            )
        super().__init__(head)


def is_of_run(head: Mapping[str, Any]) -> bool:
    """Whether a segment with this head is the one that the run is for which has started this process."""
    return os.path.basename(os.environ.get(FILE) or "") == head["id"] + SUFFIX


def pipe_of_stdout() -> str | None:
    """Which pipe or socket standard output is, or None where it is neither."""
    found = os.fstat(1)
    if stat.S_ISFIFO(found.st_mode) or stat.S_ISSOCK(found.st_mode):
        return f"{found.st_dev}:{found.st_ino}"
    return None


def expect(directory: str, segment: str) -> str:
    """Have a file for a segment (its id) in a job's directory, and its path. Raises Error."""
    forget(directory)
    path = os.path.join(directory, segment + SUFFIX)
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise os_error(path, error) from None
    return path


def forget(directory: str) -> None:
    """Remove what is there of jobs that have ended. Raises Error."""
    for name in os.listdir(directory):
        if name.endswith(SUFFIX):
            path = os.path.join(directory, name)
            try:
                os.unlink(path)
            except OSError as error:
                raise os_error(path, error) from None


def lack(directory: str, segment: str) -> str | None:
    """What lacks of the proof that a segment (its id) was taken whole, in words; None where nothing lacks."""
    try:
        with open(os.path.join(directory, segment + SUFFIX), "rb") as file:
            lines = file.read(MAX_SIZE).decode(errors="replace").splitlines()
    except OSError:
        lines = []
    begun: dict[str, int] = {}
    taken: set[str] = set()
    said = False
    for line in lines:
        word, _, who = line.partition(" ")
        said = said or word == "taken"
        if word == "begun":
            begun[who] = len(begun)
        elif word == "taken" and who in begun:
            taken.add(who)
    for who, number in begun.items():
        name, _, pid = who.partition(" ")
        # A second try that came to its end makes up for the first one.
        again = any(begun[other] > number and other.partition(" ")[0] == name for other in taken)
        if who not in taken and not again:
            return f"{name} (process {pid}) has not come to the end of the segment"
    return None if said else "no command says that it has taken the segment to its end"


def _path(head: Mapping[str, Any]) -> str | None:
    """Where the file for a segment is, if there is one; its names come from a stream."""
    if is_of_run(head):
        return os.environ[FILE]
    if not _ID.fullmatch(head["id"]) or not _UUID.fullmatch(head["uuid"]):
        return None
    return os.path.join(job_directory(default_directory(), head["uuid"]), head["id"] + SUFFIX)
