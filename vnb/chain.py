# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Chains: which segment follows which. Pure logic on heads and disks; it opens nothing.

A segment here is any object with head (dict), disks (list of dict) and name (str, for messages). Order comes
from the parent links in the heads, never from file names or file times.
"""

import contextlib

from vnb.errors import Error

HEAD_KEYS = ("id", "stage", "level", "point", "parent", "checkpoint", "chain", "domain", "uuid", "created", "run")
DISK_KEYS = ("name", "size", "level")


def outline(head, disks):
    """
    (head, disks) with nothing but what tells where a segment belongs.

    To be kept of many segments: the rest, XML above all, takes memory, up to seventy times of what it takes in a file.
    """
    return (
        {key: head[key] for key in HEAD_KEYS if key in head},
        [{key: disk[key] for key in DISK_KEYS} for disk in disks],
    )


class Follow:
    """
    Accept the segments of a stream one by one, each only if it may come after those before it.

    force (bool): accept a segment whose parent is not the point before it.
    """

    def __init__(self, name, force=False):
        self.name = name
        self.force = force
        self.head = None
        self.disks = {}

    def begin(self, head, disks):
        """Take the first segment as it is: what it may be an increment to is not here."""
        self.head = head
        self.disks = {disk["name"]: disk for disk in disks}

    def accept(self, head, disks):
        """Take a segment's head and disks. Raises Error, and stays as it was, if it does not follow."""
        before = self.head
        if before is None:
            if head["parent"] is not None and not self.force:
                raise Error(self.name, f'{head["point"]} is an increment to {head["parent"]}, which is not here')
        else:
            if head["uuid"] != before["uuid"]:
                raise Error(
                    self.name,
                    f'{head["point"]} is of another domain ({head["domain"]}, {head["uuid"]}) '
                    f'than {before["point"]} ({before["domain"]}, {before["uuid"]})',
                )
            if head["parent"] != before["point"] and not self.force:
                does = f'follows {head["parent"]}' if head["parent"] else "is a full backup of its own"
                raise Error(self.name, f'{head["point"]} {does}, it does not come after {before["point"]}')
        for disk in disks:
            known = self.disks.get(disk["name"])
            if disk["level"] == "inc" and known is None and not (self.force and before is not None):
                raise Error(self.name, f'{head["point"]} has changes of disk {disk["name"]}, but nothing before it has')
            if disk["level"] == "inc" and known is not None and disk["size"] < known["size"]:
                raise Error(
                    self.name,
                    f'{head["point"]} has changes of disk {disk["name"]} with {disk["size"]} bytes, '
                    f'less than the {known["size"]} before',
                )
        self.begin(head, disks)


def check(segments, name):
    """Raise Error unless all segments are of one domain, with an id of their own and no circle of parents."""
    for fault in _faults_of_identity(segments, name):
        raise fault
    for fault in _circles(segments, name):
        raise fault


def faults(segments, name, whole=True):
    """
    Yield an Error for each thing that is wrong with segments that belong together.

    whole (bool): all parents should be here. check() is for whoever needs to know only that nothing is.
    """
    yield from _faults_of_identity(segments, name)
    yield from _circles(segments, name)
    by_point = points(segments)
    for segment in segments:
        head = segment.head
        if head["parent"] is None:
            continue
        parent = by_point.get(head["parent"])
        if parent is None:
            if whole:
                yield Error(name, f'gap: {head["point"]} needs {head["parent"]}, which is not here')
            continue
        if head["created"] < parent.head["created"]:
            yield Error(name, f'{head["point"]} is older than {head["parent"]}, which it follows')
        follow = Follow(name)
        follow.begin(parent.head, parent.disks)
        try:
            follow.accept(head, segment.disks)
        except Error as error:
            yield error


def _faults_of_identity(segments, name):
    ids = {}
    for segment in segments:
        head = segment.head
        first = segments[0]
        if head["uuid"] != first.head["uuid"]:
            yield Error(
                name,
                f'two domains: {first.name} is of {first.head["domain"]} ({first.head["uuid"]}), '
                f'{segment.name} of {head["domain"]} ({head["uuid"]})',
            )
        other = ids.setdefault(head["id"], segment)
        if other is not segment:
            yield Error(name, f'{other.name} and {segment.name} claim the same id {head["id"]}')


def _circles(segments, name):
    by_point = points(segments)
    seen = set()
    for point in by_point:
        trail = {}  # in order; a dict, since a chain may have many thousands of points
        while point is not None and point not in seen and point in by_point:
            if point in trail:
                circle = list(trail)[list(trail).index(point):]
                yield Error(name, f'a circle of parents: {" -> ".join([*circle, point])}')
                break
            trail[point] = None
            point = by_point[point].head["parent"]
        seen.update(trail)


def points(segments):
    """
    {point: segment that brings one there}.

    A merged segment and those that it replaces may stand side by side: they have the same point. Of these
    alternatives the full one is taken, else one whose way back to a full is there, in the fewest steps. So a set
    of which a part was merged, and then only a part of what that replaced was removed, restores every point.
    One with fewer disks than another is none: somebody has taken some disks out of that, and would lose the others.
    """
    segments = _with_all_disks(segments)
    children = {}
    for segment in segments:
        children.setdefault(segment.head["parent"], []).append(segment)
    chosen = {}
    reached = [None]
    while reached:
        found = [child for point in reached for child in children.get(point, ()) if child.head["point"] not in chosen]
        step = _newest(found)
        chosen.update(step)
        reached = list(step)
    return {**_newest([segment for segment in segments if segment.head["point"] not in chosen]), **chosen}


