# SPDX-License-Identifier: LGPL-2.1-or-later
"""vnb-cat - turn a saved chain back into a stream

Usage:
  vnb-cat [--until POINT] [--disk NAME]... [--merge [--from POINT]] [options]
      SET_OR_FILE...
  vnb-cat --head [--until POINT] [--disk NAME]... [options] SET_OR_FILE...
  vnb-cat --point [--until POINT] [options] SET_OR_FILE...
  vnb-cat --base [options] SET_OR_FILE...
  vnb-cat --help | --version

Writes a stream that leads to one restore point: a full backup and the
increments that follow it, in this order.

Options:
  --until POINT  end at this restore point: its name, or a time such as
                 2026-01-31T12:00; a time is local unless Z or +01:00 follows,
                 and can be cut short as in 2026-01-31; the default is the
                 latest restore point
  --disk NAME    write only this disk; may be given several times
  --merge        merge the segments into one full segment
  --from POINT   with --merge: write one increment, with everything that comes
                 after this restore point; exit with 4 if nothing does
  --head         write only head, disks and files of the last segment, which
                 is all that vnb-config needs
  --point        print the name of the restore point, and nothing else
  --base         print the checkpoint that the next increment starts from
  --progress MODE
                 show the progress: auto, none or json; see vnb(7)
"""

from __future__ import annotations

import os

from xxhash import xxh3_128_hexdigest

from vnb.base import log
from vnb.base.errors import Error, UsageError
from vnb.cli import output
from vnb.cli.progress import Progress
from vnb.cli.runner import show
from vnb.format import codec, heads, values
from vnb.store import backupset, chain
from vnb.store.domain_files import files_of, merged_files
from vnb.store.merge import Merge

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Container, Sequence

    from vnb.format.types import Head
    from vnb.format.writing import Writer
    from vnb.store.damage import Damaged
    from vnb.store.saved_segment import SavedSegment


TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


NOTHING_TO_DO = 4  # exit status


def writes_stream(args: dict[str, Any]) -> bool:
    """Whether standard output gets a stream."""
    return not (args["--point"] or args["--base"])


def main(args: dict[str, Any]) -> int | None:
    operands, until = args["SET_OR_FILE"], args["--until"]
    name = operands[0] if len(operands) == 1 else "the chain"
    if args["--from"] and not args["--merge"]:  # docopt does not see to it
        raise UsageError("--from", "goes with --merge")
    segments, damaged = backupset.some(operands)
    if args["--base"]:
        _base(segments, name, damaged)
        return 0
    path = chain.path(segments, name, until, damaged)
    # Another command of this run has chosen the restore point, and said so.
    said = path[-1].head["point"] == until and "VNB_RUN" in os.environ and not args["--point"]
    for file in damaged:
        (log.detail if said else log.warn)(file.line)
    for segment in path:
        if segment.head["stage"] != "data":
            raise Error(segment.name, f'holds no data, but {segment.head["stage"]}')
    point = path[-1].head["point"]
    if args["--point"]:
        show(f"{point}\n")
        return 0
    held = {disk["name"] for disk in path[-1].disks}
    unknown = sorted(set(args["--disk"]) - held)
    if unknown:
        raise Error("--disk", f'no disk {", ".join(unknown)} at restore point {point}')
    if args["--from"]:
        path = _after(path, segments, name, args["--from"])
        if not path:
            log.note(f"{name}: nothing to do: {point} is the last restore point{f' by {until}' if until else ''}")
            return NOTHING_TO_DO
    left = len(chain.off_path(segments, path))
    if left and until is None:
        log.detail(f"{name}: {left} other restore points are not needed for {point} (vnb-dump --list has them)")
    # A disk that the last point does not have is not part of it: nobody needs its older data.
    wanted = set(args["--disk"]) or held
    out = output.stdout()
    if args["--head"]:
        _copy_head(path, out, wanted)
        return 0
    log.take_run(path[-1].head)
    with Progress(args["--progress"]) as progress:
        progress.begin(path[-1].head)
        if args["--merge"]:
            _merge(path, name, wanted, out, progress)
            return 0
        length = sum(saved.length for saved in path)
        grows = _grows(path, wanted)
        for saved, after in zip(path, [*path[1:], None]):
            more = {"grows": grows} if grows and saved is path[0] else {}
            _copy(saved, out, wanted, after, more, progress, saved.length / length)
    return 0


