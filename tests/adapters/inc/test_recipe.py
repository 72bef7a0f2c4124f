"""`SplitQuantPass() + RTNConfig(...)` wherever INC takes a configuration."""

from __future__ import annotations

import copy

import pytest
import torch
from neural_compressor.torch.quantization import (
    GPTQConfig,
    HQQConfig,
    RTNConfig,
    TuningConfig,
    autotune,
    convert,
    prepare,
    quantize,
)
from splitquant_inc.stored_layers import dequantized
from torch import nn

from splitquant_plugins.errors import AlreadyQuantizedError, AlreadySplitError, ConfigError, InputError
from splitquant_plugins.manifest import manifest_of
from splitquant_plugins.modules import SplitLinear

LAYERS = ["layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down", "head"]
PARTS = ("lower", "middle", "upper")


def rtn(**options):
    return RTNConfig(**{"bits": 2, "use_sym": False, "group_size": -1, **options})


@torch.no_grad()
def test_it_equals_splitting_by_hand(net, ids, split_pass, quantized):
    recipe = rtn()
    attached = split_pass() + recipe
    assert isinstance(attached, RTNConfig)
    assert type(recipe) is RTNConfig
    assert recipe.local_config == {}
    by_recipe = convert(prepare(net(), attached))
    by_hand = convert(prepare(split_pass()(net()), rtn(use_layer_wise=False)))
    assert sorted(quantized(by_recipe)) == sorted(f"{name}.{part}" for name in LAYERS for part in PARTS)
    assert torch.equal(by_recipe(ids), by_hand(ids))
    assert [record.name for record in manifest_of(by_recipe).split] == LAYERS


@torch.no_grad()
def test_prepare_convert_quantize_and_convert_alone_agree(net, ids, split_pass):
    recipe = split_pass() + rtn()
    expected = convert(prepare(net(), recipe))(ids)
    assert torch.equal(quantize(net(), recipe)(ids), expected)
    assert torch.equal(convert(net(), recipe)(ids), expected)


def test_the_users_model_is_treated_as_inc_treats_it(net, split_pass, quantized):
    recipe = split_pass() + rtn()
    model = net()
    assert prepare(model, recipe) is model
    assert isinstance(model.head, SplitLinear)
    model = net()
    before = copy.deepcopy(model.state_dict())
    prepared = prepare(model, recipe, inplace=False)
    converted = convert(prepared, inplace=False)
    assert isinstance(model.head, nn.Linear)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert isinstance(prepared.head.upper, nn.Linear)
    assert len(quantized(converted)) == 15


@torch.no_grad()
def test_a_split_improves_the_output(net, ids, split_pass, sqnr):
    wanted = net()(ids)
    plain = sqnr(wanted, quantize(net(), rtn(use_layer_wise=False))(ids))
    split = sqnr(wanted, quantize(net(), split_pass() + rtn())(ids))
    assert split > plain + 3


def test_zeros_stay_zero(net, split_pass, quantized):
    for bits, sym in ((2, False), (4, False), (2, True), (8, True)):
        model = prepare(net(), split_pass() + rtn(bits=bits, use_sym=sym))
        floats = {name: m.weight.detach().clone() for name, m in model.named_modules() if isinstance(m, nn.Linear)}
        for name, module in quantized(convert(model)).items():
            assert not dequantized(module)[floats[name] == 0].any(), (name, bits, sym)


@pytest.mark.parametrize("pattern", ["layers.0.up", r"layers\.0\.up$", ".*0.up"])
def test_set_local_reaches_all_parts_of_a_layer(net, split_pass, quantized, pattern):
    recipe = split_pass() + rtn().set_local(pattern, RTNConfig(bits=8, group_size=8))
    bits = {name: (m.bits, m.group_size) for name, m in quantized(quantize(net(), recipe)).items()}
    assert {name for name, found in bits.items() if found == (8, 8)} == {f"layers.0.up.{part}" for part in PARTS}
    assert {found[0] for found in bits.values()} == {2, 8}


@pytest.mark.parametrize("pattern", [".*up$", ".*up"])
def test_set_local_is_not_taken_for_a_part_by_accident(net, split_pass, quantized, pattern):
    recipe = split_pass() + rtn().set_local(pattern, RTNConfig(bits=4))
    bits = {name: module.bits for name, module in quantized(quantize(net(), recipe)).items()}
    assert bits["layers.0.down.upper"] == bits["layers.0.down.lower"] == bits["head.upper"] == 2
    assert bits["layers.0.up.upper"] == bits["layers.0.up.lower"] == 4


def test_set_local_after_attaching_and_on_a_part_and_on_a_type(net, split_pass, quantized):
    recipe = split_pass() + RTNConfig(bits=2, use_sym=False)
    recipe.set_local(nn.Linear, RTNConfig(bits=4, use_sym=False))
    recipe.set_local("head", RTNConfig(bits=3, use_sym=False))
    recipe.set_local(".*head.middle", RTNConfig(bits=8))
    bits = {name: module.bits for name, module in quantized(quantize(net(), recipe)).items()}
    assert bits.pop("head.middle") == 8
    assert bits.pop("head.lower") == bits.pop("head.upper") == 3
    assert set(bits.values()) == {4}


