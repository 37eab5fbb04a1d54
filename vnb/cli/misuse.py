# SPDX-License-Identifier: LGPL-2.1-or-later
"""
What is wrong with a command line that docopt refuses: it says that it does, and not why.

So it is asked again: what if this was there, what if that was not? The least change that it takes is the reason.
"""

from __future__ import annotations

import re

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any


_MOST_OPERANDS = 3  # that are missing
_MOST_WORDS = 64  # of a line that is asked about: each of them is one question more
_WORD = "\0"  # stands for any operand, or value; nobody can type it


def reason(usage: Any, argv: Sequence[str], parse: Callable[..., Any]) -> Any:
    """
    Why this command line is wrong.

    usage: of the command. parse: takes words, and returns docopt's dict for them, or None where it
    refuses them.
    """
    if len(argv) > _MOST_WORDS:
        return "wrong usage"
    # Any other option belongs to [options], so no form of the command needs it, and none forbids it.
    takes = {
        option.name: bool(option.value) for option in usage.options
        if re.search(rf"(?<![\w-]){option.name}(?![\w-])", usage.synopsis)
    }
    return _missing(takes, argv, parse) or _too_much(usage, argv, parse) or "wrong usage"


def _missing(options, argv, parse):
    """What would have to be there, too, in words, or None. options: {those of the synopsis: whether with a value}."""
    end = argv.index("--") if "--" in argv else len(argv)
    # Before what is for another command, behind it, or both.
    for before, after in ((argv[:end], argv[end:]), (argv, []), ([*argv, "--"], []), ([*argv, _WORD, "--"], [])):
        for count in range(1, _MOST_OPERANDS + 1):
            args = parse([*before, *[_WORD] * count, *after])
            if args:
                names = _operands(args)
                return f"{_listed(names, 'and')} {'are' if names[1:] else 'is'} missing"
    alone, with_operand, operand = [], [], None
    for option in options.keys() - {"--help", "--version"} - set(argv):
        words = [option, _WORD] if options[option] else [option]
        if parse([*words, *argv]):
            alone.append(option)
        args = parse([*words, *argv, _WORD])
        if args:
            with_operand.append(option)
            operand = _listed(_operands(args), "and")
    # More of them with an operand: those that are enough alone are for something else, as --stop.
    more, found = ("", alone) if len(alone) >= len(with_operand) else (f"{operand} is missing, and ", with_operand)
    return f"{more}{_listed([option for option in options if option in found], 'or')} is needed" if found else None


def _operands(args):
    """The names of the operands that have our word."""
    return [name for name, value in args.items()
            if name.isupper() and _WORD in (value if isinstance(value, list) else [value])]


def _too_much(usage, argv, parse):
    """What would have to go, in words, or None."""
    options, operands = [], []
    number = 0
    while number < len(argv):
        word, start = argv[number], number
        is_option = word.startswith("-") and word not in ("-", "--")
        with_value = is_option and any(option.value and (option.name.startswith(word) or option.short == word)
                                       for option in usage.options)
        number += 2 if with_value else 1
        if parse(argv[:start] + argv[number:]):
            (options if is_option else operands).append(word.partition("=")[0] if is_option else word)
    options = list(dict.fromkeys(options))
    if len(options) > 1:
        return f"{options[-1]} contradicts {_listed(options[:-1], 'and')}"
    if operands:
        return f'unexpected operand "{operands[-1]}"'
    if options and sum(word.partition("=")[0] == options[0] for word in argv) > 1:
        return f"{options[0]} is given twice"
    return f"{options[0]} cannot stand here" if options else None


def _listed(words, last):
    """Words as a sentence has them: "a, b and c"."""
    return f" {last} ".join(filter(None, (", ".join(words[:-1]), words[-1])))
