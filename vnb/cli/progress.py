# SPDX-License-Identifier: LGPL-2.1-or-later
"""
How far a pipeline is: one line on the terminal, or JSON lines; and what it came to in the end.

     45%|████▌     | 5.2 GiB of data, 210.3 MiB/s, 00:31 left, vda vdb

    with Progress(args["--progress"]) as progress:
        for segment in stdin():
            progress.begin(segment.head)            before anything of it is passed on
            with progress.segment(segment):         a Segment that is read, or a SegmentWriter
                ...
        progress.summarize()

Of all the commands of a pipeline that have --progress the first one shows it: it asks for the terminal (see
vnb.base.terminal) before it passes its first head, and the next one when it has that head. The frames are not counted
for this: extents of a disk ascend, so what a reader or writer knows anyway, where the last one of each disk ended,
over the size of the disks is how far it is; a thread looks at that some times a second.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time

from vnb.base import log, terminal
from vnb.base.errors import UsageError
from vnb.format.frame import DATA, HOLE, ZERO

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any


MODES = ("auto", "none", "json")
FIRST_SECONDS = 0.5  # what is done sooner needs no line, and no library that draws one
LINE_SECONDS = 0.25
JSON_SECONDS = 1
COLUMNS = 80  # where the terminal does not say
LINE = "{percentage:3.0f}%|{bar}| {desc}"
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


class Progress:
    """
    Shows how far the segments are that this process works on.

    mode: auto, a line where standard error is a terminal; json; none; None: what VNB_PROGRESS says,
    or auto. Raises UsageError for another one.
    """

    def __init__(self, mode: str) -> None:
        what, mode = ("--progress", mode) if mode else ("VNB_PROGRESS", os.environ.get("VNB_PROGRESS") or "auto")
        if mode not in MODES:
            raise UsageError(what, f'"{mode}" is not one of {", ".join(MODES)}')
        self._is_json = mode == "json"
        self._is_line = mode == "auto" and os.isatty(2) and not log.is_quiet()
        self._started = time.monotonic()
        # {frames (Segment or SegmentWriter): the share of all work that they are, or None}
        self._parts: dict[Any, Any] = {}
        self._whole = None  # the last of them that has come to its end: the extents of an increment end before the disk
        self._done = 0.0  # share of all work that is behind us
        self._since = self._started  # when what the fraction is of began
        self._totals = Totals()
        self._head: dict[Any, Any] = {}
        self._seen: dict[Any, Any] = {}  # disk: where it was when it was last shown
        self._asked = False  # for the terminal
        self._shower = None  # the thread
        self._ending = threading.Event()
        self._lock = threading.RLock()  # what is shown, and what it is made of
        self._bar = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._shower is not None:
            self._ending.set()
            self._shower.join()
            log.show_line(None)
            if self._bar is not None:
                with contextlib.suppress(OSError):
                    self._bar.close()
            terminal.release()

    def begin(self, head: Any = None) -> None:
        """
        A segment with this head comes next, or work on saved ones. Called before anything is passed on.
        """
        self._head = head or {}
        if not self._asked and (self._is_line or self._is_json):
            # Once: later the one that shows it may have come to its end, but not the pipeline.
            self._asked = True
            if terminal.claim():
                self._show()

    @contextlib.contextmanager
    def segment(self, frames: Any, share: float | None = None) -> Iterator[Any]:
        """
        Show how far a segment is while this lasts.

        frames: has disks, positions and counts: a Segment or SegmentWriter of vnb.format.stream, which this returns.
        share: how much of all the work it is; None where nobody knows what else will come.
        """
        if share is None:
            self._since = time.monotonic()
        self._parts[frames] = share
        yield frames
        with self._lock:
            self._whole = frames
            if self._is_json and self._shower is not None:
                self._show_json()
            del self._parts[frames]
            self._done += share or 0
            self._totals.add(frames.counts)

    def summarize(self) -> None:
        """Say what all segments came to: on a terminal, with --verbose, as JSON with the mode json."""
        seconds = time.monotonic() - self._started
        head = self._head
        if self._is_json:
            about = {"domain": head.get("domain"), "point": head.get("point"), "level": head.get("level")}
            log.record(summary={**about, **self._totals.fields(), "seconds": round(seconds, 3)})
            return
        say = log.note if self._is_line else log.detail
        say(f'{head.get("domain")}: {head.get("point")}: {self._totals}, {seconds:.1f} s')

    def state(self) -> Any:
        """(how far, from 0 to 1; bytes of data; the disks that went on since the last time)."""
        fraction, data, disks = self._done, self._totals.bytes[DATA], []
        for frames, share in tuple(self._parts.items()):
            size = sum(disk["size"] for disk in frames.disks)
            positions = [frames.positions[number] for number in range(len(frames.disks))]
            part = sum(positions) / size if size and frames is not self._whole else 1
            fraction += (1 if share is None else share) * part
            data += frames.counts.bytes[DATA]
            for disk, position in zip(frames.disks, positions):
                name = disk["name"]
                if position not in (self._seen.get((frames, name)), 0) and name not in disks:
                    disks.append(name)
                self._seen[frames, name] = position
        return min(fraction, 1), data, disks

    @contextlib.contextmanager
    def hidden(self) -> Iterator[str]:
        """Not in the way while this lasts; gives what has to be written in front of a line. See vnb.base.log."""
        with self._lock:
            if self._bar is not None:
                self._bar.clear()
            yield ""

    def _show(self):
        """Start the thread."""
        self._shower = threading.Thread(target=self._show_until_the_end, daemon=True)
        # Whoever blocks signals does it in his own thread, and nobody is to take them instead of it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        self._shower.start()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        log.show_line(self)

    def _show_until_the_end(self):
        wait = JSON_SECONDS if self._is_json else FIRST_SECONDS
        with contextlib.suppress(OSError):  # the terminal has gone
            while not self._ending.wait(wait):
                if self._is_json:
                    with self._lock:
                        self._show_json()
                elif not self._show_line():
                    return
                else:
                    wait = LINE_SECONDS

    def _show_json(self):
        fraction, data, disks = self.state()
        seconds = time.monotonic() - self._since
        log.record(progress={
            "domain": self._head.get("domain"), "point": self._head.get("point"), "disks": disks,
            "percent": round(100 * fraction, 1), "data": data, "seconds": round(seconds, 3),
            "rate": int(data / max(seconds, 1e-3)), "left": round(_left(fraction, seconds), 1) if fraction else None,
        })

    def _show_line(self):
        """Draw the line; False where there is nothing to draw it with."""
        with self._lock:
            if self._bar is None:
                try:
                    from tqdm import tqdm
                except ImportError:
                    return False
                tqdm.monitor_interval = 0  # a thread more, that would take the signals
                self._bar = tqdm(total=1, file=sys.stderr, leave=False, ncols=_columns(), bar_format=LINE)
            fraction, data, disks = self.state()
            seconds = time.monotonic() - self._since
            left = self._bar.format_interval(_left(fraction, seconds)) if fraction else "?"
            told = f"{size_text(data)} of data, {size_text(data / max(seconds, 1e-3))}/s, {left} left"
            self._bar.n = fraction
            self._bar.ncols = _columns()
            self._bar.set_description_str(f"{told}, {' '.join(disks)}" if disks else told, refresh=False)
            self._bar.refresh()
        return True


class Totals:
    """What segments have: bytes by state, and bytes that their data takes as it is stored."""

    def __init__(self) -> None:
        self.bytes = {DATA: 0, ZERO: 0, HOLE: 0}
        self.stored = 0

    def add(self, counts: Any) -> None:
        """Add vnb.format.values.Counts."""
        for state, count in counts.bytes.items():
            self.bytes[state] += count
        self.stored += counts.stored

    def fields(self) -> dict[str, int]:
        return {"data": self.bytes[DATA], "stored": self.stored, "zero": self.bytes[ZERO], "hole": self.bytes[HOLE]}

    def __str__(self) -> str:
        data, zero = self.bytes[DATA], self.bytes[ZERO] + self.bytes[HOLE]
        ratio = f" ({data / self.stored:.1f}:1)" if self.stored else ""
        return f"{size_text(data)} of data, {size_text(self.stored)} stored{ratio}, {size_text(zero)} zero"


def size_text(count: float) -> str:
    """Bytes for people, as "512 bytes", "1.5 GiB"."""
    unit = 0
    while count >= 1024 and unit + 1 < len(_UNITS):
        count /= 1024
        unit += 1
    return f"{count:.{1 if unit else 0}f} {_UNITS[unit]}"


def _columns():
    """How wide the terminal is now; not each one says, and with none tqdm shows all that it knows, at any length."""
    try:
        return os.get_terminal_size(2).columns or COLUMNS
    except OSError:
        return COLUMNS


def _left(fraction, seconds):
    """Seconds that the rest takes, if it goes on as before."""
    return seconds * (1 - fraction) / fraction
