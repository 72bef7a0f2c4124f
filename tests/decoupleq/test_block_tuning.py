"""Training of learned weights: towards a block's float outputs, never ending worse on held-out calls than it began."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from splitquant_plugins.decoupleq import (
    Learned,
    LearnedRounding,
    Objective,
    SolveOptions,
    TrainingOptions,
    block_objective,
    block_outputs,
    capture_inputs,
    find_blocks,
    train,
)
from splitquant_plugins.decoupleq.alternation import best_state
from splitquant_plugins.decoupleq.block_tuning import BlockChain, follows, other_parameters
from splitquant_plugins.decoupleq.objective import problem_of
from splitquant_plugins.decoupleq.parts import Parts
from splitquant_plugins.decoupleq.range_ends import with_range_ends
from splitquant_plugins.decoupleq.solver_grid import SolverGrid
from splitquant_plugins.errors import ConfigError, InputError

TRAINED, HELD_OUT = range(12), range(12, 16)
INT2 = SolverGrid(0, 3, "integer", range_ends=((0,), (3,)))


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


def learned(block: Block, grid: SolverGrid, others: tuple[str, ...] = ()) -> Learned:
    """Quantize the block's linears in place, and what trains them."""
    weights = {}
    for name in ("blocks.0.up", "blocks.0.down"):
        linear = block.get_submodule(name.removeprefix("blocks.0."))
        assert isinstance(linear, nn.Linear)
        wanted = linear.weight.detach().clone()
        options = SolveOptions(rounds=1, starts=(1.0,))
        problem = problem_of(wanted, torch.eye(linear.in_features), options.damping)
        parts = Parts(problem, grid, 1, options)
        with torch.no_grad():
            state = best_state(parts, options)[0]
            state = with_range_ends(parts, state) if grid.range_ends else state
        linear.weight.data = parts.values(state.codes, state.affine)[0].float()
        weights[f"{name}.weight"] = LearnedRounding(state.codes[0], state.affine, wanted, grid)
    chain = nn.Module()
    chain.blocks = nn.ModuleList([block])
    return Learned(chain, weights, others)


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


@pytest.fixture
def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 5, 3, generator=generator) for _ in range(16)]


@pytest.fixture
def objective(model: Model, batches: list[Tensor]) -> Objective:
    """The first block, towards its float outputs."""
    block = model.layers[0]
    calls = capture_inputs(model, block, batches)
    targets = block_outputs(block, calls)
    return block_objective(BlockChain([block], [calls]), targets, [4] * 16, [None] * 16)


def block_of(objective: Objective) -> Block:
    block = objective.module.get_submodule("blocks.0")
    assert isinstance(block, Block)
    return block


@pytest.mark.parametrize(
    "grid",
    [
        SolverGrid(0, 3),
        INT2,
        SolverGrid(0, 3, granularity="group", group_size=4),
        SolverGrid(-1, 1, "none", "tensor", range_ends=((1, -1),)),
    ],
    ids=["free", "integer", "group", "symmetric tensor"],
)
def test_training_lowers_the_error_on_calls_that_it_never_saw(grid: SolverGrid, objective: Objective) -> None:
    weights = learned(block_of(objective), grid)
    before = objective.mean(HELD_OUT)
    assert objective.mean(HELD_OUT, weights) == pytest.approx(before, rel=1e-3)
    codes = [weight.solution()[0] for weight in weights.weights]
    report = train(weights, objective, TRAINED, HELD_OUT, TrainingOptions(steps=120))
    assert report.error_before == pytest.approx(before, rel=1e-3)
    assert report.error_after < 0.8 * before
    assert report.error_after == min(report.trace)
    assert objective.mean(HELD_OUT, weights) == pytest.approx(report.error_after, rel=1e-6)
    assert not all(torch.equal(one, weight.solution()[0]) for one, weight in zip(codes, weights.weights, strict=True))
    for weight in weights.weights:
        found, affine = weight.solution()
        assert ((found >= grid.quant_min) & (found <= grid.quant_max)).all()
        torch.testing.assert_close(found, found.round())
        torch.testing.assert_close(
            affine.values(found, weight.group_of_column).float(), weight().detach(), atol=1e-5, rtol=1e-4
        )
        if grid.zero == "integer":
            torch.testing.assert_close(affine.zero / affine.scale, (affine.zero / affine.scale).round())


