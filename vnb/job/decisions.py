# SPDX-License-Identifier: LGPL-2.1-or-later
"""
The decisions of a backup, each from values alone: what it starts from, which disks it takes in full, which checkpoints
go after it, and what becomes of what a crash has left.

Nothing here asks libvirt, reads a file or says anything. A reason is a member of an enumeration, which
vnb.job.reasons puts into words. tests/job/test_decisions.py has the tables.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from vnb.store import chain

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from typing import Any

    from vnb.format.types import Disk, Head, Saved

    Bitmaps = Mapping[str, Mapping[str, str]]  # {checkpoint: {disk: its sound bitmap}}, of what libvirt knows

LATEST = 3  # checkpoints that are redefined, beside the last full's
KEPT = 2  # checkpoints that a commit keeps, beside the last full's: a lost increment can be taken once more


class Full(enum.Enum):
    """Why a backup is a full one, or has to be."""

    ASKED = enum.auto()
    NOTHING_SAVED = enum.auto()  # no segment of the chain is known
    NOTHING_WHOLE = enum.auto()  # none has all that it needs
    NO_FULL = enum.auto()  # a diff needs one
    NO_CHECKPOINT = enum.auto()  # levels copy and diff make none
    NO_BITMAP = enum.auto()  # libvirt knows a checkpoint, and no disk has a sound bitmap of it
    FORGOTTEN = enum.auto()  # libvirt knows none of the checkpoints
    NO_SUCH_BASE = enum.auto()  # libvirt does not know the checkpoint that the user names


@dataclass(frozen=True)
class Start:
    """
    Where a backup starts from.

    level: full, copy, inc or diff. base: the checkpoint, which is the restore point, that an increment starts from.
    segment: of that restore point, where the catalog has it. why: of a full backup. is_refused: a full one is needed,
    and was not asked for. is_broken: libvirt knows checkpoints of which the bitmaps are of no use.
    """

    level: str
    base: str | None = None
    segment: Any = None
    why: Full | None = None
    is_refused: bool = False
    is_broken: bool = False


@dataclass(frozen=True)
class Candidates:
    """
    Segments that an increment may follow. ours: of the chain. whole: of these, those with all that they need.
    wanted: of these, those that the level may start from.
    """

    ours: list[Any]
    whole: list[Any]
    wanted: list[Any]


def candidates(held: Sequence[Saved], chain_name: str, base: str | None, is_set: bool) -> Candidates:
    """
    Which segments of a catalog a backup may follow.

    base: "full" for the last full one. is_set: all segments that restores need are here, so one that lacks its own
    base is no good: the set would refuse what follows it.
    """
    ours = [segment for segment in held if segment.head.get("chain") == chain_name]
    whole = ours
    if is_set:
        restorable = set(chain.restorable(held))
        whole = [segment for segment in ours if segment.head["point"] in restorable]
    wanted = [segment for segment in whole if segment.head["level"] == "full"] if base == "full" else whole
    return Candidates(ours, whole, wanted)


def to_redefine(whole: Sequence[Saved], known: Collection[str]) -> list[Any]:
    """
    Which segments' checkpoints libvirt should be told of again, oldest first: it has forgotten the latest one.

    What a commit keeps, and one more, so that the next commit drops what is not needed any more. known: checkpoints.
    """
    marked = sorted((segment for segment in whole if segment.head["checkpoint"]), key=_created)
    if not marked or marked[-1].head["checkpoint"] in known:
        return []
    latest = marked[-LATEST:]
    fulls = [segment for segment in marked if segment.head["level"] == "full"]
    wanted = [full for full in fulls[-1:] if full not in latest] + latest
    return [segment for segment in wanted if segment.head["checkpoint"] not in known]


def start(level: str, found: Candidates, have: Bitmaps) -> Start:
    """Where a backup of a level, inc, diff or auto, starts from: the newest restore point with a sound bitmap."""
    usable = {name for name, disks in have.items() if disks}
    base = chain.newest_base(found.wanted, usable)
    if base is not None:
        return Start("inc" if level == "auto" else level, base.head["point"], base)
    is_broken = any(segment.head["checkpoint"] in have for segment in found.wanted)
    if not found.ours:
        why = Full.NOTHING_SAVED
    elif not found.whole:
        why = Full.NOTHING_WHOLE
    elif not found.wanted:
        why = Full.NO_FULL
    elif not any(segment.head["checkpoint"] for segment in found.wanted):
        why = Full.NO_CHECKPOINT
    else:
        why = Full.NO_BITMAP if is_broken else Full.FORGOTTEN
    return Start("full", why=why, is_refused=level != "auto", is_broken=is_broken)


def start_at(level: str, base: str, segment: Saved | None, have: Bitmaps) -> Start:
    """The same where the receiver of the stream has named the base: it knows what it holds. segment: of the base."""
    if base in have:
        return Start("inc" if level == "auto" else level, base, segment)
    return Start("full", why=Full.NO_SUCH_BASE, is_refused=level != "auto")


class InFull(enum.Enum):
    """Why an increment takes all of a disk."""

    NO_BITMAP_EVER = enum.auto()  # its image cannot hold one
    NEW = enum.auto()  # the base does not have it
    SHRANK = enum.auto()
    NO_BITMAP = enum.auto()  # no sound one of it goes back to the base
    OTHER_IMAGE = enum.auto()  # its image is another one than at the base
    MOVED_FILE = enum.auto()  # its image is the file that another disk had at the base


@dataclass(frozen=True)
class DiskNow:
    """
    What is known of a disk when an increment begins. size: bytes.

    can_hold_bitmap. has_bitmap: a sound one goes back to the base. is_same_image: as far as that is known.
    moved_from: the disk whose file this one has now.
    """

    name: str
    size: int
    can_hold_bitmap: bool = True
    has_bitmap: bool = True
    is_same_image: bool = True
    moved_from: str | None = None


def in_full(disk: DiskNow, then: Sequence[Disk] | None) -> InFull | None:
    """Why an increment has to take all of a disk, or None. then: the disks of the base; None: they are not known."""
    if not disk.can_hold_bitmap:
        return InFull.NO_BITMAP_EVER
    if then is not None:
        before = next((known for known in then if known["name"] == disk.name), None)
        if before is None:
            return InFull.NEW
        if disk.size < before["size"]:
            return InFull.SHRANK
    if not disk.has_bitmap:
        return InFull.NO_BITMAP
    # The bitmaps of all disks have the checkpoint's name: one in an image that was another disk's then would do.
    if not disk.is_same_image:
        return InFull.OTHER_IMAGE
    if disk.moved_from is not None:
        return InFull.MOVED_FILE
    return None


def superseded(held: Sequence[Saved], head: Head, known: Collection[str], is_broken: bool) -> list[str]:
    """
    The checkpoints of a chain that go after a commit, oldest first: nothing needs them any more.

    held: the catalog's segments, the new one among them. head: of the new one. known: checkpoints that libvirt has.
    is_broken: QEMU died hard, and older bitmaps are inconsistent. No increment can use them, and no disk can be
    resized; but where the new segment has no checkpoint, nothing is newer than what may be sound on other disks.
    """
    of_chain = sorted((segment for segment in held if segment.head.get("chain") == head["chain"]), key=_created)
    heads = [(segment.head["checkpoint"], segment.head["level"]) for segment in of_chain]
    ours = [name for name, _ in heads if name is not None and name in known]
    if is_broken and head["checkpoint"] is None:
        return []
    if is_broken:
        kept = {head["checkpoint"]}
    else:
        fulls = [name for name, level in heads if name in ours and level == "full"]
        kept = {*ours[-KEPT:], *fulls[-1:]}
    return [name for name in ours if name not in kept]


def grandparent(head: Head, abouts: Mapping[str, Mapping[str, Any]]) -> str | None:
    """
    The checkpoint that goes after a commit where nothing is known of the receiver, which has named the base.

    The base stays, and the one before it goes; but only one that was made so, too, and from which nothing else goes
    on: that may be of another receiver. abouts: what checkpoints of ours say of themselves.
    """
    if head["checkpoint"] is None or head["parent"] is None:
        return None
    ours = {name: about.get("base") for name, about in abouts.items() if about.get("catalog") is None}
    before = ours.get(head["parent"])
    if before is None or before not in ours:
        return None
    return before if [about.get("base") for about in abouts.values()].count(before) == 1 else None


def pruned(dropped: Collection[str], chain_name: str, held: Sequence[Saved], known: Collection[str]) -> list[str]:
    """
    The checkpoints of a chain that go because vnb-prune dropped their restore points from the set.

    dropped: names that stand in the set, whoever wrote them: never anybody else's goes, nor one that a segment has.
    """
    saved = {segment.head["checkpoint"] for segment in held}
    return sorted(name for name in dropped if is_of_chain(name, chain_name) and name in known and name not in saved)


def is_of_chain(checkpoint: str, chain_name: str) -> bool:
    """Whether a checkpoint has a name that vnb gives those of a chain."""
    return checkpoint.startswith(f"vnb.{chain_name}.")


class Left(enum.Enum):
    """What becomes of a job that a process has left behind."""

    RUNS = enum.auto()  # its owner is not provably dead: left alone
    END = enum.auto()  # its owner is dead: it is ended
    THAW = enum.auto()  # it has ended; what is left to do is to thaw the guest


def left(has_ended: bool, is_owner_dead: bool) -> Left:
    """What becomes of a job whose record is found by somebody who has the domain's lock."""
    if has_ended:
        return Left.THAW
    return Left.END if is_owner_dead else Left.RUNS


