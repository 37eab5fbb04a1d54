# SPDX-License-Identifier: LGPL-2.1-or-later
"""
The keeper: a small process that begins a backup job and stays until it has ended.

A job that nobody ends fills its scratch, and then QEMU pauses the guest. So the process that begins one
outlives whoever asked for it, and ends the job by itself when `run` has died, at a deadline, when nobody has been
connected to the export for a while, or when the scratch is about to fill its file system. Backup loses, the guest wins.

Its starter speaks to it over a socket pair, others over the socket in the job's directory: JSON, one line a message.
"""

import contextlib
import json
import os
import select
import signal
import socket
import sys
import time
import traceback

from vnb import job as jobs
from vnb.errors import Error, Interrupted, UsageError
from vnb.run import ENDING_SIGNALS
from vnb.state import JobDirectory, is_dead
from vnb.virt import Domain

TICK_SECONDS = 1.0  # free room, clients and deadline have no event that one could wait for
MAX_MESSAGE = 16 << 20  # a head has XML in it, disks are a few hundred bytes each
REQUEST_SECONDS = 10  # for a client of the control socket to say what it wants
ANSWER_SECONDS = 180  # a guest that shuts down keeps its job for half a minute


class Line:
    """Messages (dict) over a socket, one line of JSON each."""

    def __init__(self, connection):
        self.socket = connection
        self._rest = b""

    def fileno(self):
        return self.socket.fileno()

    def send(self, **message):
        """Send a message; one that nobody reads any more is lost, which is no harm."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self):
        """The next message, or None at the end. Raises Error for what is none."""
        while b"\n" not in self._rest:
            try:
                more = self.socket.recv(65536)
            except ConnectionResetError:
                more = b""
            except TimeoutError:
                raise Error("keeper", "does not answer") from None
            if not more:
                return None
            self._rest += more
            if len(self._rest) > MAX_MESSAGE:
                raise Error("keeper", "message too long")
        line, _, self._rest = self._rest.partition(b"\n")
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            raise Error("keeper", "malformed message")
        return message

    def answer(self, note):
        """Read notes, which go to note(text), up to an answer; returns it. Raises the Error that it is."""
        while True:
            message = self.receive()
            if message is None:
                raise Error("keeper", "ended without an answer")
            if "note" in message:
                note(message["note"])
            elif "error" in message:
                raise Error(*message["error"])
            else:
                return message

    def close(self):
        self.socket.close()


class Starter:
    """
    The starter's side: start a keeper, and have it end its job one way or the other.

    options (dict): see vnb.job.begin, and deadline, idle (seconds), reserve (bytes). begun (dict): head, disks.
    """

    def __init__(self, options, note):
        self.note = note
        ours, theirs = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            ours.close()
            _child(theirs, options)
        theirs.close()
        self.line = Line(ours)
        try:
            self.begun = self.line.answer(note)
        except BaseException:
            self.leave()
            raise

    def hand_over(self):
        """Let the keeper go on without us: commit and abort come over its control socket."""
        self.line.send(do="keep")
        self.line.answer(self.note)
        self.line.close()

    def finish(self, what):
        """Have the keeper do "commit" or "abort", and see it end. Raises Error, and the job goes on then."""
        self.line.send(do=what)
        self.line.answer(self.note)
        self.leave()

    def leave(self):
        """Hang up, which ends the job if it still runs, and wait for the keeper to end."""
        with contextlib.suppress(OSError):
            self.line.socket.shutdown(socket.SHUT_WR)
        with contextlib.suppress(Error):
            while (message := self.line.receive()) is not None:
                if "note" in message:
                    self.note(message["note"])
        self.line.close()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


def ask(directory, what, ledger, note):
    """
    Have the domain's job committed or aborted: by its keeper, or by ourselves where that is dead.

    directory (vnb.state.JobDirectory). what (str): "commit" or "abort". ledger (str or None).
    Returns False where there is no job.
    """
    client = directory.connect()
    if client is not None:
        client.settimeout(ANSWER_SECONDS)
        line = Line(client)
        line.send(do=what, ledger=ledger)
        line.answer(note)
        return True
    with directory.locked(wait=True):
        record = directory.load()
        if record is None:
            return False
        _end(jobs.Job(directory, record, note), what, ledger)
        return True


def _child(connection, options):
    """The keeper's life; does not return."""
    status = 1
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        line = Line(connection)
        try:
            status = _keep(line, options)
        except Error as error:
            line.send(error=[error.what, error.reason, error.where])
        except Interrupted:
            pass
        except Exception:
            line.send(error=["keeper", traceback.format_exc(limit=-1), None])
            traceback.print_exc()
    finally:
        os._exit(status)


def _keep(line, options):
    with Domain(options["uri"], options["domain"]) as domain:
        uuid = domain.uuid
    directory = JobDirectory(options["state"], uuid)
    with directory.locked() as got:
        if not got:
            raise Error(options["domain"], _who_runs(directory))
        _redirect(directory.log)
        _recover(directory, options, line)
        listener = directory.listen()
        try:
            job = jobs.begin(directory, options, lambda text: line.send(note=text))
            keeper = Keeper(job, line, listener, options)
            try:
                line.send(begun=True, head=job.head, disks=job.record["disks"])
                keeper.loop()
            finally:
                keeper.end_if_running("the keeper was ended")
        finally:
            directory.hang_up()
            listener.close()
    return 0


