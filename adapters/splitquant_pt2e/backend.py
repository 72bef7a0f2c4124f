"""PT2E as a backend of the command line and of the matrix: weights only, by LowBitWeightQuantizer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from splitquant_plugins.backends import Backend, Batch, QuantizedModel, Support, WeightFormat, quantized_by, run_of
from splitquant_plugins.errors import InputError
from splitquant_plugins.grid import Grid
from splitquant_plugins.manifest import ATTRIBUTE, manifest_of
from splitquant_plugins.modules import layer_of_part
from splitquant_plugins.passes.base import ModelPass

_SUPPORT = Support(("channel", "tensor"), ("affine", "symmetric"))


class Pt2eBackend(Backend):
    """PT2E on the exported graph: per channel or per tensor, affine or symmetric."""

    name = "pt2e"
    extra = "pt2e"
    packages = ("torchao",)
    support: ClassVar = {"int2": _SUPPORT, "int4": _SUPPORT, "int8": _SUPPORT}

    def grid(self, chosen: WeightFormat) -> Grid:
        """Return the grid of the quantizer."""
        grid: Grid = _quantizer(chosen).grid
        return grid

    def quantize(
        self,
        model: nn.Module,
        chosen: WeightFormat,
        first: ModelPass | None = None,
        batches: Iterable[Batch] = (),
    ) -> QuantizedModel:
        """Export the model with a free batch size and sequence length, and quantize the graph.

        The first of `batches` is the example that the model is traced with.
        """
        from splitquant_pt2e.compat import convert_pt2e, prepare_pt2e
        from splitquant_pt2e.layers import NAME, stamp_names
        from splitquant_pt2e.stored_layers import stored_weights

        example = next(iter(batches), None)
        if example is None:
            raise InputError("backend pt2e traces the model: give an example batch of its inputs")
        example = _at_least_two(example)

        def work() -> nn.Module:
            before = first if first is not None and first.needs_modules else None
            # A pass that needs modules runs before the export.
            exported = model.eval() if before is None else before.apply(model.eval(), grid=self.grid(chosen))
            owners = layer_of_part(exported)
            graph = export(exported.eval(), example)
            stamp_names(graph)
            for node in graph.graph.nodes:  # parts of layers that were split before go by the layer's name
                if node.meta.get(NAME) in owners:
                    node.meta[NAME] = owners[node.meta[NAME]]
            if before is not None:
                graph.meta[ATTRIBUTE] = manifest_of(exported)
            quantizer = _quantizer(chosen)
            with torch.no_grad():
                prepared = prepare_pt2e(graph, quantizer if first is None or before is not None else first + quantizer)
                prepared(**example)  # the observers see the weights in a forward
                converted: nn.Module = convert_pt2e(prepared)
            return converted

        return quantized_by(
            work,
            first,
            layers=lambda made: stored_weights(cast(GraphModule, made)),
            state=_tensors,
            run=lambda made: lambda batch: run_of(made)({name: batch[name] for name in example}),
        )

    def save(self, quantized: QuantizedModel, folder: Path) -> None:
        """Save the graph, its tensors and the manifest."""
        from splitquant_pt2e.storage import save

        save(quantized.model, folder)  # type: ignore[arg-type]

    def load(self, folder: Path) -> nn.Module:
        """Load what `save` saved, as a graph module that is called like the float model."""
        from splitquant_pt2e.storage import load

        return load(folder)


def export(model: nn.Module, example: Batch) -> GraphModule:
    """Export a model that takes tensors [batch, sequence] by name, with both sizes free."""
    config = getattr(model, "config", None)
    if getattr(config, "use_cache", False):  # a cache of keys and values is no tensor that a graph could return
        config.use_cache = False  # type: ignore[union-attr]
    free = torch.export.Dim.DYNAMIC
    shapes = {name: dict.fromkeys(range(min(tensor.ndim, 2)), free) for name, tensor in example.items()}
    with torch.no_grad():
        exported = torch.export.export(model, (), kwargs=dict(example), dynamic_shapes=shapes)
    graph: GraphModule = exported.module()
    return graph


def _quantizer(chosen: WeightFormat) -> Any:
    from splitquant_pt2e.quantizer import LowBitWeightQuantizer

    options: dict[str, Any] = {"granularity": chosen.granularity, "scheme": chosen.scheme}
    weights: Any = chosen.weights
    return LowBitWeightQuantizer(weights, **options)


def _at_least_two(example: Batch) -> dict[str, Tensor]:
    """Repeat a single row: an export takes sizes of 1 for constants."""
    return {name: tensor if tensor.shape[0] > 1 else torch.cat([tensor, tensor]) for name, tensor in example.items()}


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    from splitquant_pt2e.layers import tensor_of

    graph = cast(GraphModule, model)
    return {str(node.target): tensor_of(graph, node) for node in graph.graph.nodes if node.op == "get_attr"}
