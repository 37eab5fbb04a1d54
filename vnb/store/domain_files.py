# SPDX-License-Identifier: LGPL-2.1-or-later
"""
The files of a domain in saved segments: kernel, loader, nvram and others, wherever they are stored.

An increment names a file that has not changed since its base, and does not store it again. The head says of such a
file which content it has, so that the segment that holds it is found by heads alone.
"""

from __future__ import annotations

from vnb.base.errors import Error
from vnb.format.values import Data, Extents, File, Same

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vnb.format.types import DescribedFile
    from vnb.store.saved_segment import SavedSegment



def merged_files(path: Sequence[SavedSegment]) -> list[DescribedFile]:
    """The list "files" of the head of a path of segments, oldest first, that become one."""
    found: list[DescribedFile] = []
    for file in path[-1].head.get("files", ()):
        file = file.copy()
        if "base" in file and _holder(path, file["role"], file["path"]) is not None:
            del file["base"]
        found.append(file)
    return found


def files_of(path: Sequence[SavedSegment]) -> Iterator[File | Same]:
    """
    Yield the frames File of the last segment of a path, oldest first, as if it held them all.

    A frame Same stays where no segment of the path holds its file. Raises Error where one should, and does not.
    """
    for frame in _front(path[-1]):
        key = frame.fields["role"], frame.fields["path"]
        holder = _holder(path, *key) if type(frame) is Same else None
        if holder is None:
            yield frame
            continue
        count = 0
        for other in _front(holder):
            if type(other) is File and (other.fields["role"], other.fields["path"]) == key:
                count += 1
                yield File({**other.fields, "mode": frame.fields["mode"]}, other.payload)
        if not count:
            raise Error(holder.name, f"does not hold the {key[0]} that its head describes", key[1])


def _holder(path: Sequence[SavedSegment], role: str, place: str) -> SavedSegment | None:
    """The newest segment of a path that holds a file of the last one; None where it is in none of them."""
    for segment in reversed(path):
        file = next(
            (file for file in segment.head.get("files", ()) if (file["role"], file["path"]) == (role, place)), None
        )
        if file is None:
            raise Error(segment.name, f"does not have the {role} that a later segment takes from it", place)
        if "base" not in file:
            return segment
    return None


def _front(saved: SavedSegment) -> Iterator[File | Same]:
    """Yield the frames File and Same of a saved segment: they stand before its extents."""
    for frame in saved.open():
        if type(frame) is File or type(frame) is Same:
            yield frame
        elif type(frame) is Data or type(frame) is Extents:
            return
