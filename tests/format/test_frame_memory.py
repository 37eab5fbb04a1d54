# SPDX-License-Identifier: LGPL-2.1-or-later
"""Memory does not grow with the number of frames."""

import tracemalloc

import samples

from vnb.format import stream
from vnb.format.frame import HOLE, MAX_EXTENTS, KiB


def test_frames_that_were_looked_at_before_they_were_all_here():
    """msgpack never frees what it made of an array that it could not finish: 150 KiB a frame of extents."""
    frames = 60
    step = 1 << 20
    with samples.written() as (writer, content):
        out = writer.segment(samples.head(), [samples.disk("a", frames * MAX_EXTENTS * step)])
        for frame in range(frames):
            first = frame * MAX_EXTENTS
            runs = [word for at in range(first, first + MAX_EXTENTS) for word in (at * step, step, HOLE)]
            samples.extents(out, 0, runs)
        out.end()
        whole = content()
    tracemalloc.start()
    try:
        with samples.memory(whole) as fd:
            for segment in stream.Reader(fd, "sample"):
                for number, _ in enumerate(segment):
                    if number == frames // 2:
                        half, _ = tracemalloc.get_traced_memory()
        end, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert end - half < 500 * KiB
