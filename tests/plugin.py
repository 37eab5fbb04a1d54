# SPDX-License-Identifier: LGPL-2.1-or-later
"""
An nbdkit plugin whose disk, and whose answers, are as a test describes them.

plan=JSON: {"size": bytes, "extents": [[length, flags of base:allocation], ...] or null for data, "repeat": how
often these follow each other, "replies": extents in one reply, "block": [minimum, preferred, maximum],
"fail": [request, offset], "die": [request, offset], "stall": [request, offset], "stalled": path}

A request is "pread" or "extents". One that reaches the offset gets EIO, kills the server, or is never answered.
Before it stalls, the server opens the file "stalled" and closes it again: a FIFO, on which the test waits.

A byte of data at an offset is that of PATTERN there, so that a test knows what it must read.
"""

import errno
import json
import os
import signal
import time

try:
    import nbdkit
except ImportError:
    nbdkit = None  # a test wants to know PATTERN

API_VERSION = 2
PATTERN = bytes((7 * at ^ at >> 5) & 0xFF for at in range(4099))
HOLE, ZERO = 1, 2

plan = {"extents": None, "replies": None, "block": None}


def thread_model():
    return nbdkit.THREAD_MODEL_SERIALIZE_ALL_REQUESTS


def config(key, value):
    if key != "plan":
        raise ValueError(key)
    plan.update(json.loads(value))
    if plan["extents"]:
        plan["extents"] *= plan.get("repeat", 1)


def open(readonly):  # noqa: A001, ARG001
    return 1


def get_size(h):
    return plan["size"]


def can_multi_conn(h):
    return True


def can_extents(h):
    return plan["extents"] is not None


def block_size(h):
    return tuple(plan["block"] or (1, 4096, 0xFFFFFFFF))


def extents(h, count, offset, flags):
    _as_planned("extents", offset, count)
    found = []
    start = 0
    for length, flags_ in plan["extents"]:
        if start + length > offset:
            found.append((start, length, flags_))
        start += length
        if start >= offset + count or len(found) == plan["replies"]:
            break
    return found


def pread(h, buf, offset, flags):
    _as_planned("pread", offset, len(buf))
    begin = offset % len(PATTERN)
    content = PATTERN[begin:] + PATTERN * (len(buf) // len(PATTERN) + 1)
    buf[:] = content[: len(buf)]
    start = 0
    for length, flags_ in plan["extents"] or ():
        if flags_ & ZERO:
            low, high = max(start, offset), min(start + length, offset + len(buf))
            if low < high:
                buf[low - offset : high - offset] = bytes(high - low)
        start += length


def _as_planned(request, offset, length):
    def reached(what):
        planned, at = plan.get(what, (None, None))
        return planned == request and offset <= at < offset + length

    if reached("die"):
        os.kill(os.getpid(), signal.SIGKILL)
    if reached("fail"):
        nbdkit.set_error(errno.EIO)
        raise OSError(errno.EIO, "as planned")
    if reached("stall"):
        os.close(os.open(plan["stalled"], os.O_WRONLY))
        while True:
            time.sleep(3600)  # until the server is killed
