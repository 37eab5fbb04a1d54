# SPDX-License-Identifier: LGPL-2.1-or-later
"""New heads of segments: names that are unique for ever, and times that never run backwards."""

from __future__ import annotations

import datetime
import os
import re
import secrets
import uuid

from vnb.base.errors import Error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vnb.format.types import Head


DEFAULT_CHAIN = "main"


def now() -> str:
    """The time as heads have it, UTC with microseconds."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def new(
    domain: str, uuid: str, level: str, stage: str, parent: str | None = None, chain: str = DEFAULT_CHAIN,
    after: str | None = None, **fields: Any,
) -> Head:
    """
    A head with an id and a point of its own.

    after: the parent's `created`: the new one is later, whatever the clock says. Raises Error where that
    is no time, or the last one of all.
    """
    created = now()
    if after is not None and created <= after:
        created = _next(after)
    compact = created[:23].replace("-", "").replace(":", "")  # milliseconds: names sort by time
    head: Any = {
        "id": secrets.token_hex(16),
        "stage": stage,
        "level": level,
        "point": f"vnb.{chain}.{compact}Z.{secrets.token_hex(3)}",
        "parent": parent,
        "checkpoint": None,
        "chain": chain,
        "domain": domain,
        "uuid": uuid,
        "created": created,
        "run": os.environ.get("VNB_RUN") or secrets.token_hex(4),
        **fields,
    }
    made: Head = head
    return made


def created_of(point: str) -> str | None:
    """The latest time at which a point with this name may have been created, or None: it is not one of vnb's."""
    found = re.fullmatch(r"vnb\..+\.(\d{4})(\d\d)(\d\dT\d\d)(\d\d)(\d\d\.\d{3})Z\.[0-9a-f]+", point, re.ASCII)
    return found and f"{found[1]}-{found[2]}-{found[3]}:{found[4]}:{found[5]}999Z"


def created_of_file(name: str) -> str | None:
    """The same of the restore point of a file in a set, by the file's name, see vnb.store.backupset.file_name()."""
    found = re.fullmatch(r"(.+)\.(full|copy|inc|diff)(\.[0-9a-f]+)?\.vnb", name, re.ASCII)
    return found and created_of(found[1])


def alone(head: Head) -> Head:
    """A head as that of a segment that stands alone, in a set: nothing follows it."""
    rest: Any = {key: value for key, value in head.items() if key not in ("next", "grows")}
    made: Head = rest
    return made


def uuid_of(name: str) -> str:
    """A UUID for something that has none but its name."""
    return str(uuid.uuid5(uuid.NAMESPACE_OID, f"vnb:{name}"))


def _next(created: str) -> str:
    try:
        moment = datetime.datetime.strptime(created, "%Y-%m-%dT%H:%M:%S.%fZ") + datetime.timedelta(microseconds=1)
    except (ValueError, OverflowError):
        raise Error("catalog", f'"created" of the base is no time that another can follow: {created}') from None
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
