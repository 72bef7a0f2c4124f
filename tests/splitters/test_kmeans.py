from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splitquant_plugins.errors import CannotSplit
from splitquant_plugins.plan import TensorPlan
from splitquant_plugins.splitters.kmeans import KMeansOptions, KMeansSplitter


def plan(k=3, granularity="tensor", seed=0, **options):
    return TensorPlan("fc", "weight", k, "kmeans", granularity, KMeansOptions(**options), seed)


def split(tensor, **kwargs):
    return KMeansSplitter().split(tensor, plan(**kwargs), None)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check_parts(tensor, parts):
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    assert torch.equal(total, tensor)
    for part in parts:
        assert part.shape == tensor.shape
        assert part.dtype == tensor.dtype
        assert not part.requires_grad
        assert part.any()
    assert (sum((part != 0).int() for part in parts) <= 1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("method", ["exact", "sklearn"])
@pytest.mark.parametrize("shape", [(50,), (6, 40), (4, 3, 3, 3)])
def test_parts_sum_to_the_tensor(dtype, granularity, method, shape):
    tensor = normal(*shape).to(dtype).requires_grad_()
    parts = split(tensor, granularity=granularity, method=method)
    assert len(parts) == 3
    check_parts(tensor.detach(), parts)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.sampled_from([-3.0, -1.0, -0.0, 0.0, 0.5, 1.0, 8.0]), min_size=2, max_size=12),
    st.integers(2, 5),
    st.sampled_from(["tensor", "channel"]),
)
def test_few_distinct_values(values, k, granularity):
    tensor = torch.tensor([values, [*values[1:], 1.0]])
    try:
        parts = split(tensor, k=k, granularity=granularity)
    except CannotSplit:
        assert len(tensor.unique()) == 1 or granularity == "channel" or len(tensor[tensor != 0].unique()) == 1
        return
    check_parts(tensor, parts)
    assert len(parts) <= min(k, len(tensor.unique()))


def test_parts_ascend():
    parts = split(normal(30, 30))
    for low, high in pairwise(parts):
        assert low[low != 0].max() < high[high != 0].min()


def test_channels_have_boundaries_of_their_own():
    tensor = torch.stack([normal(60), 100 * normal(60, seed=1)])
    parts = split(tensor, granularity="channel")
    for row in range(2):
        alone = split(tensor[row])
        assert all(torch.equal(part[row], other) for part, other in zip(parts, alone, strict=True))
    assert not torch.equal(parts[0], split(tensor)[0])


def test_a_channel_with_fewer_values_leaves_its_places_zero():
    tensor = torch.stack([torch.full((40,), 2.0), normal(40)])
    parts = split(tensor, granularity="channel")
    assert len(parts) == 3
    check_parts(tensor, parts)
    assert torch.equal(parts[0][0], tensor[0])


@pytest.mark.parametrize("method", ["exact", "sklearn"])
@pytest.mark.parametrize("tensor", [torch.zeros(4, 5), torch.full((4, 5), 1.5), torch.ones(1)])
def test_a_constant_tensor_cannot_be_split(tensor, method):
    with pytest.raises(CannotSplit, match="all its values are equal"):
        split(tensor, method=method)


def test_other_tensors_that_cannot_be_split():
    with pytest.raises(CannotSplit, match="k=1"):
        split(normal(5, 5), k=1)
    with pytest.raises(CannotSplit, match="no values"):
        split(torch.zeros(0, 3))
    with pytest.raises(CannotSplit, match="but zeros"):
        split(torch.tensor([0.0, 0.0, 2.0]))
    with pytest.raises(CannotSplit, match="in each channel"):
        split(torch.tensor([[1.0, 1.0], [2.0, 2.0]]), granularity="channel")


def test_the_exact_method_is_at_least_as_good_as_sklearn():
    tensor = normal(40, 40) ** 3

    def inertia(parts):
        members = [part[part != 0] for part in parts]
        return sum(((m - m.mean()) ** 2).sum().item() for m in members)

    assert inertia(split(tensor)) <= inertia(split(tensor, method="sklearn")) * (1 + 1e-6)


def test_sklearn_uses_the_seed_of_the_plan():
    from sklearn.cluster import KMeans

    tensor = normal(300)
    for seed in (0, 7):
        expected = KMeans(3, init="k-means++", n_init=1, random_state=seed).fit_predict(tensor.numpy()[:, None])
        parts = split(tensor, seed=seed, method="sklearn")
        for part in parts:
            assert len(set(expected[part.numpy() != 0])) == 1


def test_sklearn_is_not_needed_for_the_exact_method(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.cluster", None)
    assert len(split(normal(5, 5))) == 3
    with pytest.raises(ImportError):
        split(normal(5, 5), method="sklearn")
