"""The block stage: it lowers the block's error, keeps the best state, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from splitquant_plugins.decoupleq import (
    BlockOptions,
    QuantizedAffine,
    SolveOptions,
    block_outputs,
    capture_inputs,
    find_blocks,
    tune_block,
)
from splitquant_plugins.decoupleq.alternation import best_state
from splitquant_plugins.decoupleq.objective import problem_of
from splitquant_plugins.decoupleq.parts import Parts
from splitquant_plugins.decoupleq.solver_grid import SolverGrid
from splitquant_plugins.errors import ConfigError, InputError


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    # The tensors are tiny: threads would only wait for each other.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.norm = nn.LayerNorm(width)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> tuple[Tensor, None]:
        return self.norm(x + scale * self.down(self.drop(torch.relu(self.up(x))))), None


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.layers = nn.ModuleList([Block(), Block()])
        self.calls_after: int = 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x, scale=0.5)[0]
        self.calls_after += 1
        return x


def rounded(block: Block, grid: SolverGrid) -> dict[str, QuantizedAffine]:
    """Quantize the block's linears in place."""
    layers = {}
    for name in ("up", "down"):
        linear = getattr(block, name)
        options = SolveOptions(rounds=1, starts=(1.0,))
        problem = problem_of(linear.weight.detach(), torch.eye(linear.in_features), options.damping)
        parts = Parts(problem, grid, 1, options)
        with torch.no_grad():
            state, _ = best_state(parts, options)
        linear.weight.data = parts.values(state.codes, state.affine)[0].float()
        layers[name] = QuantizedAffine(
            state.codes[0].to(torch.int8),
            state.affine.scale.float(),
            state.affine.zero.float(),
            group_of_column=parts.group_of_column,
            trains_zero=grid.zero == "free",
        )
    return layers


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


@pytest.fixture
def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 5, 3, generator=generator) for _ in range(4)]


Case = tuple[Block, list[Any], list[Tensor]]


@pytest.fixture
def case(model: Model, batches: list[Tensor]) -> Case:
    """The first block, its inputs, and its float outputs."""
    block = model.layers[0]
    assert isinstance(block, Block)
    inputs = capture_inputs(model, block, batches)
    return block, inputs, block_outputs(block, inputs)


def measured(block: nn.Module, inputs: list[Any], targets: list[Tensor]) -> float:
    pairs = zip(block_outputs(block, inputs), targets, strict=True)
    return float(torch.stack([(output - target).square().mean() for output, target in pairs]).mean())


@pytest.mark.parametrize(
    "grid",
    [
        SolverGrid(0, 3),
        SolverGrid(0, 3, "integer"),
        SolverGrid(0, 3, "free", "group", 4),
        SolverGrid(-1, 1, "none", "tensor"),
    ],
    ids=str,
)
def test_tuning_lowers_the_error_and_keeps_the_codes(grid: SolverGrid, case: Case) -> None:
    block, inputs, targets = case
    layers = rounded(block, grid)
    codes = {name: layer.codes.clone() for name, layer in layers.items()}
    before = measured(block, inputs, targets)
    report = tune_block(block, layers, inputs, targets, BlockOptions(epochs=15, learning_rate=1e-2))
    assert report.error_before == pytest.approx(before, rel=1e-4)
    assert report.error_after < 0.9 * before
    assert report.error_after == pytest.approx(min(report.trace), rel=1e-4)
    assert measured(block, inputs, targets) == pytest.approx(report.error_after, rel=1e-4)
    for name, layer in layers.items():
        assert torch.equal(layer.codes, codes[name])
        assert torch.equal(layer(), getattr(block, name).weight)
        assert (layer.scale > 0).all()
        if grid.zero == "integer":
            zero_point = -layer.ratio
            torch.testing.assert_close(zero_point, zero_point.round())


def test_the_zero_can_be_tuned_by_itself() -> None:
    linear = nn.Linear(3, 2, bias=False)
    codes = torch.tensor([[0, 1, 2], [3, 0, 1]], dtype=torch.uint8)
    scale, zero = torch.tensor([[0.5], [0.25]]), torch.tensor([[-0.3], [0.1]])
    inputs = [((torch.randn(20, 3),), {})]
    linear.weight.data = codes * scale + zero + 0.2
    targets = block_outputs(linear, inputs)
    block = nn.Sequential(linear)
    layer = QuantizedAffine(codes, scale, zero)
    report = tune_block(block, {"0": layer}, inputs, targets, BlockOptions(epochs=300, learning_rate=1e-2))
    assert report.error_after < 1e-4 * report.error_before
    assert layer.zero is not None
    torch.testing.assert_close(layer.zero.detach(), zero + 0.2, atol=1e-2, rtol=0)


