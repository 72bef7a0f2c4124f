"""Graphs exported from small models, and the plugins with this adapter."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from splitquant_plugins import SplitQuantPass
from splitquant_plugins.plugins import Plugins

collect_ignore_glob = [] if find_spec("torchao") else ["test_*.py"]


@pytest.fixture
def pt2e_plugins(plugins: Plugins) -> Plugins:
    if "pt2e" not in plugins.backends:
        import splitquant_pt2e.plugin

        plugins.add(splitquant_pt2e.plugin, "pt2e")
    return plugins


@pytest.fixture
def split(pt2e_plugins: Plugins) -> Callable[..., SplitQuantPass]:
    """Make a pass that knows this adapter."""
    return lambda **options: SplitQuantPass(plugins=pt2e_plugins, **options)


@pytest.fixture
def export() -> Callable[..., GraphModule]:
    def export_(model: nn.Module, *args: Tensor, **kwargs: Tensor) -> GraphModule:
        with torch.no_grad():
            return torch.export.export(model, args, kwargs=kwargs).module()

    return export_


@pytest.fixture
def quantize(export: Callable[..., GraphModule]) -> Callable[..., GraphModule]:
    """Export, prepare, calibrate with the example and convert."""
    from splitquant_pt2e.compat import convert_pt2e, prepare_pt2e

    def quantize_(model: nn.Module, quantizer: Any, *args: Tensor, **kwargs: Tensor) -> GraphModule:
        with torch.no_grad():
            prepared = prepare_pt2e(export(model, *args, **kwargs), quantizer)
            prepared(*args, **kwargs)
            return convert_pt2e(prepared)

    return quantize_


@pytest.fixture
def x86() -> Callable[..., Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its import uses what torch has deprecated
        import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as inductor

    def make(**options: Any) -> Any:
        config = inductor.get_default_x86_inductor_quantization_config(**options)
        return inductor.X86InductorQuantizer().set_global(config)

    return make


@pytest.fixture
def count() -> Callable[[GraphModule], Counter]:
    """Count the operators of a graph by their short name."""

    def count_(graph: GraphModule) -> Counter:
        names = [str(node.target).split(".") for node in graph.graph.nodes if node.op == "call_function"]
        return Counter(name[1] if len(name) > 1 else name[0] for name in names)

    return count_


class Residual(nn.Module):
    """What quantizers fuse: conv + relu, conv + add + relu, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = (self.body(x) + x).relu()
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


@pytest.fixture
def nets(models: SimpleNamespace) -> SimpleNamespace:
    return SimpleNamespace(
        **vars(models),
        residual=lambda: models.settle(Residual()).eval(),
        attention=lambda: Attention().eval(),
        encoder=lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(),
    )


@pytest.fixture
def sqnr() -> Callable[[Tensor, Tensor], float]:
    """Signal to quantization noise in dB."""

    def decibels(reference: Tensor, value: Tensor) -> float:
        reference, value = reference.detach(), value.detach()
        return float(10 * torch.log10(reference.pow(2).sum() / (reference - value).pow(2).sum()))

    return decibels
