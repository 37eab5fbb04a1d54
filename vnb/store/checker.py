# SPDX-License-Identifier: LGPL-2.1-or-later
"""All that is in a stream, checked to its last byte."""

from __future__ import annotations

from vnb.base.buffers import Ordered, Pool
from vnb.base.errors import Error, NotInstalled
from vnb.format import codec, stream, values

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any

    from vnb.format.writing import Writer
    from vnb.store.index_check import RowCheck



class Checker:
    """
    Checks all that is in a stream, the plain bytes too.

    fault: function that is told what is wrong with a payload: it may raise, or let the rest be checked.
    progress: is told of each segment.
    out: gets the frames, byte for byte. The end of a segment only when all of it is sound.
    go_on: called for each frame; it may raise.
    """

    def __init__(
        self, fd: int, name: str, threads: int, fault: Callable[[Error], None], progress: Any,
        out: Writer | None = None, go_on: Callable[[], None] | None = None,
    ) -> None:
        self.pool = Pool()
        self.reader = stream.Reader(fd, name, pool=self.pool)
        self.fault = fault
        self.progress = progress
        self.out = out
        self.go_on = go_on
        self.rows: RowCheck | None = None  # a RowCheck, where the index is checked
        self._work = Ordered(self._checked, threads)
        self._end = b""
        self._told: Error | None = None  # what fault() was told last

    def segments(
        self, begin: Callable[[stream.Segment], None], share: Callable[[stream.Segment], float | None] | None = None,
    ) -> Iterator[stream.Segment]:
        """
        Yield each segment when it was checked. begin: function that is given it when its head was.

        share: function (segment) that says how much of all the work it is, or None where that is not known.
        """
        with self._work:
            try:
                for segment in self.reader:
                    begin(segment)
                    self._pass_on(segment.front)
                    if self.out is not None:
                        self.out.flush()  # the next stage may refuse it, before anything is read
                    with self.progress.segment(segment, share and share(segment)):
                        self._pass_on(segment.raws())
                    yield segment
            except Error as error:
                if error is not self._told:
                    self._drain()  # what waits there came first
                raise

    def _pass_on(self, raws: Iterable[values.Raw]) -> None:
        for raw in raws:
            if self.go_on is not None:
                self.go_on()
            if raw.fields[0] == "data" and raw.fields[4] != "none":
                self._work.call(raw)
            else:
                self._work.append(self._checked(raw))
            while self._work.full:
                self._take()
        self._drain()

    def _checked(self, raw: values.Raw) -> tuple[values.Raw, Error | None]:
        """(raw, None), or (raw, what is wrong with its payload)."""
        data = raw.frame
        if type(data) is values.Data:
            assert self.reader.segment is not None
            try:
                codec.plain(data, self.reader.segment.disks[data.disk]["name"])
            except NotInstalled as error:
                return raw, error
            except Error as error:
                return raw, self.reader.error(error, raw.start)
        return raw, None

    def _drain(self) -> None:
        while len(self._work):
            self._take()

    def _take(self) -> None:
        raw, error = self._work.pop()
        if self.rows is not None:
            error = self.rows.frame(raw) or error  # of one frame only one can be wrong
        if error is not None:
            self._told = error
            self.fault(error)
        elif self.out is not None:
            self._write(raw, self.out)
        if raw.payload is not None:
            self.pool.give(raw.payload)

    def _write(self, raw: values.Raw, out: Writer) -> None:
        if raw.fields[0] == "end":
            self._end = raw.header
            return
        out.write(self._end + raw.header, raw.payload)
        self._end = b""
