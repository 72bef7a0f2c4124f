"""A checkpoint that is solved block by block holds what DecoupleQPass makes of the model in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from splitquant_plugins import DecoupleQPass, UniformGrid, manifest_of
from splitquant_plugins.backends import WeightRequest
from splitquant_plugins.checkpoints.source import Source
from splitquant_plugins.cli.main import run
from splitquant_plugins.decoupleq import layer_stage
from splitquant_plugins.errors import ConfigError, InputError, SplitFailedError
from splitquant_plugins.evaluation.tasks.choose import task_of
from splitquant_plugins.passes.calibration import iter_calls
from splitquant_plugins.plugins import Plugins
from splitquant_plugins.streaming import quantize_model as module
from splitquant_plugins.streaming.block_calls import block_calls
from splitquant_plugins.streaming.quantize_model import quantize_model
from splitquant_plugins.streaming.solve_checkpoint import solve_checkpoint
from splitquant_plugins.streaming.spilled import Spill

GRID = UniformGrid(2)
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
FAST = {"rounds": 1, "starts": (1.0,), "sweeps": 1}


def make_gemma3() -> Any:
    """Blocks of two kinds, with masks and positions of their own."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    sizes = {**SMALL, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 96}
    config = Gemma3TextConfig(**sizes, sliding_window=4, sliding_window_pattern=2, max_position_embeddings=32)
    return Gemma3ForCausalLM(config)


MODELS = {
    "llama": lambda made: made.llama(torch.float32, **SMALL),
    "llama-bf16": lambda made: made.llama(**SMALL),
    "gemma3": lambda made: make_gemma3(),
    "gpt2": lambda made: made.gpt2(n_layer=3, n_embd=32),
    "bert": lambda made: made.bert(hidden_size=32, intermediate_size=64, num_hidden_layers=2),
}
IGNORED = ("lm_head", "classifier", "bert.pooler.dense")


@pytest.fixture
def make(checkpoints: Any, tmp_path: Path) -> Any:
    """A function that saves a model into the folder `float`, and returns it with batches for it."""

    def save(name: str) -> tuple[Any, list[dict[str, torch.Tensor]]]:
        torch.manual_seed(0)
        model = MODELS[name](checkpoints).eval()
        model.save_pretrained(tmp_path / "float")
        batches = []
        for number in range(4):
            ids = torch.randint(3, 90, (2, 12))
            mask = torch.ones_like(ids)
            mask[1, 12 - number :] = 0
            batches.append({"input_ids": ids, "attention_mask": mask})
        return model, batches

    return save


def solver(batches: Any, **options: Any) -> DecoupleQPass:
    return DecoupleQPass(calibration=batches, **{**FAST, **options})


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    source = Source(folder)
    return {name: source.read(name) for name in source.names}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("memory", [2**30, 60_000])
@pytest.mark.parametrize("name", MODELS)
def test_it_is_what_the_pass_makes_in_memory(
    make: Any, tmp_path: Path, name: str, memory: int, monkeypatch: Any
) -> None:
    model, batches = make(name)
    places: list[Any] = []
    keep = Spill.keep
    monkeypatch.setattr(Spill, "keep", lambda spill, tensor: places.append(keep(spill, tensor)) or places[-1])
    given = solver(batches, calibration_bytes=memory)
    manifest = solve_checkpoint(tmp_path / "float", tmp_path / "solved", given, grid=GRID, ignore=IGNORED)
    assert any(isinstance(each.place, Path) for each in places) == (memory < 2**30)
    assert not list((tmp_path / "solved").glob(".activations*"))

    loaded = type(model).from_pretrained(tmp_path / "float").eval()
    expected = solver(batches, calibration_bytes=memory).apply(loaded, grid=GRID, ignore=IGNORED)
    again = type(model).from_pretrained(tmp_path / "solved")
    assert_same(expected.state_dict(), again.state_dict())
    assert any(
        not torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    )
    recorded = {layer.name: layer.values for layer in manifest_of(expected).layers if layer.values is not None}
    here = {layer.name: layer.values for layer in manifest.layers if layer.values is not None}
    assert here.keys() == recorded.keys()
    for layer, values in recorded.items():
        assert here[layer].model_copy(update={"seconds": values.seconds}) == values
    assert manifest.notes == manifest_of(expected).notes


