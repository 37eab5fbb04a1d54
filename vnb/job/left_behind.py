# SPDX-License-Identifier: LGPL-2.1-or-later
"""What another process has left of a job, or still keeps: taken over, ended, or told whose it is."""

from __future__ import annotations

import contextlib

from vnb.base.errors import Error
from vnb.job import decisions
from vnb.job import job as jobs
from vnb.job.channel import Line
from vnb.job.state import is_dead

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from vnb.job.state import JobDirectory


MAKE_WAY_SECONDS = 20  # for a keeper that may be asking a guest agent that hangs


def make_way(directory: JobDirectory) -> None:
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


def recover(directory: JobDirectory, name: str, say: Callable[[str], Any]) -> bool:
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


def who_runs(directory: JobDirectory) -> str:
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
