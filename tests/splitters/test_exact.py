"""Completing parts to a tensor: how far their sum may be off, in every dtype."""

from __future__ import annotations

import pytest
import torch

from splitquant_plugins.parts import sum_parts
from splitquant_plugins.passes.checks import check_parts
from splitquant_plugins.splitters._exact import complete

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def spread(spans: int, generator: torch.Generator) -> torch.Tensor:
    """Normal numbers times powers of two from 2^-spans to 1."""
    exponent = torch.randint(-spans, 1, (2000,), generator=generator).double()
    return torch.randn(2000, generator=generator, dtype=torch.float64) * torch.exp2(exponent)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize("spans", [(0, 0), (0, 12), (12, 0), (24, 24)])
def test_the_sum_is_within_eps_of_the_last_part(dtype: torch.dtype, k: int, spans: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(k)
    tensor = spread(spans[0], generator).to(dtype)
    targets = [spread(spans[1], generator) for _ in range(k - 1)]
    parts = complete(tensor, targets)
    assert len(parts) == k
    check_parts("layer.weight", tensor, parts, k)
    off = (sum_parts(parts).double() - tensor.double()).abs()
    eps, last = torch.finfo(dtype).eps, parts[-1].abs().double()
    assert bool((off <= eps * last).all())
    assert (off[tensor.abs().double() >= last] == 0).double().mean() > 0.98
    for part, target in zip(parts, targets, strict=False):
        assert bool(((part.double() - target).abs() <= 16 * eps * torch.maximum(target.abs(), last + 4)).all())


def test_a_part_that_overflows_leaves_the_weight_to_the_last() -> None:
    tensor = torch.tensor([65504.0, -60000.0, 1.0], dtype=torch.float16)
    parts = complete(tensor, [torch.tensor([7e4, 2e4, 0.5])])
    assert torch.equal(parts[0] + parts[1], tensor)
    assert parts[0].tolist() == [0, 0, 0.5]


def test_no_targets_no_split() -> None:
    tensor = torch.ones(3)
    assert complete(tensor, [])[0] is tensor