class Fate(enum.Enum):
    """What becomes of the new checkpoint of a job that is aborted."""

    NONE = enum.auto()  # it makes none
    SAVED = enum.auto()  # it stays: its segment counts
    UNKNOWN = enum.auto()  # it stays: one too many does no harm, one too few costs a full backup
    DELETE = enum.auto()


def fate(has_checkpoint: bool, is_saved: bool | None) -> Fate:
    """What becomes of the checkpoint of an aborted job. is_saved: None where the catalog cannot be read."""
    if not has_checkpoint:
        return Fate.NONE
    if is_saved is None:
        return Fate.UNKNOWN
    return Fate.SAVED if is_saved else Fate.DELETE


class Unsaved(enum.Enum):
    """What becomes of a checkpoint of ours, of which no segment is known, when somebody cleans up."""

    DELETE = enum.auto()
    DAMAGED = enum.auto()  # left alone: a file of its catalog is damaged, and may have it
    EMPTY = enum.auto()  # left alone: its catalog has nothing, and may be away, as a file system that is not mounted
    OTHER = enum.auto()  # left alone: its catalog is not known here, or its owner may live


def unsaved(
    force: bool, is_known: bool, is_owner_dead: bool, is_damaged: bool, holds_any: bool, is_alone: bool
) -> Unsaved:
    """
    See Unsaved. is_known: its catalog is one that we can look into. is_damaged, holds_any: of that catalog.

    is_alone: it is the only such checkpoint of its catalog. One is what the first backup leaves that crashed.
    """
    if force:
        return Unsaved.DELETE
    if not (is_known and is_owner_dead):
        return Unsaved.OTHER
    if is_damaged:
        return Unsaved.DAMAGED
    return Unsaved.DELETE if holds_any or is_alone else Unsaved.EMPTY


def is_stale(segment: Saved, of_catalog: Sequence[Saved], known: Collection[str]) -> bool:
    """
    Whether the bitmap of a saved segment, whose checkpoint is gone, is of no use: increments start from a later one.

    of_catalog: all segments of its catalog. known: checkpoints. The last full's may be wanted by a diff.
    """
    of_chain = [other for other in of_catalog if other.head.get("chain") == segment.head.get("chain")]
    fulls = [_created(other) for other in of_chain if other.head["level"] == "full"]
    newer = [
        other for other in of_chain if _created(other) > _created(segment) and other.head["checkpoint"] in known
    ]
    return bool(newer) and _created(segment) != max(fulls, default=None)


def _created(segment: Saved) -> str:
    return segment.head["created"]
