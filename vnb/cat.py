# SPDX-License-Identifier: LGPL-2.1-or-later
"""vnb-cat - turn a saved chain back into a stream

Usage:
  vnb-cat [--until POINT] [--disk NAME]... [--merge [--from POINT]] [options]
      SET_OR_FILE...
  vnb-cat --head [--until POINT] [--disk NAME]... [options] SET_OR_FILE...
  vnb-cat --point [--until POINT] [options] SET_OR_FILE...
  vnb-cat --base [options] SET_OR_FILE...
  vnb-cat --help | --version

Writes the segments that lead to a point, a full and its increments, in order.

Options:
  --until POINT  end at this point: a checkpoint's name, or a time as
                 2026-01-31T12:00, local, or with Z or +01:00 behind it, or
                 cut short as 2026-01-31; the default is the latest point
  --disk NAME    only this disk; may be given several times
  --merge        make one full segment of them, each block once
  --from POINT   with --merge: one increment, of what comes after this point
  --head         only head, disks and files of the last segment, without its
                 extents: all that vnb-config needs
  --point        print the name of the point, and nothing else
  --base         print the checkpoint that the next increment starts from
  --progress MODE
                 auto, none or json: how far it is, see vnb(7)
"""

import os

from xxhash import xxh3_128_hexdigest

from vnb import backupset, chain, codec, heads, log, output, stream
from vnb.errors import Error, UsageError
from vnb.merge import Merge
from vnb.progress import Progress
from vnb.run import show

NAMED = 3  # points that a message has room for


def main(args):
    operands, until = args["SET_OR_FILE"], args["--until"]
    name = operands[0] if len(operands) == 1 else "the chain"
    if args["--from"] and not args["--merge"]:  # docopt does not see to it
        raise UsageError("--from", "goes with --merge")
    segments, damaged = _segments(operands)
    # What cannot be read may be anything: the latest point, or one that a time means. Only a point that is
    # known by its name, and the way to it, need nothing of it.
    if damaged and not (until and until in chain.points(segments)):
        raise damaged[0]
    if args["--base"]:
        _tip(segments, name)
        return
    path = chain.path(segments, name, until)
    for error in damaged:
        log.warn(f"{error}; it is not needed for {until}")
    for segment in path:
        if segment.head["stage"] != "data":
            raise Error(segment.name, f'holds no data, but {segment.head["stage"]}')
    point = path[-1].head["point"]
    if args["--point"]:
        show(f"{point}\n")
        return
    held = {disk["name"] for disk in path[-1].disks}
    unknown = sorted(set(args["--disk"]) - held)
    if unknown:
        raise Error("--disk", f'no disk {", ".join(unknown)} at point {point}')
    left = chain.off_path(segments, path)
    if left and until is None:
        more = f" and {len(left) - NAMED} more (vnb-dump --list has them all)" if len(left) > NAMED else ""
        names = ", ".join(segment.head["point"] for segment in left[-NAMED:])
        log.note(f"{name}: not on the way to {point}: {names}{more}")
    # A disk that the last point does not have is not part of it: nobody needs its older data.
    wanted = set(args["--disk"]) or held
    out = output.stdout()
    if args["--head"]:
        _copy_head(path[-1], out, wanted)
        return
    log.take_run(path[-1].head)
    with Progress(args["--progress"]) as progress:
        progress.begin(path[-1].head)
        if args["--merge"]:
            _merge(_after(path, segments, name, args["--from"]), name, wanted, out, progress)
            return
        length = sum(saved.length for saved in path)
        for saved, after in zip(path, [*path[1:], None]):
            _copy(saved, out, wanted, after, progress, saved.length / length)


def _segments(operands):
    """(segments, errors): of all files that are operands, or in sets that are; the errors of those not readable."""
    found, damaged = [], []
    for operand in operands:
        for path in backupset.paths(operand) if os.path.isdir(operand) else [operand]:
            try:
                found += backupset.segments_in_file(path)
            except Error as error:
                damaged.append(error)
    return found, damaged


def _tip(segments, name):
    chain.check(segments, name)
    tip = chain.tip(segments)
    if tip is None:
        raise Error(name, "no point here has a checkpoint: the next backup must be a full one")
    show(f'{tip.head["checkpoint"]}\n')


def _after(path, segments, name, start):
    """The part of a path (list of segments) that comes after the point start (str), or all of it for None."""
    if start is None:
        return path
    points = [segment.head["point"] for segment in path]
    start = chain.latest(segments, name, start)
    if start not in points[:-1]:
        raise Error("--from", f"{start} is not on the way to {points[-1]}")
    return path[points.index(start) + 1 :]


def _merge(path, name, wanted, out, progress):
    merged = Merge(path, name, wanted)
    merged.read_head()
    with progress.segment(out.segment(merged.head, merged.disks)) as written:
        merged.write(written)
        written.end()


def _copy(saved, out, wanted, after, progress, share):
    """
    Write what a saved segment has of the disks that are wanted (set of names): a share (float) of all there is to do.

    after (SavedSegment or None): follows in this stream, and the head says so: a stream that ends where one of its
    segments does would else be taken for an older point.
    """
    segment = saved.open()
    kept = [number for number, disk in enumerate(segment.disks) if disk["name"] in wanted]
    head = {**segment.head, "next": after.head["point"]} if after is not None else heads.alone(segment.head)
    if len(kept) < len(segment.disks):
        # Not the same segment any more, but the same one each time that these disks are asked for.
        head = {**head, "id": xxh3_128_hexdigest("/".join([head["id"], *(segment.disks[n]["name"] for n in kept)]))}
    numbers = {old: new for new, old in enumerate(kept)}
    with progress.segment(out.segment(head, [segment.disks[number] for number in kept]), share) as written:
        for frame in segment:
            if frame.__class__ in (stream.Data, stream.Extents):
                if frame.disk not in numbers:
                    continue
                if frame.__class__ is stream.Data:
                    codec.check(frame, f'{saved.name}: {segment.disks[frame.disk]["name"]}')
                frame.disk = numbers[frame.disk]
            written.frame(frame)
        written.end()
    saved.close()


def _copy_head(saved, out, wanted):
    """Write what a saved segment has before its extents, as a segment of disks alone."""
    segment = saved.open()
    head = {**heads.alone(segment.head), "stage": "disks", "id": xxh3_128_hexdigest(f"{segment.head['id']}/head")}
    written = out.segment(head, [disk for disk in segment.disks if disk["name"] in wanted])
    for frame in segment:
        if frame.__class__ is stream.File:
            written.frame(frame)
        elif frame.__class__ in (stream.Data, stream.Extents):
            break
    written.end()
    saved.close()
