# SPDX-License-Identifier: LGPL-2.1-or-later
"""The table of the restore points of sets and files."""

from __future__ import annotations

import os
import sys

from vnb.base import log
from vnb.base.errors import Error, one_line
from vnb.cli.runner import show
from vnb.store import backupset, chain

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any



def listed(operands: Sequence[str]) -> int:
    """A table of each set; files that are no set have one together. Returns the exit status."""
    files = [operand for operand in operands if not os.path.isdir(operand)]
    tables = [[operand] for operand in operands if operand not in files] + ([files] if files else [])
    status = 0
    for number, table in enumerate(tables):
        name = table[0] if len(table) == 1 else "the files"
        try:
            segments, damaged = backupset.some(table)
        except Error as error:
            sys.stdout.flush()
            log.error(error)
            status = 1
            continue
        if len(tables) > 1:
            domains = sorted({f'{segment.head["domain"]} ({segment.head["uuid"]})' for segment in segments})
            show(("\n" if number else "") + one_line(f"{name}: {', '.join(domains)}") + "\n")
        status |= _table(segments, damaged, name)
    return status


def _table(segments: Any, damaged: Any, name: str) -> int:
    """Print the restore points, and which of them lead to the latest one. Returns the exit status."""
    rows = [("restore point", "level", "created", "bytes", "base")]
    for segment in sorted(segments, key=age):
        head = segment.head
        rows.append((head["point"], head["level"], head["created"], str(segment.length), head["parent"] or "-"))
    widths = [max(map(len, column)) for column in zip(*rows)]
    for point, level, created, size, parent in rows:
        show(f"{point:{widths[0]}}  {level:{widths[1]}}  {created:{widths[2]}}  {size:>{widths[3]}}  {parent}\n")
    for file in damaged:
        log.warn(file.line)
    show("\n")
    lacking = chain.lacks(segments)
    for point, needed in lacking.items():
        show(f"cannot be restored: {point} needs {needed}, {one_line(chain.where(needed, damaged))}\n")
    try:
        path = chain.path(segments, name, None, damaged)
    except Error as error:
        sys.stdout.flush()
        log.error(error)
        return 1
    show(f'latest: {path[-1].head["point"]}, from {len(path)} segment{"s" * (len(path) > 1)}\n')
    for segment in chain.off_path(segments, path):
        if segment.head["point"] not in lacking:
            show(f'also restorable: {segment.head["point"]} ({segment.name})\n')
    return 0


def age(segment: Any) -> tuple[str, str]:
    return segment.head["created"], segment.head["point"]
