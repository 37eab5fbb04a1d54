# SPDX-License-Identifier: LGPL-2.1-or-later
"""
What is known of a file in a set that cannot be read: it costs the restore points that need it, and nothing else.

Pure logic; vnb.store.backupset finds the facts.
"""

from vnb.format import heads

NOTHING = ""  # as Damaged.newest: older than any restore point
MILLISECONDS = 23  # characters of a time up to them: that is what names have


class Damaged:
    """
    A file whose segments cannot be used.

    name (str): its path. error (Error): why. advice (str): what its user can do, or "".
    head (dict or None): of its first segment, as vnb.store.chain.outline() leaves it, where that can still be read.
    newest (str or None): no other restore point in it was created after this time. NOTHING: it has no other.
    None: not known.
    """

    def __init__(self, name, error, advice="", head=None, newest=None):
        self.name = name
        self.error = error
        self.advice = advice
        self.head = head
        self.newest = newest

    @property
    def line(self):
        """For the user."""
        return f"{self.error}: left out{self.advice and f'; {self.advice}'}"

    def may_be_after(self, created):
        """Whether it may have a restore point, nobody knows which, that was created after this time (str)."""
        return self.newest is None or self.newest > created

    def is_after(self, created):
        """Whether all that may be in it was created after this time (str), as far as that is known."""
        return bool(self.newest) and self.newest[:MILLISECONDS] > created[:MILLISECONDS]


def newest_by_name(name, is_segment):
    """
    When the newest restore point of a file may have been created (str), NOTHING, or None: by the file's name (str).

    is_segment (bool): it starts as a segment does, or may start so. No order comes from a name; but a file that has
    one as vnb gives them, and whose head is lost, is not newer than that name.
    """
    created = heads.created_of_file(name)
    return NOTHING if created is None and not is_segment else created
