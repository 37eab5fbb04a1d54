# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Chains: which segment follows which. Pure logic on heads and disks; it opens nothing.

A segment here is any object with head, disks, and a name for messages. Order comes
from the links in the heads, never from file names or file times.
"""

from __future__ import annotations

from vnb.base.errors import Error
from vnb.store.damage import NOTHING
from vnb.store.moment import end_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Iterator, Sequence
    from typing import Any, TypeVar

    from vnb.format.types import DescribedFile, Disk, Head, Saved
    from vnb.store.damage import Damaged
    S = TypeVar("S", bound=Saved)


HEAD_KEYS = (
    "id", "stage", "level", "point", "parent", "checkpoint", "chain", "domain", "uuid", "created", "run", "files",
)
DISK_KEYS = ("name", "size", "level")
NAMED = 3  # files that a message has room for


def outline(head: Head, disks: Sequence[Disk]) -> tuple[Head, list[Disk]]:
    """
    (head, disks) with nothing but what tells where a segment belongs.

    To be kept of many segments: the rest, XML above all, takes memory, up to seventy times of what it takes in a file.
    """
    kept: Any = {key: value for key, value in head.items() if key in HEAD_KEYS}
    outlines: list[Any] = [{key: value for key, value in disk.items() if key in DISK_KEYS} for disk in disks]
    return kept, outlines


class Follow:
    """
    Accept the segments of a stream one by one, each only if it may come after those before it.

    force: accept a segment whose parent is not the point before it.
    """

    def __init__(self, name: str, force: bool = False) -> None:
        self.name = name
        self.force = force
        self.head: Head | None = None
        self.disks: dict[str, Disk] = {}

    def begin(self, head: Head, disks: Sequence[Disk]) -> None:
        """Take the first segment as it is: what it may be an increment to is not here."""
        self.head = head
        self.disks = {disk["name"]: disk for disk in disks}

    def accept(self, head: Head, disks: Sequence[Disk]) -> None:
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
                reason = f'{head["point"]} {does}, it does not come after {before["point"]}'
                raise Error(self.name, f"{reason} (vnb-cat FILE... finds the order)")
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


def check(segments: Sequence[Saved], name: str) -> None:
    """Raise Error unless all segments are of one domain, with an id of their own and no circle of bases."""
    for fault in _faults_of_identity(segments, name):
        raise fault
    for fault in _circles(segments, name):
        raise fault


def faults(segments: Sequence[Saved], name: str, whole: bool = True) -> Iterator[Error]:
    """
    Yield an Error for each thing that is wrong with segments that belong together.

    whole: all bases should be here. check() is for whoever needs to know only that nothing is.
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
            check_files(head, [other.head for other in segments if other.head["point"] == head["parent"]], name)
        except Error as error:
            yield error


def check_files(head: Head, bases: Sequence[Head], name: str) -> None:
    """Raise Error unless a base has each file that a head says it has. bases: heads with that point."""
    for file in head.get("files", ()):
        if "base" in file and not any(_has_file(base, file) for base in bases):
            raise Error(
                name, f'{head["point"]} has the {file["role"]} of {head["parent"]}, which has another one, or none',
                file["path"],
            )


def _has_file(head: Head, file: DescribedFile) -> bool:
    return any(_content(other) == _content(file) for other in head.get("files", ()))


def _content(file: DescribedFile) -> tuple[str, str, int, str]:
    return file["role"], file["path"], file["size"], file["sha256"]


def _faults_of_identity(segments: Sequence[Saved], name: str) -> Iterator[Error]:
    ids: dict[str, Saved] = {}
    for segment in segments:
        head = segment.head
        yield from _faults_of_domain((segments[0], segment), name)
        other = ids.setdefault(head["id"], segment)
        if other is not segment:
            yield Error(name, f'{other.name} and {segment.name} claim the same id {head["id"]}')


def _faults_of_domain(segments: Sequence[Saved], name: str) -> Iterator[Error]:
    for segment in segments:
        head, first = segment.head, segments[0]
        if head["uuid"] != first.head["uuid"]:
            yield Error(
                name,
                f'two domains: {first.name} is of {first.head["domain"]} ({first.head["uuid"]}), '
                f'{segment.name} of {head["domain"]} ({head["uuid"]})',
            )


def _circles(segments: Sequence[Saved], name: str) -> Iterator[Error]:
    by_point = points(segments)
    seen: set[str] = set()
    for start in by_point:
        point: str | None = start
        trail: dict[str, None] = {}  # in order; a dict, since a chain may have many thousands of points
        while point is not None and point not in seen and point in by_point:
            if point in trail:
                yield Error(name, _circle_at(point, trail))
                break
            trail[point] = None
            point = by_point[point].head["parent"]
        seen.update(trail)


