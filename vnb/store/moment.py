# SPDX-License-Identifier: LGPL-2.1-or-later
"""A time that a user typed, cut short after any part, as the last moment that it means. Pure."""

from __future__ import annotations

import contextlib
import re

from vnb.base.errors import Error


def end_of(text: str, name: str) -> str | None:
    """The last moment of a time, as heads have it, or None for what is no time. Raises Error for what only looks so."""
    if not re.fullmatch(r"[0-9][0-9TZ:.,+ -]*", text):
        return None
    match = re.fullmatch(
        r"(\d{4})(?:-(\d\d)(?:-(\d\d)(?:[T ](\d\d)(?::(\d\d)(?::(\d\d)(?:\.(\d{1,6}))?)?)?)?)?)?"
        r" ?(Z|[+-]\d\d:[0-5]\d)?",
        text, re.ASCII,
    )
    if match:
        with contextlib.suppress(ValueError, OverflowError):
            return _last_moment(*match.groups())
    raise Error(name, f'"{text}" is no time such as 2026-01-31T12:00 or 2026-01-31T12:00Z')


def _last_moment(
    year: str, month: str | None = None, day: str | None = None, hour: str | None = None, minute: str | None = None,
    second: str | None = None, fraction: str | None = None, zone: str | None = None,
) -> str:
    """The same of the parts of a time, None for what is cut off. Raises ValueError or OverflowError."""
    from calendar import monthrange  # only who names a restore point by a time waits for these
    from datetime import datetime, timedelta, timezone

    last = int(year), int(month or 12)
    moment = datetime(
        *last, int(day) if day else monthrange(*last)[1],
        int(hour or 23), int(minute or 59), int(second or 59), int(((fraction or "") + "999999")[:6]),
    )
    if zone == "Z" or year == "9999":  # which no point is of, and in other zones it ends later than what there is
        ends = [moment]
    elif zone is None:
        # When clocks are put back, an hour is there twice: its end is that of the second one.
        ends = [moment.replace(fold=fold).astimezone(timezone.utc) for fold in (0, 1)]
    else:
        offset = timedelta(hours=int(zone[1:3]), minutes=int(zone[4:]))
        ends = [moment.replace(tzinfo=timezone(offset if zone[0] == "+" else -offset)).astimezone(timezone.utc)]
    return f"{max(ends).replace(tzinfo=None).isoformat(timespec='microseconds')}Z"
