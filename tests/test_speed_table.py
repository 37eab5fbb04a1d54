# SPDX-License-Identifier: LGPL-2.1-or-later
"""The table of speeds is what bench.py measured."""

import json

import pytest
import speeds

ROW = {"group": "g", "job": "j", "seconds": 1.234, "ratio": 2.0, "at_most_ratio": None, "at_most_seconds": None}
RESULTS = {"date": "2026-01-31", "machine": "a machine", "versions": {"vnb": "1.0"}}


def test_the_page_has_the_table_of_the_results():
    assert speeds.PLACE.table() == speeds.render(json.loads(speeds.RESULTS.read_text(encoding="utf-8")))


@pytest.mark.parametrize("aims, text", [
    ({}, ""), ({"at_most_ratio": 1.3}, "1.30"), ({"at_most_ratio": 0.33, "at_most_seconds": 0.5}, "0.33, 0.5 s"),
])
def test_a_row(aims, text):
    assert f"| g | j | 1.23 | 2.00 | {text} |\n" in speeds.render({**RESULTS, "rows": [{**ROW, **aims}]})


def test_a_pipeline_stands_in_one_cell():
    text = speeds.render({**RESULTS, "rows": [{**ROW, "job": "a | b > FILE"}]})
    assert "| g | a \\| b > FILE | 1.23 | 2.00 |  |" in text


def test_a_group_is_named_once_and_rows_that_are_no_times_are_left_out():
    memory = {"group": "m", "job": "peak", "found": 1, "most": 2}
    lines = speeds.render({**RESULTS, "rows": [ROW, {**ROW, "job": "k"}, memory]}).splitlines()
    assert [line.split("|")[1:3] for line in lines if "2.00" in line] == [[" g ", " j "], ["  ", " k "]]
    assert not any("peak" in line for line in lines)