def test_training_learns_codes_where_scales_are_not_enough(objective: Objective) -> None:
    fixed = learned(block_of(objective), INT2)
    codes = [weight.solution()[0] for weight in fixed.weights]
    report = train(fixed, objective, TRAINED, HELD_OUT, TrainingOptions(steps=120, trains_codes=False))
    assert all(torch.equal(one, weight.solution()[0]) for one, weight in zip(codes, fixed.weights, strict=True))
    free = train(learned(block_of(objective), INT2), objective, TRAINED, HELD_OUT, TrainingOptions(steps=120))
    assert free.error_after < 0.9 * report.error_after


def test_training_never_ends_worse_on_held_out_calls(objective: Objective) -> None:
    """Towards other outputs than those of the calls held out, every step makes these worse."""
    weights = learned(block_of(objective), INT2)
    before = objective.mean(HELD_OUT, weights)
    state = {name: value.clone() for name, value in weights.state_dict().items()}

    def error(place: int, output: Tensor) -> Tensor:
        return objective.error(place, output) if place in HELD_OUT else (output - 3).square().mean()

    misled = Objective(objective.module, objective.calls, objective.rows, error)
    report = train(weights, misled, TRAINED, HELD_OUT, TrainingOptions(steps=60, code_rate=0.1))
    assert min(report.trace) > before
    assert report.error_after == report.error_before == before
    assert all(torch.equal(value, state[name]) for name, value in weights.state_dict().items())


def test_training_ends_with_the_best_state_and_not_the_last(objective: Objective) -> None:
    weights = learned(block_of(objective), INT2)
    errors = iter([1.0, 0.8, 0.6, 0.9, 0.7, *[0.95] * 40])
    states: list[Tensor] = []

    class Scripted(Objective):
        def mean(self, places: object, learned: Learned | None = None) -> float:
            assert learned is not None
            states.append(learned.weights[0].latent.detach().clone())
            return next(errors)

    scripted = Scripted(objective.module, objective.calls, objective.rows, objective.error)
    report = train(weights, scripted, TRAINED, HELD_OUT, TrainingOptions(steps=20))
    assert report.error_after == 0.6
    assert torch.equal(weights.weights[0].latent, states[2])
    assert not torch.equal(states[-1], states[2])


def test_an_error_that_is_no_number_is_never_the_best(objective: Objective) -> None:
    weights = learned(block_of(objective), INT2)
    broken = Objective(objective.module, objective.calls, objective.rows, lambda place, out: out.mean() * torch.nan)
    assert broken.mean(HELD_OUT, weights) == float("inf")
    report = train(weights, broken, TRAINED, HELD_OUT, TrainingOptions(steps=3))
    assert report.error_after == report.error_before


def test_every_group_keeps_the_ends_of_its_range(objective: Objective) -> None:
    """Rates so high that codes go anywhere: a backend must still find the range."""
    grid = SolverGrid(0, 3, "integer", "group", 4, ((0,), (3,)))
    weights = learned(block_of(objective), grid)
    for weight in weights.weights:
        for latents in (torch.full_like(weight.latent, 1.2), torch.randn_like(weight.latent) * 4):
            weight.latent.data = latents
            codes, affine = weight.solution()
            points = torch.round(-affine.zero / affine.scale)
            grouped = codes.reshape(len(codes), -1, 4)
            for end in (0, 3):
                holds = (grouped == end).any(dim=2) | (points == end) & (end == 0)
                assert (holds | (grouped == points[:, :, None]).all(dim=2) | (points == end)).all()
            moved = (codes - torch.round(latents).clamp(0, 3)).ne(0).reshape(grouped.shape).sum(dim=2)
            assert (moved <= 2).all()


