"""The default splitter, and the promise that a split never makes a layer worse without saying so."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from splitquant_plugins import SplitQuantPass, Splitter, UniformGrid, hookimpl, manifest_of
from splitquant_plugins.errors import ConfigError, SplitQuantWarning
from splitquant_plugins.evaluation.choices import choices, summary
from splitquant_plugins.plugins import Plugins

RESTRICTED = UniformGrid(2, "symmetric", "tensor")


def model(*weights: Tensor) -> nn.Sequential:
    layers = []
    for weight in weights:
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.weight = nn.Parameter(weight.clone())
        layer.bias = nn.Parameter(torch.linspace(-1, 1, weight.shape[0]))
        layers.append(layer)
    return nn.Sequential(*layers)


def heavy(rows: int = 24, columns: int = 24, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    return weight / torch.rand(rows, columns, generator=generator).clamp(min=0.05)


def on_the_grid() -> Tensor:
    """Weights that the grid holds exactly, so that no split can lower their error."""
    return torch.tensor([[-1.0, 0.0, 1.0, 1.0]]).repeat(4, 1)


def test_without_a_grid_the_default_is_the_papers_k_means():
    ours = SplitQuantPass()(model(heavy()))
    papers = SplitQuantPass(splitter="kmeans")(model(heavy()))
    for mine, theirs in zip(ours.parameters(), papers.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    (record,) = manifest_of(ours).split
    assert record.splitter == "kmeans"
    assert "no grid is known" in record.why
    assert (record.error_whole, record.error_split) == (None, None)


def test_with_a_grid_the_default_chooses_parts_for_it():
    ours = SplitQuantPass(k=2).apply(model(heavy()), grid=RESTRICTED)
    theirs = SplitQuantPass(k=2, splitter="grid").apply(model(heavy()), grid=RESTRICTED)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)
    (record,) = manifest_of(ours).split
    assert record.splitter == "grid"
    assert "is known" in record.why
    assert record.bias_parts == ("lower",)
    assert manifest_of(theirs).split[0].why == ""


def test_a_recipe_that_states_its_grid_for_some_layers_only():
    ours = SplitQuantPass(k=2).apply(
        model(heavy(), heavy(seed=1)), grid=lambda name: RESTRICTED if name == "0" else None
    )
    assert [record.splitter for record in manifest_of(ours).split] == ["grid", "kmeans"]


@pytest.mark.parametrize("splitter", ["auto", "grid", "residual", "range"])
def test_a_layer_that_gains_nothing_stays_whole_and_says_why(splitter: str):
    ours = SplitQuantPass(splitter=splitter).apply(model(on_the_grid(), heavy()), grid=RESTRICTED)
    assert type(ours[0]) is nn.Linear
    (kept,) = manifest_of(ours).kept
    assert kept.name == "0"
    assert "does not lower the weight's squared error" in str(kept.reason)
    assert kept.splitter == ("grid" if splitter == "auto" else splitter)
    assert bool(kept.why) == (splitter == "auto")
    assert kept.error_split is not None
    assert kept.error_whole is not None
    assert kept.error_split >= kept.error_whole
    assert summary(choices(manifest_of(ours))) == f"{kept.splitter} 1, whole 1"
    assert [record.name for record in manifest_of(ours).split] == ["1"]


def test_the_papers_splitter_says_so_where_it_does_harm():
    weight = torch.linspace(-1, 1, 64).reshape(8, 8)
    grid = UniformGrid(8, "symmetric", "tensor")
    with pytest.warns(SplitQuantWarning, match=r"1 of 1 split layers lose .* 0 \(squared error"):
        ours = SplitQuantPass(splitter="kmeans").apply(model(weight), grid=_Coarse(grid))
    (record,) = manifest_of(ours).harmed
    assert record.error_split > record.error_whole


class _Coarse:
    """A grid that rounds tensors with zeros in them twice as coarsely."""

    def __init__(self, grid: UniformGrid) -> None:
        self._grid = grid

    def __getattr__(self, name: str):
        return getattr(self._grid, name)

    def quantize_dequantize(self, tensor: Tensor) -> Tensor:
        rounded = self._grid.quantize_dequantize(tensor)
        return rounded if bool((tensor != 0).all()) else torch.where(tensor == 0, tensor, rounded + 0.1)


class Harmful(Splitter):
    """Two parts that pull against each other: each needs a far wider range than their sum."""

    def split(self, tensor, plan, grid):
        return [tensor + 64, torch.full_like(tensor, -64)]


def with_harmful() -> Plugins:
    class Plugin:
        @hookimpl
        def splitquant_register_splitters(self, register):
            register("harmful", Harmful, "worse than nothing")

    plugins = Plugins.load()
    plugins.add(Plugin(), "harmful")
    return plugins


def test_a_harmful_split_is_not_kept():
    split_pass = SplitQuantPass(splitter="harmful", k=2, plugins=with_harmful())
    weight = torch.arange(64.0).reshape(8, 8) % 7 - 3
    ours = split_pass.apply(model(weight), grid=UniformGrid(4))
    assert type(ours[0]) is nn.Linear
    assert "'harmful' does not lower" in str(manifest_of(ours).kept[0].reason)


@given(
    st.integers(0, 2**16),
    st.sampled_from(["affine", "symmetric"]),
    st.sampled_from(["tensor", "channel", "group"]),
    st.sampled_from([2, 4, 8]),
    st.sampled_from([2, 3]),
    st.sampled_from(["auto", "residual", "range", "halve", "kmeans"]),
)
def test_no_splitter_is_worse_than_whole_without_saying_so(seed, scheme, granularity, bits, k, splitter):
    grid = UniformGrid(bits, scheme, granularity, 8 if granularity == "group" else None)
    weight = heavy(8, 16, seed)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        ours = SplitQuantPass(splitter=splitter, k=k).apply(model(weight), grid=grid)
    parts = [part.weight for part in ours[0].children()] or [ours[0].weight]
    total = torch.stack([grid.quantize_dequantize(part.detach()).double() for part in parts]).sum(0)
    error = float((weight.double() - total).square().sum())
    whole = float((weight.double() - grid.quantize_dequantize(weight)).square().sum())
    if error > whole * (1 + 1e-6):
        assert manifest_of(ours).harmed
        assert any("lose by their split" in str(warning.message) for warning in seen)
    else:
        assert not manifest_of(ours).harmed


def test_one_scale_for_the_tensor_means_clusters_of_the_tensor_for_convolutions_too():
    convolution = nn.Sequential(nn.Conv2d(4, 6, 3))
    per_tensor = SplitQuantPass(splitter="kmeans").apply(
        copy.deepcopy(convolution), grid=UniformGrid(2, "affine", "tensor")
    )
    per_channel = SplitQuantPass(splitter="kmeans").apply(copy.deepcopy(convolution), grid=UniformGrid(2))
    asked = SplitQuantPass(splitter="kmeans", granularity="channel").apply(
        copy.deepcopy(convolution), grid=UniformGrid(2, "affine", "tensor")
    )
    found = [manifest_of(each).split[0].granularity for each in (per_tensor, per_channel, asked)]
    assert found == ["tensor", "channel", "channel"]
    parts = [part.weight for part in per_tensor[0].children()]
    lower, upper = parts[0], parts[-1]
    assert lower[lower != 0].max() < upper[upper != 0].min()


def test_calibration_without_a_grid_is_an_error_that_names_the_way_out():
    with pytest.raises(ConfigError, match="attach the pass to a recipe"):
        SplitQuantPass(calibration=[torch.randn(2, 24)])(model(heavy()))


def test_what_was_chosen_survives_saving(tmp_path):
    ours = SplitQuantPass(k=2).apply(model(heavy(), on_the_grid().repeat(1, 6)), grid=RESTRICTED)
    manifest = manifest_of(ours)
    manifest.save(tmp_path)
    loaded = type(manifest).load(tmp_path)
    assert [(r.splitter, r.why, r.error_whole, r.error_split) for r in loaded.layers] == [
        (r.splitter, r.why, r.error_whole, r.error_split) for r in manifest.layers
    ]
