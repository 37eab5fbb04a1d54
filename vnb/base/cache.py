# SPDX-License-Identifier: LGPL-2.1-or-later
"""A bounded cache of bytes that threads share: what one of them loads, the others wait for and get."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any



class Cache:
    """
    The memoryviews used last, up to limit bytes of them.

    A value that is larger than the limit is handed on and not kept.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.size = 0
        self._values: OrderedDict[Hashable, Any] = OrderedDict()
        self._loading: dict[Hashable, _Flight] = {}
        self._lock = threading.Lock()

    def get(self, key: Hashable, load: Callable[[], Any]) -> Any:
        """
        The value of a key; load() makes it if it is not here.

        Threads that ask for one key at the same time wait for the first of them, those that ask for another
        key do not. Raises what load() raises; then the next of those that wait tries by itself.
        """
        while True:
            with self._lock:
                value = self._values.get(key)
                if value is not None:
                    self._values.move_to_end(key)
                    return value
                flight = self._loading.get(key)
                if flight is None:
                    flight = self._loading[key] = _Flight()
                    break
            with flight.done:
                if flight.value is not None:
                    return flight.value  # it may have been dropped from the cache already
        try:
            flight.value = value = load()
        finally:
            with self._lock:
                del self._loading[key]
                if flight.value is not None:
                    self._keep(key, flight.value)
            flight.done.release()
        return value

    def peek(self, key: Hashable) -> Any:
        """The value of a key, or None if it is not here."""
        with self._lock:
            value = self._values.get(key)
            if value is not None:
                self._values.move_to_end(key)
            return value

    def put(self, key: Hashable, value: Any) -> None:
        """Keep a value."""
        with self._lock:
            if key not in self._values:
                self._keep(key, value)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._values

    def _keep(self, key: Hashable, value: Any) -> None:
        if value.nbytes > self.limit:
            return
        self._values[key] = value
        self.size += value.nbytes
        while self.size > self.limit:
            self.size -= self._values.popitem(last=False)[1].nbytes


class _Flight:
    """A value on its way: done is held until it is there, or until its loading failed."""

    __slots__ = ("done", "value")

    def __init__(self) -> None:
        self.value: Any = None
        self.done = threading.Lock()
        self.done.acquire()
