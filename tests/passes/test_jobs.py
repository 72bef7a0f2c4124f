"""Layers in parallel: threads, processes and a Dask cluster give the same parts."""

import joblib
import pytest
import torch
from torch import nn

from splitquant_plugins import SplitQuantPass


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(24, 24) for _ in range(5)))


def parts_of(split: nn.Module) -> list[torch.Tensor]:
    return [part.weight for layer in split for part in layer.parts()]


def same(first: nn.Module, second: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(parts_of(first), parts_of(second), strict=True))


@pytest.mark.parametrize("backend", ["threading", "loky"])
def test_any_joblib_backend_gives_the_same_parts(backend: str) -> None:
    expected = SplitQuantPass()(model())
    with joblib.parallel_config(backend=backend):
        assert same(SplitQuantPass(jobs=2)(model()), expected)


def test_a_local_dask_cluster_gives_the_same_parts() -> None:
    distributed = pytest.importorskip("distributed")
    expected = SplitQuantPass()(model())
    cluster = distributed.LocalCluster(
        n_workers=1, threads_per_worker=2, processes=False, dashboard_address=":0", protocol="inproc://"
    )
    with cluster, distributed.Client(cluster), joblib.parallel_config(backend="dask"):
        assert same(SplitQuantPass(jobs=2)(model()), expected)
