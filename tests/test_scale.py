# SPDX-License-Identifier: LGPL-2.1-or-later
"""The simulation of very many machines: what it says where the answer is known."""

import pytest
import scale


def test_one_backup_is_as_fast_as_its_slowest_stage():
    assert scale.rates({"a": {("a", "its own stages"): 0.5}})[0] == {"a": 2.0}


def test_what_is_shared():
    """Who is held back by something else leaves its share to the others."""
    line = ("host", 1), "line"
    rate, held = scale.rates({"slow": {line: 1.0, ("a", "its own stages"): 10.0}, "fast": {line: 1.0}})
    assert rate == pytest.approx({"slow": 0.1, "fast": scale.LINE - 0.1})
    assert held == {"slow": ("a", "its own stages"), "fast": line}


def test_a_store_with_a_slow_line():
    """As many hosts as there may be: the line is what it takes."""
    jobs = {host: [5.0] * 10 for host in range(20)}
    found = scale.simulate(jobs, 2, full=True, packed=False)
    assert found["hours"] * 3600 == pytest.approx(5 * 10 * 20 / scale.STORE_LINE, rel=0.02)
    assert max(found["limits"], key=found["limits"].get) == "store's line"
    assert found["at_once"] == 40
    assert scale.simulate(jobs, 2, full=True, packed=True)["hours"] < 0.6 * found["hours"]
