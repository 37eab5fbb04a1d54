# SPDX-License-Identifier: LGPL-2.1-or-later
"""
The keeper: a small process that begins a backup job and stays until it has ended.

A job that nobody ends fills its scratch, and then QEMU pauses the guest. So the process that begins one
outlives whoever asked for it, and ends the job by itself when `run` has died, at a deadline, when nobody has been
connected to the export for a while, or when the scratch is about to fill its file system. Backup loses, the guest wins.

Its starter speaks to it over a socket pair, others over the socket in the job's directory: JSON, one line a message.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
import traceback

from vnb.base import waiting
from vnb.base.errors import Error, Interrupted, Saved, UsageError, lack, os_error
from vnb.job import decisions
from vnb.job import job as jobs
from vnb.job.channel import REQUEST_SECONDS, WAITED_FOR_SECONDS, Line
from vnb.job.sources import open_source, source_of
from vnb.job.state import JobDirectory, is_dead, owner
from vnb.virt.export_clients import read_lists

TICK_SECONDS = 1.0  # free room, clients and deadline have no event that one could wait for
RAREST_SECONDS = 300  # between two attempts to end a job that does not end; the first pause is a tick
MAKE_WAY_SECONDS = 20  # for a keeper that may be asking a guest agent that hangs


def stay(directory):
    """
    Leave a keeper where all that is left to do is to thaw the guest: whoever calls has ended the job of a dead one.

    The caller has let go of the lock, and is about to end.
    """
    record = directory.load()
    if record is not None and record.has_ended and record.frozen is not None:
        # Not by fork alone: libvirt was used here, and its threads and their locks would not come along.
        subprocess.Popen(
            [sys.executable, "-m", "vnb.job.keeper", directory.state, directory.uuid],
            stdin=subprocess.DEVNULL, start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )


def _stay(directory):
    with directory.locked() as got:
        record = directory.load() if got else None
        if record is None:
            return  # somebody was faster
        _redirect(directory.log)
        with _listening(directory) as listener:
            keeper = Keeper(_adopt(directory, record), None, listener, {"deadline": 0})
            keeper.done = True
            keeper.loop()


def _adopt(directory, record):
    """The job of a record that another process wrote, as ours."""
    job = jobs.Job(directory, record, None)
    with contextlib.suppress(Error):
        job.intend(owner=owner())
    return job


@contextlib.contextmanager
def _listening(directory):
    listener = directory.listen()
    try:
        yield listener
    finally:
        directory.hang_up()
        listener.close()


def be_keeper(life):
    """A keeper's life; does not return."""
    status = 1
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        life()
        status = 0
    except (Error, Interrupted):
        pass  # said, or nobody is there who asked
    except Exception as error:
        if lack(error) is None:
            traceback.print_exc()
    finally:
        os._exit(status)


def keep_for(connection, options):
    connection.settimeout(REQUEST_SECONDS)
    line = Line(connection)
    try:
        with line.waits():
            _keep(line, options)
    except Error as error:
        line.send(error=[error.what, error.reason, error.where])
        raise
    except Exception as error:
        line.send(error=["keeper", str(lack(error) or traceback.format_exc(limit=-1)), None])
        raise


def _keep(line, options):
    # Closed at the end: libvirtd logs an error for a client that goes without a word.
    with contextlib.closing(open_source(options)) as source:
        directory = JobDirectory(options["state"], source.uuid)
        make_way(directory)
        try:
            _keep_locked(line, options, source, directory)
        except BaseException:
            stay(directory)  # what we took over, and could not even begin with
            raise


def _keep_locked(line, options, source, directory):
    with directory.locked() as got:
        if not got:
            raise Error(source.name, who_runs(directory))
        line.send(job=source.uuid)
        _redirect(directory.log)
        recover(directory, source.name, line.tell)
        with _listening(directory) as listener:
            keeper, message = _begin(directory, source, line, listener, options)
            if keeper is None:
                line.send(**message)
                return
            try:
                line.send(**message)
                with waiting.told_to(None):  # what it looks at each second keeps nobody waiting
                    keeper.loop()
            finally:
                keeper.end_if_running("the keeper was ended")
                if keeper.job.held is not None:
                    keeper.job.held.close()  # it may be another one than the source by now


def _begin(directory, source, line, listener, options):
    """Begin the job; returns a Keeper, or None where there is nothing to keep, and what to tell the starter (dict)."""
    try:
        job = jobs.begin(directory, source, options, line.tell, line.warn)
    except jobs.BelowThreshold as below:
        message = {"below": str(below)}
    except Error as error:
        error = jobs.with_domain(error, source)
        message = {"error": [error.what, error.reason, error.where]}
    else:
        message = {"head": job.head, "disks": job.record.disks, "files": job.files}
        return Keeper(job, line, listener, options), message
    record = directory.load()
    if record is None:
        return None, message
    # It could not be ended, or the guest may still freeze: for this job, or for one before.
    keeper = Keeper(_adopt(directory, record), line, listener, options)
    if record.has_ended:
        keeper.done = True
    else:
        keeper.ending = "it could not be begun"
    return keeper, message


