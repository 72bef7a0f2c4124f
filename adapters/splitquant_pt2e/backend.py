"""PT2E as a backend of the command line and of the matrix: weights only, by LowBitWeightQuantizer."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from splitquant_plugins.backends import (
    Backend,
    Batch,
    Program,
    QuantizedModel,
    StockQuantizers,
    Support,
    WeightFormat,
    WeightRequest,
    quantized_by,
    run_of,
)
from splitquant_plugins.errors import InputError, first_line
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
    storage = "splitquant_pt2e.storage"
    support: ClassVar = {"int2": _SUPPORT, "int4": _SUPPORT, "int8": _SUPPORT}

    def stock_quantizers(self) -> StockQuantizers:
        """Return the quantizers that ship with torchao, executorch and nncf."""
        from splitquant_pt2e.stock_quantizers import STOCK, missing_packages

        reasons = {name: missing_packages(name) for name in STOCK}
        return StockQuantizers(
            {name: stock.description for name, stock in STOCK.items()},
            {name: reason for name, reason in reasons.items() if reason is not None},
        )

    def stock_format(self, request: WeightRequest) -> WeightFormat:
        """Return the weight format that a stock quantizer has."""
        from splitquant_pt2e.stock_grid import stock_grid

        grid = stock_grid(str(request.quantizer))
        scheme: Any = grid.scheme
        return WeightFormat(
            f"int{grid.bits}", grid.bits, grid.granularity, None, scheme, request.method, request.quantizer
        )

    def grid(self, chosen: WeightFormat) -> Grid:
        if chosen.quantizer is not None:
            from splitquant_pt2e.stock_grid import stock_grid

            return stock_grid(chosen.quantizer)
        grid: Grid = _quantizer(chosen).grid
        return grid

    def quantize(
        self,
        model: nn.Module,
        chosen: WeightFormat,
        first: ModelPass | None = None,
        batches: Iterable[Batch] = (),
        ignore: Sequence[str] | None = None,
    ) -> QuantizedModel:
        """Export the model with a free batch size, and sequence length of token ids, and quantize the graph.

        The first of `batches` is the example that the model is traced with. A stock quantizer calibrates with all.
        """
        from splitquant_pt2e.compat import convert_pt2e, prepare_pt2e
        from splitquant_pt2e.layers import NAME, stamp_names
        from splitquant_pt2e.left_float import leaving_float
        from splitquant_pt2e.quiet import quiet
        from splitquant_pt2e.stored_layers import stored_weights

        given = list(batches) if chosen.quantizer is not None else []
        example = next(iter(given or batches), None)
        if example is None:
            raise InputError("backend pt2e traces the model: give an example batch of its inputs, as --calibration")
        example = _at_least_two(example)
        whole_layers = [glob.escape(name) for name in ignore or ()]

        def work() -> nn.Module:
            # A stock quantizer's grids are known once it has annotated the graph.
            on_graph = chosen.quantizer is not None or first is None or not first.needs_modules
            before = None if on_graph else first
            # A pass that needs modules runs before the export.
            whole = model.eval()
            exported = whole if before is None else before.apply(whole, grid=self.grid(chosen), ignore=whole_layers)
            owners = layer_of_part(exported)
            graph = export(exported.eval(), example, strict=_is_strict(chosen))
            stamp_names(graph)
            for node in graph.graph.nodes:  # parts of layers that were split before go by the layer's name
                if node.meta.get(NAME) in owners:
                    node.meta[NAME] = owners[node.meta[NAME]]
            if before is not None:
                graph.meta[ATTRIBUTE] = manifest_of(exported)
            quantizer = leaving_float(_quantizer(chosen), ignore or ())
            with torch.no_grad(), quiet() if chosen.quantizer is not None else nullcontext():
                prepared = prepare_pt2e(graph, quantizer if first is None or before is not None else first + quantizer)
                prepared(**example)  # the observers see the weights in a forward
                for batch in given[1:]:
                    prepared(**{name: batch[name] for name in example})
                converted: nn.Module = convert_pt2e(prepared)
            return converted

        return quantized_by(
            work,
            first,
            layers=lambda made: stored_weights(cast(GraphModule, made)),
            state=_tensors,
            run=lambda made: lambda batch: run_of(made)({name: batch[name] for name in example}),
        )

    def targets(self) -> dict[str, str]:
        """Devices that ExecuTorch writes programs for."""
        from splitquant_pt2e.programs import TARGETS

        return {name: target.description for name, target in TARGETS.items()}

    def program(
        self, model: nn.Module, target: str, first: ModelPass | None, batches: Sequence[tuple[Tensor, ...]]
    ) -> Program:
        """Quantize the model with the target's stock quantizer, and lower it by ExecuTorch."""
        from splitquant_pt2e.programs import export_program

        return export_program(model.eval(), target, first, batches)


def export(model: nn.Module, example: Batch, *, strict: bool = False) -> GraphModule:
    """Export a model that takes tensors by name, with the batch size free; `strict` has no guards.

    The length of token ids and masks, [batch, sequence], is free as well where the model allows that. Raises InputError
    for a model that cannot be exported.
    """
    config = getattr(model, "config", None)
    if getattr(config, "use_cache", False):  # a cache of keys and values is no tensor that a graph could return
        config.use_cache = False  # type: ignore[union-attr]
    shapes = {name: _free(tensor) for name, tensor in example.items()}
    try:
        with torch.no_grad():
            exported = torch.export.export(model, (), kwargs=dict(example), dynamic_shapes=shapes, strict=strict)
    except Exception as error:  # whatever torch.export makes of a model, which may be anybody's
        raise InputError(
            f"{type(model).__name__} cannot be exported with a free batch size, as backend pt2e does it "
            f"({type(error).__name__}: {first_line(error)}); choose another backend"
        ) from error
    graph: Any = exported.module(check_guards=False) if strict else exported.module()
    return cast(GraphModule, graph)


def _free(tensor: Tensor) -> dict[int, Any]:
    """Which sizes of an input are free."""
    dim = torch.export.Dim
    lengths = {1: dim.AUTO} if tensor.ndim > 1 and not tensor.is_floating_point() else {}
    return {0: dim.DYNAMIC, **lengths}


def _is_strict(chosen: WeightFormat) -> bool:
    from splitquant_pt2e.stock_quantizers import STOCK

    return chosen.quantizer is not None and STOCK[chosen.quantizer].strict


def _quantizer(chosen: WeightFormat) -> Any:
    if chosen.quantizer is not None:
        from splitquant_pt2e.stock_quantizers import make

        return make(chosen.quantizer)
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
