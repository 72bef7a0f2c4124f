"""Imports: the package and its plugins are light, and the public names are there."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import splitquant_plugins
from splitquant_plugins.backends import Packer
from splitquant_plugins.errors import SplitQuantWarning

HEAVY = ("torch", "transformers", "optimum", "neural_compressor", "torchao", "sklearn", "numpy")
PLUGINS = (
    "splitquant_plugins",
    "splitquant_plugins.hookspecs",
    "splitquant_plugins.builtin.preparations",
    "splitquant_plugins.builtin.layers",
    "splitquant_plugins.builtin.splitters",
    "splitquant_quanto.plugin",
)


def loaded_after(code: str, environment: dict[str, str]) -> set[str]:
    code += "\nimport sys; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    return set(result.stdout.split())


def test_importing_the_package_or_its_plugins_imports_neither_torch_nor_a_backend(python_path):
    loaded = loaded_after("\n".join(f"import {name}" for name in PLUGINS), python_path())
    assert not loaded & set(HEAVY)


def test_loading_plugins_imports_neither_torch_nor_a_backend(python_path):
    code = "from splitquant_plugins.plugins import Plugins; assert not Plugins.load().broken"
    assert not loaded_after(code, python_path()) & set(HEAVY)


def test_the_pass_imports_no_backend(python_path):
    code = "from splitquant_plugins import SplitQuantPass; import torch\nSplitQuantPass()(torch.nn.Linear(3, 3))"
    assert not loaded_after(code, python_path()) & {"transformers", "optimum", "neural_compressor", "torchao"}


def test_public_names():
    for name in splitquant_plugins.__all__:
        assert getattr(splitquant_plugins, name) is not None
    assert set(splitquant_plugins.__all__) <= set(dir(splitquant_plugins))
    with pytest.raises(AttributeError, match="no attribute 'SplitQuantPas'"):
        splitquant_plugins.SplitQuantPas  # noqa: B018


def test_it_is_typed():
    from importlib.resources import files

    assert (files("splitquant_plugins") / "py.typed").is_file()
    assert (files("splitquant_quanto") / "py.typed").is_file()


def test_the_former_home_of_packer_says_where_it_stands_now():
    with pytest.warns(SplitQuantWarning, match=r"splitquant_plugins\.backends"):
        former = importlib.import_module("splitquant_plugins.streaming.packer")
    assert former.Packer is Packer
