"""Small sharded checkpoints, and both ways to quantize them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from splitquant_plugins.streaming import writer

pytest.importorskip("transformers")
pytest.importorskip("optimum.quanto")
with warnings.catch_warnings():  # torchao deprecates some of its own enums while INC imports it
    warnings.simplefilter("ignore")
    HAS_INC = find_spec("neural_compressor") is not None and import_module("neural_compressor.torch.quantization")

LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
}
BERT = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 99,
    "num_labels": 3,
}


def make_llama(dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**{**LLAMA, "tie_word_embeddings": True, **options})).to(dtype)


def make_bert(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**{**BERT, **options})).to(dtype)


def make_gpt2(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A model whose layers store their weights transposed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 64, "n_layer": 1, "n_head": 2, "vocab_size": 99, "n_positions": 24}
    return GPT2LMHeadModel(GPT2Config(**{**sizes, **options})).to(dtype)


def make_masked(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A model whose head shares the embedding's weight, and its own bias with its parent."""
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(**{**BERT, **options})).to(dtype)


@pytest.fixture
def checkpoints(tmp_path: Path) -> SimpleNamespace:
    """The makers of models, and `save`, which writes one as a sharded checkpoint and returns the folder."""

    def save(model: Any, name: str = "float", size: str = "40KB") -> Path:
        folder = tmp_path / name
        model.save_pretrained(folder, max_shard_size=size)
        assert (folder / "model.safetensors.index.json").exists()
        return folder

    return SimpleNamespace(llama=make_llama, gpt2=make_gpt2, bert=make_bert, masked=make_masked, save=save)


@pytest.fixture
def stream(plugins: Any, tmp_path: Path) -> Callable[..., Any]:
    """Stream a checkpoint, with quanto and k-means, the quickest, unless told.

    Options are those of the pass and of `stream_model`.
    """
    from splitquant_plugins import SplitQuantPass
    from splitquant_plugins.backends import WeightRequest
    from splitquant_plugins.streaming.run import stream_model

    def run(
        folder: Path,
        name: str = "streamed",
        weights: str = "int4",
        shard_bytes: int = 20_000,
        backend_name: str = "quanto",
        **options: Any,
    ) -> Any:
        backend = plugins.backend(backend_name)
        form = backend.resolve(WeightRequest(weights))
        own = {key: options.pop(key) for key in ("ignore", "working_bytes", "finish", "scheduler") if key in options}
        first = SplitQuantPass(plugins=plugins, **{"splitter": "kmeans", **options})
        return stream_model(folder, tmp_path / name, first, backend, form, shard_bytes=shard_bytes, **own)

    return run


@pytest.fixture
def read_all() -> Callable[[Path], dict[str, torch.Tensor]]:
    """Read every safetensors file of a folder with the library."""
    from safetensors.torch import load_file

    def read(folder: Path) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = {}
        for path in folder.glob("*.safetensors"):
            found = load_file(path)
            assert not found.keys() & state.keys()
            state.update(found)
        return state

    return read


@pytest.fixture
def stopped_after_two_shards(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """A context in which streaming is ended when its second shard has appeared."""

    class Stop(BaseException):
        pass

    @contextmanager
    def stopped() -> Iterator[None]:
        publish, left = writer.ShardWriter.publish, [2]

        def stopping(self: Any) -> None:
            publish(self)
            left[0] -= 1
            if not left[0]:
                raise Stop

        with monkeypatch.context() as patch, suppress(Stop):
            patch.setattr(writer.ShardWriter, "publish", stopping)
            yield
        assert not left[0]

    return stopped
