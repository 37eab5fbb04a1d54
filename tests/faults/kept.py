# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Inputs that were found to reach what sound ones do not, and are kept for the next run: corpus/kept.tar.xz.

In it is an input for each of TARGET/HASH, and nothing that could be left out: `tar -xJf` shows them. They are in one
archive since they are much alike, so that all of them together take little more than one. A soak writes it.
"""

import collections
import io
import os
import tarfile
from pathlib import Path

from xxhash import xxh3_64_hexdigest

ARCHIVE = Path(__file__).with_name("corpus") / "kept.tar.xz"
MOST = 100  # inputs of a target
LARGEST = 64 << 10  # bytes of an input
RECENT = 8


class Kept:
    """
    For each line that is reached, but for known ones (set of int), the smallest input (bytes) that has reached it.

    earlier (list of bytes): what an earlier run has kept, to begin with.
    """

    def __init__(self, earlier=()):
        self.known = set()
        self.earlier = list(earlier)
        self._smallest = {}  # line: input
        self._lines = {}  # input: its lines
        self._recent = collections.deque(maxlen=RECENT)

    def add(self, content, lines):
        """Keep an input that has reached these lines, if it is of use."""
        if len(content) > LARGEST:
            return
        lines = lines - self.known
        new = lines - self._smallest.keys()
        smaller = {line for line in lines - new if len(content) < len(self._smallest[line])}
        if new or smaller:
            self._smallest.update(dict.fromkeys(new | smaller, content))
            self._lines[content] = lines
        if new:
            self._recent.append(content)

    def all(self):
        """What is kept, without what smaller ones have replaced."""
        return list(dict.fromkeys(self._smallest.values()))

    def recent(self):
        """The last ones that have reached something new."""
        return list(self._recent)

    def least(self):
        """What is kept and cannot be left out, the smallest first: without any of these, lines would be missing."""
        found = sorted(self.all(), key=lambda content: (len(content), content))
        count = collections.Counter(line for content in found for line in self._lines[content])
        for content in reversed(list(found)):
            if all(count[line] > 1 for line in self._lines[content]):
                found.remove(content)
                count.subtract(self._lines[content])
        return found[:MOST]

    def __len__(self):
        """How many lines were reached."""
        return len(self.known) + len(self._smallest)


def name_of(content):
    """The name of an input (bytes)."""
    return xxh3_64_hexdigest(content)


def load(archive=ARCHIVE):
    """{target: list of inputs} of an archive."""
    found = collections.defaultdict(list)
    if archive.exists():
        with tarfile.open(archive) as tar:
            for member in tar:
                found[os.path.dirname(member.name)].append(tar.extractfile(member).read())
    return found


def store(target, contents, archive=ARCHIVE):
    """Put these inputs (list of bytes) into an archive, in the place of what it has for a target."""
    found = {**load(archive), target: contents}
    new = archive.with_suffix(".new")
    with tarfile.open(new, "w:xz", preset=9, format=tarfile.PAX_FORMAT) as tar:
        for name in sorted(found):
            for content in found[name]:
                member = tarfile.TarInfo(f"{name}/{name_of(content)}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    new.replace(archive)