def test_layers_that_stay_float_are_not_split(net, split_pass, quantized):
    recipe = split_pass() + rtn().set_local("layers.1", RTNConfig(dtype="fp32"))
    model = net()
    model.lm_head = nn.Linear(3, 3)
    model = quantize(model, recipe)
    assert type(model.layers[1].up) is nn.Linear
    assert type(model.lm_head) is nn.Linear
    assert len(quantized(model)) == 9
    reasons = {record.name: record.reason for record in manifest_of(model).kept}
    assert reasons["lm_head"] == reasons["layers.1.up"] == "the recipe does not quantize it"


def test_a_part_may_stay_float(net, split_pass, quantized):
    recipe = split_pass() + rtn().set_local("head.middle", RTNConfig(dtype="fp32"))
    model = quantize(net(), recipe)
    assert type(model.head.middle) is nn.Linear
    assert "head.upper" in quantized(model)


def test_the_head_is_split_where_the_recipe_quantizes_it(net, split_pass, quantized):
    model = net()
    model.lm_head = nn.Linear(6, 6)
    assert "lm_head.lower" in quantized(quantize(model, split_pass() + rtn(quant_lm_head=True)))


@pytest.mark.parametrize("white_list", [["head"], [nn.Linear]])
def test_white_list_is_respected(net, split_pass, quantized, white_list):
    found = quantized(quantize(net(), split_pass() + rtn(white_list=white_list)))
    assert len(found) == (3 if white_list == ["head"] else 15)


def test_convolutions_stay_as_they_are(models, split_pass, quantized):
    model = quantize(models.conv(), split_pass() + rtn())
    assert type(model.stem) is nn.Conv2d
    assert sorted(quantized(model)) == [f"head.{part}" for part in PARTS]


@torch.no_grad()
def test_transformers_conv1d(models, tokens, split_pass, quantized, sqnr):
    wanted = models.gpt2
    torch.manual_seed(1)
    model = wanted()
    logits = model(tokens).logits
    model = quantize(model, split_pass() + rtn(bits=4).set_local(".*c_fc", RTNConfig(bits=8)))
    bits = {name: module.bits for name, module in quantized(model).items()}
    assert len(bits) == 24
    assert bits["transformer.h.0.mlp.c_fc.lower"] == 8
    assert bits["transformer.h.0.mlp.c_proj.lower"] == 4
    assert sqnr(logits, model(tokens).logits) > 20


@torch.no_grad()
def test_autotune_splits_each_trial_once_and_expands_lists(net, ids, split_pass, sqnr, quantized):
    model, seen = net(), []
    wanted = net()(ids)

    def evaluate(trial):
        seen.append((round(sqnr(wanted, trial(ids)), 1), len(quantized(trial))))
        return seen[-1][0]

    options = {"bits": [2, 4], "use_layer_wise": False}
    attached = split_pass() + rtn(**options)
    tuning = TuningConfig(config_set=[attached, rtn(**options)], max_trials=9, tolerable_loss=-1)
    autotune(model, tuning, eval_fn=evaluate)
    assert [count for _, count in seen] == [0, 15, 15, 5, 5]
    assert seen[1][0] > seen[3][0]
    assert seen[2][0] > seen[4][0]
    assert type(model.head) is nn.Linear
    best = autotune(net(), TuningConfig(config_set=[attached], max_trials=2, tolerable_loss=0.99), eval_fn=evaluate)
    assert len(quantized(best)) == 15


def test_recipes_are_equal_only_with_the_same_pass(split_pass):
    attached = split_pass() + rtn()
    assert attached != rtn()
    assert rtn() != attached
    assert attached != split_pass(k=2) + rtn()
    assert attached == copy.deepcopy(attached)


def test_a_user_config_may_be_changed_after_attaching(net, split_pass, quantized):
    recipe = split_pass() + rtn(bits=4)
    recipe.bits = 2
    assert {module.bits for module in quantized(quantize(net(), recipe)).values()} == {2}


def test_the_grid_of_each_layer_reaches_the_splitter(net, plugins):
    from splitquant_inc import IncRtnGrid

    from splitquant_plugins import SplitQuantPass, Splitter, hookimpl

    seen = {}

    class Spy(Splitter):
        needs_grid = True
        always_splits = True

        def split(self, tensor, plan, grid):
            seen[plan.layer] = grid
            return [tensor.clamp(max=0), tensor.clamp(min=0)]

    class Plugin:
        @hookimpl
        def splitquant_register_splitters(self, register):
            register("spy", Spy, "looks")

    plugins.add(Plugin(), "spy")
    recipe = rtn().set_local("head", RTNConfig(bits=8, group_size=8)).set_local("layers.1", rtn(use_mse_search=True))
    quantize(net(), SplitQuantPass(splitter="spy", plugins=plugins) + recipe)
    assert seen["layers.0.up"] == IncRtnGrid(2)
    assert seen["head"] == IncRtnGrid(8, "symmetric", 8)
    assert seen["layers.1.up"] is None
    with pytest.raises(ConfigError, match="needs the grid"):
        quantize(net(), SplitQuantPass(splitter="spy", plugins=plugins) + HQQConfig())


