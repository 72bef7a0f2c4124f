"""Every JSON file and safetensors header that is loaded: damaged in one place it is one clear error, or it loads."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from splitquant_plugins import SplitQuantPass
from splitquant_plugins.errors import SplitQuantError


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


def quanto_folder(folder):
    quanto = pytest.importorskip("optimum.quanto")
    from splitquant_quanto import load, save

    model = SplitQuantPass()(mlp())
    quanto.quantize(model, weights=quanto.qint4)
    quanto.freeze(model)
    save(model, folder)
    return lambda: load(folder, mlp())


def inc_folder(folder):
    quantization = pytest.importorskip("neural_compressor.torch.quantization")
    from splitquant_inc import load, save

    recipe = SplitQuantPass(splitter="residual") + quantization.RTNConfig(bits=4, use_sym=False, group_size=-1)
    save(quantization.convert(quantization.prepare(mlp(), recipe)), folder)
    return lambda: load(folder, mlp())


FILES = [
    (quanto_folder, "splitquant_manifest.json"),
    (quanto_folder, "splitquant_storage.json"),
    (quanto_folder, "quanto_qmap.json"),
    (quanto_folder, "model.safetensors"),
    (inc_folder, "splitquant_manifest.json"),
    (inc_folder, "splitquant_inc.json"),
    (inc_folder, "model.safetensors"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "name"), FILES, ids=lambda value: getattr(value, "__name__", value))
def test_mutated_files_are_refused_or_load(make, name, tmp_path, mutations, count_cases):
    load = make(tmp_path)
    load()
    path = tmp_path / name
    content = path.read_bytes()
    header, rest = content, b""
    if name.endswith(".safetensors"):
        length = 8 + int.from_bytes(content[:8], "little")
        header, rest = content[8:length], content[length:]
    refused, wrong = 0, []
    mutants = list(mutations(json.dumps(json.loads(header)), 20))
    for text in mutants:
        raw = text.encode()
        path.write_bytes(len(raw).to_bytes(8, "little") + raw + rest if rest else raw)
        try:
            load()
        except SplitQuantError as error:
            refused += 1
            if "\n" in str(error):
                wrong.append(f"more than one line: {error}")
        except Exception as error:
            wrong.append(f"{type(error).__name__}: {error} of {text[:300]}")
    count_cases(f"{make.__name__} {name} mutated", len(mutants), f"{refused} refused")
    assert not wrong, f"{len(wrong)} of {len(mutants)}: {wrong[:3]}"
    assert refused > len(mutants) / 4
