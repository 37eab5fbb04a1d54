# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where the state directory is; vnb.job.state has what is in it."""

from __future__ import annotations

import os


def default_directory() -> str:
    """/var/lib/vnb for root, a directory of their own for others; VNB_STATE_DIR overrides."""
    if os.environ.get("VNB_STATE_DIR"):
        return os.environ["VNB_STATE_DIR"]
    if os.geteuid() == 0:
        return "/var/lib/vnb"
    home = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return os.path.join(home, "vnb")


def job_directory(state: str, uuid: str) -> str:
    """The directory of the job of a domain with this UUID, in a state directory."""
    return os.path.join(state, "jobs", uuid)
