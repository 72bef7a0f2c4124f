"""The check of parts, apart from the pass."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from splitquant_plugins.errors import SplitFailedError
from splitquant_plugins.passes.checks import check_parts

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def tensor_of(seed, dtype):
    return torch.randn(6, 7, generator=torch.Generator().manual_seed(seed)).to(dtype)


@given(st.integers(0, 99), st.sampled_from(DTYPES), st.integers(1, 5))
def test_disjoint_parts_pass(seed, dtype, k):
    tensor = tensor_of(seed, dtype)
    label = torch.randint(k, tensor.shape)
    check_parts("w", tensor, [torch.where(label == part, tensor, 0) for part in range(k)], k)


@given(st.integers(0, 99), st.sampled_from(DTYPES), st.integers(2, 5))
def test_parts_that_overlap_pass_within_rounding(seed, dtype, k):
    tensor = tensor_of(seed, dtype)
    parts, left = [], tensor
    for _ in range(k - 1):
        part = (left.float() * torch.rand(tensor.shape) * 2).to(dtype)
        parts.append(part)
        left = left - part
    check_parts("w", tensor, [*parts, left], k)


@given(st.integers(0, 99), st.sampled_from(DTYPES), st.integers(2, 4), st.integers(0, 41))
def test_one_wrong_value_is_found(seed, dtype, k, place):
    tensor = tensor_of(seed, dtype)
    label = torch.randint(k, tensor.shape)
    parts = [torch.where(label == part, tensor, 0) for part in range(k)]
    value = parts[label.view(-1)[place]].view(-1)
    value[place] = value[place] * (1 + 8 * k * torch.finfo(dtype).eps)
    with pytest.raises(SplitFailedError, match="w: the parts miss the tensor"):
        check_parts("w", tensor, parts, k)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_parts_that_are_not_finite_are_found(value):
    tensor = torch.ones(2, 2)
    part = tensor.clone()
    part[0, 0] = value
    with pytest.raises(SplitFailedError):
        check_parts("w", tensor, [part, tensor - part], 2)


def test_a_dropped_part_is_found():
    tensor = torch.tensor([[-2.0, 0.1], [0.2, 3.0]])
    parts = [torch.where(kind, tensor, 0) for kind in (tensor < 0, (tensor > 0) & (tensor < 1), tensor > 1)]
    check_parts("w", tensor, parts, 3)
    for drop in range(3):
        with pytest.raises(SplitFailedError):
            check_parts("w", tensor, parts[:drop] + parts[drop + 1 :], 3)


@pytest.mark.parametrize(
    "part",
    [torch.zeros(3, 2), torch.zeros(2, 2, dtype=torch.float64), torch.zeros(2, 2, device="meta")],
    ids=["shape", "dtype", "device"],
)
def test_parts_of_another_kind_are_found(part):
    tensor = torch.ones(2, 2)
    with pytest.raises(SplitFailedError, match="w: a part is"):
        check_parts("w", tensor, [tensor, part], 2)


@pytest.mark.parametrize("number", [0, 3])
def test_the_number_of_parts(number):
    with pytest.raises(SplitFailedError, match=f"made {number} parts of k = 2"):
        check_parts("w", torch.zeros(2), [torch.zeros(2)] * number, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [2, 3])
def test_the_tolerance_is_the_rounding_of_the_additions(dtype, k):
    """One unit of the largest part for each addition is allowed, and nothing more."""
    eps = torch.finfo(dtype).eps
    tensor = torch.ones(8, dtype=dtype)
    rest = [torch.zeros(8, dtype=dtype)] * (k - 2)
    within, beyond = tensor.clone(), tensor.clone()
    within[3] += (k - 1) * eps
    beyond[3] += k * eps
    zeros = torch.zeros(8, dtype=dtype)
    check_parts("w", tensor, [within, zeros, *rest], k)
    with pytest.raises(SplitFailedError, match=f"w: the parts miss the tensor by up to {k * eps:.3g}"):
        check_parts("w", tensor, [beyond, zeros, *rest], k)


def test_one_part_has_to_be_the_tensor_itself():
    tensor = torch.ones(4)
    with pytest.raises(SplitFailedError):
        check_parts("w", tensor, [tensor + torch.finfo(torch.float32).eps], 1)


def test_parts_that_are_not_contiguous_are_checked_too():
    tensor = torch.randn(6, 7)
    parts = [tensor.t().clamp(max=0).t(), tensor.t().clamp(min=0).contiguous().t()]
    assert not all(part.is_contiguous() for part in parts)
    check_parts("w", tensor, parts, 2)
    parts[1][2, 3] += 1
    with pytest.raises(SplitFailedError):
        check_parts("w", tensor, parts, 2)


def test_a_wrong_value_is_found_anywhere_in_a_large_tensor(monkeypatch):
    monkeypatch.setattr("splitquant_plugins.passes.checks.spans", lambda n: [slice(0, n // 2), slice(n // 2, n)])
    tensor = torch.randn(3, 30_000)
    for place in (0, 24_575, 24_576, 44_999, 45_000, 89_999):
        parts = [tensor.clamp(max=0), tensor.clamp(min=0)]
        parts[0].view(-1)[place] -= 1
        with pytest.raises(SplitFailedError):
            check_parts("w", tensor, parts, 2)
