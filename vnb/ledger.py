# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Ledgers: a directory of segments, or of their heads alone, that says what is saved.

A backup set is its own ledger. For a stream that goes elsewhere, heads are kept in the state directory.
"""

import os
import socket

from vnb import backupset, chain
from vnb.errors import Error, os_error


class Ledger:
    """
    directory (str): of the ledger. own (bool): it is the one in the state directory, into which we write heads.
    """

    def __init__(self, directory, own=False):
        self.directory = os.path.abspath(directory)
        self.own = own

    @classmethod
    def of(cls, state, uuid, directory):
        """The ledger in a directory, or where that is None the one in the state directory for this domain."""
        if directory is not None:
            return cls(directory)
        return cls(os.path.join(state, "ledgers", uuid), own=True)

    @property
    def name(self):
        """What stands in a checkpoint's description: the same directory on another host is another ledger."""
        return f"{socket.gethostname()}:{os.path.realpath(self.directory)}"

    def segments(self):
        """The segments in it; an empty list where the directory is not there yet. Raises Error if it cannot be one."""
        try:
            os.stat(os.path.join(self.directory, ""))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise os_error(self.directory, error) from None
        return backupset.segments([self.directory])

    def of_domain(self, uuid, domain):
        """The segments, all of this domain, or Error."""
        found = self.segments()
        for segment in found:
            if segment.head["uuid"] != uuid:
                raise Error(
                    self.directory,
                    f'is of domain {segment.head["domain"]} ({segment.head["uuid"]}), not of {domain} ({uuid})',
                )
        chain.check(found, self.directory)
        return found

    def holds(self, head):
        """Whether the point of this head is saved: by its segment, or by one that it was merged into."""
        return any(segment.head["point"] == head["point"] for segment in self.segments())

    def record(self, head, disks):
        """Keep a head durably: its segment is safe somewhere."""
        with backupset.Store(self.directory, head, disks, check=False) as store:
            store.writer.segment({**head, "stage": "disks"}, disks).end()
            store.commit()
