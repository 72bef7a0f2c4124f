"""Plugins of other distributions, really installed and found through their entry points."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGES = Path(__file__).parent / "plugin_packages"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder with the two packages of `plugin_packages` installed in it."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("site")
    sources = tmp_path_factory.mktemp("sources")
    shutil.copytree(PACKAGES, sources, dirs_exist_ok=True)  # building leaves files beside the sources
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--quiet", "--disable-pip-version-check"]
    packages = sorted(map(str, sources.iterdir()))
    subprocess.run([sys.executable, "-m", "pip", "install", *options, "--target", str(folder), *packages], check=True)
    return folder


@pytest.fixture
def python(site, python_path):
    """Run code in a fresh interpreter that finds the installed packages."""

    def run(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {**python_path(site), **variables}
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)

    return run


LISTING = """
import json
from splitquant_plugins.plugins import Plugins
plugins = Plugins.load()
print(json.dumps({
    "infos": {i.name: [i.source, i.version, i.error, list(i.hooks)] for i in plugins.infos},
    "broken": [i.name for i in plugins.broken],
    "splitters": sorted(plugins.splitters),
}))
"""

USING = """
import copy, json, torch
from torch import nn
from splitquant_plugins import SplitQuantPass, apply_manifest, manifest_of
from splitquant_plugins.errors import ConfigError

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.out = nn.Bilinear(4, 5, 6), nn.Linear(6, 3)
    def forward(self, x, y):
        return self.out(self.mix(x, y))

torch.manual_seed(0)
model = Net()
reference = copy.deepcopy(model)
model = SplitQuantPass(splitter="quantile", spread=0.5)(model)
x, y = torch.randn(7, 4), torch.randn(7, 5)
skeleton = apply_manifest(Net(), manifest_of(model))
skeleton.load_state_dict(model.state_dict())
try:
    SplitQuantPass(splitter="quantile", spread=2)
except ConfigError as error:
    message = str(error)
print(json.dumps({
    "kinds": [r.kind for r in manifest_of(model).split],
    "types": [type(model.mix).__name__, type(model.mix.lower).__name__],
    "shares": [(p.weight != 0).float().mean().item() for p in model.mix.parts()],
    "equal": torch.equal(model.mix.weight, reference.mix.weight),
    "error": (model(x, y) - reference(x, y)).abs().max().item(),
    "reloaded": (model(x, y) - skeleton(x, y)).abs().max().item(),
    "message": message,
}))
import sys
from splitquant_plugins.cli import main
sys.argv = ["splitquant", "plugins"]
main()
"""

BROKEN = {"SPLITQUANT_BLOCK_PLUGINS": "broken"}


def test_both_are_found_and_the_broken_one_is_listed(python):
    result = python(LISTING)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    source, version, error, hooks = found["infos"]["outside"]
    assert (source, version, error) == ("splitquant-outside", "1.2.3", None)
    assert set(hooks) == {
        "splitquant_register_splitters",
        "splitquant_select_layer",
        "splitquant_build_module",
    }
    assert "quantile" in found["splitters"]
    assert found["broken"] == ["broken"]
    assert found["infos"]["broken"][2] == "RuntimeError: this plugin was made for another version"


def test_the_broken_one_is_skipped_with_a_warning_that_names_it(python):
    result = python(LISTING)
    assert "splitquant skips the broken plugin 'broken' of splitquant-broken" in result.stderr
    assert "SPLITQUANT_BLOCK_PLUGINS=broken" in result.stderr
    blocked = python(LISTING, **BROKEN)
    assert blocked.stderr == ""
    assert "broken" not in json.loads(blocked.stdout)["infos"]


def test_strict_makes_it_an_error(python):
    result = python(LISTING, SPLITQUANT_STRICT="1")
    assert result.returncode == 1
    assert "PluginError: plugin 'broken' of splitquant-broken is broken: RuntimeError" in result.stderr
    assert python(LISTING, SPLITQUANT_STRICT="0", **BROKEN).returncode == 0


@pytest.mark.parametrize("name", ["broken", "splitquant-broken"])
def test_asking_for_the_broken_one_is_an_error(python, name):
    result = python(f"from splitquant_plugins.plugins import Plugins; Plugins.load().splitter({name!r})")
    assert result.returncode == 1
    assert f"PluginError: splitter '{name}': its plugin is broken: RuntimeError: this plugin" in result.stderr


def test_an_unknown_name_mentions_the_broken_one(python):
    result = python("from splitquant_plugins.plugins import Plugins; Plugins.load().splitter('other')")
    assert "unknown splitter 'other': choose from" in result.stderr.splitlines()[-1]
    assert "quantile" in result.stderr.splitlines()[-1]
    assert "plugin 'broken' is broken" in result.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def printed(site, python_path) -> str:
    """What USING prints, the broken plugin beside it: one process for two tests, as PyTorch takes seconds to import."""
    pytest.importorskip("splitquant_plugins.cli")
    environment = {**python_path(site), "COLUMNS": "200"}
    result = subprocess.run([sys.executable, "-c", USING], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_splitter_and_the_layer_type_are_used(printed):
    found = json.loads(printed.partition("\n")[0])
    assert found["kinds"] == ["bilinear", "linear"]
    assert found["types"] == ["SplitBilinear", "Bilinear"]
    assert found["shares"] == pytest.approx([1 / 2 - 1 / 12, 1 / 6, 1 / 2 - 1 / 12], abs=0.02)
    assert found["equal"]
    assert found["error"] <= 1e-5
    assert found["reloaded"] == 0
    assert "option spread=2" in found["message"]


def test_the_command_line_lists_both(printed):
    listing = printed.partition("\n")[2]
    for word in ("outside", "quantile", "1.2.3", "broken", "this plugin was made for another version"):
        assert word in listing
