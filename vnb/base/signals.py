# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Signals that ask us to end: an Interrupted wherever Python just is, but not within code in C that has called it back.

That would print it, and take it for a failure of its own.
"""

from __future__ import annotations

import signal
import threading

from vnb.base.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _Held:
    """A context in which no signal raises anything: that is done at its end. For moments, and not nested."""

    def __init__(self) -> None:
        self.active = False
        self._main = threading.main_thread().ident  # signals are handled there
        self._came: int | None = None

    def __enter__(self) -> None:
        if threading.get_ident() == self._main:
            self.active = True

    def __exit__(self, *_: object) -> None:
        if threading.get_ident() != self._main:
            return
        self.active = False
        came, self._came = self._came, None
        if came is not None:
            raise Interrupted(came)

    def keep(self, signum: int) -> None:
        """One has come meanwhile."""
        self._came = signum


held = _Held()


def handle(signum: int, _stack: object) -> None:
    """The handler of these signals."""
    # A second signal must not break the cleaning up that the first one started.
    for other in SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    if held.active:
        held.keep(signum)
    else:
        raise Interrupted(signum)
