# SPDX-License-Identifier: LGPL-2.1-or-later
"""The files of a domain within a segment: their parts follow each other, and are as the head says. Pure."""

from __future__ import annotations

import hashlib

from vnb.format.rules import checked_file, checked_same
from vnb.format.values import File, Same

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vnb.base.errors import Error
    from vnb.format.types import DescribedFile, Fields, FileFields, Head, SameFields

    Fault = Callable[[str], Error]  # makes the error of a reason, at the frame


class DomainFiles:
    """Checks the frames "file" and "same" of a segment with this head. All raise what a Fault makes of a reason."""

    def __init__(self, head: Head) -> None:
        self._described: dict[tuple[str, str], DescribedFile] = {_key(file): file for file in head.get("files", ())}
        self._is_stored = head["stage"] != "disks"  # a catalog keeps the head alone
        self._came: set[tuple[str, str]] = set()  # of those described, what was stored or named
        self._open: FileFields | None = None  # the last part that was seen of a file of which more are to come
        self._end = 0  # where that part ends
        self._sha256 = hashlib.sha256()  # of what was seen of it, where the head says what it is

    def part(self, fields: Fields, payload: memoryview | None, error: Fault) -> File:
        """The next part of a file."""
        file = checked_file(fields, payload, error)
        assert payload is not None
        before = self._open
        if before is None:
            fits = file["offset"] == 0
        else:
            fits = (_key(file), file["size"], file["offset"]) == (_key(before), before["size"], self._end)
        self._end = file["offset"] + len(payload)
        is_last = self._end == file["size"]
        if not fits or not (is_last or payload):
            raise error(f'file {file["path"]}: a part is missing')
        self._open = None if is_last else file
        self._check_content(file, payload, is_last, error)
        return File(file, payload)

    def same(self, fields: Fields, payload: memoryview | None, error: Fault) -> Same:
        """A file that the base has."""
        same = checked_same(fields, payload, error)
        described = self._described.get(_key(same))
        if described is None or "base" not in described:
            raise error(f'file {same["path"]}: the head does not say that the base has it')
        self._comes(same, error)
        return Same(same)

    def check_whole(self, error: Fault) -> None:
        """A frame of another type has come: no file waits for another part."""
        if self._open is not None:
            raise error(f'file {self._open["path"]}: a part is missing')

    def check_all(self, error: Fault) -> None:
        """No more files will come: those that the head describes were there."""
        missing = set(self._described) - self._came
        if missing and self._is_stored:
            role, path = min(missing)
            raise error(f"file {path}: the head describes this {role}, and the segment lacks it")

    def _check_content(self, file: FileFields, payload: memoryview, is_last: bool, error: Fault) -> None:
        """Check a part of a file against what the head says of all of it."""
        described = self._described.get(_key(file))
        if described is None:
            return
        if file["offset"] == 0:
            self._sha256 = hashlib.sha256()
            self._comes(file, error)
        self._sha256.update(payload)
        differs = is_last and self._sha256.hexdigest() != described["sha256"]
        if "base" in described or file["size"] != described["size"] or differs:
            raise error(f'file {file["path"]}: is not the one that the head describes')

    def _comes(self, file: FileFields | SameFields, error: Fault) -> None:
        if _key(file) in self._came:
            raise error(f'file {file["path"]}: is there twice')
        self._came.add(_key(file))


def _key(file: DescribedFile | FileFields | SameFields) -> tuple[str, str]:
    return file["role"], file["path"]
