# SPDX-License-Identifier: LGPL-2.1-or-later
"""
What this process waits for, in words, for whoever waits for this process: see vnb.job.keeper.

    with waiting.on("libvirt to begin the job"):
        ...
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any



class _Now:
    tell: Callable[[str | None], None] | None = None  # function (str or None) that passes it on
    all: list[list[str]] = []  # what is waited for now; what came first says most, as others are waited for within it


@contextlib.contextmanager
def on(what: str) -> Iterator[None]:
    """While this lasts, this process waits for something that others have to do. what: that, in words."""
    entry = [what]
    _Now.all.append(entry)
    _tell()
    try:
        yield
    finally:
        _Now.all = [other for other in _Now.all if other is not entry]
        _tell()


@contextlib.contextmanager
def told_to(tell: Callable[[str | None], None] | None) -> Iterator[None]:
    """Have a function told of each wait that begins in this process, and of its end."""
    before, _Now.tell = _Now.tell, tell
    if _Now.all:
        _tell()
    try:
        yield
    finally:
        _Now.tell = before


def is_told() -> bool:
    """Whether anybody is told of what this process waits for."""
    return _Now.tell is not None


class Told:
    """An object whose methods wait for others. words: for what, by the method's name. other: else."""

    def __init__(self, object_: Any, words: Mapping[str, str], other: str) -> None:
        self._object = object_
        self._words = words
        self._other = other

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._object, name)
        if not callable(found):
            return found

        def call(*args: Any) -> Any:
            with on(self._words.get(name, self._other)):
                return found(*args)

        return call


def _tell() -> None:
    if _Now.tell is not None:
        _Now.tell(_Now.all[0][0] if _Now.all else None)
