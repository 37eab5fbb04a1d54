# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Places: what the user named as the home of a disk. A new image in a directory, or something that exists.

    place.begin(size, info)   a disk comes as a whole: make its image, or a new one where one was begun
    place.open(size)          a vnb.nbd.sinks to write to, with room for size bytes
    place.grow(size)          between two segments, while no target of it is open
    place.complete()          after the last segment, when no target is open any more
    place.fresh               it reads as zeroes where nothing was written since begin()
    place.file_names          what was made, to be published
    str(place)                what the user named

info is what qemu-img says of the original image, or None.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat

from vnb.base import log
from vnb.base.errors import Error, UsageError, os_error
from vnb.nbd import sinks
from vnb.qemu import image_writer
from vnb.restore.in_use import BLKROGET, refuse_if_in_use, refuse_if_in_use_at

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, Union

    from vnb.restore.imagedir import ImageDirectory
    Place = Union["NewImage", "Existing"]
    Sink = Union[sinks.Raw, sinks.Nbd]


_QCOW2_MAGIC = b"QFI\xfb"
_URI = re.compile(r"nbds?(\+unix|\+vsock)?:", re.ASCII)


class Recipe:
    """
    How new images are made.

    format_: qcow2 or raw. options: as qemu-img's -o, before those of the original.
    preallocate: all room is taken at the start. compress: clusters are compressed.
    """

    def __init__(
        self, format_: str, options: dict[str, str] | None = None, preallocate: bool = False, compress: bool = False,
    ) -> None:
        self.format = format_
        self.options = options or {}
        self.preallocate = preallocate
        self.compress = compress

    def settings(self, name: str, info: Any) -> dict[str, str]:
        """The settings of an image for the disk called name. info: of the original, see places."""
        if self.format != "qcow2":
            return {}
        settings = {**image_writer.settings(info), **self.options}
        if settings.pop("data_file", "off") == "on" and not self.compress:
            settings["data_file"] = f"{name}.data"
        else:
            settings.pop("data_file_raw", None)
        if self.preallocate:
            settings["preallocation"] = "falloc"
        return settings


class NewImage:
    """
    A new image in a vnb.restore.imagedir.ImageDirectory. name: the disk. recipe (Recipe).

    It is there under its final name when the directory has published file_names.
    replaces: what has these names now may be replaced, unless it is in use.
    """

    fresh = True

    def __init__(self, directory: ImageDirectory, name: str, recipe: Recipe, replaces: bool = False) -> None:
        self.name = name
        self._replaces = replaces
        self.file_names = [f"{name}.{recipe.format}"]
        self._recipe = recipe
        self._directory = directory
        # What is compressed cannot be written to again, nor in part, so all is gathered in a raw image first.
        self._format = "raw" if recipe.compress else recipe.format
        self._path = directory.partial(f"{name}.{self._format}")
        self._settings: dict[str, str] = {}
        self._refuse_existing(self.file_names[0])

    def begin(self, size: int, info: Any) -> None:
        """Make it, without any data, in the place of what was written until now."""
        self._settings = self._recipe.settings(self.name, info)
        self._make_empty(self._path)
        outside = self._settings.get("data_file")
        if outside:
            if outside not in self.file_names:
                self._refuse_existing(outside)
                self.file_names.append(outside)
            # Where QEMU looks for it depends on where QEMU was started, unless the name is absolute.
            self._settings["data_file"] = self._directory.partial(outside)
            self._make_empty(self._settings["data_file"])
        if self._format == "raw":
            _grow(self._path, "raw", size, self.name)
            self._allocate(0, size)
        else:
            image_writer.create(self._path, self.name, self._format, size, self._settings)

    def open(self, _size: int) -> Sink:
        """A target that writes to it."""
        keep = self._recipe.preallocate
        if self._format == "raw":
            fd = _open(self._path, os.O_WRONLY, self.name)
            return sinks.Raw(fd, self.name, keep=keep, durable=not self._recipe.compress)
        outside = [self._directory.partial(name) for name in self.file_names[1:]]
        return image_writer.Image(self.name, self._path, self.name, self._format, new=True, keep=keep, outside=outside)

    def grow(self, size: int) -> None:
        """Make it larger: what is added reads as zeroes."""
        before = os.stat(self._path).st_size
        _grow(self._path, self._format, size, self.name, self._recipe.preallocate)
        if self._format == "raw":
            self._allocate(before, size)

    def complete(self) -> None:
        """All that is to be in it is there, and durable."""
        if len(self.file_names) > 1:
            outside = os.path.abspath(self._directory.final(self.file_names[1]))
            image_writer.amend(self._path, self.name, self._format, {"data_file": outside})
            log.note(
                f"{self.name}: its data is in {self._directory.final(self.file_names[1])}: QEMU's user has to read and "
                "write it, and libvirt before 10.10 does not see to that"
            )
        if not self._recipe.compress:
            return
        final = self._directory.partial(self.file_names[0])
        self._make_empty(final)
        image_writer.compress(self._path, final, self.name, self._recipe.format, self._settings)

    def refuse_in_use(self) -> None:
        """Raise Error if one of the files that it will replace is in use: what is written there would be lost."""
        for file_name in self.file_names:
            refuse_if_in_use_at(self._directory.final(file_name))

    def __str__(self) -> str:
        return self.file_names[0]

    def _refuse_existing(self, file_name: str) -> None:
        if self._replaces:
            refuse_if_in_use_at(self._directory.final(file_name))
        else:
            self._directory.refuse_existing(file_name)

    def _make_empty(self, path: str) -> None:
        """Have an empty file: nobody else may read what was in the guest, and qemu-img leaves modes as they are."""
        os.close(_open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, self.name))

    def _allocate(self, start: int, end: int) -> None:
        if self._recipe.preallocate and end > start:
            fd = _open(self._path, os.O_WRONLY, self.name)
            try:
                os.posix_fallocate(fd, start, end - start)
            except OSError as error:
                raise os_error(self.name, error) from None
            finally:
                os.close(fd)


