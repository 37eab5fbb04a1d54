# SPDX-License-Identifier: LGPL-2.1-or-later
"""
The usage text of a command, taken apart once for everybody who asks about its options.

docopt takes a command line apart by a usage text, but it answers no question about the text itself.
"""

from __future__ import annotations

import re

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any



class Option:
    """
    One option. short, long: its names, with dashes. value: what the text calls its value.
    default. text: the first line of its description.
    """

    def __init__(self, short: str | None, long: str | None, value: str | None, default: str | None, text: str) -> None:
        self.short = short
        self.long = long
        self.value = value
        self.default = default
        self.text = text

    @property
    def name(self) -> str:
        """The long name where there is one."""
        return self.long or self.short or ""


class Usage:
    """
    A usage text.

    name, purpose: from its first line. synopsis: the lines after "Usage:". options (list of Option): in the
    order of the text.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        first, _, rest = text.strip().partition("\n")
        self.name, _, self.purpose = first.partition(" - ")
        self.synopsis = rest.partition("\nUsage:\n")[2].partition("\n\n")[0]
        self.options = [
            option for part in re.split(r"\n(?:Common o|O)ptions:\n", rest)[1:]
            for entry in re.findall(r"(?m)^  -.*(?:\n   .*)*", part) for option in _options(entry)
        ]
        self._by_name = {name: option for option in self.options for name in (option.short, option.long) if name}

    def find(self, name: str) -> Option | None:
        """The Option with a name (str, with dashes), or None."""
        return self._by_name.get(name)

    def wrong_option(self, argv: Sequence[str]) -> Any:
        """In words, which word of argv is no option of this text, or could be several; None where all are right."""
        for word in argv:
            if word == "--":  # no option follows
                break
            name = word.partition("=")[0] if word.startswith("--") else word[:2]
            if not name.startswith("-") or name == "-" or name in self._by_name:
                continue
            meant = sorted(known for known in self._by_name if known.startswith(name))  # docopt completes long options
            if not meant:
                return f"unknown option {name}"
            if meant[1:]:
                return f"{name} is not a unique prefix: {', '.join(meant)}?"
        return None


def _options(entry):
    """The options of one entry of a list: several may share a line, and a short name stands before its long one."""
    names, _, text = re.sub(r"^  ", "", entry).partition("\n")[0].partition("  ")
    text = text.strip() or entry.partition("\n")[2].partition("\n")[0].strip()
    default = re.search(r"\[default: (\S+)\]", entry)
    short = None
    for name, value in re.findall(r"(--?[A-Za-z][\w-]*)(?: ([A-Z][\w:\[\]=.-]*))?", names):
        if not name.startswith("--"):
            short = name
            if f"{short}{' ' + value if value else ''}, --" in names:
                continue  # the long name follows
            name = None
        yield Option(short, name, value or None, default and default[1], text)
        short = None
