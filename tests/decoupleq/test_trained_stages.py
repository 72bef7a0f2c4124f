"""The stages of DecoupleQPass that train: on every grid, behind a split, and never worse on what is held out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from splitquant_plugins import DecoupleQPass, SplitQuantPass, UniformGrid, manifest_of
from splitquant_plugins.decoupleq import layer_stage
from splitquant_plugins.decoupleq import run as module
from splitquant_plugins.decoupleq.model_tuning import model_objective
from splitquant_plugins.decoupleq.training import Learned
from splitquant_plugins.errors import ConfigError
from splitquant_plugins.grid import Grid
from splitquant_plugins.plugins import Plugins

FAST = {"rounds": 1, "starts": (1.0,), "sweeps": 1, "coupled_rows": False}
TRAINED = {**FAST, "tune_blocks": True, "tune_model": True, "epochs": 2, "model_steps": 30, "batch_size": 16}
# A few steps of each stage, for what does not depend on how well they go.
SHORT = {**TRAINED, "epochs": 1, "model_steps": 5, "batch_size": 20}
GRID = UniformGrid(2, "affine", "channel")


class Block(nn.Module):
    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    """Three blocks between two layers, with predictions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 12)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Any:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return SimpleNamespace(logits=3 * self.head(x))


def inputs(seed: int) -> Tensor:
    return torch.randn(160, 6, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def batches() -> list[dict[str, Tensor]]:
    return [{"x": part} for part in inputs(1).split(40)]


@torch.no_grad()
def divergence(model: nn.Module, reference: nn.Module, x: Tensor) -> float:
    wanted, found = (one(x).logits.log_softmax(-1) for one in (reference, model))
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def grids() -> dict[str, Callable[[], Grid]]:
    def inc() -> Grid:
        return pytest.importorskip("splitquant_inc.grid").IncRtnGrid(2)

    def quanto() -> Grid:
        return pytest.importorskip("splitquant_quanto.grid").QuantoWholeGrid(2)

    return {
        "PT2E channel": lambda: GRID,
        "PT2E tensor": lambda: UniformGrid(2, "affine", "tensor"),
        "symmetric": lambda: UniformGrid(2, "symmetric", "channel"),
        "group": lambda: UniformGrid(2, "affine", "group", 6),
        "INC": inc,
        "quanto": quanto,
    }


@pytest.mark.parametrize(("name", "k"), [*((name, 1) for name in grids()), ("INC", 2), ("symmetric", 2)])
def test_training_helps_on_new_inputs_and_stays_on_the_grid(
    name: str, k: int, net: Net, batches: list[dict[str, Tensor]], plugins: Plugins
) -> None:
    grid = grids()[name]()
    reference = copy.deepcopy(net)
    if k > 1:
        SplitQuantPass(k=k, plugins=plugins).apply(net, grid=grid)
    solved = DecoupleQPass(calibration=batches, plugins=plugins, **FAST).apply(copy.deepcopy(net), grid=grid)
    DecoupleQPass(calibration=batches, plugins=plugins, **TRAINED).apply(net, grid=grid)
    before, after = (divergence(one, reference, inputs(2)) for one in (solved, net))
    assert after < before
    rule = grid if k > 1 else getattr(grid, "whole", grid)
    # Rows whose parts serve better as they were split keep the floats that they were split into.
    on_grid = [one.name for one in manifest_of(net).solved if one.values is not None and not one.values.plain_rows]
    assert on_grid
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Linear) and name.removesuffix(".lower").removesuffix(".upper") in on_grid:
            weight = layer.weight.detach()
            assert torch.allclose(rule.quantize_dequantize(weight), weight, atol=2e-3 * float(weight.abs().max()))
    for record in manifest_of(net).solved:
        assert record.values is not None
        trainings = record.values.trainings
        assert all(one.held_out_after <= one.held_out_before for one in trainings)
        assert trainings[-1].what == "the model"
        assert trainings[-1].held_out_after < trainings[-1].held_out_before


def test_blocks_are_trained_in_windows(net: Net, batches: list[dict[str, Tensor]], plugins: Plugins) -> None:
    DecoupleQPass(calibration=batches, plugins=plugins, **{**TRAINED, "tune_model": False}).apply(net, grid=GRID)
    found = {record.name: record.values for record in manifest_of(net).solved if record.values is not None}
    assert [one.what for one in found["blocks.1.up"].trainings] == [
        "blocks blocks.0 and blocks.1",
        "blocks blocks.1 and blocks.2",
    ]
    assert [one.what for one in found["blocks.0.up"].trainings] == ["block blocks.0", "blocks blocks.0 and blocks.1"]
    assert found["head"].trainings == ()
    one = found["blocks.0.up"].trainings[0]
    assert (one.rows, one.rows_held_out, one.steps) == (128, 32, 16)


