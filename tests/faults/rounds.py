# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rounds of a test that tries faults, each with chances of its own, and a count of what was tried."""

import dataclasses
import itertools
import os
import random
import time

import limit

SEED = os.environ.get("VNB_SEED", "1")
ONLY = os.environ.get("VNB_ROUND")  # this round alone, to see again what happened in it
INPUT = os.environ.get("VNB_INPUT")  # this file alone, of a test that tries inputs
SOAK_SECONDS = float(os.environ.get("VNB_SOAK", "0")) * 60
MANY = 12  # faults: of fewer it is by chance how many have an effect


class Rounds:
    """
    Yields a random.Random for each round of a test: the same for the same seed, test and number.

    name (str): the test; count (int): how many, or None where seconds say how long. number (int or None): the one that
    runs; is_soak (bool): seconds count. faults (int): what was tried and had an effect, a round or what fault() was
    called for; misses (int): what had none. Where that is more than half of many, a soak says so: it has tested little.
    input (str or None): the path of what failed, where a round depends on those before it: alone it would be another.
    """

    def __init__(self, name, count=None, seconds=0, seed=SEED, only=ONLY):
        self.name = name
        self.seed = seed
        self.faults = 0
        self.misses = 0
        self.is_soak = count is None
        self.seconds = seconds
        self.number = None
        self.input = None
        self._numbers = itertools.count() if count is None else range(count)
        if only is not None:
            self._numbers = [int(only)]
        self._end = time.monotonic() + seconds if count is None else None

    def __iter__(self):
        for number in self._numbers:
            if self._end is not None and self.number is not None and time.monotonic() > self._end:
                break
            limit.renew()
            self.number = number
            before = self.faults + self.misses
            yield random.Random(f"{self.seed} {self.name} {number}")
            self.faults += self.faults + self.misses == before
        if self.is_soak and self.faults + self.misses >= MANY:
            assert self.faults > self.misses, f"{self.name}: only {self.faults} had an effect, {self.misses} had none"

    def fault(self, hit=True):
        """One more was tried, in a round of several; hit (bool): it had an effect, and counts."""
        self.faults += hit
        self.misses += not hit

    def again(self):
        """What to say to have the round again that failed (str), or the input."""
        if self.input is not None:
            return f"VNB_INPUT={self.input}"
        return f"VNB_SEED={self.seed} VNB_ROUND={self.number}"


@dataclasses.dataclass
class Tally:
    """How often a fault was tried. what, holds (str): see tests/faults/conftest.py; failed (int): of those tried."""

    what: str
    holds: str
    tried: int = 0
    failed: int = 0
