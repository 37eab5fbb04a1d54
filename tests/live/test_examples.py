# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every script in examples/ runs, as it stands."""

import subprocess
from pathlib import Path

import pytest
from lab import ROOT

EXAMPLES = sorted(path.name for path in Path(ROOT, "examples").iterdir() if path.is_file())


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(lab, name):
    done = subprocess.run([ROOT / "examples" / name], env=lab.env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert lab.leftovers() == []


def test_demo_cleans_up_when_it_is_interrupted(lab):
    """Its machine and its directory go with it."""
    demo = subprocess.Popen([ROOT / "examples" / "demo"], env=lab.env, stdout=subprocess.PIPE, text=True)
    for line in demo.stdout:
        if "vnb-checkpoint begin" in line:
            break
    demo.terminate()
    demo.stdout.read()
    assert demo.wait(60) == 143
    assert {domain.name() for domain in lab.connection.listAllDomains()} == set(lab.domains)
    assert not list(Path("/var/tmp").glob("vnb-demo.*"))  # noqa: S108
    assert lab.leftovers() == []
