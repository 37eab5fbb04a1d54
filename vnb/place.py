# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Places: what the user named as the home of a disk. A new image in a directory, or something that exists.

    place.begin(size)   a disk comes as a whole: make its image, or make a new one where one was begun
    place.open(size)    a vnb.target to write to, with room for size bytes
    place.grow(size)    between two segments, while no target of it is open
    place.fresh         it reads as zeroes where nothing was written since begin()
    str(place)          what the user named
"""

import errno
import fcntl
import os
import re
import stat
import struct

from vnb import qemu, target
from vnb.errors import Error, UsageError, os_error
from vnb.run import note

_QCOW2_MAGIC = b"QFI\xfb"
_URI = re.compile(r"nbds?(\+unix|\+vsock)?:", re.ASCII)
# What QEMU locks in images that it has open: a byte for each thing it does or that nobody else may do (file-posix.c).
_QEMU_DOES, _QEMU_DENIES = 100, 200
_QEMU_WRITE, _QEMU_RESIZE = 1, 3
_BLKROGET = 0x125E  # whether a block device is read-only: it can be opened for writing all the same


class NewImage:
    """
    A new image in a vnb.imagedir.ImageDirectory. name (str): the disk.

    format_ (str): qcow2 or raw. It is there under its final name when the directory has published file_name.
    """

    fresh = True

    def __init__(self, directory, name, format_):
        self.name = name
        self.file_name = f"{name}.{format_}"
        self._format = format_
        self._path = directory.partial(self.file_name)
        directory.refuse_existing(self.file_name)

    def begin(self, size):
        """Make it, without any data, in the place of what was written until now."""
        try:
            # Nobody else may read what was in the guest; qemu-img leaves the mode of a file that is there.
            fd = os.open(self._path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise os_error(self.name, error) from None
        try:
            if self._format == "raw":
                os.truncate(fd, size)
        except OSError as error:
            raise os_error(self.name, error) from None
        finally:
            os.close(fd)
        if self._format != "raw":
            qemu.create(self._path, self.name, self._format, size)

    def open(self, _size):
        """A target that writes to it."""
        if self._format == "raw":
            return target.Raw(_open(self._path, os.O_WRONLY, self.name), self.name)
        return qemu.Image(self.name, self._path, self.name, self._format, new=True)

    def grow(self, size):
        """Make it larger: what is added reads as zeroes."""
        _grow(self._path, self._format, size, self.name)

    def __str__(self):
        return self.file_name


class Existing:
    """Something that exists. name (str): the disk. text (str): what the user typed."""

    fresh = False

    def __init__(self, name, text):
        self.name = name
        self.text = text

    def begin(self, size):
        """Nothing is made here."""

    def grow(self, size):
        """By itself it has the size that it has; open() will see."""

    def __str__(self):
        return self.text

    def _check(self, has, size):
        if has < size:
            raise Error(self.text, f"has {has} bytes, disk {self.name} needs {size}")


class Export(Existing):
    """An NBD export; text is its URI."""

    def open(self, size):
        """A target that writes to it. Raises Error if it is too small."""

        def connect(handle):
            handle.set_uri_allow_local_file(True)  # a URI names the files with TLS keys; it is our user's
            handle.aio_connect_uri(self.text)

        export = target.Nbd(self.name, self.text, connect)
        try:
            self._check(export.size, size)
        except Error:
            export.close()
            raise
        if not export.can_flush:
            note("vnb-apply", f"{self.text}: the NBD server has no flush: it alone knows when what it took is durable")
        return export


class ImageFile(Existing):
    """An image file in a format of QEMU's."""

    def __init__(self, name, text, path, format_):
        super().__init__(name, text)
        self._path = os.path.abspath(path)
        self._format = format_

    def open(self, size):
        """A target that writes to it. Raises Error if it is too small, or not such an image."""
        image = qemu.Image(self.name, self._path, self.text, self._format)
        try:
            self._check(image.size, size)
        except Error:
            image.close()
            raise
        return image

    def grow(self, size):
        """Make it larger, if it is not large enough."""
        image = self.open(0)
        image.close()
        if image.size < size:
            qemu.resize(self._path, self.text, self._format, size)


class RawFile(Existing):
    """A file or block device whose bytes are those of the disk. certain (bool): the user said so."""

    def __init__(self, name, text, path, certain):
        super().__init__(name, text)
        self._path = path
        self._certain = certain

    def open(self, size):
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
            if stat.S_ISBLK(mode) and any(fcntl.ioctl(fd, _BLKROGET, bytes(4))):
                raise Error(self.text, os.strerror(errno.EROFS))
            self._refuse_in_use(fd)
            if not self._certain and os.pread(fd, len(_QCOW2_MAGIC), 0) == _QCOW2_MAGIC:
                raise Error(self.text, f"starts as qcow2 images do: say qcow2:{self._path} or raw:{self._path}")
            self._check(os.lseek(fd, 0, os.SEEK_END), size)
        except BaseException as error:
            os.close(fd)
            if isinstance(error, OSError):
                raise os_error(self.text, error) from None
            raise
        return target.Raw(fd, self.name)

    def grow(self, size):
        """Make it larger, if it is a file and not large enough."""
        found = os.stat(self._path)
        if stat.S_ISREG(found.st_mode) and found.st_size < size:
            _grow(self._path, "raw", size, self.name)

    def _refuse_in_use(self, fd):
        """Raise Error if QEMU has it open in a way that does not go with writing; keep QEMU out as it keeps us."""
        try:
            for first in (_QEMU_DOES, _QEMU_DENIES):
                for what in (_QEMU_WRITE, _QEMU_RESIZE):
                    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _lock(fcntl.F_RDLCK, first + what))
            for byte in (_QEMU_DOES + _QEMU_WRITE, _QEMU_DENIES + _QEMU_WRITE):
                found = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _lock(fcntl.F_WRLCK, byte))
                if struct.unpack(_FLOCK, found)[0] != fcntl.F_UNLCK:
                    raise Error(self.text, "is in use: another process has its locks")
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise Error(self.text, "is in use: another process has its locks") from None
            # A file system without locks: QEMU does without them there, too.


_FLOCK = "hhqqi4x"  # struct flock of fcntl(2), with 64 bits of offset


def _lock(type_, byte):
    return struct.pack(_FLOCK, type_, os.SEEK_SET, byte, 1, 0)


def _open(path, flags, text):
    try:
        return os.open(path, flags | os.O_CLOEXEC)
    except OSError as error:
        raise os_error(text, error) from None


def _grow(path, format_, size, name):
    if format_ != "raw":
        qemu.resize(path, name, format_, size)
        return
    try:
        os.truncate(path, size)
    except OSError as error:
        raise os_error(name, error) from None


def parse(text):
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
