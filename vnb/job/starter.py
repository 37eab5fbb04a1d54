# SPDX-License-Identifier: LGPL-2.1-or-later
"""How a command starts a keeper, and asks one that is there."""

from __future__ import annotations

import contextlib
import os
import signal
import socket

from vnb.base.errors import Error
from vnb.job import job as jobs
from vnb.job.channel import KeeperDied, Line
from vnb.job.keeper import be_keeper, keep_for, stay
from vnb.job.state import JobDirectory
from vnb.job.watch import end_as_asked

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


ANSWER_SECONDS = 180  # a guest that shuts down keeps its job for half a minute


def start(options: dict[str, Any], say: Callable[[str], Any], warn: Callable[[str], Any]) -> Starter:
    """
    Start a keeper, and wait until it has begun the job; returns its Starter. Raises Error where it has not.

    options: see vnb.job.job.begin, and deadline, idle (seconds), reserve (bytes). say, warn: functions for lines
    to the user.
    """
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        ours.close()
        be_keeper(lambda: keep_for(theirs, options))
    theirs.close()
    starter = Starter(pid, Line(ours), options["state"], say, warn)
    try:
        starter.hear_begin()
    except BaseException:
        starter.leave()
        raise
    return starter


class Starter:
    """
    The starter's side of a keeper, a child process: has it end its job one way or the other.

    pid: of the keeper. line (Line): to it. state: the state directory. say, warn: see start().
    begun: head, disks, files; or below, where there is less to do than the threshold.
    warnings: lines that were warnings. saved: the job has ended by itself, and its segment is saved.

    Keeper and starter watch each other: whoever finds the other one dead ends the job.
    """

    def __init__(self, pid: int, line: Line, state: str, say: Callable[[str], Any], warn: Callable[[str], Any]) -> None:
        self.pid = pid
        self.line = line
        self.say = say
        self.warn = warn
        self.warnings = 0
        self.saved = False
        self.begun: dict[str, Any] = {}
        self._ending: str | None = None  # why the keeper ends the job by itself
        self._state = state
        self._uuid: str | None = None

    def hear_begin(self) -> None:
        """Wait until the keeper has begun the job, or says why it has not. Raises Error."""
        self.begun = self.line.answer(self._hear)
        if "job" in self.begun:
            self._uuid = self.begun["job"]
            self.begun = self.line.answer(self._hear)

    def warned(self, text: str) -> None:
        """Say a warning of our own, which counts like the keeper's."""
        self.warnings += 1
        self.warn(text)

    def hand_over(self) -> None:
        """Let the keeper go on without us: commit and abort come over its control socket."""
        self.line.send(do="keep", warnings=self.warnings)
        self.line.answer(self._hear)
        self.line.close()

    def listen(self) -> None:
        """Hear what the keeper says. Raises Error as soon as it ends the job by itself, or where it was killed."""
        message = self.line.receive()
        if message is None:
            raise self._ended()
        self._hear(message)
        if self._ending is not None:
            raise self._ended()

    def finish(self, what: str, **more: Any) -> None:
        """Have the keeper do "commit" or "abort", and see it end. Raises Error, and the job goes on then."""
        self.line.send(do=what, **more)
        try:
            self.line.answer(self._hear)
        except KeeperDied:
            raise self._ended() from None
        self.leave()

    def _ended(self) -> KeeperDied:
        why = f"the job is ended: {self._ending}" if self._ending else "the keeper has died, and with it the job"
        return KeeperDied(self.begun["head"]["domain"], why)

    def leave(self) -> None:
        """
        Hang up, which ends the job if it still runs; wait for the keeper to end, do its work if it was killed.

        A keeper that stays is not waited for: to thaw the guest it may take as long as the guest's agent hangs, and to
        end a job as long as libvirt does not.
        """
        with contextlib.suppress(OSError):
            self.line.socket.shutdown(socket.SHUT_WR)
        stays = False
        with contextlib.suppress(Error):
            while (message := self.line.patiently(self._hear)) is not None:
                self._hear(message)
                stays = stays or "stays" in message
        self.line.close()
        if stays:
            return
        with contextlib.suppress(ChildProcessError):
            _, status = os.waitpid(self.pid, 0)
            if os.WIFSIGNALED(status) and self._uuid is not None:
                self.say(f"the keeper was killed by {signal.Signals(os.WTERMSIG(status)).name}: ending its job")
                directory = JobDirectory(self._state, self._uuid)
                with directory.locked(wait=True):
                    record = directory.load()
                    if record is not None:
                        self.saved = jobs.Job(directory, record, self.say).abort()
                stay(directory)

    def _hear(self, message: dict[str, Any]) -> None:
        if "ending" in message:
            self._ending = message["ending"]
        elif "ended" in message:
            self.saved = message["saved"]
        elif message.get("warning"):
            self.warned(message["note"])
        elif "note" in message:
            self.say(message["note"])


def ask(
    directory: JobDirectory, what: str, say: Callable[[str], Any], set_: str | None = None, proof: bool = True,
) -> dict[str, Any] | None:
    """
    Have the domain's job committed or aborted: by its keeper, or by ourselves where that is dead.

    directory (JobDirectory). what: "commit" or "abort". set_. proof: commit only
    what was taken whole; see vnb.job.proof. Returns {"strict": see Job.strict}, or None where there is no job.
    """
    client = directory.connect()
    if client is not None:
        client.settimeout(ANSWER_SECONDS)
        line = Line(client)
        line.send(do=what, set=set_, proof=proof)
        return line.answer(lambda message: say(message["note"]))
    with directory.locked(wait=True):
        record = directory.load()
        if record is None:
            return None
        job = jobs.Job(directory, record, say)
        end_as_asked(job, {"do": what, "set": set_, "proof": proof})
    stay(directory)
    return {"strict": job.strict}
