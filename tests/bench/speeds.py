# SPDX-License-Identifier: LGPL-2.1-or-later
"""The table in README.md beside this, of what bench.py measured: `make bench TABLE=1` keeps its rows in speeds.json."""

import datetime
import json
import os
import re
from pathlib import Path

import tables

PLACE = tables.Place(tables.TESTS / "bench" / "README.md", "make bench")
RESULTS = Path(__file__).with_name("speeds.json")


def save(rows):
    """Keep rows (list of dict, as bench.py has them), and write the table."""
    results = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(), "machine": machine(),
        "versions": tables.versions(), "rows": rows,
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    PLACE.write(render(results))


def machine():
    """What was measured on, in words."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 30
    return f"{os.cpu_count()} CPUs{f' ({model[1]})' if model else ''}, {memory} GiB"


def render(results):
    """The text between the markers, for what save() wrote (dict)."""
    lines = [
        f"`make bench`, {results['date']}, on {results['machine']}, with {tables.in_words(results['versions'])}:", "",
        "| | | seconds | ratio | at most |", "|---|---|---|---|---|",
    ]
    last = None
    for row in results["rows"]:
        if "seconds" in row:
            title = "" if row["group"] == last else row["group"]
            job = row["job"].replace("|", r"\|")  # of a pipeline: in a table it would end the cell
            lines.append(f"| {title} | {job} | {row['seconds']:.2f} | {row['ratio']:.2f} | {aims(row)} |")
        last = row["group"]
    return "".join(f"{line}\n" for line in ["", *lines, ""])


def aims(row):
    """What a timed row should take at most, as text: a ratio, or seconds."""
    ratio, seconds = row["at_most_ratio"], row["at_most_seconds"]
    return ", ".join(text for text in (ratio and f"{ratio:.2f}", seconds and f"{seconds} s") if text)