class StandbyImage(NewImage):
    """
    An image that was made before and is written where it is, or is made anew if the disk comes as a whole.

    files: the names of its files. Raises Error if one is in use.
    """

    def __init__(self, directory: ImageDirectory, name: str, recipe: Recipe, files: list[str]) -> None:
        super().__init__(directory, name, recipe, replaces=True)
        self._made = self.file_names
        self._outside = files[1:]
        for file_name in self._outside:
            self._refuse_existing(file_name)
        self._path = directory.final(self.file_names[0])
        self.file_names = []  # nothing to publish
        self.fresh = False

    def begin(self, size: int, info: Any) -> None:
        """Make a new one: the old one stays as it is until that is published."""
        self.file_names = self._made
        self._path = self._directory.partial(self.file_names[0])
        self.fresh = True
        super().begin(size, info)

    def open(self, size: int) -> Sink:
        """A target that writes to it."""
        if self.fresh:
            return super().open(size)
        keep = self._recipe.preallocate
        if self._format == "raw":
            fd = _open(self._path, os.O_RDWR, self._path)
            try:
                refuse_if_in_use(fd, self._path)
            except BaseException:
                os.close(fd)
                raise
            return sinks.Raw(fd, self.name, keep=keep)
        outside = [self._directory.final(name) for name in self._outside]
        path = os.path.abspath(self._path)
        return image_writer.Image(self.name, path, self._path, self._format, keep=keep, outside=outside)

    def complete(self) -> None:
        """All that is to be in it is there, and durable."""
        if self.fresh:
            super().complete()


class Existing:
    """Something that exists. name: the disk. text: what the user typed."""

    fresh = False
    file_names: Sequence[str] = ()

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        self.text = text

    def begin(self, size: int, info: Any) -> None:
        """Nothing is made here."""

    def complete(self) -> None:
        """Nothing is left to do here."""

    def grow(self, size: int) -> None:
        """By itself it has the size that it has; open() will see."""

    def __str__(self) -> str:
        return self.text

    def _check(self, has: int, size: int) -> None:
        if has < size:
            raise Error(self.text, f"has {has} bytes, disk {self.name} needs {size}")


