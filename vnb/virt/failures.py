# SPDX-License-Identifier: LGPL-2.1-or-later
"""Failures of libvirt that somebody acts upon, told by codes and never by words."""

from __future__ import annotations

import errno
import re

import libvirt

from vnb.base.errors import Error


class NoDomain(Error):
    """libvirt answers, and knows no such domain."""


class BrokenBitmap(Error):
    """A bitmap that a backup was to start from is missing or inconsistent."""


class SystemRefusal(Error):
    """
    What the kernel refused to libvirt or QEMU.

    libvirt's words are those of its locale, and it gives the number, too; QEMU's, within them, are English.
    """

    numbers: tuple[int, ...] = ()
    words = ""

    @classmethod
    def is_meant(cls, error: libvirt.libvirtError) -> bool:
        """Whether this is what a libvirtError tells."""
        if error.get_error_code() == libvirt.VIR_ERR_SYSTEM_ERROR:
            return error.get_int1() in cls.numbers
        return cls.words in error.get_error_message()


class Denied(SystemRefusal):
    """A right is lacking."""

    numbers = (errno.EACCES, errno.EPERM)
    words = "Permission denied"


class AddressInUse(SystemRefusal):
    """Somebody else listens there."""

    numbers = (errno.EADDRINUSE,)
    words = "Address already in use"


class Unready(Error):
    """The job must not be ended now."""


class Unanswered(Error):
    """The guest agent did not answer: what was asked may be done at any later time."""


def names_disk(words: str, disk: str) -> bool:
    """Whether words of libvirt, in any language and with any quotation marks, have the name of a disk in them."""
    return re.search(rf"(?<!\w){re.escape(disk)}(?!\w)", words) is not None