def test_training_that_never_helps_changes_nothing(case: Case) -> None:
    block, inputs, targets = case
    layers = rounded(block, SolverGrid(0, 3))
    before = {name: value.clone() for name, value in block.state_dict().items()}
    report = tune_block(block, layers, inputs, targets, BlockOptions(epochs=2, learning_rate=1e3))
    assert report.error_after == report.error_before < min(report.trace)
    for name, value in block.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=1e-6, atol=1e-7)


def test_only_what_is_asked_for_is_trained(case: Case) -> None:
    block, inputs, targets = case
    layers = rounded(block, SolverGrid(0, 3))
    norm, bias = block.norm.weight.clone(), block.up.bias.clone()
    tune_block(block, layers, inputs, targets, BlockOptions(epochs=2, trains_norms=False))
    assert torch.equal(block.norm.weight, norm)
    assert torch.equal(block.up.bias, bias)
    tune_block(block, layers, inputs, targets, BlockOptions(epochs=5, learning_rate=1e-2, trains_biases=True))
    assert not torch.equal(block.norm.weight, norm)
    assert not torch.equal(block.up.bias, bias)


def test_masked_positions_do_not_count(case: Case) -> None:
    block, inputs, targets = case
    layers = rounded(block, SolverGrid(0, 3))
    masks = [torch.tensor([[1, 1, 0, 0, 0]] * 4) for _ in inputs]
    spoiled = [target.clone() for target in targets]
    for target in spoiled:
        target[:, 2:] = torch.nan
    report = tune_block(block, layers, inputs, spoiled, BlockOptions(epochs=4), masks=masks)
    assert report.error_after < report.error_before


def test_deterministic(model: Model, batches: list[Tensor]) -> None:
    found = []
    start = {name: value.clone() for name, value in model.state_dict().items()}
    for number in range(2):
        model.load_state_dict(start)
        block = model.layers[0]
        assert isinstance(block, Block)
        inputs = capture_inputs(model, block, batches)
        targets = block_outputs(block, inputs)
        torch.manual_seed(number)  # not what the order of the batches depends on
        found.append(tune_block(block, rounded(block, SolverGrid(0, 3)), inputs, targets, BlockOptions(epochs=3)))
    assert found[0] == found[1]


def test_an_exception_leaves_the_block_as_it_was(case: Case) -> None:
    block, inputs, targets = case
    layers = rounded(block, SolverGrid(0, 3))
    block.train()
    block.up.bias.requires_grad_(False)
    before = {name: value.clone() for name, value in block.state_dict().items()}
    scale = layers["up"].scale.detach().clone()
    calls = 0

    def interrupt(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls > 6:  # amid the first epoch
            raise KeyboardInterrupt

    handle = block.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        tune_block(block, layers, inputs, targets, BlockOptions(learning_rate=1e-1))
    handle.remove()
    assert calls == 7
    assert list(block.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())
    assert torch.equal(layers["up"].scale, scale)
    assert type(block.up) is nn.Linear
    assert block.training
    assert block.drop.training
    assert block.down.weight.requires_grad
    assert not block.up.bias.requires_grad
    assert all(parameter.grad is None for parameter in block.parameters())


def test_capture_stops_at_the_block(model: Model, batches: list[Tensor]) -> None:
    model.train()
    calls = capture_inputs(model, model.layers[1], batches)
    assert model.calls_after == 0
    assert model.training
    assert not model.layers[1]._forward_pre_hooks
    model.eval()
    with torch.no_grad():
        expected = model.layers[0](model.embed(batches[2]), scale=0.5)[0]
    args, kwargs = calls[2]
    torch.testing.assert_close(args[0], expected)
    assert kwargs == {"scale": 0.5}
    assert not args[0].requires_grad
    with pytest.raises(InputError, match="did not call the block"):
        capture_inputs(model, nn.Linear(1, 1), batches)
    with pytest.raises(InputError, match="no calibration batches"):
        capture_inputs(model, model.layers[0], [])


def test_blocks_are_the_longest_list_of_modules_with_linears(model: Model) -> None:
    assert [name for name, _ in find_blocks(model)] == ["layers.0", "layers.1"]
    wrapped = nn.Sequential(nn.ReLU(), nn.Identity(), nn.Sequential(nn.ReLU(), nn.ReLU(), nn.ReLU()), model)
    assert [name for name, _ in find_blocks(wrapped)] == ["3.layers.0", "3.layers.1"]
    single = Block()
    assert find_blocks(single) == [("", single)]


def test_errors(case: Case) -> None:
    block, inputs, targets = case
    with pytest.raises(InputError, match="expected the same number"):
        tune_block(block, {}, inputs, targets[1:])
    with pytest.raises(ConfigError, match="epochs=-1"):
        BlockOptions(epochs=-1)
    with pytest.raises(ConfigError, match="learning_rate=0"):
        BlockOptions(learning_rate=0)
