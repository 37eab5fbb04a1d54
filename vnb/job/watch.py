# SPDX-License-Identifier: LGPL-2.1-or-later
"""
The keeper's watch over a job, as a machine with states.

    WATCHED    its starter lives; when that dies, the job is ended
    ALONE      begin has left it; commit or abort come from others, and nobody may be idle for long
    ENDING     it is being ended by ourselves, which is tried again until it works
    OVER       it has ended; we stay only as long as the guest has to be thawed
    TAKEN      somebody else has taken over its record, and the thaw with it

Messages are maps in JSON, a line each, see vnb.job.channel. {"do": ...} asks for something:

    keep        from the starter alone    WATCHED -> ALONE
    commit      from anybody              WATCHED, ALONE, ENDING -> OVER, if it works
    abort       from anybody              the same; when it is OVER, that is said, and nothing is left to do
    make way    from others, when OVER    -> TAKEN, once the other one has said "taken"
"""

from __future__ import annotations

import contextlib
import enum
import os
import select
import sys
import time

from vnb.base.errors import Error, Saved, UsageError
from vnb.job.channel import REQUEST_SECONDS, WAITED_FOR_SECONDS, Line
from vnb.job.left_behind import who_runs
from vnb.job.sources import source_of
from vnb.virt.export_clients import read_lists

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator
    from typing import Any

    from vnb.job.job import Job


TICK_SECONDS = 1.0  # free room, clients and deadline have no event that one could wait for
RAREST_SECONDS = 300  # between two attempts to end a job that does not end; the first pause is a tick


class State(enum.Enum):
    """What the keeper is about; see above."""

    WATCHED = enum.auto()
    ALONE = enum.auto()
    ENDING = enum.auto()
    OVER = enum.auto()
    TAKEN = enum.auto()


