# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Chains: which segment follows which. Pure logic on heads and disks; it opens nothing.

A segment here is any object with head (dict), disks (list of dict) and name (str, for messages). Order comes
from the parent links in the heads, never from file names or file times.
"""

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
    """
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
    A time is written as heads have it, 2026-01-31T12:00:00Z, or cut short after any part.
    """
    by_point = points(segments)
    if until is None:
        parents = {segment.head["parent"] for segment in by_point.values()}
        leaves = [segment for point, segment in by_point.items() if point not in parents]
        return max(leaves, key=_age).head["point"]
    if until in by_point:
        return until
    if _is_time(until):
        # "2026-01-31" means the whole of that day: compare as much of a time as was given.
        stem = until.rstrip("Z")
        before = [segment for segment in by_point.values() if segment.head["created"][: len(stem)] <= stem]
        if not before:
            raise Error(name, f"no point as old as {until}")
        return max(before, key=_age).head["point"]
    raise Error(name, f"no point {until} (vnb-dump lists them)")


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


def _is_time(text):
    import re

    return re.fullmatch(r"\d{4}(-\d\d(-\d\d(T\d\d(:\d\d(:\d\d(\.\d{1,6})?)?)?)?)?)?Z?", text) is not None
