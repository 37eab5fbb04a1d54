# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the logs of virtnbdbackup tell: its version and arguments, and which file each run wrote."""

from __future__ import annotations

import contextlib
import io
import os
import re

from vnb.base.errors import Error
from vnb.format import frame as f
from vnb.virtnbdbackup.datafile import open_file

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vnb.virtnbdbackup.directory import Directory


RUN = re.compile(rb"Version: (\d+)\.(\d+)\S* Arguments: (.*)")  # a line of a log: a run of virtnbdbackup begins
WROTE = re.compile(rb"target file: \[(?:.*/)?([^/]+)\.partial\]")  # another one: what this run writes
LOSING = (2, 21)  # the first version that leaves out of an increment what is dirty and zero
KEEPING = b"--no-sparse-detection"  # an option, which may be cut short, of a version that leaves nothing out
MAX_LINE = 64 * f.KiB  # of a log: what is longer is taken for several lines


class Runs:
    """What the logs in a Directory say of the runs of virtnbdbackup: which of them left zeroes out of its files."""

    def __init__(self, directory: Directory) -> None:
        self._all: set[bool] = set()  # of all runs: whether they may lose zeroes
        self._of_file: dict[str, bool] = {}  # {name of a data file: whether a run that wrote it may}
        for name in directory.names:
            if re.fullmatch(r"backup\..+\.log", name):
                # Without a log it is not known, and that is said.
                with contextlib.suppress(Error), open_file(directory.where(name)) as file:
                    self._read(io.BufferedReader(file))

    def _read(self, file: io.BufferedReader) -> None:
        loses = True
        while line := file.readline(MAX_LINE):
            if match := RUN.search(line):
                words = match[3].split()
                keeps = any(KEEPING.startswith(word) and len(word) > len(b"--no-s") for word in words)
                loses = (int(match[1]), int(match[2])) >= LOSING and not keeps
                self._all.add(loses)
            elif match := WROTE.search(line):
                name = os.fsdecode(match[1])
                self._of_file[name] = loses or self._of_file.get(name, False)

    def may_lose(self, name: str) -> bool:
        """Whether zeroes may be missing from a data file. One that no log names is judged by all runs."""
        return self._of_file.get(name, True in self._all or not self._all)
