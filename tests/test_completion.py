# SPDX-License-Identifier: LGPL-2.1-or-later
"""Completion, by the shells themselves: the generated scripts offer the options of the usage texts."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from samples import COMMANDS, ROOT

from vnb.cli.checkpoint_usage import SUBCOMMANDS

GENERATE = Path(ROOT, "packaging", "completion", "generate")
DIRECTORY = None  # of the two scripts
COMPLETE = """
source "$1"; COMP_WORDS=("${@:2}"); COMP_CWORD=$(($# - 2))
_vnb "$2" "${@: -1}" "${@: -2:1}"
printf '%s\\n' "${COMPREPLY[@]}"
"""
ZSH = """
zmodload zsh/zpty
zpty shell zsh -f -i
zpty -w shell "PS1= fpath=($1 \\$fpath); autoload -U compinit; compinit -u -D; bindkey '^I' complete-word"
zpty -w shell "unsetopt list_beep; LISTMAX=1000 COLUMNS=80 LINES=100; echo rea''dy"
zpty -r shell line '*ready*'
zpty -w -n shell "$2"$'\\t\\t'
zpty -r shell line "*$3*"
print -r -- "$line"
"""


@pytest.fixture(scope="module", autouse=True)
def generated(tmp_path_factory):
    """The two scripts, made once."""
    global DIRECTORY
    DIRECTORY = tmp_path_factory.mktemp("completion")
    subprocess.run([sys.executable, GENERATE, DIRECTORY], check=True)


def bash(*words):
    """The words that bash offers for the last word."""
    argv = ["bash", "-c", COMPLETE, "bash", DIRECTORY / "vnb.bash", *words]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


@pytest.mark.parametrize("name", COMMANDS)
def test_all_options_are_offered(name):
    commands = [[name], *([name, word] for word in SUBCOMMANDS if name == "vnb-checkpoint")]
    usage = "".join(
        subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout for command in commands)
    in_usage = set(re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", usage.partition("\nUsage:\n")[2].partition("\n\n")[0]))
    offered = bash(name, "-")
    assert len(set(offered)) == len(offered)
    assert in_usage | {"--help", "--version"} <= set(offered)
    if name == "vnb-backup-all":
        usage += subprocess.run(["vnb-backup", "--help"], capture_output=True, text=True, check=True).stdout
    assert set(offered) <= set(re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", usage))


def test_options_that_begin_so():
    assert bash("vnb-prune", "--keep-last", "3", "--keep-m") == ["--keep-monthly"]
    assert bash("vnb-prune", "--dry-run", "--x") == []


def test_subcommands_of_checkpoint():
    assert bash("vnb-checkpoint", "") == list(SUBCOMMANDS)
    assert bash("vnb-checkpoint", "clea") == ["cleanup"]


def test_a_subcommand_has_its_own_options():
    assert bash("vnb-checkpoint", "delete", "--f") == ["--force"]
    assert bash("vnb-checkpoint", "redefine", "--f") == []
    assert "--freeze" in bash("vnb-checkpoint", "--f")


@pytest.fixture
def domains(tmp_path, monkeypatch):
    (tmp_path / "virsh").write_text("#!/bin/sh\necho vm1; echo vm2; echo other; echo\n")
    (tmp_path / "virsh").chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


def test_domains(domains):
    assert bash("vnb-checkpoint", "begin", "v") == ["vm1", "vm2"]
    assert bash("vnb-backup", "-z", "") == ["vm1", "vm2", "other"]
    assert bash("vnb-checkpoint", "--level", "inc", "begin", "v") == ["vm1", "vm2"]
    assert bash("vnb-backup", "--level=full", "v") == ["vm1", "vm2"]
    assert bash("vnb-backup", "--level", "=", "full", "v") == ["vm1", "vm2"]  # as readline has it


@pytest.mark.parametrize("words", [
    ["vnb-prune", "v"], ["vnb-backup", "--level", "v"], ["vnb-backup", "--keep-weekly", ""], ["vnb-backup", "-c", "v"],
    ["vnb-backup", "--level", "=", "v"], ["vnb-backup", "vm1", ""], ["vnb-backup", "--raw", "vm1", "v"],
    ["vnb-backup-all", ""], ["vnb-checkpoint", "run", "vm1", "--", ""], ["vnb-checkpoint", "list", "--set", ""],
])
def test_files(domains, words):
    """Where it offers nothing, bash offers files."""
    assert bash(*words) == []


def test_all_domains_take_the_options_of_one():
    assert bash("vnb-backup-all", "--keep-m") == ["--keep-monthly"]
    assert bash("vnb-backup-all", "--jo") == ["--jobs"]


@pytest.mark.parametrize("name", ["vnb.bash", "_vnb"])
def test_every_command_has_it(name):
    listed = [line for line in (DIRECTORY / name).read_text().replace("\\\n", " ").splitlines()
              if line.startswith(("#compdef", "complete "))]
    assert re.findall(r" (vnb-[a-z-]+)", listed[0]) == COMMANDS


@pytest.mark.skipif(shutil.which("zsh") is None, reason="not installed: zsh")
@pytest.mark.parametrize("line, offered", [
    ("vnb-prune --keep-", "--keep-yearly"), ("vnb-checkpoint ", "redefine"), ("vnb-cat --mer", "vnb-cat --merge"),
    ("vnb-backup --keep-", "--keep-daily"), ("vnb-backup --keep-", "--keep-yearly"),
    ("vnb-backup --pass", "--password-file"), ("vnb-backup vm1 /usr/shar", "share/"),
    ("vnb-backup-all --keep-we", "--keep-weekly"), ("vnb-backup-all --jo", "--jobs"), ("vnb-backup vm", "vm2"),
    ("vnb-backup --level full oth", "other"), ("vnb-checkpoint begin oth", "other"),
    ("vnb-map -", "--tls-psk"),
])
def test_zsh(line, offered, domains):
    done = subprocess.run(["zsh", "-f", "-c", ZSH, "zsh", DIRECTORY, line, offered], capture_output=True, text=True,
                          timeout=60)
    assert offered in done.stdout
