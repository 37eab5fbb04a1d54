# SPDX-License-Identifier: LGPL-2.1-or-later
"""No damage to a stream goes unseen: each cut, each bit, each part in another order."""

import itertools

import pytest
import samples

from vnb.base.errors import Error, StreamError

STREAM = samples.every_kind()


def test_sample_is_sound():
    assert len(samples.read(STREAM)) == 2


def test_cut_at_every_byte():
    length = samples.read(STREAM)[0][-1]
    for size in range(len(STREAM)):
        if size == length:
            assert len(samples.read(STREAM[:size])) == 1  # the first segment, whole
            continue
        with pytest.raises(StreamError) as caught:
            samples.read(STREAM[:size])
        assert "\n" not in str(caught.value)


def test_every_bit_flipped():
    """A flip that nobody sees may stay in a set for years."""
    for at, bit in itertools.product(range(len(STREAM)), range(8)):
        damaged = bytearray(STREAM)
        damaged[at] ^= 1 << bit
        try:
            samples.read(damaged)
        except Error as error:
            assert "\n" not in str(error)
        else:
            pytest.fail(f"bit {bit} of byte {at} is not seen")


def test_byte_lost_or_doubled():
    for at in range(len(STREAM)):
        for damaged in (STREAM[:at] + STREAM[at + 1:], STREAM[:at] + STREAM[at:at + 1] + STREAM[at:]):
            if damaged != STREAM:
                with pytest.raises(Error):
                    samples.read(damaged)