def make_way(directory):
    """
    Have a keeper end that stays only to thaw the guest: who calls takes over its record, and the thaw with it.

    It ends where its job has; and if it does not, the lock says so.
    """
    record = directory.load()
    if record is None or not record.has_ended:
        return
    client = directory.connect()
    if client is None:
        return
    client.settimeout(MAKE_WAY_SECONDS)
    line = Line(client)
    line.send(do="make way")
    with contextlib.suppress(Error):
        if line.receive() is not None:  # it would
            line.send(do="taken")  # we are still here
            line.receive()  # it hangs up when it has let go of the lock
    line.close()


def recover(directory, name, say):
    """
    End what a keeper that was killed has left; False where there is nothing. The caller holds the lock.

    Raises Error where the owner is not provably dead.
    """
    record = directory.load()
    if record is None:
        return False
    left = decisions.left(record.has_ended, is_dead(record.owner))
    if left is decisions.Left.RUNS:
        raise Error(name, f"a backup by process {record.owner['pid']} of "
                    f"{record.owner['host']} may still run: vnb-checkpoint abort {name} ends it")
    if left is decisions.Left.END:
        say(f"{name}: ending the job of a keeper that died, begun {record.head['created']}")
    jobs.Job(directory, record, say).abort()
    return True


def who_runs(directory):
    """In words, whose backup it is that holds the lock."""
    record = directory.load()
    if record is None:
        return "another backup is beginning"
    who = record.owner
    if record.has_ended:
        return (
            f"its backup has ended, and process {who['pid']} on {who['host']} stays until the guest agent has thawed "
            "the guest"
        )
    trouble = f", and its job does not end: {record.trouble}" if record.trouble else ""
    advice = "" if trouble else ": wait for its end, or end it by vnb-checkpoint abort"
    begun = record.head["created"]
    return f"a backup runs already, begun {begun} (process {who['pid']} on {who['host']}){trouble}{advice}"


def _redirect(log):
    """The keeper outlives its terminal and its pipes: it must not hold them open."""
    null = os.open(os.devnull, os.O_RDWR)
    try:
        file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
    except OSError as error:
        raise os_error(log, error) from None
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.dup2(file, 2)
    os.close(null)
    os.close(file)
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115


