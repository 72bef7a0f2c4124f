"""The pass as a whole: what it promises of every model, and what it leaves behind on an error."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from splitquant_plugins import SplitQuantPass, manifest_of
from splitquant_plugins.errors import (
    AlreadyQuantizedError,
    AlreadySplitError,
    ConfigError,
    InputError,
    PluginError,
    SplitFailedError,
)
from splitquant_plugins.grid import UniformGrid
from splitquant_plugins.modules import SplitConv2d, SplitLinear, part_names

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@given(
    out=st.integers(1, 9),
    inputs=st.integers(1, 9),
    k=st.integers(1, 5),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    distinct=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_parts_of_a_linear_sum_to_it_bit_for_bit(out, inputs, k, dtype, bias, distinct, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(inputs, out, bias=bias, dtype=dtype))
    with torch.no_grad():
        model[0].weight.copy_(torch.randint(distinct, (out, inputs)) / 7 - 1)
    before = copy.deepcopy(model[0].state_dict())
    model = SplitQuantPass(k=k)(model)
    (record,) = manifest_of(model).layers
    if record.action == "kept":
        assert type(model[0]) is nn.Linear
        assert before["weight"].unique().numel() == 1 or k == 1
        return
    assert 2 <= record.k <= k
    split = model[0]
    for role, original in before.items():
        parts = [getattr(split._modules[name], role) for name in record.parts]
        parts = [part for part in parts if part is not None]
        assert all(part.dtype == dtype and part.shape == original.shape for part in parts)
        assert torch.equal(torch.stack([p.detach() for p in parts]).sum(0), original)
        assert torch.equal(torch.stack([(p != 0).int() for p in parts]).sum(0).clamp(max=1), (original != 0).int())


def test_the_default_is_the_papers(models):
    model = SplitQuantPass()(models.mlp())
    split = model[0]
    assert isinstance(split, SplitLinear)
    assert [name for name, _ in split.named_children()] == ["lower", "middle", "upper"]
    assert all(type(part) is nn.Linear for part in split.children())
    low, mid, high = (part.weight[part.weight != 0] for part in split.children())
    assert low.max() < mid.min()
    assert mid.max() < high.min()
    low, mid, high = (part.bias[part.bias != 0] for part in split.children())
    assert low.max() < mid.min()
    assert mid.max() < high.min()
    manifest = manifest_of(model)
    assert manifest.config.splitter == "auto"
    assert {record.splitter for record in manifest.split} == {"kmeans"}
    assert [record.name for record in manifest.split] == ["0", "2", "4"]
    assert all(record.reason is None and record.k == 3 for record in manifest.split)


@pytest.mark.parametrize("k", [2, 3, 4, 5])
def test_the_split_model_computes_the_same(models, images, assert_same_function, k):
    for model, inputs in ((models.mlp(), torch.randn(7, 12)), (models.conv(), images)):
        reference = copy.deepcopy(model)
        model = SplitQuantPass(k=k)(model)
        assert {record.k for record in manifest_of(model).split} == {k}
        assert_same_function(model, reference, inputs)


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit", "resnet", "t5"])
def test_transformers_models_compute_the_same(models, images, tokens, assert_same_function, name):
    model = getattr(models, name)()
    reference = copy.deepcopy(model)
    model = SplitQuantPass()(model)
    assert manifest_of(model).split
    inputs = (images,) if name in ("vit", "resnet") else (tokens,)
    if name == "t5":
        with torch.no_grad():
            ours, theirs = (m(input_ids=tokens, decoder_input_ids=tokens).logits for m in (model, reference))
        assert float((ours - theirs).abs().max()) <= 1e-5
    else:
        assert_same_function(model, reference, *inputs)


CONVOLUTIONS = {
    "1d": (nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
    "1d grouped": (nn.Conv1d(4, 6, 3, groups=2, stride=2), (2, 4, 9)),
    "2d": (nn.Conv2d(4, 6, 3, bias=False), (2, 4, 9, 9)),
    "2d dilated": (nn.Conv2d(4, 6, 3, dilation=2, padding="same"), (2, 4, 9, 9)),
    "2d depthwise": (nn.Conv2d(4, 8, 3, groups=4, padding=1, padding_mode="circular"), (2, 4, 9, 9)),
    "2d oblong": (nn.Conv2d(4, 6, (1, 3), stride=(2, 1), padding=(0, 2)), (2, 4, 9, 9)),
    "3d": (nn.Conv3d(4, 6, 2, padding=1), (1, 4, 5, 5, 5)),
    "3d grouped dilated": (nn.Conv3d(4, 6, 2, groups=2, dilation=2), (1, 4, 5, 5, 5)),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions_of_every_kind(case, assert_same_function, sum_of_parts):
    conv, shape = CONVOLUTIONS[case]
    model = nn.Sequential(copy.deepcopy(conv))
    reference = copy.deepcopy(model)
    model = SplitQuantPass()(model)
    split = model[0]
    assert type(split).__name__ == f"Split{type(conv).__name__}"
    assert all(type(part) is type(conv) for part in split.children())
    for option in ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"):
        assert {getattr(module, option) for module in (*split.children(), split)} == {getattr(conv, option)}
    assert torch.equal(sum_of_parts(split), conv.weight)
    assert_same_function(model, reference, torch.randn(shape))


def test_a_convolution_is_clustered_per_output_channel(sum_of_parts):
    conv = nn.Conv2d(3, 2, 3, bias=False)
    with torch.no_grad():
        conv.weight[1] *= 1000  # would leave channel 0 in one cluster, were they clustered together
    per_channel = SplitQuantPass()(nn.Sequential(copy.deepcopy(conv)))[0]
    together = SplitQuantPass(granularity="tensor")(nn.Sequential(copy.deepcopy(conv)))[0]
    assert all(bool((part.weight[0] != 0).any()) for part in per_channel.parts())
    assert sum(bool((part.weight[0] != 0).any()) for part in together.parts()) == 1


def test_a_linear_is_clustered_as_a_whole_unless_told(models):
    assert manifest_of(SplitQuantPass()(models.mlp())).split[0].granularity == "tensor"
    assert manifest_of(SplitQuantPass(granularity="channel")(models.mlp())).split[0].granularity == "channel"


def test_hugging_face_conv1d(models, tokens, sum_of_parts):
    pytest.importorskip("transformers")
    model = models.gpt2()
    name = "transformer.h.0.mlp.c_fc"
    before = model.get_submodule(name)
    model = SplitQuantPass()(model)
    split = model.get_submodule(name)
    assert isinstance(split, SplitLinear)
    assert all(type(part) is nn.Linear for part in split.children())
    assert torch.equal(sum_of_parts(split).t(), before.weight)
    assert torch.equal(split.weight, before.weight)
    assert (split.nx, split.nf, split.in_features, split.out_features) == (before.nx, before.nf, before.nx, before.nf)


def test_a_zero_bias_stays_in_one_part(sum_of_parts):
    model = nn.Sequential(nn.Linear(5, 4))
    nn.init.zeros_(model[0].bias)
    model = SplitQuantPass()(model)
    assert len(manifest_of(model).split[0].bias_parts) == 1
    assert torch.equal(sum_of_parts(model[0], "bias"), torch.zeros(4))


def test_fewer_distinct_values_than_parts(sum_of_parts):
    model = nn.Sequential(nn.Linear(5, 4, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.randint(2, (4, 5)) * 2.0 - 1)
    before = model[0].weight.detach().clone()
    model = SplitQuantPass(k=5)(model)
    assert manifest_of(model).split[0].parts == ("lower", "upper")
    assert torch.equal(sum_of_parts(model[0]), before)


def test_a_constant_layer_is_kept_with_a_reason():
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    nn.init.constant_(model[0].weight, 0.5)
    model = SplitQuantPass()(model)
    (kept,) = manifest_of(model).kept
    assert kept.name == "0"
    assert kept.reason
    assert type(model[0]) is nn.Linear


def test_a_tie_at_a_boundary_goes_to_one_part(sum_of_parts):
    # 0 is as far from -1 as from 1: it belongs to one of the two clusters, never to both or neither.
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    weight = torch.tensor([-1.0, -1.0, 0.5, 1.0]).repeat(4, 1)
    weight[0, 0] = 0.0
    with torch.no_grad():
        model[0].weight.copy_(weight)
    model = SplitQuantPass(k=2)(model)
    assert torch.equal(sum_of_parts(model[0]), weight)
    held = sum((part.weight != 0).int() for part in model[0].children())
    assert torch.equal(held, (weight != 0).int())


def test_a_head_of_two_classes(models, assert_same_function, sum_of_parts):
    model = models.mlp()
    reference = copy.deepcopy(model)
    model = SplitQuantPass()(model)
    assert torch.equal(sum_of_parts(model[4]), reference[4].weight)
    assert torch.equal(sum_of_parts(model[4], "bias"), reference[4].bias)
    # Two biases make two clusters, so the third part has none.
    assert len(manifest_of(model).split[2].bias_parts) == 2
    assert_same_function(model, reference, torch.randn(3, 12))


def test_split_bias_off_leaves_the_bias_in_the_first_part():
    layer = nn.Linear(5, 4)
    model = SplitQuantPass(split_bias=False)(nn.Sequential(copy.deepcopy(layer)))
    assert torch.equal(model[0].lower.bias, layer.bias)
    assert model[0].middle.bias is None
    assert manifest_of(model).split[0].bias_parts == ("lower",)


def test_one_part_is_the_layer_itself(models):
    model = SplitQuantPass(k=1)(models.mlp())
    assert not manifest_of(model).split
    assert type(model[0]) is nn.Linear


def test_the_root_itself_may_be_a_layer(assert_same_function):
    layer = nn.Linear(5, 4)
    reference = copy.deepcopy(layer)
    split = SplitQuantPass()(layer)
    assert isinstance(split, SplitLinear)
    assert manifest_of(split).split[0].name == ""
    assert_same_function(split, reference, torch.randn(3, 5))
    with pytest.raises(AlreadySplitError):
        SplitQuantPass()(split)


def test_training_mode_and_requires_grad_are_kept():
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model = SplitQuantPass()(model)
    assert [model[0].training, model[1].training] == [True, False]
    for part in model[0].children():
        assert part.training
        assert not part.weight.requires_grad
        assert part.bias is None or part.bias.requires_grad
    for part in model[1].children():
        assert not part.training
        assert part.weight.requires_grad
    model(torch.randn(2, 5)).sum().backward()
    assert model[1].lower.weight.grad is not None


def test_the_same_options_give_the_same_parts(models):
    model = models.conv()
    one, other = (SplitQuantPass()(copy.deepcopy(model)) for _ in range(2))
    for (name, ours), (_, theirs) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(ours, theirs), name


def test_two_jobs_give_what_one_job_gives(models):
    model = models.conv()
    one, two = (SplitQuantPass(jobs=jobs)(copy.deepcopy(model)) for jobs in (1, 2))
    assert one.state_dict().keys() == two.state_dict().keys()
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, two.state_dict()[name]), name
    ours, theirs = ([r.model_dump(exclude={"seconds"}) for r in manifest_of(m).layers] for m in (one, two))
    assert ours == theirs


def test_a_progress_bar_writes_to_standard_error_only(models, capsys):
    SplitQuantPass(progress=True)(models.mlp())
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("role", ["weight", "bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_name_the_layer_and_leave_the_model_alone(models, role, value):
    model = models.mlp()
    with torch.no_grad():
        getattr(model[2], role).view(-1)[1] = value
    before = list(model.named_modules())
    with pytest.raises(SplitFailedError, match=rf"^2\.{role} has 1 NaN or infinite"):
        SplitQuantPass()(model)
    assert list(model.named_modules()) == before


def test_a_second_split_is_an_error(models):
    model = SplitQuantPass()(models.mlp())
    with pytest.raises(AlreadySplitError, match="split before"):
        SplitQuantPass()(model)
    with pytest.raises(AlreadySplitError, match="0 was split before"):
        SplitQuantPass()(nn.Sequential(*model))


def test_a_quantized_model_is_an_error(models):
    quanto = pytest.importorskip("optimum.quanto")
    model = models.mlp()
    quanto.quantize(model, weights=quanto.qint8)
    with pytest.raises(AlreadyQuantizedError, match="split first, then quantize"):
        SplitQuantPass()(model)
    quanto.freeze(model)
    with pytest.raises(AlreadyQuantizedError, match="0"):
        SplitQuantPass()(model)


def test_a_model_without_memory_is_an_error():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(5, 4))
    with pytest.raises(InputError, match=r"0\.weight is on the meta device"):
        SplitQuantPass()(model)


def test_an_exported_graph_is_an_error_with_a_hint(models):
    exported = torch.export.export(models.mlp(), (torch.randn(2, 12),))
    for graph in (exported, exported.module()):
        with pytest.raises(InputError, match=r"SplitQuantPass\(\) \+ quantizer"):
            SplitQuantPass()(graph)


@pytest.mark.parametrize("thing", [None, "bert", torch.zeros(3), {"a": 1}])
def test_only_modules_are_taken(thing):
    with pytest.raises(InputError, match=r"takes a torch\.nn\.Module"):
        SplitQuantPass()(thing)


def test_a_model_without_parameters_is_an_error():
    with pytest.raises(InputError, match="no parameters"):
        SplitQuantPass()(nn.Sequential(nn.ReLU()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_parts_stay_on_the_device(models, assert_same_function):
    model = models.mlp().cuda()
    reference = copy.deepcopy(model)
    model = SplitQuantPass()(model)
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    assert_same_function(model, reference, torch.randn(3, 12, device="cuda"))


def test_a_splitter_that_fails_midway_leaves_the_model_as_it_was(models, images, with_splitter, assert_same_function):
    def split(tensor, plan):
        if plan.layer == "head":
            raise RuntimeError("midway")
        return [tensor / 2, tensor / 2]

    model = models.conv()
    reference = copy.deepcopy(model)
    before = list(model.named_modules())
    state = {name: id(tensor) for name, tensor in model.named_parameters()}
    with pytest.raises(PluginError, match=r"head.weight: splitter 'test' .* RuntimeError: midway"):
        SplitQuantPass(plugins=with_splitter(split), splitter="test", activations=True)(model)
    assert list(model.named_modules()) == before
    assert {name: id(tensor) for name, tensor in model.named_parameters()} == state
    assert_same_function(model, reference, images, atol=0)
    assert manifest_of(SplitQuantPass()(model)).split  # nothing stands in the way of a second try


@pytest.mark.parametrize("role", ["weight", "bias"])
def test_parts_that_miss_the_tensor_leave_the_layer_whole(models, with_splitter, role):
    def split(tensor, plan):
        factor = 0.5 if (plan.role, plan.layer) == (role, "2") else 0.0
        return [tensor, factor * tensor]

    model = models.mlp()
    with pytest.warns(UserWarning, match=rf"2\.{role}: the parts miss the tensor by up to .*; the layer is left whole"):
        model = SplitQuantPass(plugins=with_splitter(split), splitter="test")(model)
    (kept,) = manifest_of(model).kept
    assert kept.name == "2"
    assert "failed the check" in kept.reason
    assert type(model[2]) is nn.Linear
    assert isinstance(model[0], SplitLinear)


@pytest.mark.parametrize(
    ("split", "problem"),
    [
        (lambda t, p: [], "0 parts"),
        (lambda t, p: [t, *[torch.zeros_like(t)] * 3], "4 parts of k = 3"),
        (lambda t, p: [t.double(), torch.zeros_like(t).double()], "float64"),
        (lambda t, p: [t.reshape(-1), torch.zeros(t.numel())], "a part is"),
    ],
)
def test_invalid_answers_of_a_splitter(split, problem, with_splitter):
    model = nn.Sequential(nn.Linear(5, 4, bias=False))
    with pytest.warns(UserWarning, match=problem):
        model = SplitQuantPass(plugins=with_splitter(split), splitter="test")(model)
    assert problem in manifest_of(model).kept[0].reason


def test_a_part_may_miss_by_rounding_but_no_more(with_splitter):
    def split(tensor, plan):
        big = torch.full_like(tensor, 3.0)
        return [big, tensor - big]

    model = nn.Sequential(nn.Linear(5, 4, bias=False))
    before = model[0].weight.detach().clone()
    model = SplitQuantPass(plugins=with_splitter(split), splitter="test")(model)
    assert isinstance(model[0], SplitLinear)
    assert not torch.equal(model[0].weight, before)
    assert torch.allclose(model[0].weight, before, atol=1e-6)


def test_a_splitter_that_needs_a_grid_says_so(plugins, models, with_splitter):
    class Needy:
        pass

    plugins = with_splitter(lambda t, p: [t])
    plugins.splitters["test"].factory.needs_grid = True
    one = SplitQuantPass(plugins=plugins, splitter="test")
    with pytest.raises(ConfigError, match=r"needs the grid .*SplitQuantPass\(\.\.\.\) \+ recipe"):
        one(models.mlp())
    one.apply(models.mlp(), grid=UniformGrid(4))


def test_the_grid_may_differ_by_layer(plugins, models):
    from splitquant_plugins import Splitter, hookimpl

    seen = {}

    class Watching(Splitter):
        def split(self, tensor, plan, grid):
            seen[plan.layer] = grid
            return [tensor, torch.zeros_like(tensor)]

    class Plugin:
        @hookimpl
        def splitquant_register_splitters(self, register):
            register("watching", Watching, "")

    plugins.add(Plugin(), "watching")
    rule = {"0": UniformGrid(2), "2": UniformGrid(4)}
    SplitQuantPass(plugins=plugins, splitter="watching").apply(models.mlp(), grid=rule.get)
    assert seen == {"0": UniformGrid(2), "2": UniformGrid(4), "4": None}


def test_what_the_recipe_leaves_is_left(models):
    model = SplitQuantPass().apply(models.mlp(), ignore=["2"])
    assert [(record.name, record.reason) for record in manifest_of(model).kept] == [
        ("2", "the recipe does not quantize it")
    ]


def test_hooks_are_told_of_layers_and_of_the_end(plugins, models):
    from splitquant_plugins import hookimpl

    class Listener:
        layers, models = [], []

        @hookimpl
        def splitquant_after_layer(self, record):
            self.layers.append((record.name, record.action))

        @hookimpl
        def splitquant_after_split(self, model, manifest):
            self.models.append((model, manifest))

    plugins.add(Listener(), "listener")
    model = SplitQuantPass(plugins=plugins, exclude="2")(models.mlp())
    assert sorted(Listener.layers) == [("0", "split"), ("2", "kept"), ("4", "split")]
    assert Listener.models == [(model, manifest_of(model))]


def test_two_passes_run_in_order(models):
    first = SplitQuantPass(include="0")
    both = first + SplitQuantPass(activations=True)
    assert both.splits_activations
    assert not (first + first).splits_activations
    with pytest.raises(AlreadySplitError):  # the second one meets what the first one made
        both(models.mlp())


def test_the_pass_prints_what_was_chosen():
    assert repr(SplitQuantPass(k=2, exclude="head")).startswith("SplitQuantPass(k=2, exclude=('head',)")


def test_no_warning_from_the_clustering():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SplitQuantPass()(nn.Sequential(nn.Conv2d(2, 3, 1), nn.Linear(1, 2)))


def test_part_names_are_unique_and_ordered():
    assert part_names(3) == ("lower", "middle", "upper")
    for k in range(2, 9):
        names = part_names(k)
        assert len(set(names)) == k
        assert (names[0], names[-1]) == ("lower", "upper")


def test_grouped_convolution_keeps_its_type():
    assert isinstance(SplitQuantPass()(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)))[0], SplitConv2d)


def test_each_step_is_taken_once(plugins, models, images, monkeypatch):
    """Prepare, select, split, build, check, record: no module is asked about twice, and no tensor split twice."""
    from splitquant_plugins import hookimpl
    from splitquant_plugins.passes import split_layer

    steps = []

    class Listener:
        @hookimpl
        def splitquant_prepare_model(self, model, config):
            steps.append("prepare")

        @hookimpl
        def splitquant_select_layer(self, name, module, config):
            steps.append(f"select {name}")

        @hookimpl
        def splitquant_split_tensor(self, tensor, plan, grid):
            steps.append(f"split {plan.layer}.{plan.role}")

        @hookimpl
        def splitquant_build_module(self, module, parts, plan):
            steps.append("build")

        @hookimpl
        def splitquant_after_layer(self, record):
            steps.append(f"record {record.name}")

    def check(where, *_):
        steps.append(f"check {where}")

    plugins.add(Listener(), "listener")
    monkeypatch.setattr(split_layer, "refuse_wrong_sum", check)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4, bias=False))
    SplitQuantPass(plugins=plugins, exclude="2")(model)
    assert steps == [
        "prepare",
        *("select ", "select 0", "select 1", "select 2"),
        "record 2",
        *("split 0.weight", "split 0.bias", "build", "check 0.weight", "check 0.bias", "record 0"),
    ]


class CountedBatches:
    """Batches that count how often they are gone through."""

    def __init__(self, batches):
        self.batches, self.times = batches, 0

    def __iter__(self):
        self.times += 1
        return iter(self.batches)


@pytest.mark.parametrize("budget", [None, 6.0])
def test_calibration_batches_are_read_once_where_all_statistics_fit(with_splitter, models, budget):
    batches, float_model = [torch.randn(8, 12) for _ in range(2)], models.mlp()

    def weighted(tensor, plan):
        """Parts that depend on the statistics, and take no time."""
        if plan.k == 1 or plan.role == "bias":
            return [tensor, *[torch.zeros_like(tensor)] * (plan.k - 1)]
        squares = plan.second_moment.diagonal(dim1=-2, dim2=-1)
        inner = torch.where((tensor.abs() < tensor.abs().mean()) | (squares < squares.median()), tensor, 0)
        return [inner, tensor - inner, *[torch.zeros_like(tensor)] * (plan.k - 2)]

    plugins = with_splitter(weighted)
    type(plugins.splitter("test")).uses_calibration = True

    def split(calibration, **options):
        first = SplitQuantPass(calibration=calibration, splitter="test", budget=budget, plugins=plugins, **options)
        return first.apply(copy.deepcopy(float_model), grid=UniformGrid(2))

    counted = CountedBatches(batches)
    model = split(counted)
    assert counted.times == 1
    again = split(iter(batches))  # which can be read only once
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    counted = CountedBatches(batches)
    model = split(counted, calibration_bytes=1)
    measured = 0 if budget is None else 3
    assert manifest_of(model).split
    assert counted.times == measured + len(manifest_of(model).split)


def test_statistics_of_several_groups_are_not_held_together(models):
    from splitquant_plugins.passes.layer_moments import LayerMoments
    from splitquant_plugins.passes.select import select_layers

    model = models.mlp()
    split_pass = SplitQuantPass()
    layers = select_layers(model, split_pass.config, split_pass.plugins).split
    held = []
    for group, found in LayerMoments(model, [torch.randn(8, 12)], 1).groups(layers):
        assert [layer.name for layer in group] == list(found)
        assert not any(held)
        held.append(found)
    assert len(held) == 3


def test_an_error_at_the_very_end_puts_the_model_back(plugins, models, tokens):
    from splitquant_plugins import hookimpl

    class Listener:
        @hookimpl
        def splitquant_after_split(self, model, manifest):
            raise RuntimeError("at the end")

    plugins.add(Listener(), "listener")
    model = models.bert()
    model.config.tie_word_embeddings = True
    before = list(model.named_modules())
    with pytest.raises(RuntimeError, match="at the end"):
        SplitQuantPass(plugins=plugins, untie_embeddings=True)(model)
    assert list(model.named_modules()) == before
    assert model.config.tie_word_embeddings
    assert manifest_of(SplitQuantPass()(model)).split
