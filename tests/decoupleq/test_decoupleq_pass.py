"""DecoupleQPass: what it does to a model, and what it refuses."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
from torch import nn

import splitquant_plugins.decoupleq.layer_stage as module
from splitquant_plugins import DecoupleQPass, Manifest, SplitQuantPass, UniformGrid, manifest_of
from splitquant_plugins.errors import AlreadySplitError, ConfigError, InputError, SplitQuantWarning
from splitquant_plugins.passes.rebuild import apply_manifest

FAST = {"rounds": 1, "starts": (1.0,), "sweeps": 1}
GRID = UniformGrid(2, "affine", "channel")


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # small matrices: a second thread only waits
    yield
    torch.set_num_threads(before)


class Block(nn.Module):
    def __init__(self, width=12):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    """Three blocks between two layers, and one layer that is never called."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 12)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(12, 4)
        self.idle = nn.Linear(3, 3)

    def forward(self, x, labels=None):
        if labels is not None:
            raise AssertionError("labels were used")
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(40, 6, generator=generator), "labels": torch.zeros(40)} for _ in range(4)]


def rounded(model, grid=GRID):
    """The model as a backend that rounds plainly leaves it."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.weight.copy_(grid.quantize_dequantize(module.weight))
    return model


@torch.no_grad()
def error(model, reference, batches):
    return float(sum((model(b["x"]) - reference(b["x"])).square().mean() for b in batches))


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_plain_rounding_of_the_result_is_much_better(net, batches, plugins):
    reference = copy.deepcopy(net)
    plain = error(rounded(net), reference, batches)
    solved = DecoupleQPass(calibration=batches, plugins=plugins, **FAST).apply(net, grid=GRID)
    assert solved is net
    assert error(rounded(net), reference, batches) < 0.4 * plain
    # On this grid the float weights are the rounded ones.
    assert same(weights(rounded(net)), {**weights(net), "idle.weight": rounded(net).idle.weight})
    manifest = manifest_of(net)
    records = {record.name: record.values for record in manifest.layers if record.values}
    assert len(manifest.solved) == 8
    solved_records = [record.values for record in manifest.solved]
    assert all(r.error_after < r.error_before and r.samples == 160 for r in solved_records)
    assert "never reach" in records["idle"].reason
    assert torch.equal(net.idle.weight, reference.idle.weight)
    assert not manifest.split


def test_without_a_recipe_the_grid_is_that_of_the_options(net, batches, plugins):
    DecoupleQPass(calibration=batches, bits=3, group_size=4, scheme="symmetric", plugins=plugins, **FAST)(net)
    grid = UniformGrid(3, "symmetric", "group", 4)
    assert manifest_of(net).solved[0].values.grid == repr(grid)
    assert torch.allclose(grid.quantize_dequantize(net.head.weight), net.head.weight, atol=1e-6)


def test_later_blocks_are_solved_on_the_inputs_that_solved_blocks_make(net, batches, plugins):
    """Sequentially the error of the model's outputs is lower."""
    reference = copy.deepcopy(net)
    other = copy.deepcopy(net)
    DecoupleQPass(calibration=batches, plugins=plugins, **FAST).apply(net, grid=GRID)
    DecoupleQPass(calibration=batches, sequential=False, plugins=plugins, **FAST).apply(other, grid=GRID)
    assert torch.equal(net.first.weight, other.first.weight)
    assert error(rounded(net), reference, batches) < error(rounded(other), reference, batches)


def test_deterministic_and_labels_do_not_matter(net, batches, plugins):
    twin = copy.deepcopy(net)
    solver = DecoupleQPass(calibration=batches, plugins=plugins, **FAST)
    solver.apply(net, grid=GRID)
    unlabelled = [{"x": batch["x"]} for batch in batches]
    DecoupleQPass(calibration=lambda: iter(unlabelled), plugins=plugins, **FAST).apply(twin, grid=GRID)
    assert same(weights(net), weights(twin))