class Keeper:
    """
    Watches over a running job, and stays after it until the guest is thawed.

    state: to begin with. starter (Line), listener: who may speak to it. options: see
    vnb.job.starter.start.
    """

    def __init__(
        self, job: Job, starter: Line | None, listener: socket.socket, options: dict[str, Any],
        state: State = State.WATCHED, reason: str | None = None,
    ) -> None:
        self.job = job
        self.state = state
        self.reason = reason  # why it is ended by ourselves, as long as somebody may want to know
        self.starter: Any = starter
        self.left: Any = None  # a starter that has hung up, and waits for our end
        self.successor: socket.socket | None = None  # a connection to the one who takes over from us
        self.listener = listener
        self.options = options
        self.troubles: dict[str, str] = {}
        self.pause = TICK_SECONDS  # until a job that could not be ended is tried again
        self.next_try = self.ending_since = self.looked = self.last_client = time.monotonic()
        self.deadline = time.monotonic() + options["deadline"]
        self.job.note = self.job.warn = self.log

    @property
    def is_over(self) -> bool:
        """Whether the job has ended."""
        return self.state in (State.OVER, State.TAKEN)

    def loop(self) -> None:
        """Until the job has ended, and the guest is thawed, or somebody else sees to that."""
        while not self.is_over or (self.state is State.OVER and self.job.record.frozen is not None):
            if self.is_over and self.left is not None:
                self._stay_without_starter()
            speakers = [self.listener] if self.starter is None else [self.listener, self.starter]
            ready, _, _ = select.select(speakers, [], [], TICK_SECONDS)
            if self.starter in ready:
                self._hear_starter()
            elif self.listener in ready:
                self._hear_client()
            if time.monotonic() - self.looked >= TICK_SECONDS:  # whoever speaks to us, and how often
                self._look()
                self.looked = time.monotonic()

    def end_if_running(self, reason: str) -> None:
        """
        End the job by ourselves: it does not count, unless its segment is in the catalog.

        Where libvirt does not answer, this is tried again, more and more rarely: it may be restarting.
        """
        if self.is_over:
            return
        if self.state is not State.ENDING:
            self.state, self.reason = State.ENDING, reason
            self.ending_since = time.monotonic()
            self._write(f"ending the job: {reason}")
            if self.starter is not None:
                self.starter.offer(ending=reason)  # its command, which may be all that keeps QEMU, has to go
        starter = self.starter or self.left
        try:
            with contextlib.nullcontext() if starter is None else starter.waits():
                saved = self.job.abort(self.reason)
        except Error as error:
            self._try_again_later(error)
            return
        self.state = State.OVER
        for line in (self.starter, self.left):
            if line is not None:
                line.offer(ended=True, saved=saved)

    def _try_again_later(self, error: Error) -> None:
        self.next_try = time.monotonic() + self.pause
        self.pause = min(2 * self.pause, RAREST_SECONDS)
        if self._trouble("end", str(error)):
            with contextlib.suppress(Error):
                self.job.intend(trouble=error.reason)
        if self.left is not None and time.monotonic() - self.ending_since > WAITED_FOR_SECONDS:
            self.left.tell(f"{error}; its keeper goes on trying")
            self._stay_without_starter()

    def _stay_without_starter(self) -> None:
        """Have a starter that has hung up not wait for our end."""
        self.left.offer(stays=True)
        self.left.close()
        self.left = None

    # What it says.

    def log(self, text: str) -> None:
        """A line for whoever looks into the log; also for the starter, while there is one."""
        self._write(text)
        if self.starter is not None:
            self.starter.tell(text)

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):  # a file system that is full is no reason to leave the guest alone
            sys.stderr.write(f'{time.strftime("%Y-%m-%dT%H:%M:%S")} {text}\n')

    def _trouble(self, about: str, text: str) -> bool:
        """A line on what fails tick after tick: only when it is another one than before, which is returned."""
        if self.troubles.get(about) == text:
            return False
        self.troubles[about] = text
        self.log(text)
        return True

    @contextlib.contextmanager
    def _telling(self, tell: Callable[[str], Any]) -> Iterator[None]:
        """While this lasts, the job's lines go to a function."""
        self.job.note = tell
        try:
            yield
        finally:
            self.job.note = self.log

    # What it hears.

    def _hear_starter(self) -> None:
        try:
            message = self.starter.receive()
        except Error:
            message = None
        if message is None:
            self.left, self.starter = self.starter, None
            if self.state is not State.ALONE:
                self.end_if_running("the process that began it has died")
        elif message.get("do") == "keep":
            self._keep_alone(message)
        else:
            self._answer(self.starter, message)

    def _keep_alone(self, message: dict[str, Any]) -> None:
        """The starter has begun a job for others to end."""
        if self.state is State.WATCHED:
            self.state = State.ALONE
        if self.options["strict"] and message["warnings"]:
            self.job.intend(strict=message["warnings"])  # for whoever commits
        self.last_client = time.monotonic()
        self.starter.send(done=True)
        self.starter.close()
        self.starter = None

    def _hear_client(self) -> None:
        try:
            connection, _ = self.listener.accept()
        except OSError:
            return  # it has gone, or we may open no more files
        with connection:
            connection.settimeout(REQUEST_SECONDS)
            line = Line(connection)
            try:
                message = line.receive()
            except Error:
                return
            if message is None:
                return
            if message.get("do") == "make way" and self.state is State.OVER:
                self._make_way(line)
            else:
                self._answer(line, message)

    def _make_way(self, line: Line) -> None:
        """Leave, but only for someone who is still there: who gave us up meanwhile has taken over nothing."""
        line.send(way=True)
        with contextlib.suppress(Error):
            if (line.receive() or {}).get("do") == "taken":
                self.successor = line.socket.dup()  # open as long as we live: then the lock is free
                self.state = State.TAKEN

    def _answer(self, line: Line, message: dict[str, Any]) -> None:
        """Do as somebody asks, and say how that went."""
        try:
            with self._telling(line.tell):
                if self.is_over:
                    self._do_late(line, message.get("do"))
                else:
                    with line.waits():
                        end_as_asked(self.job, message)
                    self.state, self.reason = State.OVER, None
            line.send(done=True, strict=self.job.strict)
        except Error as error:
            line.send(error=[error.what, error.reason, error.where], saved=isinstance(error, Saved))
        except OSError as error:
            line.send(error=["keeper", str(error), None])

    def _do_late(self, line: Line, what: str | None) -> None:
        """The job has ended by itself, or was ended by somebody else, and we are here for the guest's sake."""
        if what != "abort":
            raise Error(self.job.head["domain"], f"the job was ended already: {self.job.record.reason}")
        self.reason = None  # who asks need not be told later
        line.tell(f"{self.job.head['domain']}: {who_runs(self.job.directory)}")

    # What it looks at.

    def _look(self) -> None:
        if self.state is State.ENDING:
            if time.monotonic() >= self.next_try:
                self.end_if_running(self.reason or "")
        else:
            for look in (self._look_at_time, self._look_at_scratch, self._look_at_guest):
                if self.state in (State.WATCHED, State.ALONE):
                    look()
        if self.job.record.frozen is not None:
            self._thaw()

    def _look_at_time(self) -> None:
        now = time.monotonic()
        if now > self.deadline:
            self.end_if_running(f"its deadline of {self.options['deadline']} seconds has passed")
        elif self._is_idle() and self.state is State.ALONE:
            if now - self.last_client > self.options["idle"]:
                self.end_if_running(f"nobody was connected for {self.options['idle']} seconds")
        else:
            self.last_client = now

    def _is_idle(self) -> bool:
        """Whether nobody is connected to the export, as far as that is known. Looks at each tick: to know how long."""
        if self.job.record.tcp and not self.job.held.is_local:
            return False
        return self.job.clients.look(read_lists(self.job.clients.is_tcp), time.monotonic()) == 0

    def _look_at_scratch(self) -> None:
        for path in self.job.record.scratch:
            directory = os.path.dirname(path)
            try:
                free = self.job.held.room(directory)
            except OSError:
                continue  # gone with the domain
            if free is not None and free < self.options["reserve"]:
                self.end_if_running(f"only {free} bytes are left in {directory}, where the scratch is")
                return

    def _look_at_guest(self) -> None:
        """A guest that QEMU stopped because it could not write is worth more than its backup."""
        try:
            stuck = self.job.held.is_guest_stopped()
        except Error:
            self._connect_again()
            return
        if not stuck and self.job.record.stuck:
            with contextlib.suppress(Error):
                self.job.intend(stuck=False)  # it runs again: when it stops now, that is because of us
        if stuck and not self.job.record.stuck:
            self.end_if_running("the guest was stopped by a write error: the scratch may be full")

    def _connect_again(self) -> None:
        """libvirtd was restarted, or the line was cut: the job survives that, our connection does not."""
        try:
            held = source_of(self.job.record)
        except Error as error:
            self._trouble("connection", str(error))
            return
        self.troubles.pop("connection", None)
        if held.is_gone:
            self.end_if_running("its domain is gone")
            return
        held.take_over(self.job.held)
        self.job.held.close()
        self.job.held = held

    def _thaw(self) -> None:
        try:
            with self._telling(lambda text: self._trouble("thaw", text)):
                thawed = self.job.thaw()
        except Error as error:
            self._trouble("thaw", str(error))  # the daemon may come back
            return
        if thawed and self.state is State.OVER and self.reason is None:
            self.job.directory.remove()  # this was all that was left to do


def end_as_asked(job: Job, message: dict[str, Any]) -> None:
    """Commit or abort a job as a message says."""
    if message.get("do") == "commit":
        job.commit(message.get("set"), message.get("proof", True))
    elif message.get("do") == "abort":
        job.abort()
    else:
        raise UsageError("keeper", f"asked to do {message.get('do')}")
