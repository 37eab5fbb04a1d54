# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which restore points of a set are kept, and how the rest is merged or dropped."""

from __future__ import annotations

import contextlib
import datetime
import os

from vnb.base.errors import Error
from vnb.store import chain
from vnb.store.merge import Merge
from vnb.virt import domxml

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


MOST = 1_000_000  # points to keep: more than any set has

# What the points of one period have in common, in local time: that is what people mean by a day.
PERIODS = {
    "daily": lambda moment: moment.date(),
    "weekly": lambda moment: moment.isocalendar()[:2],
    "monthly": lambda moment: (moment.year, moment.month),
    "yearly": lambda moment: moment.year,
}


def disks_now(latest: Any) -> Any:
    """The names of the disks that the domain has by a set's latest segment, None where it does not say."""
    with contextlib.closing(latest):
        xml = latest.open().head.get("domain_xml")
    with contextlib.suppress(Error):
        return domxml.disk_names(xml) if xml else None
    return None


class Plan:
    """
    What becomes of the segments of a set. Pure logic on heads; it opens nothing.

    kept: point: list of reasons. held: point that stays because several points start from it: those.
    merges (list of list of segment): each list, oldest first, becomes one segment for its last one's point.
    needed (set of segment): those that stay as they are. left_alone: point that can't be restored from this
    set: the one that it lacks; they count for nothing and nothing happens to them. counts: period: how many.
    damaged (list of Damaged): files of the set that nobody can read: none of them goes, nor what they need.
    disks_now: a function of the latest segment, see disks_now().
    Raises Error for a set with a circle, or of two domains.
    """

    def __init__(
        self, segments: Any, damaged: Any, name: str, counts: dict[str, int],
        disks_now: Callable[[Any], Any] = lambda _: None,
    ) -> None:
        chain.check(segments, name)
        self.segments = segments
        self.damaged = damaged
        self.by_point = chain.points(segments)
        self.left_alone = dict(sorted(chain.lacks(segments).items()))
        points = [segment for point, segment in self.by_point.items() if point not in self.left_alone]
        if not points:
            raise Error(name, "no restore point here can be restored")
        self.kept = chosen(points, counts)
        for reason, segment in [*always(points, disks_now), *wanted_by(damaged, points)]:
            self.kept.setdefault(segment.head["point"], []).append(reason)
        self.held = self._held()
        self.merges = []
        self.needed = set()
        for point in self.fixed:
            run = self._run(point)
            if len(run) == 1:
                self.needed.add(run[0])
            else:
                self.merges.append(run)
        for run in self.merges:
            Merge(run, name)  # what can't be merged is found before anything is

    @property
    def fixed(self) -> Any:
        """The points that stay, kept or held."""
        return [*self.kept, *self.held]

    def _held(self) -> Any:
        """
        Dropped points that more than one kept point starts from: to merge them into each would take more room.

        {point: list of the next points on the ways to kept ones}.
        """
        children: dict[str, list[Any]] = {}
        seen = set()
        for point in self.kept:
            while point is not None and point not in seen:
                seen.add(point)
                parent = self.by_point[point].head["parent"]
                children.setdefault(parent, []).append(point)
                point = parent
        return {
            point: nexts for point, nexts in children.items()
            if point is not None and len(nexts) > 1 and point not in self.kept
        }

    def _run(self, point: str) -> Any:
        """The segments from a point back to, not including, the next that stays, oldest first."""
        run = [self.by_point[point]]
        while (parent := run[-1].head["parent"]) is not None and parent not in self.kept and parent not in self.held:
            run.append(self.by_point[parent])
        return run[::-1]


def chosen(segments: Any, counts: dict[str, int]) -> Any:
    """
    {point: list of the periods that it is kept for}, as restic has it.

    Going back in time, the first point of each period counts, until there were as many periods as wanted. If the
    oldest of all points comes before that, it is kept too, so that the history is as long as it can be.
    """
    kept: dict[str, list[str]] = {}
    ordered = sorted(segments, key=age, reverse=True)
    for period, count in counts.items():
        last = None
        for number, segment in enumerate(ordered):
            if count == 0:
                break
            value = number if period == "last" else PERIODS[period](moment(segment))
            if value != last or number == len(ordered) - 1:
                kept.setdefault(segment.head["point"], []).append(period if value != last else f"oldest for {period}")
                last = value
                count -= 1
    return kept


def always(segments: Any, disks_now: Any) -> Any:
    """
    Yield (reason, segment) of what always stays.

    The next backups need, of each chain, the latest restore point and the next base. And of each disk that the latest
    restore point lacks, though the domain has it (disks_now, see Plan), the last restore point with this disk stays.
    """
    latest = chain.points(segments)[chain.latest(segments, "the set")]
    yield "latest", latest
    seen, present = {disk["name"] for disk in latest.disks}, disks_now(latest)
    for segment in sorted(segments, key=age, reverse=True):
        for name in sorted({disk["name"] for disk in segment.disks} - seen):
            seen.add(name)
            if present is None or name in present:
                yield f"last with {name}", segment
    chains: dict[Any, Any] = {}
    for segment in segments:
        chains.setdefault(segment.head.get("chain"), []).append(segment)
    for name, members in chains.items():
        tip = chain.newest_base(members)
        if tip is not None:
            yield "next base" if len(chains) == 1 else f"next base of chain {name}", tip


def wanted_by(damaged: Any, segments: Any) -> Any:
    """
    Yield (reason, segment) of what a damaged file needs, or may need: a sound copy of it may come back.

    damaged (list of Damaged). Where nothing of it can be read, its base may be any that is not younger.
    """
    for file in damaged:
        for segment in segments:
            if file.head is not None and segment.head["point"] == file.head["parent"]:
                yield f"base of {os.path.basename(file.name)}, which is damaged", segment
            elif file.newest is None or segment.head["created"] <= file.newest:
                yield f"perhaps needed by {os.path.basename(file.name)}, which is damaged", segment


def age(segment: Any) -> Any:
    return segment.head["created"], segment.head["point"]


def moment(segment: Any) -> Any:
    """When a point was made, in local time."""
    try:
        made = datetime.datetime.strptime(segment.head["created"], "%Y-%m-%dT%H:%M:%S.%fZ")
        return made.replace(tzinfo=datetime.timezone.utc).astimezone()
    except (ValueError, OverflowError):
        raise Error(segment.name, f'"created" is no time: {segment.head["created"]}') from None