class Export(Existing):
    """An NBD export; text is its URI."""

    def open(self, size: int) -> Sink:
        """A target that writes to it. Raises Error if it is too small."""
        export = sinks.Nbd(self.name, self.text, self.text)
        try:
            self._check(export.size, size)
        except Error:
            export.close()
            raise
        if not export.can_flush:
            log.warn(
                f"{self.text}: the NBD server does not support flush: data that it has taken may be lost if it crashes"
            )
        return export


class ImageFile(Existing):
    """An image file in a format of QEMU's."""

    def __init__(self, name: str, text: str, path: str, format_: str) -> None:
        super().__init__(name, text)
        self._path = os.path.abspath(path)
        self._format = format_

    def open(self, size: int) -> image_writer.Image:
        """A target that writes to it. Raises Error if it is too small, or not such an image."""
        image = image_writer.Image(self.name, self._path, self.text, self._format)
        try:
            self._check(image.size, size)
        except Error:
            image.close()
            raise
        return image

    def grow(self, size: int) -> None:
        """Make it larger, if it is not large enough."""
        image = self.open(0)
        image.close()
        if image.size < size:
            image_writer.resize(self._path, self.text, self._format, size)


class RawFile(Existing):
    """A file or block device whose bytes are those of the disk. certain: the user said so."""

    def __init__(self, name: str, text: str, path: str, certain: bool) -> None:
        super().__init__(name, text)
        self._path = path
        self._certain = certain

    def open(self, size: int) -> Sink:
        """A target that writes to it. Raises Error if it is too small, in use, or perhaps another format's."""
        try:
            mode = os.stat(self._path).st_mode
        except OSError as error:
            raise os_error(self.text, error) from None
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise Error(self.text, "is neither a file nor a block device")
        # A block device that is mounted, or has others on top of it, can't be opened exclusively.
        fd = _open(self._path, os.O_RDWR | (os.O_EXCL if stat.S_ISBLK(mode) else 0), self.text)
        try:
            if stat.S_ISBLK(mode) and any(fcntl.ioctl(fd, BLKROGET, bytes(4))):
                raise Error(self.text, os.strerror(errno.EROFS))
            refuse_if_in_use(fd, self.text)
            if not self._certain and os.pread(fd, len(_QCOW2_MAGIC), 0) == _QCOW2_MAGIC:
                raise Error(self.text, f"starts as qcow2 images do: say qcow2:{self._path} or raw:{self._path}")
            self._check(os.lseek(fd, 0, os.SEEK_END), size)
            self._certain = True  # what is there from now on is what a guest wrote, whatever it looks like
        except BaseException as error:
            os.close(fd)
            if isinstance(error, OSError):
                raise os_error(self.text, error) from None
            raise
        return sinks.Raw(fd, self.name)

    def grow(self, size: int) -> None:
        """Make it larger, if it is a file and not large enough."""
        found = os.stat(self._path)
        if stat.S_ISREG(found.st_mode) and found.st_size < size:
            self.open(0).close()
            _grow(self._path, "raw", size, self.name)


def _open(path: str, flags: int, text: str) -> int:
    try:
        return os.open(path, flags | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise os_error(text, error) from None


def _grow(path: str, format_: str, size: int, name: str, preallocate: bool = False) -> None:
    if format_ != "raw":
        image_writer.resize(path, name, format_, size, preallocate)
        return
    try:
        os.truncate(path, size)
    except OSError as error:
        raise os_error(name, error) from None


def parse(text: str) -> Callable[[str], Existing]:
    """A function (name) -> place that exists, for what stands behind NAME= on the command line; UsageError."""
    if _URI.match(text):
        return lambda name: Export(name, text)
    match = re.match(r"(qcow2|raw):", text)
    path = text[match.end():] if match else text
    if not path:
        raise UsageError("--disk", f'"{text}" names no file')
    if match and match[1] == "qcow2":
        return lambda name: ImageFile(name, text, path, "qcow2")
    return lambda name: RawFile(name, text, path, certain=match is not None)
