"""Targets that make up for what the layers before have lost."""

from __future__ import annotations

import copy
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import nn

from splitquant_plugins import DecoupleQPass, UniformGrid, manifest_of
from splitquant_plugins.decoupleq.asymmetric_calibration import (
    FloatInputs,
    PairedMoments,
    asymmetric_target,
    iter_paired_moments,
)
from splitquant_plugins.decoupleq.capture import BlockInputs
from splitquant_plugins.decoupleq.layer_order import stages_of
from splitquant_plugins.errors import InputError
from splitquant_plugins.passes.calibration import SecondMoment

GRID = UniformGrid(2, "affine", "channel")


class Attention(nn.Module):
    """Three layers with one input, and one behind them."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x, attention_mask=None):
        return x + self.out(torch.tanh(self.query(x)) * self.key(x) + self.value(x))


class Routed(nn.Module):
    """Sends rows to its layer by their values."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.expert = nn.Linear(4, 4)

    def forward(self, x):
        x = self.first(x)
        return self.expert(x[x[:, 0] > 0])


class InPlace(nn.Module):
    """Changes its input, as residual connections may."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        x += self.first(x)
        x += self.second(x)
        return x


def stack(depth: int = 4, width: int = 8) -> nn.Module:
    return nn.Sequential(*[Attention(width) for _ in range(depth)]).eval()


@contextmanager
def with_weight(layer: nn.Linear, weight: torch.Tensor):
    before = layer.weight
    layer.weight = nn.Parameter(weight)
    yield
    layer.weight = before


def moments(model, batches, layers, changed: nn.Linear, weight: torch.Tensor, max_bytes: int = 2**20):
    """Moments with `changed` as it is now, against those with `weight` in its place."""
    now = BlockInputs.captured(model, model, batches)
    before = FloatInputs(model, now.calls, lambda: with_weight(changed, weight), layers, max_bytes)
    return dict(iter_paired_moments(now, before, layers, max_bytes))


def test_layers_with_the_same_input_make_a_group():
    model = stack(2)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    stages = stages_of(model, [torch.randn(2, 3, 8)], layers, sequential=True)
    assert [stage.groups for stage in stages] == [
        ((f"{number}.query", f"{number}.key", f"{number}.value"), (f"{number}.out",)) for number in (0, 1)
    ]


def test_the_whole_way_leads_to_the_least_squares_target():
    weight = torch.randn(5, 6)
    wanted, found = torch.randn(200, 6).double(), torch.randn(200, 6).double()
    found = wanted + 0.3 * found
    moment, cross = (found.T @ found / 200)[None], (wanted.T @ found / 200)[None]
    pair = PairedMoments(SecondMoment(moment, 200), cross)
    target = asymmetric_target(weight, pair, 1.0, 0.0)
    expected = torch.linalg.lstsq(found, wanted @ weight.double().T).solution.T
    torch.testing.assert_close(target.double(), expected, rtol=1e-4, atol=1e-5)
    halfway = asymmetric_target(weight, pair, 0.5, 0.0)
    torch.testing.assert_close(halfway, (weight + target) / 2, rtol=1e-4, atol=1e-5)


def test_grouped_convolutions_have_a_target_per_group():
    weight = torch.randn(4, 3, 2, 1)
    moment = torch.stack([torch.eye(6), 2 * torch.eye(6)]).double()
    cross = torch.stack([torch.eye(6), torch.eye(6)]).double()
    target = asymmetric_target(weight, PairedMoments(SecondMoment(moment, 9), cross), 1.0, 0.0)
    assert target.shape == weight.shape
    torch.testing.assert_close(target[:2], weight[:2])
    torch.testing.assert_close(target[2:], weight[2:] / 2)


@pytest.mark.parametrize("max_bytes", [2**20, 1])
def test_moments_of_two_models(max_bytes):
    model = stack(1)[0]
    x = torch.randn(3, 4, 8)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    other = model.value.weight + 0.1
    layers = {"out": model.out, "query": model.query}
    found = moments(model, [{"x": x, "attention_mask": mask}], layers, model.value, other, max_bytes)
    used = mask.bool()
    with torch.no_grad():
        now = (torch.tanh(model.query(x)) * model.key(x) + model.value(x))[used].double()
        before = now + ((x @ (other - model.value.weight).T)[used]).double()
    moment, cross = found["out"].moment, found["out"].cross
    assert moment.samples == int(mask.sum())
    torch.testing.assert_close(moment.matrix[0], now.T @ now / len(now), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(cross[0], before.T @ now / len(now), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["query"].moment.matrix, found["query"].cross)
    assert found["query"].missing is None


def test_layers_that_are_called_otherwise_have_no_pairs():
    model = Routed().eval()
    found = moments(model, [torch.randn(40, 4)], {"expert": model.expert}, model.first, -model.first.weight.detach())
    assert found["expert"].moment.samples
    assert found["expert"].cross is None


class Normed(Attention):
    """What its last layer gives does not come out as it is."""

    def forward(self, x, attention_mask=None):
        return nn.functional.layer_norm(super().forward(x), x.shape[-1:])


class Doubled(Attention):
    """What its last layer gives comes out twice."""

    def forward(self, x, attention_mask=None):
        hidden = self.out(self.value(x))
        return (x + hidden + hidden, None)


@pytest.mark.parametrize(
    ("kind", "added"), [(Attention, {"out"}), (Normed, set()), (Doubled, set()), (InPlace, {"second"})]
)
def test_layers_whose_outputs_are_added_to_the_blocks_are_found(kind, added):
    block, x = kind().eval(), torch.randn(5, 3, 8)
    layers = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    inputs = BlockInputs.captured(block, block, [x])
    assert FloatInputs(block, inputs.calls, nullcontext, layers, 2**20).added == added


@pytest.mark.parametrize("max_bytes", [2**20, 1])
def test_the_last_layer_makes_up_for_what_goes_past_it(max_bytes):
    block, x = Attention().eval(), torch.randn(50, 4, 8)
    mask = torch.ones(50, 4, dtype=torch.long)
    mask[:20, 2:] = 0
    now = BlockInputs.captured(block, block, [{"x": x + 0.1 * torch.tanh(3 * x), "attention_mask": mask}])
    before = BlockInputs.captured(block, block, [{"x": x, "attention_mask": mask}])
    floats = FloatInputs(block, before.calls, nullcontext, {"out": block.out}, max_bytes)
    ((_, pair),) = iter_paired_moments(now, floats, {"out": block.out}, max_bytes)
    target = asymmetric_target(block.out.weight, pair, 1.0, 0.0)
    used = mask.bool()
    with torch.no_grad():
        changed = now.calls[0][1]["x"]
        hidden = (torch.tanh(block.query(changed)) * block.key(changed) + block.value(changed))[used].double()
        wanted = (block(x) - changed - block.out.bias)[used].double()
    expected = torch.linalg.lstsq(hidden, wanted).solution.T
    torch.testing.assert_close(target.double(), expected, rtol=1e-3, atol=1e-4)


def test_it_brings_the_outputs_nearer():
    nearer = 0
    for seed in range(4):
        torch.manual_seed(seed)
        model = stack()
        batches = [torch.randn(8, 16, 8) for _ in range(4)]
        unseen = torch.randn(64, 16, 8)
        errors = []
        for part in (0.0, 0.5):
            twin = copy.deepcopy(model)
            options = {"rounds": 1, "starts": (1.0,), "search_inputs": 0}
            DecoupleQPass(calibration=batches, asymmetric_calibration=part, **options).apply(twin, grid=GRID)
            with torch.no_grad():
                errors.append(float((twin(unseen) - model(unseen)).square().mean()))
        nearer += errors[1] < errors[0]
    assert nearer >= 3


def test_blocks_that_change_their_input_see_it_unchanged():
    block, x = InPlace().eval(), torch.randn(40, 8)
    given = x.clone()
    stages = stages_of(nn.Sequential(block, InPlace()), [x.clone()], {"0.first": block.first}, sequential=True)
    assert stages[0].groups == (("0.first",),)
    layers = {"first": block.first, "second": block.second}
    assert stages_of(block, [x.clone()], layers, sequential=True)[0].groups == (("first",), ("second",))
    inputs = BlockInputs.captured(block, block, [x])
    layers = {"first": block.first}
    for _ in range(2):
        before = FloatInputs(block, inputs.calls, nullcontext, layers, 2**20)
        ((_, found),) = iter_paired_moments(inputs, before, layers, 2**20)
        torch.testing.assert_close(found.moment.matrix[0], (given.T @ given / 40).double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("max_bytes", "float_runs"), [(2**20, 1), (64, 3)])
def test_the_float_model_runs_once_where_its_inputs_fit_and_nothing_runs_behind_the_layers(max_bytes, float_runs):
    model, x = stack(1), torch.randn(2, 3, 8)
    block = model[0]
    layers = {"query": block.query, "out": block.out}
    now = BlockInputs.captured(model, block, [x])
    runs, calls = [], []
    block.value.register_forward_hook(lambda *_: calls.append("value"))
    before = FloatInputs(block, now.calls, lambda: nullcontext(runs.append(1)), layers, max_bytes)
    runs.clear()  # it was run to see which layers' outputs are added
    calls.clear()
    (_, query), *_ = iter_paired_moments(now, before, {"query": block.query}, 2**20)
    assert len(runs) == len(calls) == 1  # the layer is reached before value is
    for _ in range(2):
        ((_, out),) = iter_paired_moments(now, before, {"out": block.out}, 2**20)
    assert len(runs) == float_runs
    torch.testing.assert_close(query.moment.matrix[0], (x.reshape(-1, 8).T @ x.reshape(-1, 8) / 6).double())
    torch.testing.assert_close(out.moment.matrix, out.cross)  # the values are the same
    assert not out.missing.any()


class Failing(Attention):
    """Gives its last layer infinity."""

    def forward(self, x):
        return x + self.out(self.value(x) / 0.0)


def test_an_error_in_a_later_block_puts_the_weights_back():
    model = nn.Sequential(Attention(), Failing()).eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=r"1\.out: its calibration inputs contain NaN or infinity"):
        DecoupleQPass(calibration=[torch.randn(2, 3, 8)], rounds=1, starts=(1.0,)).apply(model, grid=GRID)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Parallel(nn.Module):
    """Two layers of one input, both added to it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.one(x) + self.two(x)


