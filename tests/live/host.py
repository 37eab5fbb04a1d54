# SPDX-License-Identifier: LGPL-2.1-or-later
"""A host for the recipes of README and pages: their places are in a directory of ours, and so are the other hosts."""

import re
import stat
from pathlib import Path

import pytest
from lab import ROOT

PLACES = ("backup", "restore", "standby", "offsite", "mnt", "dev/vg", "run")  # the laboratory has its own
AWS = """#!/bin/sh
# aws s3 cp FROM TO, for standard input and output
store() { printf '%s/%s' "$AWS_STORE" "${1##*/}"; }
case $3 in -) exec cat > "$(store "$4")" ;; *) exec cat "$(store "$3")" ;; esac
"""
SSH = """#!/bin/sh
# ssh HOST COMMAND...: joined by spaces and given to a shell, as ssh(1) does
shift
exec sh -c "$*"
"""


def blocks_of_markdown(text):
    """The blocks of code (list of str) of a text in Markdown, as scripts."""
    return [re.sub("(?m)^    ", "", block) for block in re.findall(r"(?m)(?:^    .*\n)+", text)]


def blocks_of_page(text):
    """The literal blocks (list of str) of a text in mdoc, as scripts. One that is -compact is only shown."""
    found = re.findall(r"(?ms)^\.Bd -literal -offset indent\n(.*?)^\.Ed", text)
    return [block.replace("\\e\n", "\\\n") for block in found]


@pytest.fixture
def host(lab):
    """A function that runs a script for a domain, in the place of the domain vm1. path: where its places are."""
    here = Path(lab.new_directory("host"))
    here.chmod(0o711)
    for place in PLACES:
        (here / place).mkdir(parents=True)
    (here / "bin").mkdir()
    for name, text in (("aws", AWS), ("ssh", SSH)):
        (here / "bin" / name).write_text(text)
        (here / "bin" / name).chmod(stat.S_IRWXU)
    (here / "store").mkdir()
    (here / "home").mkdir()
    (here / "examples").symlink_to(ROOT / "examples")

    def run(script, vm, check=True):
        script = script.replace("/images/vm1/", f"{vm.directory}/").replace("restore_vm1", f"restore_{vm.name}")
        script = re.sub(rf"(?<![\w.:])/(?={'|'.join(PLACES)})", f"{here}/", script)
        script = re.sub(r"\bvm1(?= |$)(?<!/vm1)", vm.name, script, flags=re.MULTILINE)
        env = {"PATH": f"{here}/bin:{lab.env['PATH']}", "AWS_STORE": f"{here}/store", "HOME": f"{here}/home"}
        return lab.sh(f"set -e; cd {here}\n{script}", check=check, env=env)

    run.path = here
    return run