def test_a_run_that_was_killed_goes_on(make: Any, tmp_path: Path, monkeypatch: Any) -> None:
    _, batches = make("llama")
    straight = solve_checkpoint(tmp_path / "float", tmp_path / "straight", solver(batches), grid=GRID, ignore=IGNORED)
    real, names = layer_stage.solve_weight, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        names.append(kwargs["name"])
        if len(names) == 10:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(layer_stage, "solve_weight", counted)
    with pytest.raises(KeyboardInterrupt):
        solve_checkpoint(tmp_path / "float", tmp_path / "solved", solver(batches), grid=GRID, ignore=IGNORED)
    assert not (tmp_path / "solved" / "config.json").exists()
    (tmp_path / "solved" / ".activations.killed").mkdir()
    manifest = solve_checkpoint(tmp_path / "float", tmp_path / "solved", solver(batches), grid=GRID, ignore=IGNORED)
    assert not list((tmp_path / "solved").glob(".activations*"))
    assert len(names) == 10 + 14  # the first block was not solved again
    assert_same(tensors(tmp_path / "straight"), tensors(tmp_path / "solved"))
    assert len(manifest.layers) == len(straight.layers)
    with pytest.raises(InputError, match="other options, weights or calibration data"):
        solve_checkpoint(tmp_path / "float", tmp_path / "solved", solver(batches, rounds=2), grid=GRID, ignore=IGNORED)
    other = [{"input_ids": batch["input_ids"] + 1} for batch in batches]
    with pytest.raises(InputError, match="other options, weights or calibration data"):
        solve_checkpoint(tmp_path / "float", tmp_path / "solved", solver(other), grid=GRID, ignore=IGNORED)


def test_layers_outside_of_blocks_keep_plain_rounding_and_are_said_to(make: Any, tmp_path: Path) -> None:
    _, batches = make("bert")
    manifest = solve_checkpoint(tmp_path / "float", tmp_path / "solved", solver(batches), grid=GRID)
    reasons = {layer.name: layer.values.reason for layer in manifest.layers if layer.values and layer.values.reason}
    assert "none of the repeated blocks" in reasons["classifier"]
    before, after = tensors(tmp_path / "float"), tensors(tmp_path / "solved")
    assert torch.equal(before["classifier.weight"], after["classifier.weight"])


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"tune_blocks": True}, "tune_blocks"),
        ({"tune_model": True}, "tune_model"),
        ({"sequential": False}, "sequential=False"),
        ({"objective": "predictions"}, "objective='predictions'"),
        ({"resume_dir": "somewhere"}, "resume_dir"),
    ],
)
def test_what_needs_the_model_is_refused(make: Any, tmp_path: Path, options: dict[str, Any], what: str) -> None:
    _, batches = make("llama")
    with pytest.raises(ConfigError, match=what):
        solve_checkpoint(tmp_path / "float", tmp_path / "solved", solver(batches, **options), grid=GRID)
    assert not (tmp_path / "solved").exists()


def test_the_checkpoint_itself_is_not_written_into(make: Any, tmp_path: Path) -> None:
    _, batches = make("llama")
    with pytest.raises(InputError, match="is the checkpoint that is read"):
        solve_checkpoint(tmp_path / "float", tmp_path / "float", solver(batches), grid=GRID)
    assert not list((tmp_path / "float").glob("block_*"))


def test_nan_in_a_weight_names_it(make: Any, tmp_path: Path) -> None:
    _, batches = make("llama")
    path = tmp_path / "float" / "model.safetensors"
    state = load_file(path)
    state["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(SplitFailedError, match=r"layers\.1\.mlp\.up_proj\.weight has 1 NaN"):
        solve_checkpoint(tmp_path / "float", tmp_path / "solved", solver(batches), grid=GRID, ignore=IGNORED)


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "float")
    batches = [{"input_ids": torch.ones(1, 4, dtype=torch.int64)}]
    with pytest.raises(InputError, match="an encoder and a decoder"):
        solve_checkpoint(tmp_path / "float", tmp_path / "solved", solver(batches), grid=GRID)


class Stack(nn.Module):
    """Blocks whose second argument is made by `extra` of what goes between them."""

    def __init__(self, extra: Any, between: Any = lambda values: values) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.extra, self.between = extra, between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = self.between(block(x, self.extra(x)))
        return x