def _base(segments: Sequence[SavedSegment], name: str, damaged: Sequence[Damaged]) -> Any:
    for file in damaged:
        log.warn(file.line)
    whole = set(chain.restorable(segments))
    base = chain.newest_base([segment for segment in segments if segment.head["point"] in whole])
    if base is None:
        chain.check(segments, name)
        raise Error(name, "no restore point here has a checkpoint: the next backup must be a full one (--level full)")
    show(f'{base.head["checkpoint"]}\n')


def _after(path: Sequence[SavedSegment], segments: Sequence[SavedSegment], name: str, start: str) -> Any:
    """The part of a path (list of segments) that comes after a restore point or time. Raises Error."""
    points = [segment.head["point"] for segment in path]
    start = chain.latest(segments, name, start)
    if start not in points:
        raise Error("--from", f"{start} is not on the way to {points[-1]}")
    return path[points.index(start) + 1 :]


def _merge(path: Sequence[SavedSegment], name: str, wanted: Container[str] | None, out: Writer, progress: Any) -> None:
    merged = Merge(path, name, wanted)
    merged.read_head()
    with progress.segment(out.segment(merged.head, merged.disks)) as written:
        merged.write(written)
        written.end()


def _grows(path: Sequence[SavedSegment], wanted: Any) -> dict[str, int]:
    """{disk: its most bytes} of the wanted disks (set of names) that are larger later than in the first segment."""
    first = {disk["name"]: disk["size"] for disk in path[0].disks}
    most: dict[str, int] = {}
    for segment in path[1:]:
        for disk in segment.disks:
            if disk["name"] in wanted and disk["size"] > max(first.get(disk["name"], -1), most.get(disk["name"], -1)):
                most[disk["name"]] = disk["size"]
    return most


def _copy(saved: SavedSegment, out: Writer, wanted: Any, after: Any, more: Any, progress: Any, share: Any) -> None:
    """
    Write what a saved segment has of the disks that are wanted (set of names): a share of all there is to do.

    after: follows in this stream, and the head says so: a stream that ends where one of its
    segments does would else be taken for an older point. more: what else its head is to have.
    """
    segment = saved.open()
    kept = [number for number, disk in enumerate(segment.disks) if disk["name"] in wanted]
    head: Any = {**heads.alone(segment.head), **more}
    if after is not None:
        head["next"] = after.head["point"]
    if len(kept) < len(segment.disks):
        # Not the same segment any more, but the same one each time that these disks are asked for.
        head = {**head, "id": _id(head, *(segment.disks[number]["name"] for number in kept))}
    numbers = {old: new for new, old in enumerate(kept)}
    with progress.segment(out.segment(head, [segment.disks[number] for number in kept]), share) as written:
        for frame in segment:
            if type(frame) is values.Data or type(frame) is values.Extents:
                if frame.disk not in numbers:
                    continue
                if type(frame) is values.Data:
                    codec.check(frame, f'{saved.name}: {segment.disks[frame.disk]["name"]}')
                frame.disk = numbers[frame.disk]
            written.frame(frame)
        written.end()
    saved.close()


def _copy_head(path: Sequence[SavedSegment], out: Writer, wanted: Any) -> None:
    """Write what the last segment of a path has before its extents: a segment of disks alone, with all files."""
    segment = path[-1].open()
    head: Any = {**heads.alone(segment.head), "stage": "disks", "id": _id(segment.head, "head")}
    if "files" in head:
        head["files"] = merged_files(path)
    written = out.segment(head, [disk for disk in segment.disks if disk["name"] in wanted])
    for frame in files_of(path):
        written.frame(frame)
    written.end()
    for saved in path:
        saved.close()


def _id(head: Head, *words: Any) -> str:
    """The id of what is made, by these words, of the segment with this head: the same one each time."""
    return xxh3_128_hexdigest("/".join([head["id"], *words]).encode())
