"""Rounding with error feedback is GPTQ, and coordinate descent ends where no single code helps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from splitquant_plugins.solvers.gptq import Factor, Levels, descend, feedback

ROWS, WIDTH = 4, 150  # more columns than one block


def problem() -> tuple[Tensor, Tensor, Levels]:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    inputs = torch.randn(300, WIDTH, generator=generator, dtype=torch.float64) @ mixing
    target = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64)
    steps = torch.tensor([[0.8], [0.7], [0.9], [0.8]], dtype=torch.float64)
    even = Levels(torch.cat([-1.5 * steps, steps], dim=1), torch.arange(ROWS)[:, None].expand(ROWS, WIDTH), 4)
    return target, inputs.T @ inputs / 300, even


def as_table(even: Levels, **others: Tensor) -> Levels:
    table = even.table[:, :1] + torch.arange(even.even) * even.table[:, 1:]
    return Levels(table, even.table_of, **others)


def gptq(target: Tensor, moment: Tensor, levels: Levels, order: Tensor) -> Tensor:
    """As published, column by column with the Cholesky factor of the inverse of H."""
    factor = torch.linalg.cholesky(torch.linalg.inv(moment[order][:, order]), upper=True)
    left = target[:, order].clone()
    places = torch.empty_like(target)
    for at, column in enumerate(order.tolist()):
        own = levels.columns(torch.tensor([column]))
        places[:, column] = own.nearest(left[:, at : at + 1])[:, 0].double()
        error = (left[:, at] - own.values(places[:, column, None])[:, 0]) / factor[at, at]
        left[:, at:] -= torch.outer(error, factor[at, at:])
    return places.int()


def errors(target: Tensor, moment: Tensor, levels: Levels, places: Tensor) -> Tensor:
    difference = levels.values(places) - target
    return ((difference @ moment) * difference).sum(dim=1)


@pytest.mark.parametrize("table", [False, True])
def test_feedback_is_gptq(table: bool) -> None:
    target, moment, levels = problem()
    levels = as_table(levels) if table else levels
    by_activation = torch.argsort(moment.diagonal(), descending=True)
    assert torch.equal(feedback(target, Factor.of(moment), levels), gptq(target, moment, levels, by_activation))
    as_they_are = gptq(target, moment, levels, torch.arange(WIDTH))
    assert torch.equal(feedback(target, Factor.of(moment, activation_order=False), levels), as_they_are)


@pytest.mark.parametrize("table", [False, True])
def test_descent_ends_where_no_single_code_helps(table: bool) -> None:
    target, moment, levels = problem()
    levels = as_table(levels) if table else levels
    start = levels.nearest(target)
    places = descend(target, moment, start, levels, 100)
    assert (errors(target, moment, levels, places) < errors(target, moment, levels, start)).all()
    for column in range(WIDTH):
        for code in range(4):
            changed = places.clone()
            changed[:, column] = code
            least = errors(target, moment, levels, places) * (1 - 1e-9)
            assert (errors(target, moment, levels, changed) >= least).all()


def test_what_is_frozen_stays() -> None:
    target, moment, levels = problem()
    frozen = torch.rand(target.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    start = levels.nearest(target)
    places = descend(target, moment, start, levels, 10, frozen)
    assert torch.equal(places[frozen], start[frozen])
    assert not torch.equal(places, start)


def test_only_levels_that_can_stand_for_a_weight_are_taken() -> None:
    target, moment, even = problem()
    middle = as_table(even).table
    # The outer levels stand for no weight on the other side of 0.
    low, high = middle - torch.inf, middle + torch.inf
    low[:, -1], high[:, 0] = 0.0, 0.0
    levels = as_table(even, low=low, high=high)
    own = levels.table_of.long()
    for places in (
        levels.nearest(target),
        feedback(target, Factor.of(moment), levels),
        descend(target, moment, levels.nearest(target), levels, 4),
    ):
        assert bool((low[own, places.long()] <= target).all())
        assert bool((target <= high[own, places.long()]).all())
    free = feedback(target, Factor.of(moment), as_table(even))
    assert not bool(((low[own, free.long()] <= target) & (target <= high[own, free.long()])).all())


def test_the_same_for_any_number_of_threads() -> None:
    target, moment, levels = problem()
    target = torch.cat([target] * 200) * torch.linspace(0.5, 2, 800)[:, None]
    many = Levels(levels.table, levels.table_of.repeat(200, 1), levels.even)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            places = feedback(target, Factor.of(moment), many)
            found.append(descend(target, moment, places, many, 3))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)
