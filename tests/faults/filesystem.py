# SPDX-License-Identifier: LGPL-2.1-or-later
"""
A file system of its own on a loop device, whose power can be cut, or that becomes read-only in the middle of something.

    with private_mounts(), FileSystem("ext4", directory) as disk:
        ...                             # in disk.path
        disk.cut()                      # nothing gets to the disk any more
        disk.again()                    # mounted again: what was not synced is gone

No device-mapper is needed: the shutdown ioctl of ext4 and xfs has a file system write nothing any more, neither what is
dirty nor the log that it holds in memory, and fail in all that it is asked for. What had got to the device stays, as on
a disk without a cache of its own.

Only root can mount. Where this is not possible the test is skipped.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from lab import NEW_MOUNTS, KiB, MiB, change_root, leave_mounts, run, wait_for

SIZE = 400 * MiB  # of a sparse file: xfs takes no less than 300
GOING_DOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN, XFS_IOC_GOINGDOWN: _IOR('X', 125, __u32)
NO_LOG_FLUSH = 2

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts file systems: needs root")


@contextlib.contextmanager
def private_mounts():
    """
    Be in a mount namespace of our own.

    Whoever makes one beside us, as a laboratory does, gets a copy of each mount that it sees, and so keeps it busy:
    this keeps ours out of sight. And they go with the namespace, whatever happens to the test.
    """
    here = os.getcwd()
    before = os.open("/proc/thread-self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    root = os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            leave_mounts()
        except OSError as error:
            pytest.skip(f"no mount namespace of our own: {error.strerror}")
        try:
            yield
        finally:
            if ctypes.CDLL(None, use_errno=True).setns(before, NEW_MOUNTS) != 0:
                raise OSError(ctypes.get_errno(), "setns")
            change_root(root, here)  # it need not be the root directory of the namespace
    finally:
        os.close(root)
        os.close(before)


class FileSystem:
    """
    A file system, from entering it as a context until it is left.

    kind (str): ext4 or xfs; directory (Path): its image is made there, and where it is mounted. size (int): in bytes.
    options (str): for mount(8). path (Path): where it is mounted.
    """

    def __init__(self, kind, directory, size=SIZE, options="loop"):
        self.kind = kind
        self.path = directory / "fs"
        self.size = size
        self.options = options
        self._image = directory / "fs.img"

    def __enter__(self):
        if shutil.which(f"mkfs.{self.kind}") is None:
            pytest.skip(f"not installed: mkfs.{self.kind}")
        self.path.mkdir(exist_ok=True)
        with open(self._image, "wb") as file:
            file.truncate(self.size)
        run(f"mkfs.{self.kind}", "-q", self._image)
        try:
            self._mount()
        except RuntimeError as error:
            pytest.skip(f"no loop device, or no {self.kind}: {str(error).rpartition(': ')[2]}")
        return self

    def __exit__(self, *_):
        if os.path.ismount(self.path):
            subprocess.run(["umount", "-l", self.path], check=True)
        self._image.unlink()

    def _mount(self):
        run("mount", "-t", self.kind, "-o", self.options, self._image, self.path)

    def sync(self):
        """All that is there now is safe."""
        run("sync", "-f", self.path)

    def cut(self):
        """Cut the power."""
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.ioctl(fd, GOING_DOWN, struct.pack("I", NO_LOG_FLUSH))
        except OSError as error:
            if error.errno in (errno.ENOTTY, errno.EOPNOTSUPP, errno.EPERM):
                pytest.skip(f"{self.kind} has no shutdown here: {error}")
            raise
        finally:
            os.close(fd)

    def fail(self):
        """Have ext4 find an error, whereupon it is read-only with the mount option errors=remount-ro."""
        number = os.stat(self.path).st_dev
        device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve().name
        trigger = Path("/sys/fs/ext4", device, "trigger_fs_error")
        try:
            trigger.write_text("1")
        except OSError as error:
            pytest.skip(f"errors of ext4 can't be had here: {error}")

    def again(self):
        """Mount it again, when nobody uses it any more."""
        def is_free():
            return subprocess.run(["umount", self.path], capture_output=True, check=False).returncode == 0

        wait_for(is_free, f"{self.path} that is not busy")
        self._mount()


@contextlib.contextmanager
def filled(directory, room):
    """Leave about so much room (bytes) in a file system, as long as the context lasts."""
    path = directory / "filler"
    with open(path, "wb") as file:
        size, step = 0, 128 * MiB
        while step >= 4 * KiB:
            try:
                os.posix_fallocate(file.fileno(), size, step)
                size += step
            except OSError as error:
                assert error.errno == errno.ENOSPC
                step //= 2
        file.truncate(max(size - room, 0))
        os.fsync(file.fileno())
    yield
    path.unlink()
