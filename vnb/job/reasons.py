# SPDX-License-Identifier: LGPL-2.1-or-later
"""The reasons of vnb.job.decisions in words, for messages."""

from __future__ import annotations

from vnb.format import heads
from vnb.job.decisions import Full, InFull

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vnb.job.decisions import DiskNow
    from vnb.store.catalog import Catalog


def full(why: Full, catalog: Catalog, chain: str, base: str | None, forgotten: str) -> str:
    """Why a full backup is needed. base: what the user names. forgotten: what to say of checkpoints that are gone."""
    where = catalog.where
    nothing = f"no earlier backup is saved {where}"
    if chain != heads.DEFAULT_CHAIN:
        nothing = f"no earlier backup of chain {chain} is saved {where}"
    return {
        Full.NOTHING_SAVED: nothing,
        Full.NOTHING_WHOLE: f"no restore point {where} has all that it needs",
        Full.NO_FULL: f"no full backup of chain {chain} is known {where}",
        Full.NO_CHECKPOINT: f"no restore point {where} has a checkpoint: levels copy and diff make none",
        Full.NO_BITMAP: "no disk has a sound bitmap that goes back to a restore point",
        Full.FORGOTTEN: f"the checkpoints of the restore points {where} are all gone{forgotten}",
        Full.NO_SUCH_BASE: f"there is no checkpoint {base}{forgotten}",
    }[why]


def in_full(
    why: InFull, disk: DiskNow, base: str, cannot_hold: str | None, before: int | None, image: str | None
) -> str:
    """Why an increment takes all of a disk. cannot_hold: why no bitmap. before: bytes it had. image: what it was."""
    return {
        InFull.NO_BITMAP_EVER: f"{cannot_hold}",
        InFull.NEW: f"{base} does not have it",
        InFull.SHRANK: f"it shrank from {before} to {disk.size} bytes",
        InFull.NO_BITMAP: f"no sound bitmap of it goes back to {base}",
        InFull.OTHER_IMAGE: f"its image is another one than {image}, which it was at {base}",
        InFull.MOVED_FILE: f"its image is the file that {disk.moved_from} had at {base}",
    }[why]