def test_blocks_are_tuned(net, batches, plugins):
    reference, plain = copy.deepcopy(net), copy.deepcopy(net)
    DecoupleQPass(calibration=batches, plugins=plugins, **FAST).apply(plain, grid=GRID)
    options = {"tune_blocks": True, "epochs": 3, "tune_biases": True}
    DecoupleQPass(calibration=batches, plugins=plugins, **FAST, **options).apply(net, grid=GRID)
    changed = [
        not torch.equal(one.norm.weight, two.norm.weight) for one, two in zip(net.blocks, reference.blocks, strict=True)
    ]
    assert any(changed)
    assert not same(weights(net), weights(plain))
    numbers = [re.findall(r"([\d.e-]+) before, ([\d.e-]+) after", note) for note in manifest_of(net).notes]
    assert len(numbers) >= 2  # layers with a row that keeps plain rounding are left out
    assert all(float(after) <= float(before) for ((before, after),) in numbers)
    assert any(float(after) < 0.97 * float(before) for ((before, after),) in numbers)
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    for layer in net.blocks.modules():
        if isinstance(layer, nn.Linear):
            assert torch.allclose(GRID.quantize_dequantize(layer.weight), layer.weight, atol=1e-6)


def test_blocks_that_are_layers_are_tuned(plugins):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    inputs = [torch.randn(8, 8) for _ in range(4)]
    options = {"tune_blocks": True, "block_steps": 4, **FAST}
    DecoupleQPass(calibration=inputs, plugins=plugins, **options).apply(net, grid=GRID)
    assert [record.name for record in manifest_of(net).solved] == ["0", "2"]
    assert all(record.values.trainings for record in manifest_of(net).solved)


def test_after_a_split_the_parts_are_solved_together(net, batches, plugins):
    grid = UniformGrid(2, "symmetric", "tensor")
    reference, whole, only_split = (copy.deepcopy(net) for _ in range(3))
    solver = DecoupleQPass(calibration=batches, plugins=plugins, **FAST)
    split = SplitQuantPass(k=2, plugins=plugins)
    solver.apply(whole, grid=grid)
    split.apply(only_split, grid=grid)
    (split + solver).apply(net, grid=grid)
    assert error(rounded(net, grid), reference, batches) < 0.3 * error(rounded(whole, grid), reference, batches)
    assert error(rounded(net, grid), reference, batches) < 0.3 * error(rounded(only_split, grid), reference, batches)
    manifest = manifest_of(net)
    assert len(manifest.split) == 9
    assert all(record.values.joint for record in manifest.solved)
    assert any("no longer sum" in note for note in manifest.notes)
    # The skeleton of such a model is that of the split.
    rebuilt = apply_manifest(Net(), Manifest.model_validate_json(manifest.model_dump_json()), plugins)
    rebuilt.load_state_dict(net.state_dict())
    assert torch.equal(rebuilt(batches[0]["x"]), net(batches[0]["x"]))


def test_the_manifest_of_a_model_that_was_not_split(net, batches, plugins, tmp_path):
    DecoupleQPass(calibration=batches, plugins=plugins, **FAST).apply(net, grid=GRID)
    manifest = manifest_of(net)
    manifest.save(tmp_path)
    assert Manifest.load(tmp_path) == manifest
    assert manifest.values["rounds"] == 1
    loaded = apply_manifest(Net(), Manifest.load(tmp_path), plugins)
    assert type(loaded.head) is nn.Linear


def test_convolutions_tied_layers_and_exclusions(plugins):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.Flatten(),
        nn.Linear(8 * 16, 8),
        nn.Linear(8, 8),
        nn.Linear(8, 8),
    ).eval()
    model[6].weight = model[5].weight
    batches = [torch.randn(30, 3, 6, 6)]
    before = model[4].weight.detach().clone()
    DecoupleQPass(calibration=batches, exclude="4", plugins=plugins, **FAST).apply(model, grid=GRID, ignore=["0"])
    records = {record.name: record.values for record in manifest_of(model).layers}
    assert model[6].weight is model[5].weight
    assert torch.equal(model[4].weight, before)
    assert {name for name, record in records.items() if record.action == "solved"} == {"2", "5", "6"}
    assert "exclude" in records["4"].reason
    assert "recipe" in records["0"].reason
    assert records["2"].error_after < records["2"].error_before