def test_layers_solved_at_once_share_what_is_to_be_made_up_for():
    block, x = Parallel().eval(), torch.randn(60, 8)
    layers = {"one": block.one, "two": block.two}
    now = BlockInputs.captured(block, block, [x + 0.1 * torch.randn(60, 8)])
    before = FloatInputs(block, BlockInputs.captured(block, block, [x]).calls, nullcontext, layers, 2**20)
    for name, pair in iter_paired_moments(now, before, layers, 2**20):
        with torch.no_grad():
            layers[name].weight.copy_(asymmetric_target(layers[name].weight, pair, 1.0, 0.0))
    given = now.calls[0][0][0]
    with torch.no_grad():
        left = (before.of(0)[1] - block(given)).double()
    expected = torch.linalg.lstsq(given.double(), left).solution
    assert expected.abs().max() < 1e-4  # nothing is left that the inputs explain


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["GPTJ", "Bloom", "Mamba"])
def test_language_models_that_keep_their_cache_under_other_names(kind):
    transformers = pytest.importorskip("transformers")
    sizes = {
        "GPTJ": {"n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4, "n_positions": 16},
        "Bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2},
        "Mamba": {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
    }[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(vocab_size=32, **sizes)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    found = []
    for use_cache in (True, False):
        twin = copy.deepcopy(model)
        twin.config.use_cache = use_cache
        batches = [{"input_ids": torch.arange(24).reshape(2, 12)}]
        DecoupleQPass(calibration=batches, rounds=1, starts=(1.0,), exclude="lm_head").apply(twin, grid=GRID)
        assert twin.config.use_cache is use_cache
        found.append(twin.state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, {"asymmetric_calibration": 0.0}, {"tune_blocks": True, "epochs": 1}])
def test_a_language_model_that_keeps_a_cache(options):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    assert config.use_cache
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(32, (3, 12))
    mask = torch.ones_like(ids)
    mask[0, 8:] = 0
    batches = [{"input_ids": ids, "attention_mask": mask}] * 2
    DecoupleQPass(calibration=batches, rounds=1, starts=(1.0,), exclude="lm_head", **options).apply(model, grid=GRID)
    assert len(manifest_of(model).solved) == 14
