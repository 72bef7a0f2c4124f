"""Streamed folders that transformers' `from_pretrained` loads."""

from __future__ import annotations

import json
from importlib import import_module

import pytest
import torch
from torch import nn

from splitquant_plugins.backends import WeightRequest
from splitquant_plugins.cli.options import untied_for_head
from splitquant_plugins.errors import InputError
from splitquant_plugins.evaluation.tasks.choose import task_of
from splitquant_plugins.streaming.quantize_model import quantize_model

pytest.importorskip("optimum.quanto")
transformers = pytest.importorskip("transformers")

from splitquant_quanto import load  # noqa: E402

IDS = torch.arange(12).reshape(2, 6)
CASES = [
    ("llama", torch.float32, {}),
    ("llama", torch.float16, {"untie_embeddings": True}),
    ("masked", torch.float32, {}),
    ("gpt2", torch.float32, {"exclude": "*.c_fc"}),
]


@torch.no_grad()
@pytest.mark.parametrize(("kind", "dtype", "options"), CASES)
def test_it_computes_what_the_adapter_loads(plugins, checkpoints, tmp_path, kind, dtype, options):
    folder = checkpoints.save(getattr(checkpoints, kind)(dtype))
    arguments = (plugins, str(folder), "quanto", WeightRequest("int8"), "kmeans")
    quantize_model(*arguments, tmp_path / "adapter", dict(options), True)
    quantize_model(*arguments, tmp_path / "both", dict(options), True, pretrained=True)
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, report = getattr(transformers, architecture).from_pretrained(tmp_path / "both", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    expected = load(tmp_path / "adapter")(IDS).logits
    assert torch.equal(model(IDS).logits, expected)
    assert torch.equal(load(tmp_path / "both")(IDS).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("backend", ["quanto", "inc"])
@pytest.mark.filterwarnings("ignore")  # INC's own
def test_a_head_that_stays_float_and_one_that_is_quantized(plugins, checkpoints, tmp_path, backend, tied, head):
    if backend == "inc":
        pytest.importorskip("neural_compressor.torch")
    adapter = import_module(f"splitquant_{backend}")
    folder = checkpoints.save(checkpoints.llama(torch.float32, tie_word_embeddings=tied))
    given = (plugins, str(folder), backend, WeightRequest("int2"), "kmeans")
    logits = []
    for stream in (False, True):
        output, task = tmp_path / str(stream), task_of(str(folder), head=head)
        quantize_model(*given, output, untied_for_head({}, head=head), stream, pretrained=True, task=task)
        model, report = transformers.AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        assert (type(model.lm_head) is nn.Linear) is not head
        assert (model.lm_head.weight is model.model.embed_tokens.weight) is (tied and not head)
        logits += [model(IDS).logits, adapter.load(output)(IDS).logits]
    assert all(torch.equal(found, logits[0]) for found in logits)


def test_it_is_guarded_against_readers_without_the_package(plugins, checkpoints, tmp_path, read_all):
    folder = checkpoints.save(checkpoints.llama(torch.float32))
    quantize_model(
        plugins, str(folder), "quanto", WeightRequest("int8"), "kmeans", tmp_path / "out", {}, True, pretrained=True
    )
    tensors = read_all(tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert tensors["model.layers.0.mlp.up_proj.weight"].shape == (1,)
    assert tensors["lm_head.weight"].shape == (1,)  # quantized whole
    (tmp_path / "out" / "model-splitquant.safetensors").unlink()
    with pytest.raises(InputError, match=r"model-splitquant\.safetensors does not exist"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