def test_transformers_conv1d(plugins):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = nn.Sequential(transformers.pytorch_utils.Conv1D(10, 6), nn.ReLU(), nn.Linear(10, 3))
    reference = copy.deepcopy(model)
    batches = [torch.randn(64, 6)]
    options = {"tune_blocks": True, "epochs": 1}
    DecoupleQPass(calibration=batches, plugins=plugins, **FAST, **options).apply(model, grid=GRID)
    weight = model[0].weight.detach()
    assert weight.shape == reference[0].weight.shape
    assert torch.allclose(GRID.quantize_dequantize(weight.t()).t(), weight, atol=1e-6)
    assert not torch.allclose(weight, reference[0].weight)


@pytest.mark.parametrize("tune", [False, True])
def test_a_run_that_was_killed_goes_on(net, batches, plugins, tmp_path, tune, monkeypatch):
    options = {**FAST, "plugins": plugins, "resume_dir": tmp_path, "tune_blocks": tune, "block_steps": 10}
    straight = copy.deepcopy(net)
    DecoupleQPass(calibration=batches, **{**options, "resume_dir": None}).apply(straight, grid=GRID)
    before = weights(net)
    killed = copy.deepcopy(net)

    real, names = module.solve_weight, []

    def counted(*args, **kwargs):
        names.append(kwargs["name"])
        if len(names) == 6:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "solve_weight", counted)
    with pytest.raises(KeyboardInterrupt):
        DecoupleQPass(calibration=batches, **options).apply(killed, grid=GRID)
    assert same(weights(killed), before), "the model was not put back"
    assert names[-1] == "blocks.2.up"
    names.clear()
    names.extend(["done"] * 6)
    DecoupleQPass(calibration=batches, **options).apply(killed, grid=GRID)
    assert names[6:] == ["blocks.2.up", "blocks.2.down", "head"]
    assert same(weights(killed), weights(straight))
    assert [r.values.error_after for r in manifest_of(killed).solved] == [
        r.values.error_after for r in manifest_of(straight).solved
    ]
    with pytest.raises(InputError, match="other options, weights or calibration"):
        DecoupleQPass(calibration=batches[1:], **options).apply(copy.deepcopy(net), grid=GRID)


def changed_eps(net):
    net.blocks[0].norm.eps = 1e-2


def changed_tuple(net):
    net.first.padding = (1, 2)


def changed_function(net):
    net.first.activation = torch.relu


def changed_buffer(net):
    net.register_buffer("table", torch.ones(2), persistent=False)


@pytest.mark.parametrize("change", [changed_eps, changed_tuple, changed_function, changed_buffer, None])
def test_what_another_model_or_memory_left_is_not_taken(net, batches, plugins, tmp_path, change):
    options = {**FAST, "plugins": plugins, "resume_dir": tmp_path}
    DecoupleQPass(calibration=batches, **options).apply(copy.deepcopy(net), grid=GRID)
    if change is None:
        options["calibration_bytes"] = 2**20
    else:
        change(net)
    with pytest.raises(InputError, match="other options, weights or calibration"):
        DecoupleQPass(calibration=batches, **options).apply(net, grid=GRID)


def test_what_a_tensor_is_passed_as_counts(plugins, tmp_path):
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x=None, y=None):
            return self.linear(x if y is None else 2 * y)

    net, x = Sum(), torch.randn(9, 4)
    options = {**FAST, "plugins": plugins, "resume_dir": tmp_path}
    DecoupleQPass(calibration=[{"x": x}], **options).apply(copy.deepcopy(net), grid=GRID)
    with pytest.raises(InputError, match="other options, weights or calibration"):
        DecoupleQPass(calibration=[{"y": x}], **options).apply(net, grid=GRID)


def test_a_finished_block_that_was_changed_is_not_taken(net, batches, plugins, tmp_path):
    options = {**FAST, "plugins": plugins, "resume_dir": tmp_path}
    DecoupleQPass(calibration=batches, **options).apply(copy.deepcopy(net), grid=GRID)
    path = tmp_path / "block_0001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"block_0001\.safetensors is not what was written"):
        DecoupleQPass(calibration=batches, **options).apply(net, grid=GRID)


