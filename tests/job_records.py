# SPDX-License-Identifier: LGPL-2.1-or-later
"""Records of jobs, with no more in them than a test wants."""

from vnb.job.record import Record

HEAD = {
    "id": "i", "domain": "vm1", "uuid": "u-1", "point": "p", "level": "full", "chain": "main", "parent": None,
    "checkpoint": None, "created": "2026-01-31T12:00:00.000000Z",
}


OWNER = {"host": "another", "boot": "b", "pid": 5, "start": 10}


def record(**fields):
    """The record of a job of the domain vm1, of which nothing is left to undo but what fields say."""
    return Record(**{"head": HEAD, "owner": dict(OWNER), **fields})
