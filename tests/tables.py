# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tables that programs write into Markdown pages, each between two markers, and the versions of all that took part."""

import os
import platform
import re
import subprocess
from pathlib import Path

import vnb

TESTS = Path(__file__).resolve().parent
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


def in_words(found):
    """What versions() found, as text."""
    return ", ".join(f"{name} {version}" for name, version in found.items())


class Place:
    """
    The place of one table.

    page (Path): the Markdown file. writer (str): the command that writes the table, as the first marker names it.
    """

    def __init__(self, page, writer):
        self.page = page
        self.begin = f"<!-- {writer} writes this -->\n"

    def _parts(self):
        before, found, rest = self.page.read_text(encoding="utf-8").partition(self.begin)
        now, found_too, after = rest.partition(END)
        if not (found and found_too):
            raise SystemExit(f"{self.page}: has no place for a table: {self.begin}")
        return before + found, now, found_too + after

    def table(self):
        """What stands there."""
        return self._parts()[1]

    def write(self, text):
        """Put a table there."""
        before, _, after = self._parts()
        self.page.write_text(before + text + after, encoding="utf-8")
