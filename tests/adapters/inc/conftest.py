"""A small stack of blocks, and a pass that knows the inc adapter."""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from splitquant_plugins import SplitQuantPass, Splitter, hookimpl
from splitquant_plugins.plugins import Plugins

with warnings.catch_warnings():  # torchao deprecates some of its own enums while INC imports it
    warnings.simplefilter("ignore")
    pytest.importorskip("transformers")  # INC wants it imported first
    pytest.importorskip("neural_compressor.torch.quantization")
logging.getLogger("neural_compressor").setLevel(logging.ERROR)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    """Two blocks between an embedding and a head; `name_or_path` is what INC's GPTQ asks for."""

    def __init__(self, path: str, width: int = 16) -> None:
        super().__init__()
        self.name_or_path = path
        self.embedding = nn.Embedding(40, width)
        self.layers = nn.ModuleList([Block(width), Block(width)])
        self.head = nn.Linear(width, 8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@pytest.fixture(autouse=True, scope="module")
def _cheap_garbage_collection() -> Iterator[None]:
    """INC collects garbage for every layer, which takes long where much is imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def net(tmp_path: Path) -> Callable[[], Net]:
    """Return a maker of the same model with a few large weights, every time."""
    folder = tmp_path / "float"
    folder.mkdir()

    def make() -> Net:
        torch.manual_seed(3)
        model = Net(str(folder)).eval()
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.Linear):
                    module.weight.view(-1)[::97] = 0.9
        return model

    return make


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 40, (4, 12))


class _Bands:
    """A plugin with a splitter by value: far below zero, around it, far above it."""

    @hookimpl
    def splitquant_register_splitters(self, register: Any) -> None:
        register("bands", BandSplitter, "made by a test")


class BandSplitter(Splitter):
    splits_bias = True

    def split(self, tensor: Tensor, plan: Any, grid: Any) -> Sequence[Tensor]:
        far = tensor.abs() > tensor.abs().mean()
        kinds = (far & (tensor < 0), ~far, far & (tensor > 0))
        if plan.k == 2:
            kinds = (kinds[0], ~kinds[0])
        return [torch.where(kind, tensor, torch.zeros_like(tensor)) for kind in kinds]


@pytest.fixture
def plugins() -> Plugins:
    """The installed plugins, with the inc adapter of this checkout where it is not installed."""
    loaded = Plugins.load()
    if "inc" not in loaded.backends:
        import splitquant_inc.plugin

        loaded.add(splitquant_inc.plugin, "inc")
    loaded.add(_Bands(), "bands")
    return loaded


@pytest.fixture
def split_pass(plugins: Plugins) -> Callable[..., SplitQuantPass]:
    """Return a maker of passes with a splitter that needs no clustering."""
    return lambda **options: SplitQuantPass(splitter="bands", plugins=plugins, **options)


@pytest.fixture
def sqnr() -> Callable[[Tensor, Tensor], float]:
    def measure(wanted: Tensor, found: Tensor) -> float:
        error = (wanted - found).double().square().sum().clamp(min=1e-300)
        return float(10 * torch.log10(wanted.double().square().sum() / error))

    return measure


@pytest.fixture
def quantized() -> Callable[[nn.Module], dict[str, Any]]:
    from splitquant_inc.stored_layers import quantized_layers

    return quantized_layers
