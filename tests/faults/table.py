# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Puts what a soak run tried into the README, between two markers: `table.py [RESULTS]`, from results.json beside this.

`make soak` calls it. Nobody writes that table by hand: a test compares the two.
"""

import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import vnb

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
RESULTS = Path(__file__).with_name("results.json")
BEGIN = "<!-- make soak writes this -->\n"
END = "<!-- up to here -->\n"


def versions():
    """{program: its version} of what takes part."""
    found = {"vnb": vnb.__version__}
    for name, command in {
        "QEMU": ["qemu-img", "--version"], "libvirt": ["libvirtd", "--version"], "nbdkit": ["nbdkit", "--version"],
    }.items():
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found[name] = re.search(r"\d+\.\d+\.\d+", text)[0]
    found["Python"] = platform.python_version()
    found["Linux"] = re.match(r"[\d.]*\d", os.uname().release)[0]
    return found


def render(results):
    """The text between the markers, for what pytest_sessionfinish() in conftest.py wrote (dict)."""
    programs = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [
        f'`make soak MINUTES={results["asked"]} SEED={results["seed"]}`, {results["began"][:10]}, '
        f'{results["minutes"]} minutes,',
        f"with {programs}:",
        "",
        "| tried | times | what held |",
        "|---|---|---|",
    ]
    for fault in results["faults"]:
        held = f'**{fault["failed"]} of {fault["tried"]} failed**: ' if fault["failed"] else ""
        lines.append(f'| {fault["what"]} | {fault["tried"]} | {held}{fault["holds"]} |')
    return "".join(f"{line}\n" for line in ["", *lines, ""])


def between(text):
    """(what stands before the table, the table, what stands after it) in a README."""
    before, found, rest = text.partition(BEGIN)
    now, found_too, after = rest.partition(END)
    if not (found and found_too):
        raise SystemExit(f"table.py: {README}: has no place for the table")
    return before + found, now, found_too + after


def main(path=RESULTS):
    before, _, after = between(README.read_text(encoding="utf-8"))
    results = json.loads(Path(path).read_text(encoding="utf-8"))
    README.write_text(before + render(results) + after, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
