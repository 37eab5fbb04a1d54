# SPDX-License-Identifier: LGPL-2.1-or-later
"""How much memory a set takes, which is slow to measure."""

import gc
import tracemalloc

import samples

from vnb.store import backupset


def test_many_segments_take_little_memory(tmp_path):
    """What is in a head beside the links may take seventy times its bytes in memory: none of it is kept."""
    large = {"more": [[]] * 12_000}
    with open(tmp_path / "a.vnb", "wb") as file:
        for number in range(200):
            file.write(samples.segment(samples.head(f"p{number}", **large), [samples.disk(size=0, image=large)]))
    tracemalloc.start()
    try:
        found = backupset.segments([str(tmp_path)])
        gc.collect()
        now, _peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(found) == 200 and now < 1 << 20