def test_batches_of_nothing_but_padding_are_an_error(plugins):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x, attention_mask=None):
            return self.linear(x)

    net = Masked()
    before = weights(net)
    padding = [{"x": torch.randn(2, 3, 4), "attention_mask": torch.zeros(2, 3)}]
    with pytest.raises(InputError, match="masks leave any token"):
        DecoupleQPass(calibration=padding, plugins=plugins, **FAST).apply(net, grid=GRID)
    assert same(weights(net), before)


def test_too_little_damping_names_the_layer(plugins, monkeypatch):
    def solve(*args, **kwargs):
        raise torch.linalg.LinAlgError("not positive definite")

    monkeypatch.setattr(module, "solve_weight", solve)
    with pytest.raises(InputError, match=r"0: the second moment .* damping=0"):
        DecoupleQPass(calibration=[torch.zeros(1, 4)], damping=0, plugins=plugins)(nn.Sequential(nn.Linear(4, 4)))


def test_coverage_names_what_stays_float(batches, plugins, net):
    DecoupleQPass(calibration=batches, plugins=plugins, **FAST).apply(net, grid=GRID)
    found = manifest_of(net).coverage
    assert found.values == sum(parameter.numel() for parameter in net.parameters())
    assert found.split_share == 0
    assert found.quantized_share is None


def test_a_device_that_is_not_there_is_an_error(batches, plugins, net):
    for device in ("cuda:99", "nowhere", "meta"):
        with pytest.raises(ConfigError, match=f"device='{device}'"):
            DecoupleQPass(calibration=batches, plugins=plugins, device=device)
    here = DecoupleQPass(calibration=batches, plugins=plugins, device="cpu", **FAST)
    there = copy.deepcopy(net)
    here.apply(net, grid=GRID)
    DecoupleQPass(calibration=batches, plugins=plugins, **FAST).apply(there, grid=GRID)
    assert same(weights(net), weights(there))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_all_stages_run_on_another_device(batches, plugins, net):
    options = {**FAST, "tune_blocks": True, "tune_model": True, "block_steps": 4, "model_steps": 4}
    DecoupleQPass(calibration=batches, plugins=plugins, device="cuda", **options).apply(net, grid=GRID)
    assert {parameter.device.type for parameter in net.parameters()} == {"cpu"}
    assert all(record.values.action == "solved" for record in manifest_of(net).layers if record.values.samples)


def test_nan_in_the_calibration_names_the_layer_and_changes_nothing(net, batches, plugins):
    before = weights(net)
    bad = [*batches, {"x": torch.full((2, 6), torch.nan)}]
    with pytest.raises(InputError, match=r"first: .*NaN"):
        DecoupleQPass(calibration=bad, plugins=plugins, **FAST).apply(net, grid=GRID)
    assert same(weights(net), before)
    with pytest.raises(InputError, match="no calibration batches"):
        DecoupleQPass(calibration=[], plugins=plugins, **FAST).apply(net, grid=GRID)


def test_what_is_refused(net, batches, plugins):
    def solver(**options):
        return DecoupleQPass(calibration=batches, plugins=plugins, **options)

    with pytest.raises(ConfigError, match=r"no option 'bit'; it takes: .*bits, .*calibration.*resume_dir"):
        solver(bit=2)
    with pytest.raises(ConfigError, match="bits=9"):
        solver(bits=9)
    for option in ({"learning_rate": math.inf}, {"damping": math.inf}, {"starts": (1.0, math.nan)}):
        with pytest.raises(ConfigError, match=rf"option {next(iter(option))}.*finite"):
            solver(**option)
    with pytest.raises(ConfigError, match="group_size"):
        solver(granularity="group")
    with pytest.raises(ConfigError, match="needs calibration"):
        DecoupleQPass(plugins=plugins)
    with pytest.raises(ConfigError, match="one-shot iterator"):
        DecoupleQPass(calibration=iter(batches), plugins=plugins)
    with pytest.raises(ConfigError, match="values are chosen last"):
        solver() + SplitQuantPass(plugins=plugins)
    with pytest.raises(ConfigError, match=r"bits=4.*rounds to a grid with bits=2"):
        solver(bits=4).apply(net, grid=GRID)
    with pytest.raises(ConfigError, match="matches no module"):
        solver(exclude="nowhere").apply(net, grid=GRID)
    with pytest.raises(ConfigError, match="no layer to solve"):
        solver().apply(net, grid=lambda name: None)
    with pytest.raises(InputError, match="an exported graph has no layer modules"):
        solver()(torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2))))
    with pytest.raises(InputError, match=r"takes a torch\.nn\.Module"):
        solver()("model")
    solver(**FAST).apply(net, grid=GRID)
    with pytest.raises(AlreadySplitError, match="applied to this model before"):
        solver().apply(net, grid=GRID)
    with pytest.raises(AlreadySplitError, match=r"DecoupleQPass was applied.* SplitQuantPass goes first"):
        SplitQuantPass(plugins=plugins)(net)
    assert repr(solver(bits=2)) == "DecoupleQPass(bits=2)"