def _with_all_disks(segments):
    """The segments without those that lack disks which another one has for the same point."""
    most = {}
    for segment in segments:
        point = segment.head["point"]
        most[point] = max(most.get(point, 0), len(segment.disks))
    return [segment for segment in segments if len(segment.disks) == most[segment.head["point"]]]


def _newest(segments):
    """{point: the newest of its segments}."""
    newest = {}
    for segment in segments:
        other = newest.get(segment.head["point"])
        if other is None or _preference(segment) > _preference(other):
            newest[segment.head["point"]] = segment
    return newest


def path(segments, name, until=None):
    """
    The segments to apply, in order, for a point: a full, then increments.

    until (str or None): the name of a point, or a time (see latest); None for the latest point.
    Raises Error for a gap, a circle, segments of two domains, or a point that is not there.
    """
    if not segments:
        raise Error(name, "no segment here")
    check(segments, name)
    by_point = points(segments)
    point = latest(segments, name, until)
    found = []
    while point is not None:
        segment = by_point.get(point)
        if segment is None:
            raise Error(name, f'gap: {found[-1].head["point"]} needs {point}, which is not here')
        found.append(segment)
        point = segment.head["parent"]
    found.reverse()
    follow = Follow(name)
    for segment in found:
        follow.accept(segment.head, segment.disks)
    return found


def latest(segments, name, until=None):
    """
    The name of the point meant by until: itself, or the last one created by that time, or the latest.

    The latest is, among the points that are nobody's parent, the one created last.
    A time is local, 2026-01-31T12:00:00, as a day of --keep-daily is; with Z it is of UTC, as heads have it, and with
    +01:00 of that zone. It may be cut short after any part, and means the whole of that day, minute and so on.
    """
    by_point = points(segments)
    if until is None:
        parents = {segment.head["parent"] for segment in by_point.values()}
        leaves = [segment for point, segment in by_point.items() if point not in parents]
        return max(leaves, key=_age).head["point"]
    if until in by_point:
        return until
    end = _end_of(until, name)
    if end is None:
        raise Error(name, f"no point {until} (vnb-dump lists them)")
    before = [segment for segment in by_point.values() if segment.head["created"] <= end]
    if not before:
        raise Error(name, f"no point as old as {until}")
    return max(before, key=_age).head["point"]


def restorable(segments):
    """The points (list of str) from which parent links lead to a full."""
    by_point = points(segments)
    known = {None: True}
    for point in by_point:
        trail = []
        while point not in known:
            trail.append(point)
            if point not in by_point:
                known[point] = False
                break
            point = by_point[point].head["parent"]
        known.update((passed, known[point]) for passed in trail)
    return [point for point in by_point if known[point]]


def off_path(segments, chosen):
    """Segments that path() left out, oldest first, without those that a chosen one is an alternative to."""
    on = {segment.head["point"] for segment in chosen}
    return sorted((segment for segment in segments if segment.head["point"] not in on), key=_age)


def tip(segments, checkpoints=None):
    """
    The segment whose checkpoint the next increment may start from, or None.

    checkpoints (set of str or None): names that libvirt still has; None: any will do. The newest point that
    has one is taken, along the path of the latest point first.
    """
    candidates = [
        segment
        for segment in points(segments).values()
        if segment.head["checkpoint"] is not None
        and (checkpoints is None or segment.head["checkpoint"] in checkpoints)
    ]
    return max(candidates, key=_age, default=None)


def _preference(segment):
    return (segment.head["created"], segment.head["id"])


def _age(segment):
    return (segment.head["created"], segment.head["point"])


def _end_of(text, name):
    """The last moment of a time, as heads have it, or None for what is no time. Raises Error for what only looks so."""
    import re

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


def _last_moment(year, month=None, day=None, hour=None, minute=None, second=None, fraction=None, zone=None):
    """The same of the parts (str) of a time, None for what is cut off. Raises ValueError or OverflowError."""
    from calendar import monthrange
    from datetime import datetime, timedelta, timezone

    year, month = int(year), int(month or 12)
    moment = datetime(
        year, month, int(day) if day else monthrange(year, month)[1],
        int(hour or 23), int(minute or 59), int(second or 59), int(((fraction or "") + "999999")[:6]),
    )
    if zone == "Z" or year == 9999:  # which no point is of, and in other zones it ends later than what there is
        ends = [moment]
    elif zone is None:
        # When clocks are put back, an hour is there twice: its end is that of the second one.
        ends = [moment.replace(fold=fold).astimezone(timezone.utc) for fold in (0, 1)]
    else:
        offset = timedelta(hours=int(zone[1:3]), minutes=int(zone[4:]))
        ends = [moment.replace(tzinfo=timezone(offset if zone[0] == "+" else -offset)).astimezone(timezone.utc)]
    return f"{max(ends).replace(tzinfo=None).isoformat(timespec='microseconds')}Z"
