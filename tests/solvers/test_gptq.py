"""Rounding with error feedback is GPTQ, and coordinate descent ends where no single code helps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from splitquant_plugins.solvers.gptq import AffineLevels, TableLevels, descend, feedback_codes

ROWS, WIDTH = 4, 90  # more columns than one block


def problem() -> tuple[Tensor, Tensor, AffineLevels]:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    inputs = torch.randn(200, WIDTH, generator=generator, dtype=torch.float64) @ mixing
    target = torch.randn(WIDTH, ROWS, generator=generator, dtype=torch.float64)
    scale = torch.full((WIDTH, ROWS), 0.8, dtype=torch.float64)
    return target, inputs.T @ inputs / 200, AffineLevels(scale, -1.5 * scale, 0, 3)


def gptq(target: Tensor, moment: Tensor, levels: AffineLevels, order: Tensor) -> Tensor:
    """As published, column by column with the Cholesky factor of the inverse of H."""
    factor = torch.linalg.cholesky(torch.linalg.inv(moment[order][:, order]), upper=True)
    left = target[order].clone()
    codes = torch.empty_like(target)
    for place, column in enumerate(order.tolist()):
        codes[column] = levels.nearest(left[place], column)
        error = (left[place] - levels.values(codes[column], column)) / factor[place, place]
        left[place:] -= torch.outer(factor[place, place:], error)
    return codes


def test_feedback_is_gptq() -> None:
    target, moment, levels = problem()
    by_activation = torch.argsort(moment.diagonal(), descending=True)
    assert torch.equal(feedback_codes(target, moment, levels), gptq(target, moment, levels, by_activation))
    as_they_are = gptq(target, moment, levels, torch.arange(WIDTH))
    assert torch.equal(feedback_codes(target, moment, levels, activation_order=False), as_they_are)


def test_a_table_of_the_same_levels_gives_the_same_codes() -> None:
    target, moment, levels = problem()
    one_row = levels.scale[0, 0] * (torch.arange(4, dtype=torch.float64) - 1.5)
    for rows in (1, ROWS):
        table = TableLevels(one_row.expand(1, rows, 4), torch.zeros(WIDTH, dtype=torch.int64))
        codes = feedback_codes(target, moment, table)
        assert torch.equal(codes, feedback_codes(target, moment, levels))
        assert torch.equal(descend(target, moment, codes, table, 3), descend(target, moment, codes, levels, 3))


@pytest.mark.parametrize("every_column", [False, True])
def test_descent_ends_where_no_single_code_helps(every_column: bool) -> None:
    target, moment, levels = problem()

    def errors(codes: Tensor) -> Tensor:
        difference = (levels.values(codes, slice(None)) - target).T
        return ((difference @ moment) * difference).sum(dim=1)

    start = levels.nearest(target, slice(None))
    codes = descend(target, moment, start, levels, 100, every_column=every_column)
    assert (errors(codes) < errors(start)).all()
    for column in range(WIDTH):
        for code in range(4):
            changed = codes.clone()
            changed[column] = code
            assert (errors(changed) >= errors(codes) * (1 - 1e-9)).all()
