# SPDX-License-Identifier: LGPL-2.1-or-later
"""The cache that readers share: bounded, and each value made once however many want it."""

import threading

import pytest

from vnb.base.cache import Cache

DEADLINE = 30  # seconds: for a test that would hang


def value(size):
    return memoryview(bytes(size))


def test_what_was_used_last_stays():
    cache = Cache(30)
    for key in "abc":
        cache.get(key, lambda: value(10))
    cache.get("a", pytest.fail)
    cache.get("d", lambda: value(10))
    assert [key in cache for key in "abcd"] == [True, False, True, True]
    assert cache.size == 30


def test_a_value_over_the_limit_is_not_kept():
    cache = Cache(30)
    cache.get("a", lambda: value(10))
    assert len(cache.get("b", lambda: value(31))) == 31
    assert "a" in cache and "b" not in cache


def threads(count, function):
    started = [threading.Thread(target=function, args=(number,), daemon=True) for number in range(count)]
    for thread in started:
        thread.start()
    return started


def test_one_thread_loads_and_the_others_wait():
    cache = Cache(100)
    entered, go = threading.Event(), threading.Event()
    loads, results = [], []

    def load():
        loads.append(1)
        entered.set()
        assert go.wait(DEADLINE)
        return value(10)

    first = threads(1, lambda _: results.append(cache.get("a", load)))
    assert entered.wait(DEADLINE)
    waiting = threading.Barrier(5)

    def wait(_):
        waiting.wait(DEADLINE)
        results.append(cache.get("a", load))

    others = threads(4, wait)
    waiting.wait(DEADLINE)
    # Another key does not wait for this one.
    assert len(cache.get("b", lambda: value(3))) == 3
    go.set()
    for thread in first + others:
        thread.join(DEADLINE)
    assert [len(result) for result in results] == [10] * 5
    assert loads == [1]


def test_a_failure_reaches_whoever_asks():
    cache = Cache(10)

    def fail():
        raise ValueError("no")

    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            cache.get("a", fail)
    assert len(cache.get("a", lambda: value(1))) == 1


def test_many_threads_and_few_places():
    cache = Cache(40)
    wrong = []

    def use(number):
        for turn in range(2000):
            key = (turn * 7 + number) % 13
            if cache.get(key, lambda key=key: memoryview(bytes([key]) * 10))[0] != key:
                wrong.append(key)

    for thread in threads(8, use):
        thread.join(DEADLINE)
        assert not thread.is_alive()
    assert not wrong
    assert cache.size <= 40