def test_a_resume_dir_that_is_a_file(net, batches, plugins, tmp_path):
    (tmp_path / "file").write_text("theirs")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match=r"resume_dir=.*file is not a folder"):
            DecoupleQPass(calibration=batches, plugins=plugins, resume_dir=path, **FAST).apply(net, grid=GRID)


def test_the_former_name_of_an_option_still_works_with_a_warning(net, batches, plugins):
    with pytest.warns(SplitQuantWarning, match="drift is called asymmetric_calibration"):
        former = DecoupleQPass(calibration=batches, drift=0.25, plugins=plugins)
    assert former.config == DecoupleQPass(calibration=batches, asymmetric_calibration=0.25, plugins=plugins).config
    with pytest.warns(SplitQuantWarning), pytest.raises(ConfigError, match="asymmetric_calibration=2"):
        DecoupleQPass(calibration=batches, drift=2, plugins=plugins)


def test_a_manifest_saved_with_the_former_option_loads(net, batches, plugins, tmp_path):
    DecoupleQPass(calibration=batches, plugins=plugins, **FAST).apply(net, grid=GRID)
    manifest = manifest_of(net)
    values = {("drift" if key == "asymmetric_calibration" else key): value for key, value in manifest.values.items()}
    assert "drift" in values
    manifest.model_copy(update={"values": values}).save(tmp_path)
    loaded = apply_manifest(Net(), Manifest.load(tmp_path), plugins)
    assert manifest_of(loaded).values["drift"] == 0.5


def test_statistics_within_a_limit_give_a_solution_too(net, batches, plugins):
    DecoupleQPass(calibration=batches, calibration_bytes=1, plugins=plugins, **FAST).apply(net, grid=GRID)
    assert len(manifest_of(net).solved) == 8


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("options", [{}, {"sequential": False}, {"tune_blocks": True, "epochs": 1}])
def test_a_batch_that_does_not_fit_is_named_and_the_model_is_put_back(net, number, options):
    before = {name: value.clone() for name, value in net.state_dict().items()}
    batches = [torch.randn(8, 6) for _ in range(3)]
    batches[number - 1] = torch.randn(8, 5)
    with pytest.raises(InputError, match=f"calibration batch {number}[: ]"):
        DecoupleQPass(calibration=batches, **FAST, **options).apply(net, grid=GRID)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_passes_in_a_row_print_as_they_are_written():
    first, second = SplitQuantPass(k=2), DecoupleQPass(calibration=[], bits=3)
    assert repr(first + second) == f"{first!r} + {second!r}"
    assert repr(first + second) == repr(SplitQuantPass(k=2) + DecoupleQPass(calibration=[], bits=3))
    assert repr(first + second) != repr(SplitQuantPass(k=4) + second)


def test_nested_batches_are_part_of_what_is_resumed(tmp_path):
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))

        def forward(self, pair, scale=1.0):
            return self.blocks(pair[0] * pair[1] * scale)

    torch.manual_seed(0)
    x, other = torch.randn(20, 6), torch.randn(20, 6)
    options = {"resume_dir": tmp_path / "blocks", "rounds": 1, "starts": (1.0,)}

    def solve(batch):
        torch.manual_seed(0)
        return DecoupleQPass(calibration=[batch], **options).apply(Nested().eval(), grid=UniformGrid(2))

    solve({"pair": (x, x)})
    solve({"pair": (x, x)})
    for batch in ({"pair": (x, other)}, {"pair": (x, x), "scale": 9.0}):
        with pytest.raises(InputError, match="other options, weights or calibration data"):
            solve(batch)
