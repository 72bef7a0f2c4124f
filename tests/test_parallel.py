"""Results come in order, the budget holds, and an error ends the work."""

import threading
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from splitquant_plugins.parallel import in_order, in_threads


@given(st.lists(st.integers(0, 12), max_size=30), st.integers(1, 10), st.integers(1, 4))
def test_order_and_budget(costs, budget, threads):
    lock = threading.Lock()
    alive, too_much = {}, []

    def work(number):
        with lock:
            alive[number] = costs[number]
            if sum(alive.values()) > budget and len(alive) > 1:
                too_much.append(dict(alive))
        return number

    found = []
    for number in in_order(work, range(len(costs)), cost=costs.__getitem__, budget=budget, threads=threads):
        found.append(number)
        with lock:  # the consumer lets go of a result before it asks for the next
            alive.pop(number)
    assert found == list(range(len(costs)))
    assert not too_much


def test_work_is_done_side_by_side():
    meeting = threading.Barrier(2, timeout=20)
    assert list(in_order(lambda _: meeting.wait() >= 0, range(4), cost=lambda _: 1, budget=4, threads=2)) == [True] * 4


def test_an_error_comes_at_its_place_and_stops_the_rest():
    done = []

    def work(number):
        if number == 1:
            raise ValueError("one")
        time.sleep(0.01)
        done.append(number)
        return number

    results = in_order(work, range(50), cost=lambda _: 1, budget=50, threads=1)
    assert next(results) == 0
    with pytest.raises(ValueError, match="one"):
        next(results)
    assert len(done) < 10


def test_torch_works_alone_in_each_thread_and_as_before_outside():
    torch.set_num_threads(2)
    inside = list(in_order(lambda _: torch.get_num_threads(), range(4), threads=2, torch_alone=True))
    assert inside == [1] * 4
    assert torch.get_num_threads() == 2
    later = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [2]


def test_without_costs_all_items_are_handed_out_at_once_and_torch_keeps_its_threads():
    torch.set_num_threads(2)
    meeting = threading.Barrier(2, timeout=20)

    def work(number):
        meeting.wait()
        return number, torch.get_num_threads()

    assert in_threads(work, range(4)) == [(number, 2) for number in range(4)]
    assert in_threads(lambda number: -number, []) == []
