# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a job leaves behind, removed by what its record says: servers, sockets, scratch files, a frozen guest."""

from __future__ import annotations

import contextlib
import os

from vnb.base import processes
from vnb.base.errors import Error
from vnb.job.state import start_of
from vnb.virt.failures import Unanswered, Unready

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vnb.base.ssh import Host
    from vnb.job.record import Record
    from vnb.job.source import Journal
    from vnb.virt.domain import Domain



def shut_out(name: str, cut: Callable[[], int]) -> None:
    """cut(), which returns what Clients.shut_out() does. Raises Unready where the guest would wait."""
    stalled = cut()
    if stalled:
        raise Unready(
            name, f"the job cannot be ended: clients of its export do not read ({stalled}), and this user may not cut "
            "them off: the guest would wait for them. End them, or run vnb-checkpoint abort as root"
        )


def forwarded(directory: str) -> str:
    """The socket here, in the directory of a job, that ssh forwards to the one of QEMU on its host."""
    return os.path.join(directory, "nbd.sock")


def end_servers(record: Record) -> None:
    """End the programs that a job has started, by their ids, and remove the sockets."""
    for pid, start in record.servers:
        if start is not None and start_of(pid) == start:
            processes.end(pid)
    for socket in record.sockets:
        with contextlib.suppress(OSError):  # one that stays does no harm: the next job takes its place
            os.unlink(socket)


def remove_files(journal: Journal, host: Host | None) -> None:
    """Remove socket and scratch files: those that libvirt made it does itself, but not after a crash of its own."""
    if host is None and not journal.record.tcp:
        with contextlib.suppress(OSError):
            os.unlink(journal.record.endpoint)
    if host is None or journal.record.scratch_made:
        remove_scratch(journal, host)


def remove_scratch(journal: Journal, host: Host | None) -> None:
    """Remove the scratch files. What stays on another host is said: the backup itself is over."""
    paths = journal.record.scratch
    if host is not None:
        try:
            host.run(host.destination, "rm", "-f", "--", *paths)
        except Error as error:
            journal.note(f"{error}: left behind there: {', '.join(paths)}")
        return
    for path in paths:
        with contextlib.suppress(OSError):
            os.unlink(path)


def thaw(domain: Domain, journal: Journal) -> bool:
    """
    Thaw a guest that we froze; True when it is done. The intent stays where the agent does not answer.

    A guest that was started anew is not the one that we froze: libvirt has another number for it.
    """
    if journal.record.frozen != domain.id:
        journal.intend(frozen=None)
        return True
    try:
        domain.thaw()
    except Unanswered as error:
        journal.note(f"{domain.name}: cannot thaw the guest yet: {error.reason}")
        return False
    except Error as error:
        if domain.is_active:
            journal.note(f"{domain.name}: cannot thaw the guest: {error.reason}")
            return False
    journal.intend(frozen=None)
    return True
