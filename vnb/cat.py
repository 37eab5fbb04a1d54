# SPDX-License-Identifier: LGPL-2.1-or-later
"""vnb-cat - turn a saved chain back into a stream

Usage:
  vnb-cat [--until POINT] [--disk NAME]... [--debug] SET_OR_FILE...
  vnb-cat --tip [--debug] SET_OR_FILE...
  vnb-cat --help | --version

Writes the segments that lead to a point, a full and its increments, in order.

Options:
  --until POINT  end at this point: a checkpoint's name, or a time as
                 2026-01-31T12:00:00Z, or cut short as 2026-01-31; the
                 default is the latest point
  --disk NAME    only this disk; may be given several times
  --tip          print the checkpoint that the next increment starts from
  --debug        show tracebacks
  --help         print this
  --version      print the version
"""

import secrets

from vnb import backupset, chain, stream
from vnb.errors import Error
from vnb.run import note


def main(args):
    operands = args["SET_OR_FILE"]
    name = operands[0] if len(operands) == 1 else "the chain"
    segments = backupset.segments(operands)
    if args["--tip"]:
        chain.check(segments, name)
        tip = chain.tip(segments)
        if tip is None:
            raise Error(name, "no point here has a checkpoint: the next backup must be a full one")
        print(tip.head["checkpoint"])
        return
    path = chain.path(segments, name, args["--until"])
    wanted = set(args["--disk"])
    unknown = wanted - {disk["name"] for disk in path[-1].disks}
    if unknown:
        raise Error("--disk", f'no disk {", ".join(sorted(unknown))} at point {path[-1].head["point"]}')
    left = chain.off_path(segments, path)
    if left and args["--until"] is None:
        note("vnb-cat", f'{name}: not on the way to {path[-1].head["point"]}: '
             + ", ".join(segment.head["point"] for segment in left))
    out = stream.stdout()
    # A disk that the last point does not have is not part of it: nobody needs its older data.
    wanted = wanted or {disk["name"] for disk in path[-1].disks}
    for saved in path:
        _copy(saved.open(), out, wanted)
        saved.close()


def _copy(segment, out, wanted):
    kept = [number for number, disk in enumerate(segment.disks) if disk["name"] in wanted]
    head = segment.head
    if len(kept) < len(segment.disks):
        head = {**head, "id": secrets.token_hex(16)}  # not the same segment any more
    numbers = {old: new for new, old in enumerate(kept)}
    written = out.segment(head, [segment.disks[number] for number in kept])
    for frame in segment:
        if frame.__class__ in (stream.Data, stream.Extents):
            if frame.disk not in numbers:
                continue
            frame.disk = numbers[frame.disk]
        written.frame(frame)
    written.end()
