"""The modules that take a layer's place."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from splitquant_plugins import SplitQuantPass, manifest_of
from splitquant_plugins.modules import SplitActivation, SplitConv1d, SplitLinear, SplitModule, part_names


@pytest.fixture
def split():
    return SplitQuantPass()(nn.Sequential(nn.Linear(5, 4)))[0]


def test_parts_are_named_children_and_no_module_list(models):
    model = SplitQuantPass()(models.conv())
    splits = [module for module in model.modules() if isinstance(module, SplitModule)]
    assert len(splits) == 4
    for module in splits:
        assert [name for name, _ in module.named_children()] == list(module.part_names)
        assert not any(isinstance(part, (nn.ModuleList, nn.Sequential)) for part in module.modules())


def test_one_part_or_many():
    assert part_names(1) == ("whole",)
    assert part_names(4) == ("lower", "middle_1", "middle_2", "upper")


def test_forward_is_the_sum_of_the_parts(split):
    x = torch.randn(3, 5)
    expected = split.lower(x) + split.middle(x) + split.upper(x)
    assert torch.equal(split(x), expected)


def test_weight_and_bias_answer_the_sum_of_what_the_parts_hold_now(split):
    with torch.no_grad():
        split.middle.weight.add_(1)
    assert torch.equal(split.weight, split.lower.weight + split.middle.weight + split.upper.weight)
    assert (split.weight.dtype, split.weight.device.type) == (torch.float32, "cpu")
    assert split.bias.shape == (4,)
    assert split.weight.requires_grad


def test_no_bias_answers_none():
    assert SplitQuantPass()(nn.Sequential(nn.Linear(5, 4, bias=False)))[0].bias is None


@pytest.mark.parametrize("value", [nn.Parameter(torch.zeros(4, 5)), torch.zeros(4, 5)])
@pytest.mark.parametrize("role", ["weight", "bias"])
def test_assigning_a_weight_is_an_error_that_says_what_to_do(split, role, value):
    before = split.weight.clone()
    with pytest.raises(AttributeError, match=rf"the {role} of a SplitLinear .* before the split, .*\.lower\.{role}"):
        setattr(split, role, value)
    assert role not in split._parameters
    assert torch.equal(split.weight, before)


def test_a_linear_answers_for_its_features(split):
    assert (split.in_features, split.out_features, split.transposed) == (5, 4, False)


def test_state_dict_holds_the_parts_only(split):
    assert set(split.state_dict()) == {f"{part}.{role}" for part in split.part_names for role in ("weight", "bias")}


def test_deepcopy_is_independent(split):
    twin = copy.deepcopy(split)
    assert type(twin) is SplitLinear
    assert torch.equal(twin.weight, split.weight)
    with torch.no_grad():
        twin.lower.weight.add_(1)
    assert not torch.equal(twin.weight, split.weight)
    assert [name for name, _ in twin.named_children()] == ["lower", "middle", "upper"]


def test_deepcopy_of_a_model_keeps_the_manifest_and_the_sharing(models):
    model = SplitQuantPass()(models.tied())
    twin = copy.deepcopy(model)
    assert manifest_of(twin) == manifest_of(model)
    assert twin.first is twin.again
    assert twin.twin.lower.weight is twin.first.lower.weight
    assert twin.first is not model.first


def test_a_pickled_model_comes_back(models):
    model = SplitQuantPass()(models.conv())
    twin = pickle.loads(pickle.dumps(model))
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(twin(x), model(x))
    assert manifest_of(twin) == manifest_of(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), model(x))


def test_replacing_a_part_is_told(split):
    told = []
    split.notify(lambda *call: told.append(call))
    new = nn.Linear(5, 4)
    split.middle = new
    split.note = 3
    assert told == [(split, "middle", new)]
    twin = copy.deepcopy(split)
    twin.lower = new
    assert told[1] == (twin, "lower", new)


def test_replacing_a_part_of_a_loaded_model_is_told_to_the_installed_plugins(split, plugins, monkeypatch):
    from splitquant_plugins import hookimpl
    from splitquant_plugins.plugins import Plugins

    told = []

    class Listener:
        @hookimpl
        def splitquant_part_replaced(self, split, part, module):
            told.append(part)

    plugins.add(Listener(), "listener")

    def load(cls):
        return plugins

    monkeypatch.setattr(Plugins, "load", classmethod(load))
    twin = pickle.loads(pickle.dumps(split))
    twin.lower, twin.upper = nn.Linear(5, 4), nn.Linear(5, 4)
    assert told == ["lower", "upper"]


def test_a_pickle_from_before_plugins_were_pickled_finds_the_installed_ones(split, plugins, monkeypatch):
    from splitquant_plugins import hookimpl, modules
    from splitquant_plugins.plugins import Plugins

    told = []

    class Listener:
        @hookimpl
        def splitquant_part_replaced(self, split, part, module):
            told.append(part)

    split.notify(modules._tell_installed_plugins)  # what such a pickle names
    twin = pickle.loads(pickle.dumps(split))
    plugins.add(Listener(), "listener")

    def load(cls):
        return plugins

    monkeypatch.setattr(Plugins, "load", classmethod(load))
    twin.lower, twin.upper = nn.Linear(5, 4), nn.Linear(5, 4)
    assert told == ["lower", "upper"]


@pytest.mark.parametrize("strict", [False, True])
def test_a_split_model_is_exported(models, images, strict):
    model = SplitQuantPass(activations=True)(models.conv())
    exported = torch.export.export(model, (images,), strict=strict)
    assert torch.allclose(exported.module()(images), model(images), atol=1e-6)
    targets = [str(node.target) for node in exported.graph.nodes]
    assert sum("conv2d" in target for target in targets) == 9


def test_a_split_model_is_compiled(models, images):
    model = SplitQuantPass(activations=True)(models.conv())
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(images), model(images), atol=1e-6)


def test_a_split_transformer_is_exported(models, tokens):
    model = SplitQuantPass()(models.bert())
    exported = torch.export.export(model, (tokens,))
    with torch.no_grad():
        assert torch.allclose(exported.module()(tokens).logits, model(tokens).logits, atol=1e-5)


def test_parts_move_with_the_model(split):
    split.double()
    assert {part.weight.dtype for part in split.children()} == {torch.float64}
    assert split.weight.dtype == torch.float64


def test_a_convolution_without_batch_dimension():
    conv = nn.Conv1d(2, 3, 2)
    x = torch.randn(2, 7)
    split = SplitQuantPass()(nn.Sequential(copy.deepcopy(conv)))[0]
    assert isinstance(split, SplitConv1d)
    assert torch.allclose(split(x), conv(x), atol=1e-6)


def test_activation_chunks_are_modules_of_their_own():
    split = SplitActivation(nn.LeakyReLU(0.3), 3, -1)
    chunks = list(split.children())
    assert len({id(chunk) for chunk in chunks}) == 3
    assert all(chunk.negative_slope == 0.3 for chunk in chunks)
