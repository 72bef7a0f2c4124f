"""Rows that make up for each other, weighed by what a block makes of its layers' outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from splitquant_plugins import DecoupleQPass, UniformGrid, manifest_of
from splitquant_plugins.decoupleq import layer_stage
from splitquant_plugins.decoupleq.alternation import SolveOptions, best_state
from splitquant_plugins.decoupleq.capture import BlockInputs
from splitquant_plugins.decoupleq.coupled_rows import coupled_error, with_coupled_rows
from splitquant_plugins.decoupleq.objective import problem_of
from splitquant_plugins.decoupleq.output_moments import output_moments
from splitquant_plugins.decoupleq.parts import Parts
from splitquant_plugins.decoupleq.solve_weight import solve_weight
from splitquant_plugins.decoupleq.solver_grid import solver_grid
from splitquant_plugins.errors import ConfigError
from splitquant_plugins.passes.loss_moments import collect_gradient_moments

GRID = UniformGrid(2, "affine", "channel")
QUICK: dict[str, Any] = {"rounds": 1, "starts": (1.0,), "search_inputs": 0}


def moment_of(size: int, samples: int) -> Tensor:
    mixing = torch.randn(size, size, dtype=torch.float64)
    rows = torch.randn(samples, size, dtype=torch.float64) @ mixing
    return rows.T @ rows / samples


class Block(nn.Module):
    """Multiplies queries with keys, and mixes what comes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.unused = nn.Linear(16, 16)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        self.unused(x)
        chances = (self.query(x) @ self.key(x).mT / 2).softmax(dim=-1)
        return x + self.out(chances @ self.value(x))


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}


@pytest.mark.parametrize("k", [1, 2])
def test_coupled_rows_lower_the_error_that_counts_them_together(k: int) -> None:
    torch.manual_seed(0)
    weight, inputs, outputs = torch.randn(20, 12, dtype=torch.float64), moment_of(12, 60), moment_of(20, 60)
    options = SolveOptions()
    solver = Parts(problem_of(weight, inputs, 0.01), solver_grid(GRID, weight.shape), k, options)
    alone, _ = best_state(solver, options)
    together = with_coupled_rows(solver, alone, outputs)
    errors = [
        coupled_error(solver, torch.stack(solver.values(s.codes, s.affine)).sum(dim=0), outputs)
        for s in (alone, together)
    ]
    assert errors[1] < 0.9 * errors[0]
    torch.testing.assert_close(together.errors, solver.state(together.codes, together.affine).errors)


def test_the_error_is_that_of_the_outputs_weighed_together() -> None:
    torch.manual_seed(0)
    weight, given, seen = torch.randn(6, 5).double(), torch.randn(50, 5).double(), torch.randn(40, 6).double()
    solver = Parts(problem_of(weight, given.T @ given / 50, 0.0), solver_grid(GRID, weight.shape), 1, SolveOptions())
    values = weight + 0.1 * torch.randn(6, 5).double()
    outputs = seen.T @ seen / 40
    damped = (outputs / outputs.diagonal().mean() + 0.1 * torch.eye(6).double()) / 1.1
    off = given @ (values - weight).T
    expected = ((off @ damped) * off).sum() / 50
    assert coupled_error(solver, values, outputs) == pytest.approx(float(expected), rel=1e-6)


def test_rows_that_do_not_touch_each_other_are_solved_alone() -> None:
    torch.manual_seed(0)
    weight, moment = torch.randn(10, 8), moment_of(8, 40)
    alone = solve_weight(weight, [weight], moment, GRID)
    together = solve_weight(weight, [weight], moment, GRID, output_moment=torch.eye(10))
    assert together.error_after == pytest.approx(alone.error_after)
    # A scale for the whole tensor is no row's own.
    grid = UniformGrid(2, "affine", "tensor")
    coupled = solve_weight(weight, [weight], moment, grid, output_moment=moment_of(10, 40))
    assert torch.equal(coupled.rounded[0], solve_weight(weight, [weight], moment, grid).rounded[0])


