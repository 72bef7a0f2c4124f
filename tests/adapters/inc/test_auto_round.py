"""AutoRound behind a pass: where auto-round is installed, and what is refused where it is not."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch
from neural_compressor.torch.quantization import AutoRoundConfig, convert, prepare
from transformers import LlamaConfig, LlamaForCausalLM

from splitquant_plugins import SplitQuantPass
from splitquant_plugins.errors import ConfigError
from splitquant_plugins.manifest import manifest_of
from splitquant_plugins.modules import SplitLinear

pytestmark = pytest.mark.filterwarnings("ignore")  # auto-round's own, of many kinds


def llama():
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=40,  # no multiple of 32: left float
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8).view(-1)[::97] *= 4
    return model


@pytest.fixture
def installed():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("auto_round")


@pytest.fixture
def recipe(tmp_path):
    def make(**options):
        options = {"bits": 2, "use_sym": False, "group_size": -1, "export_format": "fake", **options}
        folder = str(tmp_path / "rounded")
        return AutoRoundConfig(iters=2, seqlen=16, nsamples=4, batch_size=2, output_dir=folder, **options)

    return make


def rounded(recipe):
    model = prepare(llama(), recipe)
    for seed in range(2):
        model(torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(seed)))
    return convert(model)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("options", [{}, {"use_sym": True, "group_size": 16, "bits": 3}])
def test_the_parts_are_rounded_together(recipe, plugins, sqnr, options):
    ids = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(9))
    wanted = llama()(ids).logits.detach()
    plain = sqnr(wanted, rounded(recipe(**options))(ids).logits.detach().float())
    model = rounded(SplitQuantPass(k=2, plugins=plugins) + recipe(**options))
    assert sqnr(wanted, model(ids).logits.detach().float()) > plain + 3
    splits = {name for name, module in model.named_modules() if isinstance(module, SplitLinear)}
    assert splits == {f"model.layers.0.self_attn.{each}_proj" for each in "qkvo"}
    kept = {record.name: record.reason for record in manifest_of(model).kept}
    assert kept["model.layers.0.mlp.up_proj"] == kept["lm_head"] == "the recipe does not quantize it"
    for name in splits:
        for part in model.get_submodule(name).parts():
            rows = part.weight.detach().float()
            if not options:
                assert max(len(row.unique()) for row in rows) <= 4


@pytest.mark.usefixtures("installed")
def test_what_was_not_tried_is_refused(recipe, split_pass):
    for options in ({"act_bits": 8}, {"dtype": "fp8_to_int_sym"}, {"bits": 8}):
        with pytest.raises(ConfigError, match="not tried with split layers"):
            prepare(llama(), split_pass() + recipe(**options))


def test_formats_that_are_read_again_are_refused(recipe, split_pass):
    with pytest.raises(ConfigError, match=r"builds no split layers; use export_format=.fake."):
        prepare(llama(), split_pass() + recipe(export_format="auto_round"))


def test_layer_options_are_refused(recipe, split_pass):
    with pytest.raises(ConfigError, match="finds no parts of split"):
        prepare(llama(), split_pass() + recipe().set_local("lm_head", recipe(bits=4)))


def test_a_missing_package_is_named(recipe, split_pass, monkeypatch):
    for name in ("auto_round", "auto_round.utils", "auto_round.schemes"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match="needs the package auto-round"):
        prepare(llama(), split_pass() + recipe())
