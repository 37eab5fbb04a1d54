# SPDX-License-Identifier: LGPL-2.1-or-later
"""
A directory of images, where a new image has its final name when it is whole, and not before.

    DIR/vda.qcow2                           what was there, or was finished
    DIR/.vnb-apply.1f0c5ab2.partial/        what one process is making now
        lock                                locked as long as that process lives
        vda.qcow2

A directory of one's own, with a lock beside the images and not on them: where flock(2) is made of the same locks
that QEMU takes (NFS), a lock of ours on the image would keep QEMU out.
"""

import contextlib
import errno
import fcntl
import os
import secrets
import shutil

from vnb.durable import make_directories, sync_directory
from vnb.errors import Error, os_error

_PREFIX = ".vnb-apply."
_SUFFIX = ".partial"
_LOCK = "lock"


class ImageDirectory:
    """
    Makes new images in a directory.

        with ImageDirectory(path) as directory:
            ... make the image directory.partial("vda.qcow2") ...
            directory.publish(["vda.qcow2"])

    What was not published is gone in the end, and with it the directory if it was made here and holds nothing.
    path (str): made if it is not there. What a killed process left in it is removed. Raises Error.
    """

    def __init__(self, path):
        self.path = path
        self._workspace = None
        self._lock = None
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

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            self.close()
        except BaseException:
            self.close()  # a signal; there is no second one
            raise

    def close(self):
        """Remove what was not published. May be called again."""
        if self._workspace is not None:
            shutil.rmtree(self._workspace, ignore_errors=True)
        if self._lock is not None:
            lock, self._lock = self._lock, None
            os.close(lock)
        for path in reversed(self._made):
            with contextlib.suppress(OSError):
                os.rmdir(path)

    def final(self, file_name):
        """The path of an image that has its final name, as the user would type it."""
        return os.path.join(self.path, file_name)

    def partial(self, file_name):
        """The absolute path of an image that has not."""
        return os.path.abspath(os.path.join(self._workspace, file_name))

    def refuse_existing(self, file_name):
        """Raise Error if there is something by this name already."""
        if os.path.lexists(self.final(file_name)):
            raise Error(self.final(file_name), os.strerror(errno.EEXIST))

    def publish(self, file_names):
        """
        Give images their final names, all or none, and make that durable. The images themselves are durable already.

        Nothing is replaced. Raises Error.
        """
        named = []
        try:
            for file_name in file_names:
                self._name(file_name, named)
            sync_directory(self.path)
        except BaseException as error:
            for other in named:
                os.unlink(self.final(other))
            if isinstance(error, OSError):
                raise os_error(self.final(file_name) if file_names else self.path, error) from None
            raise

    def replace(self, file_names):
        """Give images their final names, whatever had these before, and make that durable. Raises Error."""
        try:
            for file_name in file_names:
                os.rename(self.partial(file_name), self.final(file_name))
            sync_directory(self.path)
        except OSError as error:
            raise os_error(self.final(file_name) if file_names else self.path, error) from None

    def _name(self, file_name, named):
        partial, final = self.partial(file_name), self.final(file_name)
        try:
            os.link(partial, final)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                raise
            # A file system without links: the gap between these two calls can't be closed there.
            self.refuse_existing(file_name)
            os.rename(partial, final)
        named.append(file_name)

    def _begin(self):
        """Make the workspace and lock it. Somebody who cleans up may take it for abandoned before it is locked."""
        self._workspace = os.path.join(self.path, f"{_PREFIX}{secrets.token_hex(4)}{_SUFFIX}")
        os.mkdir(self._workspace, 0o700)
        with contextlib.suppress(FileNotFoundError):
            self._lock = lock_file(os.path.join(self._workspace, _LOCK), os.O_CREAT)


def remove_abandoned(directory):
    """Remove what killed processes left in a directory. What a living one makes is locked. Raises OSError."""
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
                    shutil.rmtree(workspace, ignore_errors=True)
                    os.close(lock)
            finally:
                os.close(fd)


def lock_file(path, flags=0, directory=None):
    """
    A descriptor of a file, locked; None if somebody else has the lock, or removed the file. Raises OSError.

    directory (int or None): a descriptor of what path is relative to.
    """
    fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | flags, 0o600, dir_fd=directory)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(fd), os.stat(path, dir_fd=directory, follow_symlinks=False)):
            return fd
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(fd)
    return None


def _make(path):
    """Make a directory and those above it, unless they are there; the paths of those made. Raises Error."""
    try:
        # QEMU, which runs as another user, has to get through to the images; they themselves are private.
        return make_directories(path, 0o711)
    except OSError as error:
        raise os_error(error.filename or path, error) from None
