"""The levels that parts can form: places in the table of sums, and the codes that they are of."""

from __future__ import annotations

import pytest
import torch

from splitquant_plugins.decoupleq.alternation import SolveOptions
from splitquant_plugins.decoupleq.objective import problem_of
from splitquant_plugins.decoupleq.parts import Parts, most_parts
from splitquant_plugins.decoupleq.solver_grid import SolverGrid

GRIDS = [
    SolverGrid(0, 3, "integer", "group", 4),
    SolverGrid(-1, 1, "none", "channel"),
    SolverGrid(0, 3, "free", "tensor"),
]


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_nearest_is_the_nearest_of_all_sums(grid: SolverGrid, k: int) -> None:
    weight = torch.randn(3, 9, generator=torch.Generator().manual_seed(k))
    options = SolveOptions()
    parts = Parts(problem_of(weight, torch.eye(9), options.damping), grid, k, options)
    state = parts.nearest(parts.first(0.8))
    every = torch.cartesian_prod(*[torch.arange(grid.quant_min, grid.quant_max + 1.0)] * k).reshape(-1, k, 1, 1)
    of_every = torch.stack([torch.stack(parts.values(codes.expand(k, 3, 9), state.affine)).sum(0) for codes in every])
    least = (of_every - weight).abs().amin(dim=0)
    found = (torch.stack(parts.values(state.codes, state.affine)).sum(0) - weight).abs()
    torch.testing.assert_close(found, least)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_what_is_frozen_keeps_its_codes_and_the_rest_gets_no_worse(grid: SolverGrid, k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(4, 9, generator=generator), torch.randn(30, 9, generator=generator)
    options = SolveOptions()
    parts = Parts(problem_of(weight, x.T @ x / 30, options.damping), grid, k, options)
    start = parts.nearest(parts.first(0.9))
    frozen = torch.rand(4, 9, generator=generator) < 0.5
    after = parts.descended(start, frozen)
    assert torch.equal(after.codes[:, frozen], start.codes[:, frozen])
    assert not torch.equal(after.codes, start.codes)
    assert (after.errors <= start.errors * (1 + 1e-9)).all()
    unchanged = parts.descended(start, torch.ones_like(frozen))
    assert torch.equal(unchanged.codes, start.codes)


def test_as_many_parts_as_form_4096_sums() -> None:
    assert [most_parts(SolverGrid(0, 2**bits - 1)) for bits in (2, 3, 4, 8)] == [6, 4, 3, 1]
