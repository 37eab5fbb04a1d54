# SPDX-License-Identifier: LGPL-2.1-or-later
"""Plans, as far as they need no machine."""

import pytest

from vnb.job.images_moved import are_moved
from vnb.virt.failures import names_disk

A, B, OVERLAY = [1, 10], [1, 11], [1, 12]
FIRST, SECOND = [1, 12], [2, 12]  # the only files of two file systems


@pytest.mark.parametrize("now, own, other, moved", [
    ([A], A, B, False),
    ([B], A, B, True),
    ([OVERLAY], A, B, False),  # a copy, or something new
    ([OVERLAY, A], A, B, False),
    ([OVERLAY, B], A, B, True),
    ([A, B], A, B, False),  # one that was committed into what is the other's, too
    ([], A, B, False),
    # Mounted again, as other devices.
    ([[7, 10]], A, B, False),
    ([[7, 11]], A, B, True),
    ([FIRST], FIRST, SECOND, False),
    ([[7, 12]], FIRST, SECOND, False),
    # Each mounted where the other was.
    ([SECOND], FIRST, SECOND, True),
])
def test_whose_file_a_disk_has(now, own, other, moved):
    assert are_moved(now, own, other) == moved


@pytest.mark.parametrize("words, disk, named", [
    ("missing or broken bitmap 'c' for disk 'vda'", "vda", True),
    ("bitmap «c» for disk «vda»", "vda", True),
    ("ディスク 'vda' のビットマップ", "vda", True),
    ("for disk 'vdaa'", "vda", False),
    ("for disk 'xvda'", "vda", False),
    ("for disk 'v.a'", "v.a", True),
    ("for disk 'vda'", "v.a", False),
])
def test_which_disk_libvirt_speaks_of(words, disk, named):
    """Whatever the language is, and its quotation marks."""
    assert names_disk(words, disk) == named
