"""Second moments that count what reaches the model's predictions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from splitquant_plugins import SplitQuantPass, UniformGrid, manifest_of
from splitquant_plugins.errors import ConfigError, InputError
from splitquant_plugins.passes.calibration import collect_second_moments
from splitquant_plugins.passes.layer_moments import LayerMoments
from splitquant_plugins.passes.loss_moments import collect_loss_moments
from splitquant_plugins.passes.select import select_layers


class Output(dict):
    """What transformers returns."""


class Classifier(nn.Module):
    """Two layers to logits of three classes, for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(5, 8)
        self.down = nn.Linear(8, 3)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Output:
        return Output(logits=self.down(torch.tanh(self.up(x))))


def expected(model: Classifier, x: Tensor, groups: int) -> Tensor:
    """H of `up`, token by token, with the classes that seed 0 draws."""
    logits = model(x)["logits"]
    drawn = torch.multinomial(logits.softmax(-1), 1, generator=torch.Generator().manual_seed(0))[:, 0]
    total = torch.zeros(groups, 5, 5, dtype=torch.float64)
    for row, label in zip(x, drawn, strict=True):
        outputs = model.up(row).detach().requires_grad_()
        (-model.down(torch.tanh(outputs)).log_softmax(-1)[label]).backward()
        weights = outputs.grad.double().square().reshape(groups, -1).mean(dim=1)
        total += weights[:, None, None] * torch.outer(row, row).double()
    return total / len(x)


@pytest.mark.parametrize("groups", [1, 4])
def test_it_is_the_mean_of_x_weighted_by_squared_gradients(groups: int) -> None:
    torch.manual_seed(0)
    model, x = Classifier(), torch.randn(12, 5)
    found = collect_loss_moments(model, [{"x": x}], {"up": model.up}, groups=groups)["up"]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert found.samples == 12
    torch.testing.assert_close(found.matrix, expected(model, x, groups))


def test_groups_divide_the_outputs() -> None:
    model = Classifier()
    found = collect_loss_moments(model, [{"x": torch.randn(4, 5)}], dict(model.named_children()), groups=5)
    assert {name: len(moment.matrix) for name, moment in found.items()} == {"up": 4, "down": 3}


def test_batches_add_up_and_padding_does_not_count() -> None:
    torch.manual_seed(0)
    model, x = Classifier(), torch.randn(2, 3, 5)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    padded = x.clone()
    padded[0, 2] = 1e3
    layers = {"up": model.up}
    one = collect_loss_moments(model, [{"x": padded, "attention_mask": mask}], layers)["up"]
    other = collect_loss_moments(model, [{"x": x[mask != 0]}], layers)["up"]
    assert one.samples == other.samples == 5
    torch.testing.assert_close(one.matrix, other.matrix)
    twice = collect_loss_moments(model, [{"x": x[0]}, {"x": x[1]}], layers)["up"]
    assert twice.samples == 6


def test_outputs_without_logits_count_as_they_are() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(4, 64), torch.randn(200, 4)
    model = nn.Sequential(layer)
    weighted = collect_loss_moments(model, [x], {"0": layer})["0"].matrix
    plain = collect_second_moments(model, [x], {"0": layer})["0"].matrix
    torch.testing.assert_close(weighted, plain, rtol=0.2, atol=0.05)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_counts_the_places_that_reach_the_output(groups: int) -> None:
    class Corner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 4, 3, padding=1, groups=groups)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x)[..., 0, 0]

    torch.manual_seed(0)
    model, x = Corner(), torch.randn(3, 2, 5, 5)
    found = collect_loss_moments(model, [x], {"conv": model.conv})["conv"]
    assert found.samples == 3 * 25
    patches = torch.nn.functional.pad(x, (1, 1, 1, 1))[:, :, :3, :3].reshape(3, groups, -1).double()
    direction = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).double()
    for group in range(groups):
        channels = direction.reshape(3, groups, -1)[:, group].square().mean(dim=1)
        wanted = sum(w * torch.outer(p, p) for w, p in zip(channels, patches[:, group], strict=True)) / 75
        torch.testing.assert_close(found.matrix[group], wanted)


def test_what_cannot_be_measured_is_said() -> None:
    model = Classifier()
    with pytest.raises(InputError, match=r"up: .*NaN"):
        collect_loss_moments(model, [{"x": torch.full((2, 5), torch.nan)}], {"up": model.up})
    with pytest.raises(InputError, match="no calibration batches"):
        collect_loss_moments(model, [], {"up": model.up})

    class Detached(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.detach()

    cut = nn.Sequential(nn.Linear(5, 5), Detached())
    with pytest.raises(InputError, match="without gradients"):
        collect_loss_moments(cut, [torch.ones(1, 5)], {"0": cut[0]})


def test_the_pass_weighs_by_predictions(plugins) -> None:
    """The first of two layers' outputs that are equally large counts in the predictions, the other hardly does."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matters, self.hardly = nn.Linear(16, 8), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.matters(x) + 1e-3 * self.hardly(x)

    def chosen(objective: str) -> dict[str, int]:
        torch.manual_seed(0)
        model = Both()
        with torch.no_grad():
            model.hardly.weight.mul_(2)
        batches = [torch.randn(64, 16)]
        split = SplitQuantPass(calibration=batches, objective=objective, budget=6.2, plugins=plugins)
        parts = manifest_of(split.apply(model, grid=UniformGrid(2))).layers
        return {record.name: record.k for record in parts}

    assert chosen("predictions")["matters"] > chosen("predictions")["hardly"]
    assert chosen("outputs")["matters"] <= chosen("outputs")["hardly"]
    with pytest.raises(ConfigError, match="give calibration=batches"):
        SplitQuantPass(objective="predictions", plugins=plugins).apply(Both(), grid=UniformGrid(2))


@pytest.mark.parametrize("options", [{"k": 2}, {"budget": 6.2}])
def test_what_predictions_do_not_depend_on_costs_nothing(plugins, options) -> None:
    class Beside(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.beside = nn.Linear(5, 8)

        def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Output:
            return Output(logits=super().forward(x)["logits"], other=self.beside(x))

    torch.manual_seed(0)
    model, batches = Beside(), [{"x": torch.randn(64, 5)}]
    found = collect_loss_moments(model, batches, {"beside": model.beside})["beside"]
    assert found.samples == 64
    assert not found.matrix.any()
    split = SplitQuantPass(calibration=batches, objective="predictions", plugins=plugins, **options)
    record = next(r for r in manifest_of(split.apply(model, grid=UniformGrid(2))).layers if r.name == "beside")
    assert record.error_whole in (0, None)


def test_layers_too_large_for_memory_come_in_groups(plugins) -> None:
    torch.manual_seed(0)
    model = Classifier()
    layers = select_layers(model, SplitQuantPass(plugins=plugins).config, plugins).split
    batches = [{"x": torch.randn(6, 5)}]
    options = {"objective": "predictions", "objective_groups": 2}
    together = dict(next(iter(LayerMoments(model, batches, 2**30, **options).groups(layers)))[1])
    apart: dict[str, Tensor] = {}
    groups = 0
    for _, found in LayerMoments(model, batches, 1, **options).groups(layers):
        apart.update(found)
        groups += 1
    assert groups == 2
    assert together.keys() == apart.keys() == {"up", "down"}
    for name in apart:
        torch.testing.assert_close(apart[name], together[name])