class Shared(dict):
    """Keys and values of one block that another reads."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + (0 if isinstance(more, dict) else more)


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        (Stack(lambda x: x.mean(dim=-1, keepdim=True)), "depend on what blocks before it return"),
        (Stack(torch.zeros_like, torch.relu), "as its first argument"),
        (Stack(lambda x: Shared()), "is given a Shared"),
        (Stack(lambda x: {}), "is given a dict"),
    ],
)
def test_blocks_that_do_not_simply_follow_each_other_are_refused(tmp_path: Path, model: Stack, problem: str) -> None:
    blocks = [(f"blocks.{number}", block) for number, block in enumerate(model.blocks)]
    calls = iter_calls(model, [torch.randn(2, 4)])
    with pytest.raises(InputError, match=problem):
        block_calls(model, blocks, calls, Spill(tmp_path, 0), lambda call: blocks[0][1](*call[0], **call[1]))
    assert all("forward" not in block.__dict__ for block in model.blocks)


def test_calls_of_blocks_that_follow_each_other(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Stack(lambda x: torch.full_like(x[..., :1], 2.0))
    blocks = [(f"blocks.{number}", block) for number, block in enumerate(model.blocks)]
    batches = [torch.randn(2, 4), torch.randn(3, 4)]
    spill = Spill(tmp_path, 40)
    found = block_calls(
        model, blocks, iter_calls(model, batches), spill, lambda call: blocks[0][1](*call[0], **call[1])
    )
    hidden = found.first
    for number, (_, block) in enumerate(blocks):
        hidden = [spill.keep(block(*args, **kwargs).detach()) for args, kwargs in found.of(number, hidden)]
    for batch, kept in zip(batches, hidden, strict=True):
        torch.testing.assert_close(kept.get(), model(batch).detach())
    assert 0 < spill.bytes <= 40


@pytest.mark.parametrize("backend", ["quanto", "inc"])
def test_what_is_saved_is_what_is_saved_in_memory(make: Any, tmp_path: Path, backend: str) -> None:
    if backend == "inc":
        pytest.importorskip("neural_compressor.torch.quantization")
    _, batches = make("llama")
    task = task_of(str(tmp_path / "float"))
    rows = {}
    for stream in (True, False):
        rows[stream] = quantize_model(
            *(
                Plugins.load(),
                str(tmp_path / "float"),
                backend,
                WeightRequest("int2"),
                "none",
                tmp_path / str(stream),
                {},
            ),
            **{"stream": stream, "pretrained": True, "decoupleq": FAST, "calibration": batches, "task": task},
        )
    assert rows[True]["streamed"]
    assert rows[True]["method"] == rows[False]["method"] == "decoupleq"
    assert rows[True]["layers_quantized"] == rows[False]["layers_quantized"] == 21
    assert rows[True]["bits_per_weight"] == rows[False]["bits_per_weight"]
    assert_same(tensors(tmp_path / "True"), tensors(tmp_path / "False"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["False", "True", "float"]
    modes = {oct(path.stat().st_mode & 0o777) for each in ("True", "False") for path in (tmp_path / each).iterdir()}
    assert len(modes) == 1
    said = [
        json.loads((tmp_path / each / "splitquant_manifest.json").read_text())["values"] for each in ("True", "False")
    ]
    assert said[0] == said[1]


def test_the_output_appears_whole(make: Any, tmp_path: Path, monkeypatch: Any) -> None:
    _, batches = make("llama")

    def quantize() -> dict[str, Any]:
        return quantize_model(
            *(Plugins.load(), str(tmp_path / "float"), "quanto", WeightRequest("int2"), "none", tmp_path / "out", {}),
            **{"stream": True, "pretrained": True, "decoupleq": FAST, "calibration": batches},
        )

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "describe_streamed", killed)
        with pytest.raises(KeyboardInterrupt):
            quantize()
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.solved").exists()
    assert quantize()["layers_quantized"] == 22
    assert sorted(path.name for path in tmp_path.iterdir()) == ["float", "out"]
    assert "quantization_config" in json.loads((tmp_path / "out" / "config.json").read_text())


def test_text_of_the_models_own_needs_the_model(make: Any, tmp_path: Path, capsys: Any) -> None:
    make("llama")
    given = ["--backend", "quanto", "--weights", "int2", "--split", "none", "--method", "decoupleq", "--stream"]
    words = ["quantize", str(tmp_path / "float"), *given, "--calibration", "self", "--output", str(tmp_path / "out")]
    assert run(words) == 2
    assert "write the text before" in capsys.readouterr().err
