# SPDX-License-Identifier: LGPL-2.1-or-later
"""What can go wrong, as facts; vnb.cli.runner turns them into a line on stderr and an exit status."""


from __future__ import annotations


class Error(Exception):
    """
    An expected failure: exit status 1 and one line, `command: object: where: reason`.

    what: the object, as the user typed it.
    where: a place in it, such as "offset 1048576" or "stream offset 4194304".
    reason: lower case, no full stop; the system's own words for an errno.
    errno: of the system call that failed, where it was one.
    is_damage: it says that what was read is not as it was written.
    """

    errno: int | None = None
    is_damage = False

    def __init__(self, what: str | None, reason: object, where: str | None = None) -> None:
        super().__init__(what, reason, where)
        self.what = what
        self.where = where
        self.reason = str(reason)  # some callers have an exception here, which no JSON can hold

    def __str__(self) -> str:
        return ": ".join(one_line(part) for part in (self.what, self.where, self.reason) if part)


class Saved(Error):
    """What was to be saved is saved, but something after it has failed: exit status 3."""


class StreamError(Error):
    """The input is not a sound stream."""

    is_damage = True


class Followed(StreamError):
    """The command that was to write the input has failed before it wrote anything, and has said why."""


class NotInstalled(Error):
    """What the input needs is not here: nothing is wrong with the input."""


class UsageError(Error):
    """The command line makes no sense: exit status 2, the reason and then the usage."""


class Mistyped(UsageError):
    """A command line with a known mistake, and the reason says how it has to be typed: the usage is not printed."""


def lack(error: BaseException) -> Error | None:
    """The Error of a MemoryError, ImportError or RuntimeError by which this process lacks something; else None."""
    if isinstance(error, MemoryError):
        return Error(None, "out of memory")
    if isinstance(error, ImportError):
        return Error(None, str(error))  # not installed, or no memory to load it
    if str(error) == "can't start new thread":  # Python has no class for it
        return Error(None, "out of memory, or too many processes: cannot start a thread")
    return None


class Interrupted(BaseException):
    """A signal that asks us to end. Not an Exception, so that nothing takes it for a failure."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class OutputClosed(BaseException):
    """Whoever read our standard output has closed it: clean up, then die by SIGPIPE."""


def one_line(text: object, limit: int = 4096) -> str:
    """
    The text with what would break the line or steer a terminal made visible: it may come from a stream.

    limit: characters; a text that is longer is cut.
    """
    text = str(text).strip()
    if len(text) > limit:
        text = text[:limit] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def os_error(what: str | None, error: OSError, where: str | None = None) -> Error:
    """An OSError as an Error, with the system's words."""
    failure = Error(what, error.strerror or str(error), where)
    failure.errno = error.errno
    return failure
