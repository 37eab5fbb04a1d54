# SPDX-License-Identifier: LGPL-2.1-or-later
"""vnb-options - print the options that vnb.ini adds to those of a script

Usage:
  vnb-options [options] FILE SECTION [ARGUMENT]...
  vnb-options --help | --version

Reads the usage of a command from standard input, and prints the options that
FILE has for it, one word a line. SECTION is backup, backup-all or restore.
ARGUMENT is a word of the command line; an option on it is not printed.
vnb-backup, vnb-backup-all and vnb-restore run this command.
"""

from __future__ import annotations

import configparser
import re
import sys

from vnb.base.errors import Error, os_error
from vnb.cli.runner import show
from vnb.cli.usage import Usage

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


OPTIONS_FIRST = True  # what was typed is not for us
MAX_FILE = 1 << 20  # characters
YES, NO = ("yes", "true", "on", "1"), ("no", "false", "off", "0")
SECTIONS = "[backup], [backup NAME] and [restore] are"


def main(args: dict[str, Any]) -> None:
    # vnb-backup-all has two usage texts there, its own and that of vnb-backup.
    options = known(Usage(sys.stdin.read(MAX_FILE)))
    typed, operands = split(args["ARGUMENT"], options)
    names = sections(args["SECTION"], operands)
    values = read(args["FILE"], names)
    for option, (where, value) in values.items():
        # Cut off it could be a part of the value, and read with it the comment would be.
        comment = re.search(r"(?:^|\s)[#;].*", f"{option} {value or ''}")
        if comment:
            raise Error(args["FILE"], f'"{comment[0].strip()}" is a comment only on a line of its own', where)
        if f"--{option}" not in options or option in ("help", "version", "dry-run"):
            raise Error(args["FILE"], f'"{option}" is no option that can stand here', where)
        if f"--{option}" not in typed:
            show("".join(f"{line}\n" for line in lines(option, value, options[f"--{option}"], args["FILE"], where)))


def sections(command: str, operands: Sequence[str]) -> Any:
    """The sections that count, each more than those before. command: backup, backup-all or restore."""
    if command == "backup" and operands:
        return ["backup", f"backup {operands[0]}"]
    return [command.removesuffix("-all")]


def known(usage: Any) -> Any:
    """{option with its dashes: whether it takes a value} of a vnb.cli.usage.Usage, and {short option: long option}."""
    found = {}
    for option in usage.options:
        found[option.name] = bool(option.value)
        if option.short and option.long:
            found[option.short] = option.long
    return found


def split(words: Sequence[str], options: Any) -> Any:
    """(options (set, long ones), operands) of a command line."""
    typed: set[str] = set()
    operands: list[str] = []
    rest = iter(words)
    for word in rest:
        name, equals, _ = word.partition("=")
        if word == "--":
            operands += rest
        elif word.startswith("-") and word != "-":
            takes = options.get(name)
            if isinstance(takes, str):
                name, takes = takes, options[takes]
            typed.add(name)
            if takes and not equals:
                next(rest, None)
        else:
            operands.append(word)
    return typed, operands


def read(path: str, names: Any) -> Any:
    """{option: (section, value or None)} of these sections of a file, each after the ones before. Raises Error."""
    none: Any = None  # no section is the default of others
    parser = configparser.RawConfigParser(
        delimiters=("=",), comment_prefixes=("#", ";"), allow_no_value=True, default_section=none, strict=True,
    )
    try:
        with open(path, encoding="utf-8") as file:
            parser.read_string(file.read(MAX_FILE), path)
    except OSError as error:
        raise os_error(path, error) from None
    except configparser.MissingSectionHeaderError as error:
        raise Error(path, f"is in no section: {SECTIONS}", f"line {error.lineno}") from None
    except (configparser.Error, UnicodeDecodeError) as error:
        raise Error(path, " ".join(str(error).split())) from None
    for name in parser.sections():
        if name.partition(" ")[0] not in ("backup", "restore"):
            raise Error(path, f"is for no command: {SECTIONS}", f"[{name}]")
    return {
        option: (f"[{name}]", value) for name in names if parser.has_section(name)
        for option, value in parser.items(name)
    }


def lines(option: str, value: str, takes: Any, path: str, where: Any) -> Any:
    """The option as words of a command line; several for several lines of its value. Raises Error."""
    if takes:
        values = [line for line in (value or "").splitlines() if line]
        if not values:
            raise Error(path, f'"{option}" needs a value', where)
        return [f"--{option}={line}" for line in values]
    if value is None or value.lower() in YES:
        return [f"--{option}"]
    if value.lower() in NO:
        return []
    raise Error(path, f'"{option}" is yes or no, not "{value}"', where)
