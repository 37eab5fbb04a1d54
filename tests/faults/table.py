# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Writes what a soak run tried into README.md beside this: `table.py [RESULTS]`, by default from results.json.

`make soak` calls it. Nobody writes that table by hand: a test compares the two.
"""

import json
import sys
from pathlib import Path

import tables

RESULTS = Path(__file__).with_name("results.json")
PLACE = tables.Place(tables.TESTS / "faults" / "README.md", "make soak")


def render(results):
    """The text between the markers, for what pytest_sessionfinish() in conftest.py wrote (dict)."""
    lines = [
        f'`make soak MINUTES={results["asked"]} SEED={results["seed"]}`, {results["began"][:10]}, '
        f'{results["minutes"]} minutes,',
        f"with {tables.in_words(results['versions'])}:",
        "",
        "| tried | times | what held |",
        "|---|---|---|",
    ]
    for fault in results["faults"]:
        held = f'**{fault["failed"]} of {fault["tried"]} failed**: ' if fault["failed"] else ""
        lines.append(f'| {fault["what"]} | {fault["tried"]} | {held}{fault["holds"]} |')
    return "".join(f"{line}\n" for line in ["", *lines, ""])


def main(path=RESULTS):
    PLACE.write(render(json.loads(Path(path).read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main(*sys.argv[1:])
