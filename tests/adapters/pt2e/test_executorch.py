"""XNNPACKQuantizer in global mode, and the converted graph as a program of ExecuTorch's XNNPACK delegate."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from splitquant_pt2e import integer_parts
from torch import Tensor

pytest.importorskip("executorch", reason="executorch is not installed: tox run -e executorch")
pytestmark = pytest.mark.filterwarnings("ignore")  # executorch and torch.export deprecate their own


@pytest.fixture
def xnnpack():
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer

    def make(**options):
        config = xnnpack_quantizer.get_symmetric_quantization_config(is_per_channel=True, **options)
        return xnnpack_quantizer.XNNPACKQuantizer().set_global(config)

    return make


def program_of(graph, path: Path, *args: Tensor):
    """Lower a converted graph, write it to `path`, and return the names of its delegates and other calls."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lowered = to_edge_transform_and_lower(torch.export.export(graph, args), partitioner=[XnnpackPartitioner()])
    calls = [n for n in lowered.exported_program().graph.nodes if n.op == "call_function"]
    names = [str(node.target) for node in calls]
    path.write_bytes(lowered.to_executorch().buffer)
    return [name for name in names if "getitem" not in name]


def run(path: Path, *args: Tensor) -> Tensor:
    from executorch.runtime import Runtime

    return Runtime.get().load_program(path).load_method("forward").execute(list(args))[0]


@torch.no_grad()
def test_the_global_mode_does_not_quantize_partial_sums(split, xnnpack, quantize, nets, images, count, sqnr):
    model = nets.residual()
    plain = quantize(model, xnnpack(), images)
    parts = quantize(model, split() + xnnpack(), images)
    assert count(parts)["quantize_per_tensor"] == count(plain)["quantize_per_tensor"]
    assert count(parts)["conv2d"] == 3 * count(plain)["conv2d"]
    many = torch.randn(32, 2, 3, 16, 16, generator=torch.Generator().manual_seed(5))  # two images say little
    expected, split_outputs, plain_outputs = (
        torch.cat([one(batch) for batch in many]) for one in (model, parts, plain)
    )
    assert sqnr(expected, split_outputs) > sqnr(expected, plain_outputs) + 0.5


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static", "convolutions"])
def test_a_split_graph_runs_as_a_program(split, xnnpack, quantize, nets, images, tmp_path, sqnr, kind):
    model, inputs = (nets.residual(), images) if kind == "convolutions" else (nets.mlp(), torch.randn(8, 12))
    quantizer = split() + xnnpack(is_dynamic=kind == "dynamic")
    graph = quantize(model, quantizer if kind == "dynamic" else integer_parts(quantizer), inputs)
    assert sqnr(model(inputs), graph(inputs)) > 20
    calls = program_of(graph, tmp_path / "model.pte", inputs)
    assert "executorch_call_delegate" in calls
    assert not [name for name in calls if "conv" in name or "linear" in name or "quantize" in name]
    assert sqnr(graph(inputs), run(tmp_path / "model.pte", inputs)) > 30
