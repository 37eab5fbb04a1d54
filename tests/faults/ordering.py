# SPDX-License-Identifier: LGPL-2.1-or-later
"""
What a power failure may take from the files of a program, at any time of its life, from the system calls that it made.

A disk keeps what fsync(2) made it keep, and of all else any part: data of a file until the file is synced, by whatever
descriptor; a name, made or changed or removed, until its directory is synced. Trace follows the calls that strace(1)
has recorded and holds them against these rules:

- what gets a final name is synced before;
- a file with a final name goes only when the names that were made beside it are synced;
- in the end, what has a final name is synced, and so are the name, and the directories that were made for it.
"""

import collections
import os
import re

WRITES = ("write", "writev", "pwrite64", "pwritev", "pwritev2", "ftruncate", "fallocate", "copy_file_range", "sendfile")
SYNCS = ("fsync", "fdatasync")
RENAMES = ("rename", "renameat", "renameat2", "link", "linkat")
MAKES = ("mkdir", "mkdirat")
REMOVES = ("unlink", "unlinkat")
CALLS = ",".join((*WRITES, *SYNCS, *RENAMES, *MAKES, *REMOVES, "openat", "open", "creat"))
_CALL = re.compile(r"^\d+ +(\w+)\((.*)\) += (\d+)(?:<(.*)>)?$")
_UNFINISHED = re.compile(r"^(\d+) +(.*) <unfinished \.\.\.>$")
_RESUMED = re.compile(r"^(\d+) +<\.\.\. \w+ resumed>(.*)$")
_DESCRIPTOR = re.compile(r"\d+<(.*?)(?: \(deleted\))?>")
_PATH = re.compile(r'(?:AT_FDCWD(?:<(.*?)>)?, |\d+<(.*?)>, )?"((?:[^"\\]|\\.)*)"')


def command(log):
    """strace(1) that records what a Trace reads into a file."""
    return ["strace", "-f", "-y", "-s", "4096", "-o", str(log), "-e", f"trace={CALLS}", "-e", "signal=none"]


class Trace:
    """
    What was written and not synced, call by call.

    log (text of strace); directory: only what is below it counts; is_final (function of a path): a name that promises
    that all is there. committed (int): final names that were made. faults (list of str): rules that were broken.
    """

    def __init__(self, log, directory, is_final):
        self.directory = os.path.realpath(directory)
        self.is_final = is_final
        self.committed = 0
        self.faults = []
        self._unsynced = {}  # path: the call that wrote to it
        self._names = collections.defaultdict(list)  # directory: what was done to names in it
        for number, line in enumerate(whole_lines(log), start=1):
            self._line(number, line)
        self._at_the_end()

    def _line(self, number, line):
        match = _CALL.match(line)
        if match is None:
            return  # an error, or no call
        call, arguments, _, result = match.groups()
        where = f"line {number}: {call}"
        if call in WRITES:
            self._unsynced[_descriptor(arguments)] = where
        elif call in SYNCS:
            path = _descriptor(arguments)
            self._unsynced.pop(path, None)
            self._names.pop(path, None)
        elif call in RENAMES:
            self._rename(where, call, [path for path in _paths(arguments) if path])
        elif call in MAKES:
            self._name(where, _paths(arguments)[0])
        elif call in REMOVES:
            self._remove(where, _paths(arguments)[0])
        elif "O_CREAT" in arguments or call == "creat":
            self._name(where, result)

    def _name(self, where, path):
        if self._counts(path):
            self._names[os.path.dirname(path)].append((where, path))

    def _rename(self, where, call, paths):
        old, new = paths
        if not self._counts(new):
            return
        if old in self._unsynced:
            written = self._unsynced[old] if call.startswith("link") else self._unsynced.pop(old)
            self._unsynced[new] = written
            if self.is_final(new):
                self.faults.append(f"{where}: {new} has a name, and what {written} wrote is not synced")
        self._name(where, new)
        self.committed += self.is_final(new)

    def _remove(self, where, path):
        """What goes may be needed, as long as what takes its place can vanish."""
        self._unsynced.pop(path, None)
        if self._counts(path) and self.is_final(path):
            for made, other in self._names[os.path.dirname(path)]:
                if self.is_final(other) and not made.endswith(REMOVES):
                    self.faults.append(f"{where}: {path} goes, and the name {other} ({made}) is not synced")
        if self._counts(path):
            self._names[os.path.dirname(path)].append((where, path))

    def _at_the_end(self):
        """A program that has said that it is done has lost nothing any more."""
        for path, where in self._unsynced.items():
            if self._counts(path) and self.is_final(path):
                self.faults.append(f"the end: what {where} wrote to {path} is not synced")
        for directory, names in self._names.items():
            for where, path in names:
                # A temporary file that was made and removed, or renamed, is of no interest; a directory is.
                if (self.is_final(path) or os.path.isdir(path)) and os.path.lexists(path):
                    self.faults.append(f"the end: {directory} is not synced after {where} of {path}")

    def _counts(self, path):
        return path.startswith(f"{self.directory}/") or path == self.directory


def whole_lines(log):
    """Yield the lines of a log, those that another thread has cut in two put together, where they ended."""
    begun = {}
    for line in log.splitlines():
        if match := _UNFINISHED.match(line):
            begun[match[1]] = match[2]
        elif match := _RESUMED.match(line):
            yield f"{match[1]} {begun.pop(match[1], '')}{match[2]}"
        else:
            yield line


def _descriptor(arguments):
    match = _DESCRIPTOR.match(arguments)
    return match[1] if match else ""


def _paths(arguments):
    """The absolute paths among the arguments of a call."""
    return [
        os.path.normpath(os.path.join(here or there or "", path)) for here, there, path in _PATH.findall(arguments)
    ]
