# SPDX-License-Identifier: LGPL-2.1-or-later
"""vnb-import - read a directory that virtnbdbackup wrote

Usage:
  vnb-import [--until POINT] [options] DIRECTORY
  vnb-import --help | --version

Writes all backups in the directory as a stream, for vnb-pack -o SET. The
stream also suits vnb-apply if there is no differential backup.

Options:
  --until POINT  write only this restore point and the ones that it needs: the
                 name of a checkpoint such as virtnbdbackup.2, the name of a
                 restore point, or a time such as 2026-01-31
  --progress MODE
                 show the progress: auto, none or json; see vnb(7)
"""

from __future__ import annotations

from vnb.base import log
from vnb.cli import output
from vnb.cli.progress import Progress
from vnb.store import chain
from vnb.virtnbdbackup.directory import Directory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


DOUBT = (
    "may lack what the guest zeroed or trimmed, and then its old bytes come back: it cannot be known (virtnbdbackup "
    "from 2.21 on leaves such ranges out, unless it is told --no-sparse-detection)"
)
INCOMPLETE = 3  # exit status: the stream is whole, but not all points of the directory are in it


def writes_stream(_args: dict[str, Any]) -> bool:
    """Whether standard output gets a stream."""
    return True


def main(args: dict[str, Any]) -> int | None:
    log.name_run()
    backup = Directory(args["DIRECTORY"])
    for line in backup.notes:
        log.warn(f"{backup.path}: {line}")
    wanted, status = backup.points, 0
    named = args["--until"] and backup.named(args["--until"])
    if not named:
        # Whoever wants all, or the last one of a time, has to know what is missing.
        for error in backup.lost if wanted else backup.lost[1:]:
            log.warn(f"{error}: not imported")
        status = INCOMPLETE if backup.lost else 0
    if not wanted:
        raise backup.lost[0]
    if args["--until"]:
        wanted = chain.path(wanted, backup.path, named or args["--until"])
    doubtful = [point for point in wanted if point.may_lack_zeroes]
    if doubtful:
        names = ", ".join(point.head["point"] for point in doubtful[:3])
        more = f" and {len(doubtful) - 3} others" if len(doubtful) > 3 else ""
        log.warn(f"{backup.path}: {names}{more}: {DOUBT}")
    out = output.stdout()
    with Progress(args["--progress"]) as progress:
        for point, after in zip(wanted, [*wanted[1:], None]):
            progress.begin(point.head)
            point.write(out, progress, after)
    return status
