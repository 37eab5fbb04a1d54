# SPDX-License-Identifier: LGPL-2.1-or-later
"""Files of a domain beside its disks (nvram, kernel, ...), on their way from file frames to their places."""

from __future__ import annotations

import errno
import os
import tempfile

from vnb.base.errors import Error, os_error
from vnb.format import rules, values
from vnb.format.frame import MiB
from vnb.restore.imagedir import EXISTS, ImageDirectory
from vnb.virt import file_elements

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from typing import Any


PART = MiB  # bytes of a file that are read at a time
_SYSTEM = ("/dev", "/proc", "/run", "/sys")  # nothing that is found there after a restart


def destinations(wanted: Iterable[tuple[str, str]], directory: str) -> dict[tuple[str, str], str]:
    """
    {(role, path): where it goes} of files, [(role, path)], that come into one directory.

    Of the path, which comes from a stream, the last part alone counts. Raises Error where that is no name for a file.
    """
    found: dict[tuple[str, str], str] = {}
    for role, path in wanted:
        check_path(role, path)
        name = os.path.basename(path)
        if os.path.join(directory, name) in found.values():
            name = f"{role}.{name}"
        found[role, path] = os.path.join(directory, name)
    if len(set(found.values())) < len(found):
        raise Error("file", "several files have the same name, and would be restored to the same path")
    return found


def originals(wanted: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str | None]:
    """{(role, path): where it goes, or None where something is there already} of files that go where they were."""
    found = {}
    for role, path in wanted:
        check_path(role, path)
        is_there = os.path.lexists(path)
        if not is_there and os.path.normpath(path).startswith(tuple(f"{directory}/" for directory in _SYSTEM)):
            raise Error("file", "is not restored to a directory of the system's own", path)
        found[role, path] = None if is_there else path
    return found


def check_path(role: str, path: str) -> None:
    """Raise Error unless a path from a stream, of a file that a domain needs, is one that a file may have had."""
    if not path.startswith("/") or ".." in path.split("/"):
        raise Error("file", f"{role}: is no absolute path, or leads upwards", path)
    if not rules.is_safe_name(os.path.basename(path)) or not path.isprintable():
        raise Error("file", f"{role}: is no name for a file", path)


class Earlier:
    """
    The files of one segment of a stream, for the next one, which may name them as unchanged.

        with Earlier() as earlier:
            for segment in reader:
                earlier.begin()
                for frame in segment: for part in earlier.parts(frame): ...

    They lie in temporary files without a name.
    """

    def __init__(self) -> None:
        self._before: dict[tuple[str, str], Any] = {}  # (role, path): file of the segment before
        self._now: dict[tuple[str, str], Any] = {}

    def __enter__(self) -> Earlier:
        return self

    def __exit__(self, *_: object) -> None:
        for file in (*self._before.values(), *self._now.values()):
            file.close()

    def begin(self) -> None:
        """Another segment begins."""
        for file in self._before.values():
            file.close()
        self._before, self._now = self._now, {}

    def parts(self, frame: values.File | values.Same) -> Iterable[values.File] | None:
        """
        The frames File of a frame File, or Same: itself, or those of the segment before.

        None where nothing before has the file. Raises OSError.
        """
        key = frame.fields["role"], frame.fields["path"]
        if type(frame) is values.File:
            if key[0] in file_elements.STABLE_ROLES:
                if key not in self._now:
                    self._now[key] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by begin() or __exit__()
                self._now[key].write(frame.payload)
            return [frame]
        file = self._before.pop(key, None)
        if file is None:
            return None
        self._now[key] = file
        return self._again(file, {**frame.fields, "size": file.seek(0, os.SEEK_END)})

    def _again(self, file: Any, fields: Any) -> Iterator[values.File]:
        offset = file.seek(0)
        while True:
            payload = file.read(PART)
            if not payload and (offset or fields["size"]):
                return
            part: Any = {**fields, "offset": offset}
            yield values.File(part, payload)
            offset += len(payload)
            if offset == fields["size"]:
                return


