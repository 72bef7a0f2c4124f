"""Parts solved together: monotone, on the grid, and better than parts solved one after the other."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from splitquant_plugins.decoupleq import SolveOptions, ValueGrid, solve_layer, solve_parts
from splitquant_plugins.errors import ConfigError, InputError

GRIDS = [
    ValueGrid(2),
    ValueGrid(2, zero="integer"),
    ValueGrid(2, zero="none", full_range=True),
    ValueGrid(2, "group", 5, zero="integer"),
    ValueGrid(2, "group", 4),
    ValueGrid(2, "tensor", zero="none"),
    ValueGrid(2, "tensor"),
]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    # The tensors are tiny: threads would only wait for each other.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def problem(seed: int, rows: int, columns: int, samples: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    inputs = torch.randn(samples, columns, generator=generator, dtype=torch.float64) @ mixing
    return torch.randn(rows, columns, generator=generator), inputs.T @ inputs / samples


def error(difference: Tensor, moment: Tensor) -> float:
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)
    return float(torch.einsum("ri,ij,rj->", difference.double(), damped, difference.double()))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 4), columns=st.integers(1, 14), k=st.integers(1, 3))
def test_properties_on_any_problem(grid: ValueGrid, seed: int, rows: int, columns: int, k: int) -> None:
    weight, moment = problem(seed, rows, columns, samples=9)
    solution = solve_parts(weight, moment, grid, k)
    low, high = grid.code_range
    assert len(solution.parts) == k
    for part in solution.parts:
        assert int(part.codes.min()) >= low
        assert int(part.codes.max()) <= high
        assert (part.scale > 0).all()
        if grid.zero != "float":
            # A backend keeps the exact 0 of every part.
            assert not (part.scale * part.zero_point + part.zero).any()
            assert (part.zero_point >= low).all()
            assert (part.zero_point <= high).all()
    assert all(a >= b for a, b in itertools.pairwise(solution.trace))
    reference = error(weight, moment)
    difference = sum((part.dequantize() for part in solution.parts), start=-weight)
    assert solution.error_after == pytest.approx(error(difference, moment), rel=1e-2, abs=1e-5 * reference)
    assert solution.error_after <= solution.error_before + 1e-5 * reference


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_better_than_one_part_after_the_other(grid: ValueGrid) -> None:
    weight, moment = problem(5, 8, 40, samples=120)
    together = solve_parts(weight, moment, grid, 2)
    first = solve_layer(weight, moment, grid)
    second = solve_layer(weight - first.dequantize(), moment, grid)
    assert together.error_after < second.error_after
    three = solve_parts(weight, moment, grid, 3)
    assert three.error_after < 0.5 * together.error_after


def test_the_scales_are_solved_together() -> None:
    # Codes -1, 0, 1 twice with scales 1 and 0.4: not digits of one uniform grid, where it starts.
    _, moment = problem(3, 1, 24, samples=60)
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(-1, 2, (2, 6, 24), generator=generator).float()
    weight = codes[0] + 0.4 * codes[1]
    solution = solve_parts(weight, moment, ValueGrid(2, "tensor", zero="none"), 2)
    assert solution.error_after < 1e-3 * error(weight, moment)
    assert sorted(part.scale.item() for part in solution.parts) == pytest.approx([0.4, 1.0], rel=1e-2)


def test_groups_of_rows_with_inputs_of_their_own() -> None:
    weight, first = problem(0, 6, 9, samples=20)
    _, second = problem(1, 6, 9, samples=20)
    for grid in (ValueGrid(2), ValueGrid(2, "tensor", zero="none")):
        solution = solve_parts(weight, torch.stack([first, second]), grid, 2)
        difference = solution.dequantize() - weight
        expected = error(difference[:3], first) + error(difference[3:], second)
        assert solution.error_after == pytest.approx(expected, rel=1e-3)
        assert solution.error_after < 0.1 * error(weight[:3], first) + 0.1 * error(weight[3:], second)


def test_zero_rows_stay_zero() -> None:
    weight, moment = problem(2, 3, 30, samples=10)
    weight[1] = 0
    for grid in GRIDS[:5]:
        assert not solve_parts(weight, moment, grid, 2).dequantize()[1].any()


def test_same_input_same_answer() -> None:
    weight, moment = problem(4, 5, 12, samples=6)
    first, second = (solve_parts(weight, moment, ValueGrid(2), 2) for _ in range(2))
    assert torch.equal(first.dequantize(), second.dequantize())
    assert first.trace == second.trace


def test_errors_say_what_is_possible() -> None:
    weight, moment = problem(0, 2, 4, samples=9)
    with pytest.raises(ConfigError, match="k=2 with 8 bits"):
        solve_parts(weight, moment, ValueGrid(8), 2)
    with pytest.raises(ConfigError, match="k=0"):
        solve_parts(weight, moment, ValueGrid(2), 0)
    with pytest.raises(InputError, match="layer1: the weight contains NaN"):
        solve_parts(weight * torch.nan, moment, ValueGrid(2), 2, SolveOptions(), name="layer1")
