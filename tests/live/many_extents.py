# SPDX-License-Identifier: LGPL-2.1-or-later
"""
nbdkit Python plugin: a large disk of very many extents, and next to nothing to read.

Every MiB, or what extent= says in bytes, is an extent of its own, in turn a hole and zeroes; one in 256 has 64 KiB of
data.

    nbdkit python many_extents.py size=1099511627776 --run 'nbdinfo --map "$uri"'
"""

import nbdkit

API_VERSION = 2
extent = 1 << 20
DATA = 64 << 10
DATA_EVERY = 256

export_size = 1 << 40


def config(key, value):
    global export_size, extent
    if key == "size":
        export_size = int(value)
    elif key == "extent":
        extent = int(value)
    else:
        raise RuntimeError(f"unknown parameter {key}")


def thread_model():
    return nbdkit.THREAD_MODEL_PARALLEL


def open(_readonly):  # noqa: A001 -- nbdkit's name for it
    return 1


def get_size(_handle):
    return export_size


def can_extents(_handle):
    return True


def can_multi_conn(_handle):
    return True


def pread(_handle, buffer, offset, _flags):
    for at in range(len(buffer) // 4096):
        buffer[at * 4096] = (offset // 4096 + at) % 255 + 1


def extents(_handle, count, offset, _flags):
    # nbdkit takes more than it was asked for; up to 4096 extents are enough for one answer
    end = min(offset + count, offset + 4096 * extent, export_size)
    number = offset // extent
    found = []
    while number * extent < end:
        start = number * extent
        state = nbdkit.EXTENT_ZERO | (nbdkit.EXTENT_HOLE if number % 2 else 0)
        if number % DATA_EVERY == 0:
            found.append((start, DATA, 0))
            found.append((start + DATA, extent - DATA, state))
        else:
            found.append((start, extent, state))
        number += 1
    return found
