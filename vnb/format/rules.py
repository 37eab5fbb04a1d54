# SPDX-License-Identifier: LGPL-2.1-or-later
"""What heads, disks and files of a stream may have in them. Pure: it raises what it is given."""

from __future__ import annotations

import re

from vnb.format import frame as f

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from vnb.base.errors import Error
    from vnb.format.types import Disk, Fields, FileFields, Head, SameFields


# What a segment holds: disks alone, their extents, or their data. Each stage needs one and makes the next.
STAGES = ("disks", "extents", "data")
LEVELS = ("full", "copy", "inc", "diff")
DISK_LEVELS = ("full", "inc")  # all of the disk, or what changed since the base
LONGEST_PATH = 4096  # characters of a file's path: Linux's PATH_MAX
_SHA256 = re.compile("[0-9a-f]{64}")
_CREATED = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", re.ASCII)  # so it sorts as text


def checked_head(fields: Fields, payload: object, error: Callable[[str], Error]) -> Head:
    """The head of a "vnb" frame's fields, or raise error(reason)."""
    if fields[0] != "vnb" or len(fields) != 3 or payload is not None or not isinstance(fields[2], dict):
        raise error("malformed head")
    if type(fields[1]) is not int:
        raise error("malformed head: version")
    if fields[1] != f.VERSION:
        newer = error(f"format version {fields[1]}, this vnb knows version {f.VERSION}: a newer vnb is needed")
        newer.is_damage = False
        raise newer
    head: Any = fields[2]
    for key in ("id", "point", "uuid"):
        if not f.is_name(head.get(key)):
            raise error(f'malformed head: "{key}" is no name of 1 to 255 printable characters')
    if not is_domain_name(head.get("domain")):
        raise error('malformed head: "domain" is no name of 1 to 255 characters without NUL and line feed')
    for key in ("parent", "checkpoint"):
        if key not in head or not (head[key] is None or f.is_name(head[key])):
            raise error(f'malformed head: "{key}" is neither a name nor nil')
    for key in ("chain", "run", "next"):
        if key in head and not f.is_name(head[key]):
            raise error(f'malformed head: "{key}" is no name of 1 to 255 printable characters')
    for key in ("domain_xml", "checkpoint_xml"):
        if not isinstance(head.get(key), (str, type(None))):
            raise error(f'malformed head: "{key}" is neither text nor nil')
    grows = head.get("grows", {})
    if not isinstance(grows, dict) or not all(
        is_safe_name(name) and type(size) is int and 0 <= size <= f.MAX_OFFSET for name, size in grows.items()
    ):
        raise error('malformed head: "grows"')
    if not isinstance(head.get("created"), str) or not _CREATED.fullmatch(head["created"]):
        raise error('malformed head: "created" is no time such as 2026-01-31T12:00:00.000000Z')
    if head.get("stage") not in STAGES or head.get("level") not in LEVELS:
        stages, levels = ", ".join(STAGES), ", ".join(LEVELS)
        raise error(f"malformed head: a stage is one of {stages}, a level one of {levels}")
    if (head["level"] in ("inc", "diff")) != (head["parent"] is not None):
        raise error(f'malformed head: level {head["level"]} and parent {head["parent"]}')
    if not is_list_of_files(head.get("files", []), head["parent"]):
        raise error('malformed head: "files"')
    if head["parent"] == head["point"]:
        raise error("malformed head: the segment is its own base")
    checked: Head = head
    return checked


def checked_disk(fields: Fields, payload: object, before: list[Disk], error: Callable[[str], Error]) -> Disk:
    """The disk of a "disk" frame's fields, or raise error(reason). before: the disks of earlier frames."""
    if len(fields) != 3 or payload is not None or not isinstance(fields[2], dict):
        raise error('malformed frame "disk"')
    if type(fields[1]) is not int or fields[1] != len(before):
        raise error(f'malformed frame "disk": its number is not {len(before)}, which is next')
    if len(before) >= f.MAX_DISKS:
        raise error(f"more than {f.MAX_DISKS} disks")
    disk: Any = fields[2]
    name = disk.get("name")
    if not is_safe_name(name):
        raise error("a disk without a name that may be a part of a file name")
    if any(other["name"] == name for other in before):
        raise error(f"two disks are named {name}")
    size = disk.get("size")
    if type(size) is not int or not 0 <= size <= f.MAX_OFFSET or disk.get("level") not in DISK_LEVELS:
        raise error(f"{name}: malformed size, or a level that is not one of {', '.join(DISK_LEVELS)}")
    if not all(isinstance(disk.get(key, {}), dict) for key in ("image", "source")):
        raise error(f"{name}: malformed image or source")
    checked: Disk = disk
    return checked


def checked_file(fields: Fields, payload: memoryview | None, error: Callable[[str], Error]) -> FileFields:
    """The fields of a "file" frame, or raise error(reason)."""
    if len(fields) != 2 or payload is None or not isinstance(fields[1], dict):
        raise error('malformed frame "file"')
    file: Any = fields[1]
    path = file.get("path")
    if not names_a_file(file):
        raise error('malformed frame "file"')
    numbers = [file.get(key) for key in ("size", "offset", "mode")]
    if any(type(number) is not int for number in numbers) or file["offset"] + len(payload) > file["size"]:
        raise error(f'malformed frame "file": {path}')
    checked: FileFields = file
    return checked


def checked_same(fields: Fields, payload: object, error: Callable[[str], Error]) -> SameFields:
    """The fields of a "same" frame, or raise error(reason)."""
    if len(fields) != 2 or payload is not None or not isinstance(fields[1], dict):
        raise error('malformed frame "same"')
    same: Any = fields[1]
    if not names_a_file(same) or type(same.get("mode")) is not int:
        raise error('malformed frame "same"')
    checked: SameFields = same
    return checked


def is_list_of_files(files: object, parent: str | None) -> bool:
    """Whether a value may be "files" of a head whose base is parent."""
    if not (isinstance(files, list) and all(isinstance(file, dict) and names_a_file(file) for file in files)):
        return False
    for file in files:
        sha256 = file.get("sha256")
        if type(file.get("size")) is not int or not (isinstance(sha256, str) and _SHA256.fullmatch(sha256)):
            return False
        if "base" in file and (file["base"] is not True or parent is None):
            return False
    return len({(file["role"], file["path"]) for file in files}) == len(files)


def names_a_file(fields: dict[str, Any]) -> bool:
    path = fields.get("path")
    return f.is_name(fields.get("role")) and isinstance(path, str) and len(path) <= LONGEST_PATH


def is_domain_name(name: object) -> bool:
    """Whether a value may be the name of a domain: libvirt takes tabs and joiners, which are not printable."""
    return isinstance(name, str) and 0 < len(name) <= f.MAX_NAME and "\0" not in name and "\n" not in name


def is_safe_name(name: object) -> bool:
    """Whether a name from a stream may become a part of a file name: nothing that leaves a directory or hides."""
    return isinstance(name, str) and f.is_name(name) and "/" not in name and not name.startswith(".")
