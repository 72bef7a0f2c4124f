"""Scalars become tensors for annotation, but where integers are computed."""

from __future__ import annotations

import torch
from splitquant_pt2e.compat import Quantizer
from splitquant_pt2e.integer_scalars import leaving_integers
from torch import nn

aten = torch.ops.aten


class ScalarsToTensors(Quantizer):
    """As XNNPACKQuantizer does, for additions."""

    def transform_for_annotation(self, model):
        for number, node in enumerate(list(model.graph.nodes)):
            if node.target == aten.add.Tensor and not isinstance(node.args[1], torch.fx.Node):
                model.register_buffer(f"scalar_{number}", torch.tensor(float(node.args[1])))
                with model.graph.inserting_before(node):
                    node.args = (node.args[0], model.graph.get_attr(f"scalar_{number}"))
        model.recompile()
        return model

    def annotate(self, model):
        return model

    def validate(self, model):
        pass


class Lookup(nn.Module):
    def forward(self, table, index):
        return table[index + 1] + 2


@torch.no_grad()
def test_integers_still_index():
    args = torch.randn(5, 3), torch.tensor([0, 2])
    expected = Lookup()(*args)
    changed = {}
    for kind in (ScalarsToTensors, leaving_integers(ScalarsToTensors)):
        graph = torch.export.export(Lookup(), args).module()
        made = kind().transform_for_annotation(graph)
        assert made is graph
        buffers = [name for name, _ in graph.named_buffers()]
        changed[kind is ScalarsToTensors] = len(buffers)
        if kind is not ScalarsToTensors:
            torch.testing.assert_close(graph(*args), expected)
            assert kind.__name__ == "ScalarsToTensors"
    assert changed == {True: 2, False: 1}
