# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which versions of other people's libraries are here, for --version: the first question about any trouble."""

from __future__ import annotations

import platform

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any



def libraries() -> Any:
    """A line such as "Python 3.11.2, libvirt 9.0.0, no libnbd, ...": what is not installed is said to be so."""
    found = []
    for name, version_of in (
        ("Python", platform.python_version), ("libvirt", _libvirt), ("libnbd", _libnbd), ("lz4", _lz4),
        ("msgpack", _msgpack), ("xxhash", _xxhash), ("zstd", _zstd),
    ):
        try:
            found.append(f"{name} {version_of()}")
        except ImportError:  # the module, or a library that it needs
            found.append(f"no {name}")
    return ", ".join(found)


def _libvirt():
    import libvirt

    number = libvirt.getVersion()  # of the library; the host's may be another
    return f"{number // 1000000}.{number // 1000 % 1000}.{number % 1000}"


def _libnbd():
    import nbd

    return nbd.NBD().get_version()


def _lz4():
    import lz4

    return lz4.library_version_string()


def _msgpack():
    import msgpack

    return ".".join(map(str, msgpack.version))


def _xxhash():
    import xxhash

    return xxhash.XXHASH_VERSION


def _zstd():
    import zstandard

    return ".".join(map(str, zstandard.ZSTD_VERSION))
