# SPDX-License-Identifier: LGPL-2.1-or-later
"""Jobs that do the same thing, timed in turns."""

import shutil
import statistics
import time
from pathlib import Path

from lab import MiB

ROOT = Path(__file__).resolve().parents[2]


class Group:
    """
    Jobs that do the same thing, the first of them the yardstick.

    jobs: {name: function that takes a fresh directory (str) and returns seconds}. size (int): bytes that each handles,
    0 where that says nothing. most: {name: the largest ratio to the yardstick that it should take}; seconds: {name:
    the most seconds}. Both are aims, and nothing fails by them.
    """

    def __init__(self, title, size, jobs, most=None, seconds=None):
        self.title = title
        self.size = size
        self.jobs = jobs
        self.most = most or {}
        self.seconds = seconds or {}

    def measure(self, lab, rounds):
        """
        Yield a row (dict) for each job.

        They take turns, since the page cache may be three times as fast as it was a minute ago; and every other time
        the other way round, since who comes after a job that writes may have to wait for its disk.
        """
        times = {name: [] for name in self.jobs}
        for number in range(rounds):
            names = list(self.jobs)
            for name in names if number % 2 == 0 else reversed(names):
                directory = lab.new_directory("job")
                try:
                    times[name].append(self.jobs[name](directory))
                finally:
                    shutil.rmtree(directory)
        yardstick = None
        for name, found in times.items():
            median = statistics.median(found)
            yardstick = yardstick or median
            yield {
                "group": self.title, "job": name, "seconds": round(median, 3), "ratio": round(median / yardstick, 2),
                "spread": round(max(found) / min(found), 2),
                "mib_per_second": round(self.size / MiB / median) or None,
                "at_most_ratio": self.most.get(name), "at_most_seconds": self.seconds.get(name),
                "rounds": [round(value, 3) for value in found],
            }


def timed(function):
    """The seconds that a function takes."""
    start = time.monotonic()
    function()
    return time.monotonic() - start


def script(lab, text):
    """The seconds that a bash script takes in a laboratory."""
    return timed(lambda: lab.sh(text))


def python(lab, program, path, *arguments):
    """Run a program (str) with the distribution's Python; the seconds that it says it took."""
    words = " ".join(map(str, arguments))
    return float(lab.sh(f"/usr/bin/python3 -c '{program}' {path} {words}").stdout)
