# SPDX-License-Identifier: LGPL-2.1-or-later
"""The table of faults is what a soak run tried; rounds can be had again."""

import contextlib
import json

import limit
import pytest
import table
from rounds import MANY, Rounds

FAULT = {"what": "a", "holds": "b", "tried": 3, "failed": 0}
RESULTS = {"seed": "7", "asked": 5, "began": "2026-01-31T12:00:00Z", "minutes": 6, "versions": {"vnb": "1.0"}}


@pytest.fixture
def numbers(monkeypatch):
    """What the first chances of the rounds are."""
    monkeypatch.setattr(limit, "renew", lambda: None)
    return lambda *arguments, **options: [chance.random() for chance in Rounds(*arguments, **options, only=None)]


def test_the_page_has_the_table_of_the_results():
    assert table.PLACE.table() == table.render(json.loads(table.RESULTS.read_text(encoding="utf-8")))


def test_what_failed_is_said():
    assert "| a | 3 | b |\n" in table.render({**RESULTS, "faults": [FAULT]})
    assert "| a | 3 | **1 of 3 failed**: b |\n" in table.render({**RESULTS, "faults": [{**FAULT, "failed": 1}]})


def test_the_same_seed_gives_the_same_chances(numbers):
    assert numbers("a", count=4, seed="1") == numbers("a", count=4, seed="1")
    assert len({*numbers("a", count=4, seed="1"), *numbers("a", count=4, seed="2"),
                *numbers("b", count=4, seed="1")}) == 12


def test_a_round_alone_is_as_among_the_others(numbers, monkeypatch):
    all_ = numbers("a", count=4)
    assert [chance.random() for chance in Rounds("a", count=4, only="2")] == all_[2:3]


def test_what_had_no_effect_does_not_count(monkeypatch):
    monkeypatch.setattr(limit, "renew", lambda: None)
    rounds = Rounds("a", count=3, only=None)
    for number, _ in enumerate(rounds):
        if number > 0:
            rounds.fault(number == 1)
    assert (rounds.faults, rounds.misses) == (2, 1)


@pytest.mark.parametrize("hits, is_enough", [(MANY // 2, False), (MANY // 2 + 1, True)])
def test_a_soak_that_mostly_misses_fails(monkeypatch, hits, is_enough):
    monkeypatch.setattr(limit, "renew", lambda: None)
    rounds = Rounds("a", seconds=0, only=None)
    with contextlib.nullcontext() if is_enough else pytest.raises(AssertionError, match="had none"):
        for _ in rounds:
            for number in range(MANY):
                rounds.fault(number < hits)


def test_by_time_there_is_one_round_at_least(numbers):
    assert len(numbers("a", seconds=0)) == 1
