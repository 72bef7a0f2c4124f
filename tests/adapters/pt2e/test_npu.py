"""Stock quantizers of NPUs: their grids are known, their programs stay whole, and a split never makes them worse."""

from __future__ import annotations

import contextlib
import io

import pytest
import torch
from splitquant_pt2e import Pt2eGrid, grid_of_spec
from splitquant_pt2e.annotation import input_spec, resolved
from splitquant_pt2e.layers import layer_calls
from splitquant_pt2e.stock_quantizers import STOCK, installed, make
from torch import nn

pytest.importorskip("executorch", reason="executorch is not installed: tox run -e npu")
pytestmark = pytest.mark.filterwarnings("ignore")  # executorch and torch.export deprecate their own


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return self.head(torch.relu(x + self.body(x)).mean((2, 3)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    model = Net().eval()
    with torch.no_grad():
        for layer in (model.stem, model.body, model.head):
            layer.weight.view(-1)[::37] *= 6
    return model


def quantized(model, quantizer, images):
    from splitquant_pt2e.compat import convert_pt2e, prepare_pt2e

    graph = torch.export.export(model, (images[:1],), strict=True).module(check_guards=False)
    prepared = prepare_pt2e(graph, quantizer)
    with torch.no_grad():
        for image in images.split(1):
            prepared(image)
    return convert_pt2e(prepared)


@pytest.mark.parametrize("name", STOCK)
def test_the_grid_of_a_stock_quantizer_is_closed(net, name):
    if reason := installed(name):
        pytest.skip(reason)
    graph = torch.export.export(net, (torch.randn(2, 3, 8, 8),), strict=True).module(check_guards=False)
    quantizer = make(name)
    graph = quantizer.transform_for_annotation(graph) or graph
    quantizer.annotate(graph)
    specs = [(resolved(input_spec(call.node, call.weight)), call.axis) for call in layer_calls(graph)]
    grids = [grid_of_spec(spec, axis) for spec, axis in specs if spec is not None]
    assert grids
    assert all(isinstance(grid, Pt2eGrid) for grid in grids)


@pytest.mark.parametrize("unit", ["ethos-u55-128", "ethos-u85-256"])
def test_an_ethos_program_is_one_delegate(net, split, unit):
    pytest.importorskip("ethosu.vela", reason="ethos-u-vela is not installed: tox run -e npu")
    from executorch.backends.arm.ethosu import EthosUCompileSpec, EthosUPartitioner
    from executorch.exir import to_edge_transform_and_lower

    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))

    def program(quantizer):
        graph = quantized(net, quantizer, images)
        with contextlib.redirect_stdout(io.StringIO()):
            lowered = to_edge_transform_and_lower(
                torch.export.export(graph, (images[:1],), strict=True),
                partitioner=[EthosUPartitioner(EthosUCompileSpec(unit))],
            )
            size = len(lowered.to_executorch().buffer)
        with torch.no_grad():
            error = torch.cat([graph(image) - net(image) for image in images.split(1)]).square().sum()
        calls = [str(node.target) for node in lowered.exported_program().graph.nodes if node.op == "call_function"]
        return [name for name in calls if "delegate" in name], [name for name in calls if "aten" in name], size, error

    plain, parts = (
        program(quantizer) for quantizer in (make("ethos-u"), split(k=2, splitter="grid") + make("ethos-u"))
    )
    assert len(plain[0]) == len(parts[0]) == 1
    assert plain[1] == parts[1] == []
    assert plain[2] < parts[2] < 3 * plain[2]
    assert parts[3] < plain[3]
