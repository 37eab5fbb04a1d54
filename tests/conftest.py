# SPDX-License-Identifier: LGPL-2.1-or-later
"""For all tests: the commands of this tree come first in PATH."""

import os
from pathlib import Path

COMMANDS = Path(__file__).resolve().parents[1] / ".venv" / "bin"

os.environ["PATH"] = f"{COMMANDS}:{os.environ['PATH']}"
