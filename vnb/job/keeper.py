# SPDX-License-Identifier: LGPL-2.1-or-later
"""
The keeper: a small process that begins a backup job and stays until it has ended.

A job that nobody ends fills its scratch, and then QEMU pauses the guest. So the process that begins one
outlives whoever asked for it, and ends the job by itself when `run` has died, at a deadline, when nobody has been
connected to the export for a while, or when the scratch is about to fill its file system. Backup loses, the guest wins.
This module is the process; what it does while the job runs is in vnb.job.watch.

Its starter speaks to it over a socket pair, others over the socket in the job's directory: JSON, one line a message.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import traceback

from vnb.base import waiting
from vnb.base.errors import Error, Interrupted, lack, os_error
from vnb.job import job as jobs
from vnb.job.channel import REQUEST_SECONDS, Line
from vnb.job.left_behind import make_way, recover, who_runs
from vnb.job.sources import open_source
from vnb.job.state import JobDirectory, owner
from vnb.job.watch import Keeper, State

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator
    from typing import Any

    from vnb.job.record import Record
    from vnb.job.source import Source



def stay(directory: JobDirectory) -> None:
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


def _stay(directory: JobDirectory) -> None:
    with directory.locked() as got:
        record = directory.load() if got else None
        if record is None:
            return  # somebody was faster
        _redirect(directory.log)
        with _listening(directory) as listener:
            Keeper(_adopt(directory, record), None, listener, {"deadline": 0}, State.OVER).loop()


def _adopt(directory: JobDirectory, record: Record) -> jobs.Job:
    """The job of a record that another process wrote, as ours."""
    job = jobs.Job(directory, record, None)
    with contextlib.suppress(Error):
        job.intend(owner=owner())
    return job


@contextlib.contextmanager
def _listening(directory: JobDirectory) -> Iterator[socket.socket]:
    listener = directory.listen()
    try:
        yield listener
    finally:
        directory.hang_up()
        listener.close()


def be_keeper(life: Callable[[], None]) -> None:
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


def keep_for(connection: socket.socket, options: dict[str, Any]) -> None:
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


def _keep(line: Line, options: dict[str, Any]) -> None:
    # Closed at the end: libvirtd logs an error for a client that goes without a word.
    with contextlib.closing(open_source(options)) as source:
        directory = JobDirectory(options["state"], source.uuid)
        make_way(directory)
        try:
            _keep_locked(line, options, source, directory)
        except BaseException:
            stay(directory)  # what we took over, and could not even begin with
            raise


def _keep_locked(line: Line, options: dict[str, Any], source: Source, directory: JobDirectory) -> None:
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


def _begin(
    directory: JobDirectory, source: Source, line: Line, listener: socket.socket, options: dict[str, Any],
) -> tuple[Keeper | None, dict[str, Any]]:
    """Begin the job; returns a Keeper, or None where there is nothing to keep, and what to tell the starter."""
    try:
        job = jobs.begin(directory, source, options, line.tell, line.warn)
    except jobs.BelowThreshold as below:
        message: dict[str, Any] = {"below": str(below)}
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
    state, reason = (State.OVER, None) if record.has_ended else (State.ENDING, "it could not be begun")
    return Keeper(_adopt(directory, record), line, listener, options, state, reason), message


def _redirect(log: str) -> None:
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


if __name__ == "__main__":
    with contextlib.suppress(Error):  # said in the log, or nobody is there who asked
        _stay(JobDirectory(sys.argv[1], sys.argv[2]))
