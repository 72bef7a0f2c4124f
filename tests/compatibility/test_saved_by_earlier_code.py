"""What release 0.1.0 saved, before the modules moved, still loads and computes the same.

`saved/index.json` lists the files, and `saved/make_fixtures.py` says how each was made. Weights have to come back bit
for bit; outputs up to the order in which a processor sums.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, load_model
from torch import Tensor, nn
from torch.fx import GraphModule

from splitquant_plugins import Manifest, apply_manifest, manifest_of

SAVED = Path(__file__).parent / "saved"
INDEX = json.loads((SAVED / "index.json").read_text())
FIXTURES = {entry["name"]: entry for entry in INDEX["fixtures"]}
NEEDS = {
    "quanto": ("transformers", "optimum.quanto"),
    "inc": ("transformers", "neural_compressor.torch.quantization"),  # INC wants transformers imported first
    "pt2e": ("torchao.quantization.pt2e",),
}


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16, bias=False), nn.GELU(), nn.Linear(16, 8))


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.BatchNorm2d(3),
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 6, 3, stride=2, groups=6, padding=1, padding_mode="reflect"),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        nn.Linear(96, 5),
    )


def tied_net() -> nn.Module:
    first, twin = nn.Linear(8, 8), nn.Linear(8, 8)
    twin.weight = first.weight
    return nn.Sequential(first, nn.ReLU(), first, nn.ReLU(), twin)


UNSPLIT: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, "conv_net": conv_net, "tied_net": tied_net}


def load(loader: str, path: Path, unsplit: nn.Module | None) -> nn.Module:
    """Load what was saved, by the public names; backends that are not installed are skipped."""
    with warnings.catch_warnings():  # torchao deprecates some of its own enums while it is imported
        warnings.simplefilter("ignore")
        for package in NEEDS.get(loader, ()):
            pytest.importorskip(package)
    if loader in NEEDS:
        load_saved = importlib.import_module(f"splitquant_{loader}").load
        return load_saved(path) if unsplit is None else load_saved(path, unsplit)
    if loader == "torch":
        return torch.load(path, weights_only=False)  # a file of our own
    if loader == "pickle":
        return pickle.loads(path.read_bytes())  # a file of our own
    assert loader == "manifest", f"index.json names the loader {loader!r}, which is unknown here"
    assert unsplit is not None
    model = apply_manifest(unsplit, Manifest.load(path))
    load_model(model, path / "parts.safetensors")
    return model.eval()


def output_of(model: nn.Module, folder: Path) -> Tensor:
    with torch.no_grad():
        output: Any = model(**load_file(folder / "input.safetensors"))
    return getattr(output, "logits", output)


def digests_of(model: nn.Module) -> dict[str, str]:
    """Digests of what each layer's weight dequantizes to, parts summed in order."""
    if isinstance(model, GraphModule):
        from splitquant_pt2e import stored_weights

        stored = {name: [one.weight for one in parts] for name, parts in stored_weights(model).items()}
        return {name: digest(sum(parts[1:], parts[0])) for name, parts in stored.items()}
    found = {}
    for record in manifest_of(model).layers:
        weight: Any = model.get_submodule(record.name).weight
        if record.action == "split":
            found[record.name] = digest(weight)
        elif record.values is not None:  # solved and quantized, and not split
            found[record.name] = digest(weight.dequantize())
    return found


def digest(weight: Tensor) -> str:
    data = weight.detach().float().contiguous()
    return hashlib.sha256(repr(tuple(data.shape)).encode() + data.numpy().tobytes()).hexdigest()


def load_fixture(name: str) -> nn.Module:
    entry = FIXTURES[name]
    unsplit = UNSPLIT[entry["unsplit"]]() if entry["unsplit"] else None
    return load(entry["loader"], SAVED / entry["saved"], unsplit)


def test_every_saved_folder_is_in_the_index() -> None:
    assert {path.name for path in SAVED.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(FIXTURES)


@pytest.mark.parametrize("name", FIXTURES)
def test_it_loads_and_computes_the_same(name: str) -> None:
    model, entry = load_fixture(name), FIXTURES[name]
    assert not model.training
    assert digests_of(model) == entry["weights"]
    expected = load_file(SAVED / name / "expected.safetensors")["output"]
    torch.testing.assert_close(output_of(model, SAVED / name), expected, rtol=1e-4, atol=1e-5)
    manifest = manifest_of(model)
    assert manifest.version == INDEX["release"]
    touched = {record.name for record in manifest.layers if record.action == "split" or record.values is not None}
    assert touched == set(entry["weights"])
    assert bool(manifest.solved) == ("DecoupleQPass" in entry["what"])


@pytest.mark.parametrize("name", [name for name, entry in FIXTURES.items() if entry["loader"] != "manifest"])
def test_it_can_be_saved_again(name: str, tmp_path: Path) -> None:
    model, entry = load_fixture(name), FIXTURES[name]
    expected = output_of(model, SAVED / name)
    path = tmp_path / Path(entry["saved"]).name
    if entry["loader"] in ("quanto", "inc", "pt2e"):
        importlib.import_module(f"splitquant_{entry['loader']}").save(model, path)
    else:
        path.write_bytes(pickle.dumps(model)) if entry["loader"] == "pickle" else torch.save(model, path)
    again = load(entry["loader"], path, UNSPLIT[entry["unsplit"]]() if entry["unsplit"] else None)
    assert torch.equal(output_of(again, SAVED / name), expected)
    assert digests_of(again) == entry["weights"]


@pytest.mark.parametrize("name", [name for name, entry in FIXTURES.items() if entry["loader"] in ("torch", "pickle")])
def test_a_part_of_an_unpickled_model_can_be_replaced(name: str) -> None:
    """Replacing a part asks the plugins that are installed now."""
    model = load_fixture(name)
    split: Any = model.get_submodule(manifest_of(model).split[0].name)
    before = split.weight.detach().clone()
    name_of_part, part = next(iter(split.named_children()))
    lost = part.weight.detach().clone()
    twin = pickle.loads(pickle.dumps(part))
    with torch.no_grad():
        twin.weight.zero_()
    setattr(split, name_of_part, twin)
    torch.testing.assert_close(split.weight.detach(), before - lost)