@torch.no_grad()
def test_layers_that_share_a_weight_are_both_right(models, split_pass, sqnr):
    model = models.tied()
    weight = model.first.weight.detach().clone()
    model = quantize(model, split_pass() + rtn(bits=4))
    for layer in (model.first, model.twin):
        assert sqnr(weight, layer.weight.float()) > 15
    plain = quantize(models.tied(), rtn(bits=4, use_layer_wise=False))
    assert sqnr(weight, plain.twin.recover().float()) < 5  # INC writes codes over the weight that both share


@torch.no_grad()
def test_an_embedding_that_shares_a_heads_weight_is_not_overwritten(models, tokens, split_pass):
    model = nn.Module()
    model.embedding, model.decoder, model.body = nn.Embedding(9, 4), nn.Linear(4, 9), nn.Linear(4, 4)
    model.decoder.weight = model.embedding.weight
    before = model.embedding.weight.detach().clone()
    quantize(model, split_pass() + rtn())
    assert torch.equal(model.embedding.weight, before)


def test_a_model_is_split_once(net, split_pass):
    recipe = split_pass() + rtn()
    with pytest.raises(AlreadySplitError):
        quantize(split_pass()(net()), recipe)
    with pytest.raises((AlreadySplitError, AlreadyQuantizedError)):
        quantize(quantize(net(), recipe), recipe)
    with pytest.raises((AlreadyQuantizedError, ConfigError)):
        quantize(quantize(net(), rtn(use_layer_wise=False)), recipe)
    with pytest.raises(ConfigError, match="attached already"):
        split_pass() + recipe


@pytest.mark.parametrize("first", [False, True])
def test_what_inc_has_converted_is_not_prepared_again(net, split_pass, first):
    recipe = rtn(use_layer_wise=False)
    model = convert(prepare(net(), split_pass() + recipe if first else recipe))
    with pytest.raises(AlreadyQuantizedError):
        convert(prepare(model, split_pass(k=2) + rtn()))


def test_a_recipe_that_quantizes_nothing_is_an_error(net, split_pass):
    for recipe in (rtn(dtype="fp32"), rtn(white_list=["no_such_layer"])):
        with pytest.raises(ConfigError, match="quantizes no layer"):
            quantize(net(), split_pass() + recipe)


def test_a_single_layer_cannot_be_replaced(split_pass):
    with pytest.raises(InputError, match="Sequential"):
        quantize(nn.Linear(4, 4), split_pass() + rtn())


def test_a_recipe_of_another_kind_is_refused(split_pass):
    from neural_compressor.torch.quantization import MXQuantConfig, SmoothQuantConfig, TEQConfig

    for config, reason in (
        (TEQConfig(), "codes of 4 bits"),
        (SmoothQuantConfig(), "needs intel_extension_for_pytorch"),
        (MXQuantConfig(), "not tried"),
    ):
        with pytest.raises(ConfigError, match=f"{type(config).__name__}: .*{reason}"):
            split_pass() + config
    with pytest.raises(ConfigError, match="weights only"):
        split_pass(activations=True) + rtn()


def test_same_kinds_join_as_in_inc(net, split_pass, quantized):
    joined = (split_pass() + rtn()) + RTNConfig().set_local("head", RTNConfig(bits=8))
    assert {module.bits for module in quantized(quantize(net(), joined)).values()} == {2, 8}


def test_joined_kinds_are_refused_and_inc_still_quantizes_nothing(net, split_pass, quantized):
    plain = quantize(net(), rtn(use_layer_wise=False) + GPTQConfig())
    assert not quantized(plain), "INC's ComposableConfig quantizes now: attach to it instead of refusing"
    with pytest.raises(ConfigError, match="quantizes nothing"):
        split_pass() + (rtn() + GPTQConfig())
    with pytest.raises(ConfigError, match="quantizes nothing"):
        (split_pass() + rtn()) + GPTQConfig()
    with pytest.raises(ConfigError, match="ComposableConfig"):
        quantize(net(), HQQConfig() + (split_pass() + rtn()))
    with pytest.raises(ConfigError, match="put the pass first"):
        rtn() + (split_pass() + rtn())


@torch.no_grad()
@pytest.mark.parametrize("group_size", [-1, 6])
def test_asymmetric_bfloat16_weights_are_what_they_are_in_32_bits(net, split_pass, quantized, group_size):
    recipe = RTNConfig(use_sym=False, bits=2, group_size=group_size, use_layer_wise=False)
    recipe.set_local("layers.1.*", RTNConfig(use_sym=True, use_layer_wise=False))
    narrow = net().bfloat16()
    wide = copy.deepcopy(narrow).float()
    found, expected = (quantized(quantize(model, split_pass() + recipe)) for model in (narrow, wide))
    assert found.keys() == expected.keys()
    for name, module in found.items():
        if not name.startswith("layers.1"):
            assert torch.equal(module.qweight, expected[name].qweight)
            assert torch.equal(module.scales, expected[name].scales)