def test_a_tensor_that_shares_one_scale_keeps_its_ends() -> None:
    grid = SolverGrid(-1, 1, "none", "tensor", range_ends=((1, -1),))
    parts = Parts(problem_of(torch.randn(5, 4), torch.eye(4), 0.0), grid, 1, SolveOptions())
    weight = LearnedRounding(torch.ones(5, 4), parts.first(1.0), torch.ones(5, 4), grid)
    weight.latent.data = torch.full((5, 4), 0.3)
    weight.latent.data[3, 2] = -0.4
    codes = weight.solution()[0]
    assert codes.abs().sum() == 0  # all zeros is a range of its own
    weight.latent.data[0, 0] = 0.49
    weight.point.data.zero_()
    grid = SolverGrid(0, 3, "integer", "tensor", range_ends=((0,), (3,)))
    weight = LearnedRounding(torch.ones(5, 4), parts.first(1.0), torch.ones(5, 4), grid)
    weight.point.data.fill_(2)
    weight.latent.data = torch.full((5, 4), 1.2)
    weight.latent.data[3, 2], weight.latent.data[1, 1] = 0.8, 1.4
    codes = weight.solution()[0]
    assert (codes == 0).nonzero().tolist() == [[3, 2]]
    assert (codes == 3).nonzero().tolist() == [[1, 1]]


def test_only_what_is_asked_for_is_trained(objective: Objective) -> None:
    block = block_of(objective)
    assert set(other_parameters(block, ["up", "down"], norms=True, biases=True)) == {
        "up.bias",
        "down.bias",
        "norm.weight",
        "norm.bias",
    }
    assert not list(other_parameters(block, ["up", "down"], norms=False, biases=False))
    weights = learned(block, INT2, ("blocks.0.norm.weight",))
    before = {name: value.clone() for name, value in block.state_dict().items()}
    train(weights, objective, TRAINED, HELD_OUT, TrainingOptions(steps=40))
    assert not torch.equal(weights.others[0], before["norm.weight"])
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())


def test_masked_positions_do_not_count(model: Model, batches: list[Tensor]) -> None:
    block = model.layers[0]
    calls = capture_inputs(model, block, batches)
    targets = block_outputs(block, calls)
    masks = [torch.tensor([[1, 1, 1, 0, 0]] * 4)] * 16
    wrong = [target.clone() for target in targets]
    for target in wrong:
        target[:, 3:] = 1e6
    chain = BlockChain([block], [calls])
    assert block_objective(chain, wrong, [4] * 16, masks).mean(HELD_OUT) == 0.0
    assert block_objective(chain, wrong, [4] * 16, [None] * 16).mean(HELD_OUT) > 0.1


def test_deterministic(objective: Objective) -> None:
    found = []
    state = {name: value.clone() for name, value in block_of(objective).state_dict().items()}
    for seed in (0, 0, 1):
        block_of(objective).load_state_dict(state)
        weights = learned(block_of(objective), INT2)
        train(weights, objective, TRAINED, HELD_OUT, TrainingOptions(steps=20, seed=seed))
        found.append(weights.weights[0].latent.detach())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_an_exception_leaves_the_block_as_it_was(objective: Objective) -> None:
    block = block_of(objective)
    weights = learned(block, INT2, ("blocks.0.norm.weight",))
    block.train()
    block.up.bias.requires_grad_(False)
    before = {name: value.clone() for name, value in block.state_dict().items()}
    calls = 0

    def interrupt(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls > 8:
            raise KeyboardInterrupt

    handle = block.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(weights, objective, TRAINED, HELD_OUT, TrainingOptions(steps=20))
    handle.remove()
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())
    assert block.training
    assert block.drop.training
    assert block.down.weight.requires_grad
    assert not block.up.bias.requires_grad
    assert all(parameter.grad is None for parameter in block.parameters())


def test_blocks_in_a_chain_give_what_the_model_gives(model: Model, batches: list[Tensor]) -> None:
    blocks = list(model.layers)
    calls = [capture_inputs(model, block, batches) for block in blocks]
    assert follows(blocks[0], calls[0], calls[1])
    assert not follows(blocks[1], calls[1], calls[0])
    chain = BlockChain(blocks, calls)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(chain.eval()(3), model(batches[3]))


@pytest.mark.parametrize("between", [lambda x: x + 1, lambda x: x[:, :1]], ids=["other values", "another shape"])
def test_blocks_with_something_between_them_are_no_chain(
    between: Callable[[Tensor], Tensor], model: Model, batches: list[Tensor]
) -> None:
    calls = capture_inputs(model, model.layers[0], batches)
    after = [((between(output),), {}) for output in block_outputs(model.layers[0], calls)]
    assert not follows(model.layers[0], calls, after)


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


def test_errors() -> None:
    with pytest.raises(ConfigError, match="steps=-1"):
        TrainingOptions(steps=-1)
    with pytest.raises(ConfigError, match="code_rate=-1"):
        TrainingOptions(code_rate=-1)
