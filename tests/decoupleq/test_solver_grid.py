"""What the solver derives from a backend's grid, and that it is what the backend's own rounding does."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from splitquant_plugins.decoupleq.solver_grid import Affine, SolverGrid, group_ranges, solver_grid
from splitquant_plugins.grid import UniformGrid


@dataclass(frozen=True)
class FreeZeroGrid(UniformGrid):
    """As quanto has for whole layers."""

    free_zero: bool = True


@dataclass(frozen=True)
class SignedScaleGrid(UniformGrid):
    """As INC has: the sign of the scale makes the largest magnitude the lowest code."""

    def qparams(self, groups):
        low, high = groups.amin(dim=1, keepdim=True), groups.amax(dim=1, keepdim=True)
        scale = torch.maximum(-low, high) / 2 ** (self.bits - 1)
        return torch.where(high > -low, -scale, scale), torch.zeros_like(scale)


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        (UniformGrid(2), SolverGrid(0, 3, "integer", range_ends=((0,), (3,)))),
        (FreeZeroGrid(2), SolverGrid(0, 3, "free", range_ends=((0,), (3,)))),
        (UniformGrid(3, "affine", "tensor"), SolverGrid(0, 7, "integer", "tensor", None, ((0,), (7,)))),
        (UniformGrid(2, "affine", "group", 4), SolverGrid(0, 3, "integer", "group", 4, ((0,), (3,)))),
        (UniformGrid(2, "affine", "group", 32), SolverGrid(0, 3, "integer", "channel", None, ((0,), (3,)))),
        (UniformGrid(3, "symmetric"), SolverGrid(-3, 3, "none", range_ends=((3, -3),), end_steps=3.0)),
        (
            UniformGrid(2, "symmetric", symmetric_scale="full"),
            SolverGrid(-1, 1, "none", range_ends=((1,),), end_steps=1.5),
        ),
        (
            SignedScaleGrid(2, "symmetric", symmetric_scale="full"),
            SolverGrid(-2, 1, "none", range_ends=((-2,),), end_steps=2.0),
        ),
    ],
    ids=str,
)
def test_what_is_derived(grid: UniformGrid, expected: SolverGrid) -> None:
    derived = solver_grid(grid, torch.Size([6, 10]))
    assert derived.end_steps == pytest.approx(expected.end_steps)
    assert replace(derived, end_steps=expected.end_steps) == expected


@pytest.mark.parametrize("scheme", ["affine", "symmetric"])
@pytest.mark.parametrize("symmetric_scale", ["restricted", "full"])
def test_values_that_hold_their_range_ends_are_rounded_to_themselves(scheme, symmetric_scale) -> None:
    grid = UniformGrid(2, scheme, "channel", symmetric_scale=symmetric_scale)
    derived = solver_grid(grid, torch.Size([1, 4]))
    affine = Affine(torch.tensor([[0.25]]), torch.tensor([[-0.25 if scheme == "affine" else 0.0]]))
    codes = torch.tensor([[derived.quant_max, derived.quant_min + 1, derived.quant_min, 1.0]])
    group_of_column = derived.group_of_column(4)
    values = affine.values(codes, group_of_column)
    floats = derived.with_clipped_ends(codes, values, affine.scale[:, group_of_column])
    if (scheme, symmetric_scale) == ("symmetric", "full"):
        assert float(floats.max()) == pytest.approx(1.5 * float(values.max()))
        assert not torch.equal(grid.quantize_dequantize(values), values)
    torch.testing.assert_close(grid.quantize_dequantize(floats), values)


def test_an_end_that_stands_for_zero_is_always_there() -> None:
    points = torch.tensor([0.0, 1.0, 3.0])
    affine = SolverGrid(0, 3, "integer", range_ends=((0,), (3,)))
    assert affine.needs_end((0,), points).tolist() == [False, True, True]
    assert affine.needs_end((3,), points).tolist() == [True, True, False]
    assert SolverGrid(-1, 1, "none").needs_end((1, -1), points).all()


def test_ranges_include_zero_and_the_last_group_may_be_shorter() -> None:
    weight = torch.tensor([[1.0, 2.0, -3.0], [4.0, 5.0, 6.0]])
    low, high = group_ranges(weight, SolverGrid(0, 3, "integer", "group", 2))
    assert low.tolist() == [[0.0, -3.0], [0.0, 0.0]]
    assert high.tolist() == [[2.0, 0.0], [5.0, 6.0]]
    assert [bound.item() for bound in group_ranges(weight, SolverGrid(0, 3, "integer", "tensor"))] == [-3.0, 6.0]