class Files:
    """
    Takes file frames and makes files of them.

        with Files(destinations) as files:
            files.add(frame) for each
            files.publish()

    destinations: {(role, path): where it goes, or None}. Until publish() nothing has its final name, and what is not
    published is gone in the end. Nothing is ever replaced. check: all is looked at, and nothing written.
    Raises Error.
    """

    def __init__(self, destinations_: Mapping[tuple[str, str], str | None], check: bool = False) -> None:
        self._destinations = destinations_
        self._check = check
        self._directories: dict[str, ImageDirectory] = {}  # path: ImageDirectory
        self._descriptors: dict[tuple[str, str], int] = {}  # (role, path): of the file that is written
        self._complete: dict[tuple[str, str], tuple[ImageDirectory | None, str]] = {}  # and the file's name
        self._published: list[str] = []

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def complete(self) -> set[tuple[str, str]]:
        """The keys of the files that came, whole."""
        return set(self._complete)

    def add(self, frame: values.File) -> None:
        """Take a part of a file; parts are whole and in order. A file that nothing needs is left out."""
        fields = frame.fields
        key = fields["role"], fields["path"]
        if fields["role"] in file_elements.FILE_ROLES:
            check_path(*key)
        final = self._destinations.get(key)
        if final is None:
            return
        if key in self._complete:
            raise Error("file", f"{key[0]}: is there twice", key[1])
        try:
            self._write(key, final, fields, frame.payload)
        except OSError as error:
            raise os_error(final, error) from None

    def wants(self, role: str, path: str) -> bool:
        """Whether a file goes anywhere."""
        return self._destinations.get((role, path)) is not None

    def add_text(self, final: str, text: str) -> None:
        """Make one more file, private, of a text of ours."""
        data = text.encode()
        try:
            self._write(("text", final), final, {"role": None, "offset": 0, "size": len(data), "mode": 0}, data)
        except OSError as error:
            raise os_error(final, error) from None

    def _write(self, key: tuple[str, str], final: str, fields: Any, payload: Any) -> None:
        directory, name = os.path.split(final)
        is_last = fields["offset"] + len(payload) == fields["size"]
        if self._check:
            if os.path.lexists(final):
                raise Error(final, EXISTS)
            if is_last:
                self._complete[key] = None, name
            return
        home = self._directories.get(directory)
        if home is None:
            home = self._directories[directory] = ImageDirectory(directory)
        fd = self._descriptors.get(key)
        if fd is None:
            home.refuse_existing(name)
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = self._descriptors[key] = os.open(home.partial(name), flags, 0o600)
        view = memoryview(payload)
        while view:
            view = view[os.write(fd, view):]
        if is_last:
            # QEMU, another user, has to read a kernel or a loader, which libvirt may leave as they are. What others
            # could not read before they can't now, and the nvram, which libvirt makes QEMU's own, they never can.
            others = 0 if fields["role"] in file_elements.WRITTEN_ROLES else fields["mode"] & 0o044
            os.fchmod(fd, 0o600 | others)
            os.fsync(fd)
            os.close(self._descriptors.pop(key))
            self._complete[key] = home, name

    def publish(self) -> None:
        """Give all that came their names, durably."""
        for home in self._directories.values():
            names = [name for other, name in self._complete.values() if other is home]
            home.publish(names)
            self._published += [home.final(name) for name in names]

    def withdraw(self) -> None:
        """Remove what was published: what it was published for has failed."""
        while self._published:
            try:
                os.unlink(self._published.pop())
            except OSError as error:
                if error.errno != errno.ENOENT:
                    raise os_error(error.filename, error) from None

    def close(self) -> None:
        """Remove what was not published. May be called again."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])
        while self._directories:
            path, home = self._directories.popitem()
            try:
                home.close()
            except BaseException:
                self._directories[path] = home
                home.close()  # a signal; there is no second one
                raise
