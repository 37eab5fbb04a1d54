# SPDX-License-Identifier: LGPL-2.1-or-later
"""
The files of a domain in saved segments: kernel, loader, nvram and others, wherever they are stored.

An increment names a file that has not changed since its base, and does not store it again. The head says of such a
file which content it has, so that the segment that holds it is found by heads alone.
"""

from vnb.base.errors import Error
from vnb.format.values import Data, Extents, File, Same


def merged_files(path):
    """The list "files" of the head of a path of segments, oldest first, that become one."""
    found = []
    for file in path[-1].head.get("files", ()):
        if "base" in file and _holder(path, file["role"], file["path"]) is not None:
            file = {key: value for key, value in file.items() if key != "base"}
        found.append(file)
    return found


def files_of(path):
    """
    Yield the frames File of the last segment of a path, oldest first, as if it held them all.

    A frame Same stays where no segment of the path holds its file. Raises Error where one should, and does not.
    """
    for frame in _front(path[-1]):
        key = frame.fields["role"], frame.fields["path"]
        holder = _holder(path, *key) if frame.__class__ is Same else None
        if holder is None:
            yield frame
            continue
        count = 0
        for other in _front(holder):
            if other.__class__ is File and (other.fields["role"], other.fields["path"]) == key:
                count += 1
                yield File({**other.fields, "mode": frame.fields["mode"]}, other.payload)
        if not count:
            raise Error(holder.name, f"does not hold the {key[0]} that its head describes", key[1])


def _holder(path, role, place):
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


def _front(saved):
    """Yield the frames File and Same of a saved segment: they stand before its extents."""
    for frame in saved.open():
        if frame.__class__ in (File, Same):
            yield frame
        elif frame.__class__ in (Data, Extents):
            return