class Keeper:
    """
    Watches over a running job, and stays after it (done) until the guest is thawed.

    starter (Line), listener (socket): who may speak to it. options (dict): see Starter.
    """

    def __init__(self, job, starter, listener, options):
        self.job = job
        self.starter = starter
        self.left = None  # a starter that has hung up, and waits for our end
        self.successor = None  # a connection to the one who takes over from us
        self.listener = listener
        self.options = options
        self.done = False
        self.ending = None
        self.ending_since = None
        self.kept_alone = False
        self.troubles = {}
        self.pause = TICK_SECONDS  # until a job that could not be ended is tried again
        self.next_try = time.monotonic()
        self.looked = time.monotonic()
        self.deadline = time.monotonic() + options["deadline"]
        self.last_client = time.monotonic()
        self.job.note = self.job.warn = self.log

    def loop(self):
        """Until the job has ended, and the guest is thawed, or somebody else sees to that."""
        while (not self.done or self.job.record.frozen is not None) and self.successor is None:
            if self.done and self.left is not None:
                self._stay_without_starter()
            waiting = [self.listener] if self.starter is None else [self.listener, self.starter]
            ready, _, _ = select.select(waiting, [], [], TICK_SECONDS)
            if self.starter in ready:
                self._hear_starter()
            elif self.listener in ready:
                self._hear_client()
            if time.monotonic() - self.looked >= TICK_SECONDS:  # whoever speaks to us, and how often
                self._look()
                self.looked = time.monotonic()

    def _stay_without_starter(self):
        """Have a starter that has hung up not wait for our end."""
        self.left.offer(stays=True)
        self.left.close()
        self.left = None

    def end_if_running(self, reason):
        """
        End the job by ourselves: it does not count, unless its segment is in the catalog.

        Where libvirt does not answer, this is tried again, more and more rarely: it may be restarting.
        """
        if self.done:
            return
        if self.ending is None:
            self.ending = reason
            self.ending_since = time.monotonic()
            self._write(f"ending the job: {reason}")
            if self.starter is not None:
                self.starter.offer(ending=reason)  # its command, which may be all that keeps QEMU, has to go
        starter = self.starter or self.left
        try:
            with contextlib.nullcontext() if starter is None else starter.waits():
                saved = self.job.abort(self.ending)
        except Error as error:
            self.next_try = time.monotonic() + self.pause
            self.pause = min(2 * self.pause, RAREST_SECONDS)
            if self._trouble("end", str(error)):
                with contextlib.suppress(Error):
                    self.job.intend(trouble=error.reason)
            if self.left is not None and time.monotonic() - self.ending_since > WAITED_FOR_SECONDS:
                self.left.tell(f"{error}; its keeper goes on trying")
                self._stay_without_starter()
            return
        self.done = True
        for line in (self.starter, self.left):
            if line is not None:
                line.offer(ended=True, saved=saved)

    def log(self, text):
        """A line for whoever looks into the log; also for the starter, while there is one."""
        self._write(text)
        if self.starter is not None:
            self.starter.tell(text)

    def _write(self, text):
        with contextlib.suppress(OSError):  # a file system that is full is no reason to leave the guest alone
            sys.stderr.write(f'{time.strftime("%Y-%m-%dT%H:%M:%S")} {text}\n')

    def _trouble(self, about, text):
        """A line on what fails tick after tick: only when it is another one than before, which is returned."""
        if self.troubles.get(about) == text:
            return False
        self.troubles[about] = text
        self.log(text)
        return True

    def _hear_starter(self):
        try:
            message = self.starter.receive()
        except Error:
            message = None
        if message is None:
            self.left, self.starter = self.starter, None
            if not self.kept_alone:
                self.end_if_running("the process that began it has died")
        elif message.get("do") == "keep":
            self.kept_alone = True
            if self.options["strict"] and message["warnings"]:
                self.job.intend(strict=message["warnings"])  # for whoever commits
            self.last_client = time.monotonic()
            self.starter.send(done=True)
            self.starter.close()
            self.starter = None
        else:
            self._do(self.starter, message)

    def _hear_client(self):
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
            if message.get("do") == "make way" and self.done:
                self._make_way(line)
            else:
                self._do(line, message)

    def _make_way(self, line):
        """Leave, but only for someone who is still there: who gave us up meanwhile has taken over nothing."""
        line.send(way=True)
        with contextlib.suppress(Error):
            if (line.receive() or {}).get("do") == "taken":
                self.successor = line.socket.dup()  # open as long as we live: then the lock is free

    def _do(self, line, message):
        self.job.note = line.tell
        try:
            if self.done:
                self._do_late(line, message.get("do"))
            else:
                with line.waits():
                    end_as_asked(self.job, message)
                self.done = True
            line.send(done=True, strict=self.job.strict)
        except Error as error:
            line.send(error=[error.what, error.reason, error.where], saved=isinstance(error, Saved))
        except OSError as error:
            line.send(error=["keeper", str(error), None])
        finally:
            self.job.note = self.log

    def _do_late(self, line, what):
        """The job has ended by itself, or was ended by somebody else, and we are here for the guest's sake."""
        if what != "abort":
            raise Error(self.job.head["domain"], f"the job was ended already: {self.job.record.reason}")
        self.ending = None  # who asks need not be told later
        line.tell(f"{self.job.head['domain']}: {who_runs(self.job.directory)}")

    def _look(self):
        if self.ending is not None:
            if time.monotonic() >= self.next_try:
                self.end_if_running(self.ending)
        elif not self.done:
            self._look_at_time()
            for look in (self._look_at_scratch, self._look_at_guest):
                if not self.done:
                    look()
        if self.job.record.frozen is not None:
            self._thaw()

    def _look_at_time(self):
        now = time.monotonic()
        if now > self.deadline:
            self.end_if_running(f"its deadline of {self.options['deadline']} seconds has passed")
        elif self._is_idle() and self.kept_alone:
            if now - self.last_client > self.options["idle"]:
                self.end_if_running(f"nobody was connected for {self.options['idle']} seconds")
        else:
            self.last_client = now

    def _thaw(self):
        self.job.note = lambda text: self._trouble("thaw", text)
        try:
            thawed = self.job.thaw()
        except Error as error:
            self._trouble("thaw", str(error))  # the daemon may come back
            return
        finally:
            self.job.note = self.log
        if thawed and self.done and self.ending is None:
            self.job.directory.remove()  # this was all that was left to do

    def _look_at_scratch(self):
        for path in self.job.record.scratch:
            try:
                free = self.job.held.room(os.path.dirname(path))
            except OSError:
                continue  # gone with the domain
            if free is not None and free < self.options["reserve"]:
                self.end_if_running(
                    f"only {free} bytes are left in {os.path.dirname(path)}, where the scratch is"
                )
                return

    def _look_at_guest(self):
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

    def _connect_again(self):
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

    def _is_idle(self):
        """Whether nobody is connected to the export, as far as that is known. Looks at each tick: to know how long."""
        if self.job.record.tcp and not self.job.held.is_local:
            return False
        return self.job.clients.look(read_lists(self.job.clients.is_tcp), time.monotonic()) == 0


def end_as_asked(job, message):
    """Commit or abort a job as a message (dict) says."""
    if message.get("do") == "commit":
        job.commit(message.get("set"), message.get("proof", True))
    elif message.get("do") == "abort":
        job.abort()
    else:
        raise UsageError("keeper", f"asked to do {message.get('do')}")


if __name__ == "__main__":
    with contextlib.suppress(Error):  # said in the log, or nobody is there who asked
        _stay(JobDirectory(*sys.argv[1:]))
