# SPDX-License-Identifier: LGPL-2.1-or-later
"""
How fast, and in how much memory: the pipelines beside the tools that people know, in one run.

Usage: bench.py [--json] [--table] [--rounds N] [--data MIB] [--only WORD]

Each group of jobs is of 2 GiB, on a disk of 4 GiB where there is one. A ratio is to the first job of the group, and
worth more than the times: see turns.py. A time is the median of the rounds; spread is the slowest by the fastest.
What ends in files is synced within its time. What a row should take at most is an aim.
"""

import argparse
import itertools
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "live")]
os.environ["PATH"] = f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}"

import exports  # noqa: E402 -- after the path to it
import machine  # noqa: E402
import sets  # noqa: E402
import speeds  # noqa: E402
from lab import Lab, MiB  # noqa: E402


def measured(lab, data, rounds, word):
    """Yield the rows (dict) of the groups that have a word in their title."""
    for group in itertools.chain.from_iterable(module.groups(lab, data) for module in (machine, exports, sets)):
        if word in group.title:
            yield from group.measure(lab, rounds)
    for title, function in ((sets.INDEX, sets.large_index), (sets.MEMORY, sets.memory)):
        if word in title:
            yield from function(lab)


def lines(row, last_group):
    """The text of a row, with its group's above it where that is another than last_group."""
    if "seconds" in row:
        head = "seconds", "ratio", "at most", "spread", "MiB/s"
        found = row["seconds"], row["ratio"], speeds.aims(row), row["spread"], row["mib_per_second"]
    else:
        head, found = ("found", "at most"), (row["found"], row["most"])
    text = f"  {row['job']:44}" + "".join(f"{'' if value is None else value:>12}" for value in found)
    if row["group"] == last_group:
        return text
    return f"\n{row['group']:46}" + "".join(f"{word:>12}" for word in head) + "\n" + text


def main():
    parser = argparse.ArgumentParser(prog="bench")
    parser.add_argument("--json", action="store_true", help="one array of objects on stdout")
    parser.add_argument("--table", action="store_true", help="write the table of README.md here")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", type=int, default=2048, metavar="MIB")
    parser.add_argument("--only", default="", metavar="WORD", help="groups with this in their title")
    options = parser.parse_args()
    rows = []
    with Lab() as lab:
        for row in measured(lab, options.data * MiB, options.rounds, options.only):
            if not options.json:
                print(lines(row, rows[-1]["group"] if rows else None), flush=True)
            rows.append(row)
    if options.json:
        json.dump(rows, sys.stdout, indent=1)
        print()
    if options.table:
        speeds.save(rows)


if __name__ == "__main__":
    main()
