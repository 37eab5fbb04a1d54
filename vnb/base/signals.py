# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Signals that ask us to end: an Interrupted wherever Python just is, but not within code in C that has called it back.

That would print it, and take it for a failure of its own.
"""

import signal
import threading

from vnb.base.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _Held:
    """A context in which no signal raises anything: that is done at its end. For moments, and not nested."""

    def __init__(self):
        self.active = False
        self._main = threading.main_thread().ident  # signals are handled there
        self._came = None

    def __enter__(self):
        if threading.get_ident() == self._main:
            self.active = True

    def __exit__(self, *_):
        if threading.get_ident() != self._main:
            return
        self.active = False
        came, self._came = self._came, None
        if came is not None:
            raise Interrupted(came)

    def keep(self, signum):
        """One has come meanwhile."""
        self._came = signum


held = _Held()


def handle(signum, _stack):
    """The handler of these signals."""
    # A second signal must not break the cleaning up that the first one started.
    for other in SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    if held.active:
        held.keep(signum)
    else:
        raise Interrupted(signum)