def _circle_at(point: str, trail: Iterable[str]) -> str:
    """A circle, in words: trail has the points that lead to one of them once more."""
    circle = list(trail)[list(trail).index(point):]
    return f'circular bases: {" -> ".join([*circle, point])}'


def points(segments: Sequence[S]) -> dict[str, S]:
    """
    {point: segment that brings one there}.

    A merged segment and those that it replaces may stand side by side: they have the same point. Of these
    alternatives the full one is taken, else one whose way back to a full is there, in the fewest steps. So a set
    of which a part was merged, and then only a part of what that replaced was removed, restores every point.
    One with fewer disks than another is none: somebody has taken some disks out of that, and would lose the others.
    """
    segments = _with_all_disks(segments)
    children: dict[str | None, list[S]] = {}
    for segment in segments:
        children.setdefault(segment.head["parent"], []).append(segment)
    chosen: dict[str, S] = {}
    reached: list[str | None] = [None]
    while reached:
        found = [child for point in reached for child in children.get(point, ()) if child.head["point"] not in chosen]
        step = _newest(found)
        chosen.update(step)
        reached = list(step)
    return {**_newest([segment for segment in segments if segment.head["point"] not in chosen]), **chosen}


def _with_all_disks(segments: Sequence[S]) -> list[S]:
    """The segments without those that lack disks which another one has for the same point."""
    most: dict[str, int] = {}
    for segment in segments:
        point = segment.head["point"]
        most[point] = max(most.get(point, 0), len(segment.disks))
    return [segment for segment in segments if len(segment.disks) == most[segment.head["point"]]]


def _newest(segments: Sequence[S]) -> dict[str, S]:
    """{point: the newest of its segments}."""
    newest: dict[str, S] = {}
    for segment in segments:
        other = newest.get(segment.head["point"])
        if other is None or _preference(segment) > _preference(other):
            newest[segment.head["point"]] = segment
    return newest


def path(segments: Sequence[S], name: str, until: str | None = None, damaged: Sequence[Damaged] = ()) -> list[S]:
    """
    The segments to apply, in order, for a restore point: a full, then increments.

    until: the name of a restore point, or a time (see latest); None for the latest one.
    damaged: files whose segments are not among these.
    Raises Error for a gap, a circle, segments of two domains, or a restore point that is not there.
    """
    if not segments:
        for file in damaged:
            raise file.error
        raise Error(name, "no segment here")
    last = latest(segments, name, until, damaged)
    segments = _of_domain_of(last, segments)
    by_point = points(segments)
    found: dict[str, S] = {}
    point: str | None = last
    while point is not None:
        if point in found:
            raise Error(name, _circle_at(point, found))
        segment = by_point.get(point)
        if segment is None:
            child = list(found.values())[-1].head["point"]
            raise Error(name, f"gap: {child} needs {point}, {where(point, damaged)}{_instead(segments, name)}")
        found[point] = segment
        point = segment.head["parent"]
    way = list(found.values())[::-1]
    ids = {segment.head["id"] for segment in way}
    for fault in _faults_of_identity([segment for segment in segments if segment.head["id"] in ids], name):
        raise fault
    follow = Follow(name)
    for segment in way:
        follow.accept(segment.head, segment.disks)
    return way


def _of_domain_of(point: str, segments: Sequence[S]) -> list[S]:
    """The segments of the domain of a restore point."""
    uuids = {segment.head["uuid"] for segment in segments if segment.head["point"] == point}
    return [segment for segment in segments if segment.head["uuid"] in uuids]


def where(point: str, damaged: Sequence[Damaged]) -> str:
    """Where a restore point is that no segment has, in words. damaged: see path()."""
    for file in damaged:
        if file.head is not None and file.head["point"] == point:
            return f"which is damaged ({file.name})"
    unknown = _unknown(damaged)
    return f"which is not here, or in what is damaged ({unknown})" if unknown else "which is not here"


def _unknown(damaged: Sequence[Damaged]) -> str:
    """The files, in words, of which nobody knows what is in them; "" if there is none."""
    names = [file.name for file in damaged if file.may_be_after(NOTHING)]
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if names[NAMED:] else "")


def _instead(segments: Sequence[Saved], name: str) -> str:
    """The end of a message: what can be restored."""
    by_point = points(segments)
    newest = max((by_point[point] for point in restorable(segments)), key=_age, default=None)
    return f"; --until {newest.head['point']} is the newest that can be restored" if newest is not None else ""


