"""Architectures with buffers that no file has, and with embeddings that more than the head shares."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from splitquant_plugins import SplitQuantPass
from splitquant_plugins.plugins import Plugins

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
SIZES: dict[str, dict[str, Any]] = {
    "GPTJForCausalLM": {"n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4, "n_positions": 32},
    "GPTNeoForCausalLM": {"hidden_size": 16, "num_layers": 1, "attention_types": [[["global"], 1]], "num_heads": 2},
    "BartForConditionalGeneration": {
        **{"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 32},
        **{"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, **HEADS},
    },
    "UMT5ForConditionalGeneration": {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2},
    "CLIPVisionModel": {
        **{"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        **{"image_size": 16, "patch_size": 8},
    },
    "Swinv2Model": {
        **{"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2]},
        "window_size": 4,
    },
}


def made(name: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model with random weights, and inputs of it."""
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    sizes = SIZES[name]
    if "image_size" in sizes:
        side = sizes["image_size"]
        return kind(kind.config_class(**sizes)).eval(), {"pixel_values": torch.randn(1, 3, side, side)}
    tokens = torch.randint(3, 30, (2, 10))
    config = kind.config_class(vocab_size=32, decoder_start_token_id=0, **sizes)
    also = {"decoder_input_ids": tokens} if config.is_encoder_decoder else {}
    return kind(config).eval(), {"input_ids": tokens, **also}


@torch.no_grad()
def output(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    found: torch.Tensor = model(**inputs)[0]
    return found


@pytest.mark.parametrize("untie", [False, True])
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("name", SIZES)
def test_what_was_saved_comes_back(name: str, quantized: bool, untie: bool, tmp_path: Path, plugins: Plugins) -> None:
    model, inputs = made(name)
    split = SplitQuantPass(untie_embeddings=untie, plugins=plugins)(copy.deepcopy(model))
    torch.testing.assert_close(output(split, inputs), output(model, inputs), rtol=1e-4, atol=1e-4)
    if quantized:
        quanto = pytest.importorskip("optimum.quanto")
        quanto.quantize(split, weights=quanto.qint4)  # the head, too
        quanto.freeze(split)
    before = output(split, inputs)
    split.save_pretrained(tmp_path)
    assert torch.equal(output(split, inputs), before)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(output(loaded, inputs), before)
    buffers = dict(model.named_buffers())
    own = {key: value for key, value in loaded.named_buffers() if key in buffers}
    assert own.keys() == buffers.keys()
    assert all(torch.equal(value, buffers[key]) for key, value in own.items())
