"""A broken checkpoint is one line that names the file, or the tensor, whatever command meets it."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

INDEX = "model.safetensors.index.json"
KEY = "bert.pooler.dense.weight"


def shard_of(folder: Path) -> Path:
    """The file that holds the tensor KEY."""
    if (folder / INDEX).is_file():
        return folder / str(json.loads((folder / INDEX).read_text())["weight_map"][KEY])
    return folder / "model.safetensors"


def truncated(folder: Path) -> None:
    path = shard_of(folder)
    path.write_bytes(path.read_bytes()[:-100])


def header_cut_off(folder: Path) -> None:
    path = shard_of(folder)
    path.write_bytes(path.read_bytes()[:50])


def header_that_lies(folder: Path) -> None:
    path = shard_of(folder)
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header[KEY]["shape"] = [10**9, 10**9]
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def no_weights(folder: Path) -> None:
    shard_of(folder).unlink()


def of_another_shape(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(shard_of(folder))
    rows, columns = tensors[KEY].shape
    tensors[KEY] = torch.zeros(columns // 2, rows * 2)
    save_file(tensors, shard_of(folder), metadata={"format": "pt"})


def of_another_type(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": "wide"}))


def impossible(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_attention_heads": 3}))


def changed_index(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = json.loads((folder / INDEX).read_text())
        (folder / INDEX).write_text(json.dumps(change(content)))

    return damage


SINGLE = {
    "truncated": (truncated, r"model\.safetensors is truncated"),
    "header cut off": (header_cut_off, r"model\.safetensors is truncated"),
    "header that lies": (header_that_lies, r"model\.safetensors is truncated, damaged or no"),
    "no weights": (no_weights, r"model\.safetensors"),
    "another shape": (of_another_shape, rf"{KEY} is \[8, 32\], and \[16, 16\] in Bert"),
    "hidden_size": (of_another_type, r"hidden_size.* expected int"),
    "heads": (impossible, r"not a multiple of the number of attention heads"),
}
SHARDED = {
    **{name: SINGLE[name] for name in ("truncated", "header that lies", "another shape")},
    "truncated": (truncated, r"model-\d+-of-\d+\.safetensors is truncated"),
    "header that lies": (header_that_lies, r"model-\d+-of-\d+\.safetensors is truncated, damaged or no"),
    "missing shard": (no_weights, r"index\.json: shard model-\d+-of-\d+\.safetensors does not exist"),
    "a tensor that is not there": (
        changed_index(lambda c: {**c, "weight_map": {**c["weight_map"], "ghost": c["weight_map"][KEY]}}),
        r"index\.json: model-\d+-of-\d+\.safetensors has no tensor ghost",
    ),
    "no map": (changed_index(lambda _: {}), r"index\.json has no weight_map"),
    "a list": (changed_index(lambda _: []), r"index\.json has no weight_map"),
    "outside": (
        changed_index(lambda c: {**c, "weight_map": {**c["weight_map"], KEY: "../x.safetensors"}}),
        r"index\.json: tensor .* is no safetensors file beside it",
    ),
}


@pytest.mark.parametrize("command", ["compare", "inspect", "memory", "stream"])
@pytest.mark.parametrize(
    ("shards", "case"), [(None, name) for name in SINGLE] + [("4KB", name) for name in SHARDED], ids=str
)
def test_it_is_one_line_with_the_file_or_the_tensor(
    shards: str | None,
    case: str,
    command: str,
    classifier: Callable[..., Path],
    texts: Path,
    fails: Callable[..., str],
    tmp_path: Path,
) -> None:
    if command in ("memory", "stream"):
        pytest.importorskip("optimum.quanto")
    folder = classifier(shards=shards)
    damage, message = (SHARDED if shards else SINGLE)[case]
    damage(folder)
    quantize = ["quantize", folder, "--output", tmp_path / "out"]
    line = fails(
        *{
            "compare": ["compare", folder, "--data", texts, "--backend", "simulated"],
            "inspect": ["inspect", folder],
            "memory": [*quantize, "--no-stream"],
            "stream": [*quantize, "--stream"],
        }[command]
    )
    import re

    assert re.search(message, line), line
    assert str(folder) in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["compare", "inspect"])
def test_a_damaged_pickle(
    command: str, classifier: Callable[..., Path], texts: Path, fails: Callable[..., str]
) -> None:
    folder = classifier()
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"garbage")
    data = ["--data", texts, "--backend", "simulated"] if command == "compare" else []
    line = fails(command, folder, *data)
    assert "pickled weights are damaged" in line
    assert "weights_only" not in line