def test_a_model_that_training_makes_worse_stays_as_it_was(
    net: Net, batches: list[dict[str, Tensor]], plugins: Plugins, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the training itself, before rounding, believes that it helped."""
    solved = DecoupleQPass(calibration=batches, plugins=plugins, **FAST).apply(copy.deepcopy(net), grid=GRID)

    def spoilt(learned: Learned, *_: Any) -> Any:
        for weight in learned.weights:
            weight.latent.data = 3 - weight.latent.data
        for other in learned.others:
            other.data += 1
        return SimpleNamespace(steps=1)

    monkeypatch.setattr(module, "train", spoilt)
    DecoupleQPass(calibration=batches, plugins=plugins, **TRAINED).apply(net, grid=GRID)
    assert same(weights(net), weights(solved))
    for record in manifest_of(net).solved:
        assert record.values is not None
        assert all(one.held_out_after == one.held_out_before for one in record.values.trainings)


@pytest.mark.parametrize("stages", [{"tune_blocks": True}, {"tune_blocks": False}], ids=["blocks", "model only"])
def test_a_killed_run_goes_on_to_the_same_values(
    stages: dict[str, bool],
    net: Net,
    batches: list[dict[str, Tensor]],
    plugins: Plugins,
    tmp_path: Any,
    monkeypatch: Any,
) -> None:
    options: dict[str, Any] = {**SHORT, **stages, "plugins": plugins}
    straight = DecoupleQPass(calibration=batches, **options).apply(copy.deepcopy(net), grid=GRID)
    before = weights(net)
    real, calls = layer_stage.solve_weight, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs["name"])
        if kwargs["name"] == "blocks.2.up" and len(calls) < 8:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(layer_stage, "solve_weight", counted)
    with pytest.raises(KeyboardInterrupt):
        DecoupleQPass(calibration=batches, resume_dir=tmp_path, **options).apply(net, grid=GRID)
    assert same(weights(net), before)
    calls.extend([""] * 8)
    DecoupleQPass(calibration=batches, resume_dir=tmp_path, **options).apply(net, grid=GRID)
    assert calls[-3:] == ["blocks.2.up", "blocks.2.down", "head"]
    assert same(weights(net), weights(straight))


def test_an_interrupted_training_puts_the_model_back(
    net: Net, batches: list[dict[str, Tensor]], plugins: Plugins, monkeypatch: Any
) -> None:
    before = weights(net)

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "model_objective", interrupted)
    with pytest.raises(KeyboardInterrupt):
        DecoupleQPass(calibration=batches, plugins=plugins, **SHORT).apply(net, grid=GRID)
    assert same(weights(net), before)


@pytest.mark.parametrize("limit", [0, 2**20], ids=["made anew", "kept"])
def test_the_divergence_is_that_of_the_predictions(limit: int, net: Net) -> None:
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.head.weight.mul_(0.9)
    x = inputs(3)[:30].reshape(2, 15, 6)
    mask = torch.ones(2, 15)
    mask[0, 9:] = 0
    made = []

    def float_outputs(place: int) -> Any:
        made.append(place)
        return net(x)

    objective = model_objective(other, [((x,), {})], [2], [mask], float_outputs, limit)
    first, again = objective.mean([0]), objective.mean([0])
    assert first == again == pytest.approx(divergence(other, net, x[mask != 0]), abs=1e-4)  # kept in half precision
    assert len(made) == (1 if limit else 2)


def test_outputs_that_are_no_predictions_are_compared_by_their_squares() -> None:
    one, other = nn.Linear(4, 3), nn.Linear(4, 3)
    x = torch.randn(5, 4)
    objective = model_objective(other, [((x,), {})], [5], [None], lambda _: one(x), 0)
    assert objective.mean([0]) == pytest.approx(float((one(x) - other(x)).square().mean().detach()), rel=1e-5)


def test_options_out_of_range(batches: list[dict[str, Tensor]]) -> None:
    for option, value in (
        ("held_out", 1.0),
        ("held_out", 0.0),
        ("batch_size", 0),
        ("block_window", 0),
        ("model_steps", -1),
    ):
        with pytest.raises(ConfigError, match=option):
            DecoupleQPass(calibration=batches, **{option: value})


def test_a_model_that_writes_into_its_inputs_is_trained_on_the_same_ones_each_time() -> None:
    class Writes(Net):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x.add_(1))

    torch.manual_seed(0)
    net, given = Writes().eval(), torch.randn(32, 6)
    kept = given.clone()
    solved = [
        DecoupleQPass(calibration=calibration, **SHORT).apply(copy.deepcopy(net), grid=GRID)
        for calibration in ([given], lambda: iter([kept.clone()]))
    ]
    assert torch.equal(given, kept)
    assert all(torch.equal(one, other) for one, other in zip(*(each.parameters() for each in solved), strict=True))
