# SPDX-License-Identifier: LGPL-2.1-or-later
"""A Reader with a pool: who gives payloads back."""

import samples

from vnb.format import stream


class CountingPool:
    """Counts the buffers that are out."""

    def __init__(self):
        self.out = 0

    def take(self, size):
        self.out += 1
        return memoryview(bytearray(size))

    def give(self, view):
        self.out -= 1


def test_index_payloads_go_back_to_the_pool():
    """They are not yielded, so nobody else can: a pool with a limit would run dry in a long segment."""
    pool = CountingPool()
    with samples.memory(samples.every_kind(required=False)) as fd:
        for segment in stream.Reader(fd, "sample", pool=pool):
            for frame in segment:
                if getattr(frame, "payload", None) is not None:
                    pool.give(frame.payload)
    assert pool.out == 0
