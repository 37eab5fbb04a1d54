# SPDX-License-Identifier: LGPL-2.1-or-later
"""Programs that commands start, and that must not outlive them."""

import os
import shutil
import subprocess
import sys

import pytest
from servers import DEADLINE

STARTER = """
import os, sys
from vnb.base.processes import Child
Child(["sh", "-c", 'touch "$1"; exec tail -f /dev/null', "sh", sys.argv[1]], "coreutils", keep=[int(sys.argv[2])])
os._exit(0)
"""
# $7 is who started it; $PPID may be somebody else already when a shell first asks.
LATE = """#!/bin/sh
while [ -e "/proc/$7" ]; do :; done
exec {real} "$@"
"""


@pytest.mark.parametrize("is_late", [False, True], ids=["asked", "too-late-to-ask"])
def test_it_ends_with_who_started_it(tmp_path, is_late):
    """Killed, so that there is nothing that it can do; also where the kernel was not asked yet to tell the program."""
    environment = dict(os.environ)
    if is_late:
        setpriv = tmp_path / "setpriv"
        setpriv.write_text(LATE.format(real=shutil.which("setpriv")))
        setpriv.chmod(0o755)
        environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
    ours, theirs = os.pipe()
    with open(ours, "rb") as end:
        try:
            subprocess.run(
                [sys.executable, "-c", STARTER, tmp_path / "started", str(theirs)], pass_fds=[theirs],
                env=environment, check=True, timeout=DEADLINE,
            )
        finally:
            os.close(theirs)
        end.read()  # until nobody has the other end of the pipe
    assert not (is_late and (tmp_path / "started").exists())
