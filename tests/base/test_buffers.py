# SPDX-License-Identifier: LGPL-2.1-or-later
"""Buffers that are used again, and calls whose results come in order: nothing is lost, nothing is left."""

import signal
import threading
import tracemalloc

import pytest

from vnb.base.buffers import SMALL, Ordered, Pool
from vnb.base.errors import Interrupted


def test_a_buffer_is_used_again():
    pool = Pool()
    view = pool.take(500_000)
    assert len(view) == 500_000
    buffer = view.obj
    pool.give(view)
    again = pool.take(500_001)
    assert again.obj is buffer
    assert pool.take(500_001).obj is not buffer


def test_a_buffer_is_not_much_larger_than_asked_for():
    pool = Pool()
    pool.give(pool.take(4 << 20))
    assert len(pool.take(100_000).obj) < 200_001


@pytest.mark.parametrize("size", [0, 1, SMALL - 1, SMALL, SMALL + 1, 4 << 20])
def test_sizes(size):
    pool = Pool()
    view = pool.take(size)
    assert len(view) == size
    pool.give(view)
    assert len(pool.take(size)) == size


def test_no_more_is_kept_than_the_limit():
    """Whatever sizes came and went."""
    pool = Pool(limit=1 << 20)
    tracemalloc.start()
    try:
        for size in (70_000, 130_000, 300_000, 600_000, 100_000):
            views = [pool.take(size) for _ in range(20)]
            for view in views:
                pool.give(view)
            del views, view
            assert tracemalloc.get_traced_memory()[0] < 1.1 * (1 << 20)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("threads", [0, 1, 2, 7])
def test_results_come_in_the_order_of_the_calls(threads):
    before = threading.active_count()
    found = []
    gate = threading.Event()

    def work(number):
        if threads > 1 and number == 0:
            assert gate.wait(60)  # the first is done last
        if number == 1:
            gate.set()
        return -number

    with Ordered(work, threads) as work_:
        for number in range(100):
            if number % 7 == 3:
                work_.append(-number)
            else:
                work_.call(number)
            while work_.full:
                found.append(work_.pop())
        while len(work_):
            found.append(work_.pop())
    assert found == [-number for number in range(100)]
    assert threading.active_count() == before


@pytest.mark.parametrize("threads", [0, 2])
def test_what_a_call_raises_comes_in_its_place(threads):
    def work(number):
        if number == 1:
            raise ValueError("this one")
        return number

    with Ordered(work, threads) as work_:
        for number in range(3):
            work_.call(number)
        assert work_.pop() == 0
        with pytest.raises(ValueError, match="this one"):
            work_.pop()
        assert work_.pop() == 2


def test_threads_end_with_their_work_undone():
    """After a failure nobody takes the results any more."""
    before = threading.active_count()
    called = []
    with pytest.raises(KeyError), Ordered(called.append, 3) as work:
        for number in range(50):
            work.call(number)
        raise KeyError
    assert threading.active_count() == before


def test_no_thread_starts_for_nothing():
    before = threading.active_count()
    with Ordered(None, 8) as work:
        work.append(5)
        assert work.pop() == 5
        assert threading.active_count() == before


def test_a_signal_while_a_thread_starts(monkeypatch):
    """
    The thread runs and the caller does not know of it: it must not take from another thread the word that ends that.

    So vnb-pack hung for ever after Ctrl-C, about once in a thousand times on a busy machine.
    """
    start, started = threading.Thread.start, []
    unknown = threading.Event()  # the second thread is there, and has begun to wait for calls

    def interrupted(thread):
        start(thread)
        started.append(thread)
        if len(started) == 2:
            raise Interrupted(signal.SIGINT)

    def function(argument):
        if argument == "first":
            unknown.wait()
            started[1].join(60)  # it has been told to end
        else:
            unknown.set()

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(Interrupted), Ordered(function, threads=2) as work:
        work.call("first")
        work.call("second")
    assert len(started) == 2
    assert not any(thread.is_alive() for thread in started)
