# SPDX-License-Identifier: LGPL-2.1-or-later
"""Memory is bounded by the requests in flight, never by the disk or by the number of its extents."""

import shutil

import pytest
from peaks import LIMIT, peaks


@pytest.mark.skipif(shutil.which("nbdkit") is None, reason="not installed: nbdkit")
def test_no_stage_grows_with_a_large_disk(lab):
    found = peaks(lab)
    assert len(found) == 8
    assert {command: peak >> 20 for command, peak in found.items() if peak > LIMIT} == {}
