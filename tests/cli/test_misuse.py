# SPDX-License-Identifier: LGPL-2.1-or-later
"""Command lines that make no sense: what is said names what is wrong with them."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from samples import COMMANDS, ROOT

WAYS = "--socket, --listen, --fuse, --device or --run is needed"
SUBCOMMANDS = "begin, run, commit, abort, list, size, cleanup, redefine, delete"
OTHER_DOCOPT = Path(ROOT, ".venv", "docopt-ng")
SCRIPTS = ("vnb-backup", "vnb-backup-all", "vnb-restore")


def refused(name, *argv, **environment):
    """The reason, from the first line."""
    done = subprocess.run([name, *argv], capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60,
                          env={**os.environ, **environment})
    assert (done.returncode, done.stdout) == (2, "")
    first, _, usage = done.stderr.partition("\n")
    assert usage.startswith("Usage:\n")
    return first.removeprefix(f"{name}: ")


WRONG = [
    ("vnb-cat", "SET_OR_FILE is missing"),
    ("vnb-cat --until x", "SET_OR_FILE is missing"),
    ("vnb-prune", "SET is missing"),
    ("vnb-prune --keep-last 1", "SET is missing"),
    ("vnb-prune --keep-last 1 --keep-last 2 set", "--keep-last is given twice"),
    ("vnb-options", "FILE and SECTION are missing"),
    ("vnb-map set", WAYS),
    ("vnb-map", f"SET_OR_FILE is missing, and {WAYS}"),
    ("vnb-map --listen 5", "SET_OR_FILE is missing"),
    ("vnb-map --socket a --listen=5 set", "--listen contradicts --socket"),
    ("vnb-cat --base --head set", "--head contradicts --base"),
    ("vnb-cat --base --until x set", "--until contradicts --base"),
    ("vnb-apply --preallocate --compress dir", "--compress contradicts --preallocate"),
    ("vnb-apply a b", 'unexpected operand "b"'),
    ("vnb-dump --svg set", "--map is needed"),
    ("vnb-dump --from-json file", 'unexpected operand "file"'),
    ("vnb-checkpoint", "SUBCOMMAND is missing"),
    ("vnb-checkpoint start vm1", f'unknown subcommand "start"; expected one of {SUBCOMMANDS}'),
    ("vnb-checkpoint delete --image a=b vm1", "unknown option --image"),
    ("vnb-checkpoint list", "DOMAIN is missing"),
    ("vnb-checkpoint list --json vm1 vm2", 'unexpected operand "vm2"'),
    ("vnb-checkpoint run vm1 --level full", "COMMAND is missing"),
    ("vnb-checkpoint run --level full -- cat", "DOMAIN is missing"),
    ("vnb-checkpoint run --level full", "DOMAIN and COMMAND are missing"),
    ("vnb-pack " + "x " * 999, "wrong usage"),  # told soon
    ("vnb-cat --frobnicate set", "unknown option --frobnicate"),
    ("vnb-cat --ver set", "--ver is not a unique prefix: --verbose, --version?"),
    ("vnb-cat set --until", "--until requires argument"),
    ("vnb-cat --head=yes set", "--head must not have an argument"),
]


@pytest.mark.parametrize("line, reason", WRONG)
def test_what_is_wrong(line, reason):
    assert refused(*line.split()) == reason


@pytest.fixture
def other_docopt():
    """An environment in which Python finds docopt-ng before docopt, as where Debian 13 has both."""
    if not OTHER_DOCOPT.exists():
        pytest.skip("docopt-ng could not be had")
    return {"PYTHONPATH": str(OTHER_DOCOPT)}


def test_all_commands_run_with_the_other_docopt(other_docopt):
    for name in {*COMMANDS, "vnb-checkpoint"} - {*SCRIPTS}:
        done = subprocess.run([name, "--help"], capture_output=True, text=True, env={**os.environ, **other_docopt})
        assert (done.returncode, done.stderr) == (0, "")
        assert "\nUsage:\n" in done.stdout


@pytest.mark.parametrize("line, reason", WRONG)
def test_what_is_wrong_in_our_words(line, reason, other_docopt):
    """docopt-ng has words of its own."""
    assert refused(*line.split(), **other_docopt) == reason


@pytest.mark.parametrize("name", sorted({*COMMANDS, "vnb-checkpoint"} - {*SCRIPTS}))
def test_an_option_with_nothing_in_it(name):
    """A variable that was not set is no reason to go without TLS, or to write to standard output."""
    command = [name, "begin"] if name == "vnb-checkpoint" else [name]
    usage = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
    options = set(re.findall(r"(?m)^  (?:-., )?(--?[a-z][\w-]*) [A-Z]", usage)) | {"--log-format"}
    operands = {"vnb-map": ["--run=x", "set"], "vnb-cat": ["--merge", "set"], "vnb-dump": ["--map", "set"],
                "vnb-checkpoint": ["begin", "vm1"], "vnb-extents": ["uri"], "vnb-options": ["a", "backup"],
                "vnb-import": ["set"], "vnb-prune": ["set"]}.get(name, [])
    for option in options:
        if name == "vnb-map" and option in ("--socket", "--listen", "--fuse", "--device", "--run", "--stop"):
            line = [option, ""] + ["set"] * (option != "--stop")
        elif option == "--image":
            line = ["begin", option, ""]
        else:
            line = [option, "", *operands]
        assert refused(name, *line) == f"{'--connect' if option == '-c' else option}: is empty"


@pytest.mark.parametrize("line, name", [
    (["vnb-cat", ""], "SET_OR_FILE"), (["vnb-cat", "set", ""], "SET_OR_FILE"), (["vnb-prune", ""], "SET"),
    (["vnb-apply", ""], "DIR"), (["vnb-map", "--run", "x", "--disk", "a", "--disk=", "set"], "--disk"),
    (["vnb-checkpoint", "run", "", "--level", "full", "--", "cat"], "DOMAIN"),
    (["vnb-checkpoint", "run", "vm1", "--level", "full", "--", ""], "COMMAND"), (["vnb-import", ""], "DIRECTORY"),
])
def test_an_operand_with_nothing_in_it(line, name):
    assert refused(*line) == f"{name}: is empty"


def test_empty_words_of_another_command():
    """They are for it."""
    line = ["vnb-checkpoint", "run", "--image", "vda=/nonexistent", "--level", "copy", "--", "cat", ""]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "COMMAND" not in done.stderr
