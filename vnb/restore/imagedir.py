# SPDX-License-Identifier: LGPL-2.1-or-later
"""
A directory of images, where a new image has its final name when it is whole, and not before.

    DIR/vda.qcow2                           what was there, or was finished
    DIR/.vnb-apply.1f0c5ab2.partial/        what one process is making now
        lock                                locked as long as that process lives
        vda.qcow2
        .names                              JSON, while several get their final names: {name: what the file is like}

A directory of one's own, with a lock beside the images and not on them: where flock(2) is made of the same locks
that QEMU takes (NFS), a lock of ours on the image would keep QEMU out.

Several images get their names one after the other, by link(2): those that have one are still in the directory, too.
Who finds .names there, and one of these that has no final name, takes the others' names away again. Where there are no
links they are moved, and told by their sizes and times.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil

from vnb.base import locks
from vnb.base.durable import make_directories, sync_directory
from vnb.base.errors import Error, os_error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


EXISTS = f"{os.strerror(errno.EEXIST)}: nothing is replaced here, so choose another directory or remove it"
_PREFIX = ".vnb-apply."
_SUFFIX = ".partial"
_LOCK = "lock"
_NAMES = ".names"


class ImageDirectory:
    """
    Makes new images in a directory.

        with ImageDirectory(path) as directory:
            ... make the image directory.partial("vda.qcow2") ...
            directory.publish(["vda.qcow2"])

    What was not published is gone in the end, and with it the directory if it was made here and holds nothing.
    path: made if it is not there. What a killed process left in it is removed. Raises Error.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._workspace = ""
        self._lock: int | None = None
        self._made = _make(path)
        try:
            remove_abandoned(path)
            while self._lock is None:
                self._begin()
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise os_error(path, error) from None
            raise

    def __enter__(self) -> ImageDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.close()
        except BaseException:
            self.close()  # a signal; there is no second one
            raise

    def close(self) -> None:
        """Remove what was not published. May be called again."""
        if self._workspace:
            shutil.rmtree(self._workspace, ignore_errors=True)
        if self._lock is not None:
            lock, self._lock = self._lock, None
            os.close(lock)
        for path in reversed(self._made):
            with contextlib.suppress(OSError):
                os.rmdir(path)

    def final(self, file_name: str) -> str:
        """The path of an image that has its final name, as the user would type it."""
        return os.path.join(self.path, file_name)

    def partial(self, file_name: str) -> str:
        """The absolute path of an image that has not."""
        return os.path.abspath(os.path.join(self._workspace, file_name))

    def refuse_existing(self, file_name: str) -> None:
        """Raise Error if there is something by this name already."""
        if os.path.lexists(self.final(file_name)):
            raise Error(self.final(file_name), EXISTS)

    def publish(self, file_names: Sequence[str]) -> None:
        """
        Give images their final names, all or none, and make that durable. The images themselves are durable already.

        Nothing is replaced. If we are killed meanwhile, the next one in this directory sees to it. Raises Error.
        """
        file_name = None
        workspace = -1
        stamps = {}
        try:
            workspace = os.open(self._workspace, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stamps = {name: _stamp(os.stat(name, dir_fd=workspace)) for name in file_names}
            if len(stamps) > 1:
                self._announce(stamps, workspace)
            for file_name in file_names:
                self._name(file_name)
            sync_directory(self.path)
            self._forget_names()
        except BaseException as error:
            with contextlib.suppress(OSError):  # what we have got here for is what matters
                _take_names_back(self.path, workspace, stamps)
                self._forget_names()
            if isinstance(error, OSError):
                raise os_error(self.final(file_name) if file_name else self.path, error) from None
            raise
        finally:
            if workspace != -1:
                os.close(workspace)

    def _announce(self, stamps: dict[str, list[int]], workspace: int) -> None:
        """Tell what is to get a final name, durably; the images' names in the workspace are durable, too, then."""
        fd = os.open(_NAMES, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC, 0o600, dir_fd=workspace)
        try:
            text = memoryview(json.dumps(stamps).encode())
            while text:
                text = text[os.write(fd, text):]
            os.fsync(fd)
        finally:
            os.close(fd)
        os.fsync(workspace)
        sync_directory(self.path)

    def _forget_names(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(self._workspace, _NAMES))

    def replace(self, file_names: Sequence[str]) -> None:
        """Give images their final names, whatever had these before, and make that durable. Raises Error."""
        try:
            for file_name in file_names:
                os.rename(self.partial(file_name), self.final(file_name))
            sync_directory(self.path)
        except OSError as error:
            raise os_error(self.final(file_name) if file_names else self.path, error) from None

    def _name(self, file_name: str) -> None:
        partial, final = self.partial(file_name), self.final(file_name)
        try:
            os.link(partial, final)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                raise
            # A file system without links: the gap between these two calls can't be closed there.
            self.refuse_existing(file_name)
            os.rename(partial, final)

    def _begin(self) -> None:
        """Make the workspace and lock it. Somebody who cleans up may take it for abandoned before it is locked."""
        self._workspace = os.path.join(self.path, f"{_PREFIX}{secrets.token_hex(4)}{_SUFFIX}")
        os.mkdir(self._workspace, 0o700)
        with contextlib.suppress(FileNotFoundError):
            self._lock = lock_file(os.path.join(self._workspace, _LOCK), os.O_CREAT)


def remove_abandoned(directory: str) -> None:
    """
    Remove what killed processes left in a directory. What a living one makes is locked. Raises OSError.

    Images that one of them was to publish together have their final names all, or none of them has.
    """
    for name in os.listdir(directory):
        if not (name.startswith(_PREFIX) and name.endswith(_SUFFIX)):
            continue
        workspace = os.path.join(directory, name)
        # Somebody else may be faster, and somebody else's is not for us, nor what a link leads to.
        with contextlib.suppress(OSError):
            fd = os.open(workspace, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                # There may be none: its maker was killed before that, or it was being removed.
                if os.fstat(fd).st_uid == os.geteuid() and (lock := lock_file(_LOCK, os.O_CREAT, fd)) is not None:
                    try:
                        _end_publishing(directory, fd)
                        shutil.rmtree(workspace, ignore_errors=True)
                    finally:
                        os.close(lock)
            finally:
                os.close(fd)


def _end_publishing(directory: str, workspace: int) -> None:
    """
    What a killed process gave final names to keeps them if that is all, else loses them. Raises OSError.

    workspace: a descriptor of the directory that it left.
    """
    try:
        fd = os.open(_NAMES, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=workspace)
        with open(fd, encoding="utf-8") as file:
            stamps = json.load(file)
    except (FileNotFoundError, ValueError, RecursionError):
        return  # it had named nothing: this is written, wholly, before
    if isinstance(stamps, dict) and not all(_is_named(file_name, workspace) for file_name in stamps):
        _take_names_back(directory, workspace, stamps)


def _is_named(file_name: str, workspace: int) -> bool:
    """Whether a file in the workspace has got another name, which may have been changed since, or was moved."""
    found = _found(file_name, workspace)
    return found is None or found.st_nlink > 1


def _take_names_back(directory: str, workspace: int, stamps: dict[str, list[int]]) -> None:
    """
    Take the final names of files away from them, and make that durable. Raises OSError.

    stamps: {name: what _stamp() said before it was named}. What is something else now is left alone: it is
    another's, or somebody has begun to use it.
    """
    for file_name, stamp in stamps.items():
        final = os.path.join(directory, os.path.basename(file_name))
        named, here = _found(final), _found(file_name, workspace)
        if named is None or _stamp(named) != stamp:
            continue
        if here is None:
            os.rename(final, file_name, dst_dir_fd=workspace)
        elif os.path.samestat(named, here):
            os.unlink(final)
    sync_directory(directory)


def _stamp(found: os.stat_result) -> list[int]:
    """What of a file (os.stat() of it) stays the same when it is linked or moved, and changes when it is written."""
    return [found.st_size, found.st_mtime_ns]


def _found(path: str, directory: int | None = None) -> os.stat_result | None:
    """os.stat() of a file, not of what a link leads to; None if there is none. directory: see lock_file()."""
    try:
        return os.stat(path, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return None


def lock_file(path: str, flags: int = 0, directory: int | None = None) -> int | None:
    """
    A descriptor of a file, locked; None if somebody else has the lock, or removed the file. Raises OSError.

    directory: a descriptor of what path is relative to.
    """
    fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | flags, 0o600, dir_fd=directory)
    try:
        locks.take(fd)
        if os.path.samestat(os.fstat(fd), os.stat(path, dir_fd=directory, follow_symlinks=False)):
            return fd
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(fd)
    return None


def _make(path: str) -> list[str]:
    """Make a directory and those above it, unless they are there; the paths of those made. Raises Error."""
    try:
        # QEMU, which runs as another user, has to get through to the images; they themselves are private.
        return make_directories(path, 0o711)
    except OSError as error:
        raise os_error(error.filename or path, error) from None
