# SPDX-License-Identifier: LGPL-2.1-or-later
"""
What is known of a file in a set that cannot be read: it costs the restore points that need it, and nothing else.

Pure logic; vnb.store.backupset finds the facts.
"""

from __future__ import annotations

from vnb.format import heads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vnb.base.errors import Error
    from vnb.format.types import Head


NOTHING = ""  # as Damaged.newest: older than any restore point
MILLISECONDS = 23  # characters of a time up to them: that is what names have


class Damaged:
    """
    A file whose segments cannot be used.

    name: its path. error: why. advice: what its user can do, or "".
    head: of its first segment, as vnb.store.chain.outline() leaves it, where that can still be read.
    newest: no other restore point in it was created after this time. NOTHING: it has no other.
    None: not known.
    """

    def __init__(
        self, name: str, error: Error, advice: str = "", head: Head | None = None, newest: str | None = None,
    ) -> None:
        self.name = name
        self.error = error
        self.advice = advice
        self.head = head
        self.newest = newest

    @property
    def line(self) -> str:
        """For the user."""
        return f"{self.error}: left out{self.advice and f'; {self.advice}'}"

    def may_be_after(self, created: str) -> bool:
        """Whether it may have a restore point, nobody knows which, that was created after this time."""
        return self.newest is None or self.newest > created

    def is_after(self, created: str) -> bool:
        """Whether all that may be in it was created after this time, as far as that is known."""
        return self.newest is not None and self.newest[:MILLISECONDS] > created[:MILLISECONDS]


def newest_by_name(name: str, is_segment: object) -> str | None:
    """
    When the newest restore point of a file may have been created, NOTHING, or None: by the file's name.

    is_segment: it starts as a segment does, or may start so. No order comes from a name; but a file that has
    one as vnb gives them, and whose head is lost, is not newer than that name.
    """
    created = heads.created_of_file(name)
    return NOTHING if created is None and not is_segment else created
