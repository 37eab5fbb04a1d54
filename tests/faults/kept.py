# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Inputs that were found to reach what sound ones do not, and are kept for the next run: corpus/kept.tar.xz.

The names in it are TARGET/HASH. It is one archive since they are much alike: all of them together take little more
than a few do. A soak writes it.
"""

import collections
import io
import os
import tarfile
from pathlib import Path

from xxhash import xxh3_64_hexdigest

ARCHIVE = Path(__file__).with_name("corpus") / "kept.tar.xz"
LIMIT = 230 << 10  # bytes of the archive: what is in git stays there
MOST = 40  # inputs of a target in it: each run tries them
LARGEST = 64 << 10  # bytes of one of them
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
        """For an archive: what reaches all that is reached. Each is the one that adds the most, and the smallest."""
        left = {content: set(self._lines[content]) for content in self.all() if len(content) <= LARGEST}
        found = []
        while left and len(found) < MOST:
            best = max(left, key=lambda content: (len(left[content]), -len(content), content))
            lines = left.pop(best)
            if not lines:
                break
            found.append(best)
            for others in left.values():
                others -= lines
        return found

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
    """Put these inputs (list of bytes) into an archive, as far as they have room, for what it has for a target."""
    found = {**load(archive), target: contents}
    new = archive.with_suffix(".new")
    _write(new, found)
    while new.stat().st_size > LIMIT and found[target]:
        found[target] = found[target][: len(found[target]) * 3 // 4]
        _write(new, found)
    new.replace(archive)


def _write(path, found):
    with tarfile.open(path, "w:xz", preset=9, format=tarfile.PAX_FORMAT) as tar:
        for name in sorted(found):
            for content in found[name]:
                member = tarfile.TarInfo(f"{name}/{name_of(content)}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
