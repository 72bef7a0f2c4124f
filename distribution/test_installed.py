"""The wheel works where nothing is but itself and what it depends on, and the checkout is out of reach."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

FILES = """
import json, importlib, importlib.metadata
from importlib.resources import files
names = ("splitquant_plugins", "splitquant_quanto", "splitquant_inc", "splitquant_pt2e")
print(json.dumps({
    "homes": [importlib.import_module(f"{name}.plugin" if "_plugins" not in name else name).__file__ for name in names],
    "typed": [(files(name) / "py.typed").is_file() for name in names],
    "schema": json.loads((files("splitquant_plugins.recipes") / "recipe.schema.json").read_text())["title"],
    "entry points": sorted(one.name for one in importlib.metadata.entry_points(group="splitquant")),
}))
"""

SPLIT = """
import torch, splitquant_plugins
from splitquant_plugins import Manifest, SplitQuantPass, UniformGrid, apply_manifest, manifest_of
from safetensors.torch import load_model, save_model

def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)).eval()

x, unsplit, grid = torch.randn(8, 16), net(), UniformGrid(bits=2)
split = SplitQuantPass(splitter="kmeans")(net())
assert [layer.k for layer in manifest_of(split).split] == [3, 3]
assert torch.allclose(split(x), unsplit(x), atol=1e-5)
for layer in (0, 2):
    whole = unsplit[layer].weight
    parts = sum(grid.quantize_dequantize(part.weight) for part in split[layer].parts())
    assert (whole - parts).norm() < (whole - grid.quantize_dequantize(whole)).norm() / 2
manifest_of(split).save("split")
save_model(split, "split/parts.safetensors")
again = apply_manifest(net(), Manifest.load("split"))
load_model(again, "split/parts.safetensors")
assert torch.equal(again(x), split(x))
print(splitquant_plugins.__file__)
"""


def is_installed(path: str) -> bool:
    """Say whether a module comes from the environment's packages, and not from the checkout."""
    return "site-packages" in Path(path).parts and not Path(path).is_relative_to(ROOT / "splitquant_plugins")


def test_what_is_imported_is_what_was_installed_with_its_data(installed: Callable[..., str]) -> None:
    found = json.loads(installed("python", "-W", "error", "-c", FILES))
    assert all(map(is_installed, found["homes"])), found["homes"]
    assert found["typed"] == [True] * 4
    assert found["schema"] == "splitquant recipe"
    assert found["entry points"] == ["inc", "pt2e", "quanto"]


def test_what_it_depends_on_fits_together(installed: Callable[..., str]) -> None:
    installed("python", "-m", "pip", "check")


def test_the_command_runs_and_lists_every_plugin_as_sound(installed: Callable[..., str]) -> None:
    assert "quantize" in installed("splitquant", "--help")
    assert "BROKEN" not in installed("splitquant", "plugins", "--json", "plugins.json")
    rows = json.loads(installed("python", "-c", "print(open('plugins.json').read())"))
    assert {"quanto", "inc", "pt2e", "simulated"} <= {name for row in rows for name in row["backends"]}
    assert [row["error"] for row in rows if row["error"]] == []


def test_a_model_is_split_saved_and_loaded(installed: Callable[..., str]) -> None:
    assert is_installed(installed("python", "-W", "error", "-c", SPLIT).strip())