def _recover(directory, options, line):
    """End what a keeper that was killed has left, or refuse where that is not provably ours to end."""
    record = directory.load()
    if record is None:
        return
    if record["phase"] != "ended":
        if not is_dead(record["owner"]):
            raise Error(options["domain"], f"a backup by process {record['owner']['pid']} of "
                        f"{record['owner']['host']} may still run: vnb-checkpoint abort {options['domain']}")
        line.send(note=f"{options['domain']}: ending the job of a keeper that died, begun {record['head']['created']}")
    jobs.Job(directory, record, lambda text: line.send(note=text)).abort()


def _who_runs(directory):
    record = directory.load()
    if record is None:
        return "another backup is beginning"
    who = record["owner"]
    return f"a backup runs already, begun {record['head']['created']} (process {who['pid']} on {who['host']})"


def _redirect(log):
    """The keeper outlives its terminal and its pipes: it must not hold them open."""
    null = os.open(os.devnull, os.O_RDWR)
    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.dup2(file, 2)
    os.close(null)
    os.close(file)
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115


class Keeper:
    """Watches over a running job."""

    def __init__(self, job, starter, listener, options):
        self.job = job
        self.starter = starter
        self.listener = listener
        self.options = options
        self.done = False
        self.kept_alone = False
        self.deadline = time.monotonic() + options["deadline"]
        self.last_client = time.monotonic()
        self.job.note = self.log

    def loop(self):
        """Until the job has ended."""
        while not self.done:
            waiting = [self.listener] if self.starter is None else [self.listener, self.starter]
            ready, _, _ = select.select(waiting, [], [], TICK_SECONDS)
            if self.starter in ready:
                self._hear_starter()
            elif self.listener in ready:
                self._hear_client()
            else:
                self._look()

    def end_if_running(self, reason):
        """End the job by ourselves: it does not count, unless its segment is in the ledger."""
        if self.done:
            return
        self.log(f"ending the job: {reason}")
        for signum in ENDING_SIGNALS:
            signal.signal(signum, signal.SIG_IGN)
        self.job.abort(reason)
        self.done = True

    def log(self, text):
        """A line for whoever looks into the log; also for the starter, while there is one."""
        print(time.strftime("%Y-%m-%dT%H:%M:%S"), text, file=sys.stderr)
        if self.starter is not None:
            self.starter.send(note=text)

    def _hear_starter(self):
        message = self.starter.receive()
        if message is None:
            self.starter = None
            if not self.kept_alone:
                self.end_if_running("the process that began it has died")
        elif message.get("do") == "keep":
            self.kept_alone = True
            self.last_client = time.monotonic()
            self.starter.send(done=True)
            self.starter.close()
            self.starter = None
        else:
            self._do(self.starter, message)

    def _hear_client(self):
        connection, _ = self.listener.accept()
        with connection:
            connection.settimeout(REQUEST_SECONDS)
            line = Line(connection)
            try:
                message = line.receive()
            except Error:
                return
            if message is not None:
                self._do(line, message)

    def _do(self, line, message):
        self.job.note = lambda text: line.send(note=text)
        try:
            _end(self.job, message.get("do"), message.get("ledger"))
            self.done = True
            line.send(done=True)
        except Error as error:
            line.send(error=[error.what, error.reason, error.where])
        finally:
            self.job.note = self.log

    def _look(self):
        now = time.monotonic()
        if now > self.deadline:
            self.end_if_running(f"its deadline of {self.options['deadline']} seconds has passed")
        elif self.kept_alone and self._clients() == 0:
            if now - self.last_client > self.options["idle"]:
                self.end_if_running(f"nobody was connected for {self.options['idle']} seconds")
        else:
            self.last_client = now
        if not self.done:
            self._look_at_scratch()

    def _look_at_scratch(self):
        for path in self.job.record["scratch"]:
            try:
                room = os.statvfs(os.path.dirname(path))
            except OSError:
                continue  # not of this host, or gone with the domain
            free = room.f_bavail * room.f_frsize
            if free < self.options["reserve"]:
                self.end_if_running(
                    f"only {free} bytes are left in {os.path.dirname(path)}, where the scratch is"
                )
                return

    def _clients(self):
        """How many connections to the export there are: the kernel lists what was accepted on its socket."""
        with open("/proc/net/unix", encoding="utf-8", errors="replace") as file:
            # Fields: Num RefCount Protocol Flags Type St Inode Path; state 03 is connected.
            found = [line.split(None, 7) for line in file]
        path = self.job.record["socket"]
        return sum(1 for fields in found if len(fields) == 8 and fields[5] == "03" and fields[7].strip() == path)


def _end(job, what, ledger):
    if what == "commit":
        job.commit(ledger)
    elif what == "abort":
        job.abort()
    else:
        raise UsageError("keeper", f"asked to do {what}")