def latest(segments: Sequence[Saved], name: str, until: str | None = None, damaged: Sequence[Damaged] = ()) -> str:
    """
    The name of the restore point meant by until: itself, or the last one created by that time, or the latest.

    The latest is, among the restore points that are nobody's base, the one created last.
    A time is local, 2026-01-31T12:00:00, as a day of --keep-daily is; with Z it is of UTC, as heads have it, and with
    +01:00 of that zone. It may be cut short after any part, and means the whole of that day, minute and so on.
    damaged: nothing older takes the place of what is, or may be, in there.
    Raises Error.
    """
    by_point = points(segments)
    if until is not None and until in by_point:
        return until
    lost = [file for file in damaged if file.head is not None and file.head["point"] not in by_point]
    for file in lost:
        if file.head is not None and file.head["point"] == until:
            raise Error(name, f"{until} is damaged ({file.error}){_instead(segments, name)}")
    end = None
    if until is None:
        what = "the latest restore point"
    else:
        end = end_of(until, name)
        if end is None:
            reason = f"no restore point {until} (vnb-dump --list has them), nor is that a time such as 2026-01-31T12:00"
            unknown = _unknown(damaged)
            raise Error(name, reason + (f"; it may be in what is damaged ({unknown})" if unknown else ""))
        what = f"the last restore point by {until}"
    for fault in _faults_of_domain(segments, name):
        raise fault
    heads = [segment.head for segment in by_point.values()]
    heads += [file.head for file in lost if file.head is not None]
    if end is None:
        parents = {head["parent"] for head in heads}
        found = [head for head in heads if head["point"] not in parents]
    else:
        found = [head for head in heads if head["created"] <= end]
    if not found and end is None:
        raise next(_circles(segments, name), Error(name, "circular bases"))
    chosen = max(found, key=_age_of_head, default=None)
    for file in damaged:
        if file.may_be_after(chosen["created"] if chosen else NOTHING) and not (end and file.is_after(end)):
            raise Error(name, f"{what} may be in a file that cannot be read ({file.error}){_instead(segments, name)}")
    if chosen is None:
        oldest = min((head["created"] for head in heads), default=None)
        raise Error(name, f"no restore point is as old as {until}: the oldest is of {oldest}")
    if chosen["point"] not in by_point:
        error = next(file.error for file in lost if file.head is chosen)
        raise Error(name, f'{what}, {chosen["point"]}, is damaged ({error}){_instead(segments, name)}')
    return chosen["point"]


def restorable(segments: Sequence[Saved]) -> list[str]:
    """The restore points from which the links lead to a full."""
    lacking = lacks(segments)
    return [point for point in points(segments) if point not in lacking]


def lacks(segments: Sequence[Saved]) -> dict[str, str]:
    """{restore point: the one that it needs, and that no segment has}; in a circle, or from it on, itself."""
    by_point = points(segments)
    known: dict[str | None, str | None] = {None: None}
    for start in by_point:
        point: str | None = start
        trail: dict[str | None, None] = {}
        while point not in known:
            trail[point] = None
            if point not in by_point or by_point[point].head["parent"] in trail:  # not there, or a circle
                known[point] = point
                break
            point = by_point[point].head["parent"]
        known.update((passed, known[point]) for passed in trail)
    needed = {point: known[point] for point in by_point}
    return {point: lacking for point, lacking in needed.items() if lacking is not None}


def off_path(segments: Sequence[S], chosen: Sequence[Saved]) -> list[S]:
    """Segments that path() left out, oldest first, without those that a chosen one is an alternative to."""
    on = {segment.head["point"] for segment in chosen}
    return sorted((segment for segment in segments if segment.head["point"] not in on), key=_age)


def newest_base(segments: Sequence[S], checkpoints: Container[str] | None = None) -> S | None:
    """
    The segment whose checkpoint the next increment may start from, or None.

    checkpoints: names that libvirt still has; None: any will do. The newest point that
    has one is taken, along the path of the latest point first.
    """
    candidates = [
        segment
        for segment in points(segments).values()
        if segment.head["checkpoint"] is not None
        and (checkpoints is None or segment.head["checkpoint"] in checkpoints)
    ]
    return max(candidates, key=_age, default=None)


def _preference(segment: Saved) -> tuple[str, str]:
    return (segment.head["created"], segment.head["id"])


def _age(segment: Saved) -> tuple[str, str]:
    return _age_of_head(segment.head)


def _age_of_head(head: Head) -> tuple[str, str]:
    return (head["created"], head["point"])
