# SPDX-License-Identifier: LGPL-2.1-or-later
"""Options of the command line: those that all commands have, and their values, checked before anything is opened."""

from __future__ import annotations

import re

from vnb.base.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any


COMMON = """\
  -v, --verbose        print more, and the name of the run in each line
  -q, --quiet          print only warnings and errors
  --log-format FORMAT  text, json or journald
  --debug              show tracebacks
  --help               print this text
  --version            print the version
"""
OTHERS = ("COMMAND", "ARGUMENT")  # words of another command's line, which checks them itself
_UNITS = {None: 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def usage(text: str) -> str:
    """The whole usage text of a command whose own part is text; [options] in it also means the common ones."""
    heading = "Common options" if "\nOptions:\n" in text else "Options"
    return f"{text.strip()}\n\n{heading}:\n{COMMON}"


def refuse_empty(args: Mapping[str, Any]) -> None:
    """
    Raise UsageError for an option or operand that was given, but with nothing in it.

    A variable of a script that is not set makes such a word. If vnb took it for an option that was not given, a server
    would go without its TLS, and a backup would go to standard output.
    """
    for name, value in args.items():
        if name not in OTHERS and "" in (value if isinstance(value, list) else [value]):
            raise UsageError(name, "is empty")


def integer(args: Mapping[str, Any], option: str, low: int, high: int) -> int:
    """The value of an option as an integer within [low, high]; UsageError."""
    text = args[option]
    if not re.fullmatch(r"[0-9]{1,18}", text) or not low <= int(text) <= high:
        raise UsageError(option, f'"{text}" is not a number within {low}-{high}')
    return int(text)


def size(args: Mapping[str, Any], option: str, low: int, high: int) -> int:
    """The value of an option as bytes: a number with k, M, G or T (powers of 1024) behind it, or none."""
    text = args[option]
    match = re.fullmatch(r"([0-9]{1,15})(?:([kmgt])(?:ib)?)?", text.lower())
    value = int(match[1]) * _UNITS[match[2]] if match else -1
    if not low <= value <= high:
        raise UsageError(option, f'"{text}" is not a size such as 4096, 512k, 10M or 2G, within {low}-{high}')
    return value


def seconds(args: Mapping[str, Any], option: str) -> int:
    """The value of an option as seconds: a number with s, m, h or d behind it, or none (seconds)."""
    text = args[option]
    match = re.fullmatch(r"([0-9]{1,9})([smhd]?)", text)
    if not match:
        raise UsageError(option, f'"{text}" is not a time such as 90s, 10m, 4h or 1d')
    return int(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]