def test_moments_of_gradients_leave_padding_out() -> None:
    torch.manual_seed(0)
    block, x = Block().eval(), torch.randn(6, 5, 16)
    mask = torch.ones(6, 5, dtype=torch.long)
    mask[:, 3:] = 0
    # Rows of tokens that count; keys and values of the others are seen, too.
    inputs = BlockInputs.captured(block, block, [{"x": x, "attention_mask": mask}])
    found = output_moments(block, inputs.calls, inputs.masks, linear_layers(block), 2**20)
    assert set(found) == {"query", "key", "value", "out"}
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    direction[mask == 0] = 0
    probe = torch.zeros(6, 5, 16, requires_grad=True)
    handle = block.query.register_forward_hook(lambda _m, _x, y: y + probe)
    (gradient,) = torch.autograd.grad(block(x), probe, direction)
    handle.remove()
    rows = gradient[mask == 1].double()
    torch.testing.assert_close(found["query"], rows.T @ rows / len(rows), rtol=1e-4, atol=1e-8)
    assert output_moments(block, inputs.calls, inputs.masks, linear_layers(block), 16 * 16 * 8 - 1) == {}


def test_attention_comes_out_nearer() -> None:
    """Beside rows that are solved alone, on inputs that were not seen."""
    better = 0
    for seed in range(3):
        torch.manual_seed(seed)
        model = nn.Sequential(Block(), Block()).eval()
        batches, unseen = [torch.randn(16, 12, 16) for _ in range(4)], torch.randn(64, 12, 16)
        errors = []
        for coupled in (False, True):
            twin = copy.deepcopy(model)
            DecoupleQPass(calibration=batches, coupled_rows=coupled, **QUICK).apply(twin, grid=GRID)
            with torch.no_grad():
                errors.append(float((twin(unseen) - model(unseen)).square().mean()))
        better += errors[1] < errors[0]
    assert better >= 2


def test_a_block_without_gradients_is_solved_row_by_row_and_said_to_be() -> None:
    class Refusing(torch.autograd.Function):
        @staticmethod
        def forward(_context: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(_context: object, *_: Tensor) -> Tensor:
            raise RuntimeError("no gradient here")

    class Opaque(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(Refusing.apply(self.layer(x)))

    torch.manual_seed(0)
    model = nn.Sequential(Opaque(), Opaque()).eval()
    twin = copy.deepcopy(model)
    batches = [torch.randn(32, 8)]
    with torch.inference_mode():
        DecoupleQPass(calibration=batches, **QUICK).apply(model, grid=GRID)
    assert any("no coupled rows" in note and "no gradient here" in note for note in manifest_of(model).notes)
    DecoupleQPass(calibration=batches, coupled_rows=False, **QUICK).apply(twin, grid=GRID)
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda y: {"aux": None, "y": y}, "a block returned dict"),
        (lambda y: (y.mean(), y), "expected rows"),
        (lambda y: (y.detach(), y), "without gradients"),
    ],
    ids=["no tensor first", "a loss first", "no gradients"],
)
def test_blocks_of_other_outputs_are_solved_row_by_row(wrong: Callable[[Tensor], Any], said: str) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Any:
            return wrong(self.last(torch.tanh(self.layer(x))))

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Odd(), Odd()])

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                found = block(x)
                x = found["y"] if isinstance(found, dict) else found[1]
            return x

    torch.manual_seed(0)
    model = Stack().eval()
    DecoupleQPass(calibration=[torch.randn(32, 8)], asymmetric_calibration=0.5, **QUICK).apply(model, grid=GRID)
    assert any("no coupled rows" in note and said in note for note in manifest_of(model).notes)


def test_rows_may_count_as_the_models_predictions_see_them(plugins: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            widths = nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12)
            self.blocks = nn.ModuleList([nn.Sequential(*widths), nn.Sequential(*copy.deepcopy(widths))])

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x[..., :3]

    torch.manual_seed(0)
    model, x = Net(), torch.randn(64, 12)
    wanted = collect_gradient_moments(model, [x], {"blocks.0.0": model.blocks[0][0]})["blocks.0.0"]
    given: dict[str, Tensor] = {}
    solve = layer_stage.solve_weight

    def noting(*args: Any, **kwargs: Any) -> Any:
        given[kwargs["name"]] = kwargs["output_moment"]
        return solve(*args, **kwargs)

    monkeypatch.setattr(layer_stage, "solve_weight", noting)
    options = {"calibration": [x], "plugins": plugins, **QUICK}
    DecoupleQPass(objective="predictions", **options).apply(copy.deepcopy(model), grid=GRID)
    torch.testing.assert_close(given["blocks.0.0"], wanted)
    by_predictions = given["blocks.0.0"]
    DecoupleQPass(**options).apply(copy.deepcopy(model), grid=GRID)
    assert not torch.allclose(given["blocks.0.0"], by_predictions)
    with pytest.raises(ConfigError, match="raise calibration_bytes"):
        DecoupleQPass(objective="predictions", calibration_bytes=100, **options).apply(model, grid=GRID)
