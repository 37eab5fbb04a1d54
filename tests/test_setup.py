# SPDX-License-Identifier: LGPL-2.1-or-later
"""What `make setup` does in a tree of its own, where all packages are, and no package index is."""

import os
import shutil
import subprocess

import pytest
from samples import ROOT


@pytest.fixture
def setup(tmp_path):
    """Run the set-up in a copy of the tree, as a user who has no sbin in PATH; returns subprocess.CompletedProcess."""
    for name in (".ci", "bin", "vnb", "setup.cfg", "pyproject.toml", "README.md", "COPYING.LIB"):
        source, target = os.path.join(ROOT, name), tmp_path / "tree" / name
        shutil.copytree(source, target) if os.path.isdir(source) else shutil.copy2(source, target)
    apt = tmp_path / "apt-get"
    apt.write_text("#!/bin/sh\nexit 1\n")  # nothing is installed on the host that the tests run on
    apt.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    environment |= {"PATH": f"{tmp_path}:/usr/bin:/bin", "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull}
    return lambda: subprocess.run(
        [tmp_path / "tree/.ci/setup"], env=environment, capture_output=True, text=True, check=False, timeout=200
    )


def test_the_linter_is_asked_for_until_it_is_there(setup):
    """What could not be had when .venv was made, as without a network that day, is not missing for good."""
    first = setup()
    assert first.returncode == 0, first.stderr
    assert "setup: making .venv\n" in first.stderr
    second = setup()
    assert second.returncode == 0, second.stderr
    assert "making .venv" not in second.stderr
    for done in (first, second):
        assert "setup: could not install ruff" in done.stderr
        assert "these packages are missing" not in done.stderr
