"""What was measured is measured again where anything about it changed, and only there."""

from __future__ import annotations

import torch
from torch import Tensor

from splitquant_plugins.grid import UniformGrid
from splitquant_plugins.solvers.rounding_error import quantized_sum, row_error, split_error


class Counting(UniformGrid):
    """Counts how often it rounds."""

    calls = 0

    def quantize_dequantize(self, tensor: Tensor) -> Tensor:
        type(self).calls += 1
        return super().quantize_dequantize(tensor)


def test_the_same_question_is_answered_once() -> None:
    grid, weight = Counting(2), torch.randn(4, 16)
    parts = [weight / 2, weight / 2]
    first = split_error(weight, parts, grid)
    before = Counting.calls
    first += 1  # the caller's own
    assert torch.equal(split_error(weight, parts, grid), row_error(weight, quantized_sum(parts, grid)))
    assert Counting.calls == before + 2  # those of this test
    moment = torch.eye(16)[None]
    other = UniformGrid(4)
    for changed in (
        lambda: (weight, parts, other, None),
        lambda: (weight, parts, grid, moment),
        lambda: (weight, parts[:1], grid, None),
        lambda: (weight, [parts[0], parts[1].clone()], grid, None),
        lambda: (weight, [parts[0], parts[1].mul_(0.5)], grid, None),
        lambda: (weight.mul_(2), parts, grid, None),
    ):
        tensor, split, on, h = changed()
        expected = row_error(tensor, quantized_sum(split, on), h)
        assert torch.equal(split_error(tensor, split, on, h), expected)


def test_inference_tensors_are_measured() -> None:
    with torch.inference_mode():
        weight = torch.randn(4, 16)
        before = split_error(weight, [weight], UniformGrid(2))
        weight *= 2
        assert not torch.equal(split_error(weight, [weight], UniformGrid(2)), before)
