"""Outputs of parts as integers, for targets whose kernels write nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch.fx import GraphModule

from splitquant_plugins.errors import ConfigError
from splitquant_pt2e.annotation import annotation_of, input_spec, resolved
from splitquant_pt2e.compat import ANNOTATION
from splitquant_pt2e.mixing import with_mixin
from splitquant_pt2e.parallel_parts import PART
from splitquant_pt2e.recipe import SplittingQuantizer


def integer_parts(quantizer: Any) -> Any:
    """Return `SplitQuantPass() + quantizer` such that the output of every part is quantized, with a scale of its own.

    Integer kernels that write integers (static XNNPACK, for one) need it; the sum of the parts is still taken in
    float. Where the inputs of a layer are quantized dynamically nothing changes. It costs accuracy: leave it out where
    kernels can write floats. Raises ConfigError for a quantizer without a pass.
    """
    if not isinstance(quantizer, SplittingQuantizer):
        raise ConfigError("integer_parts takes SplitQuantPass() + quantizer: there are no parts without a pass")
    return with_mixin(quantizer, _IntegerParts, "Integer")


class _IntegerParts:
    def annotate(self, model: GraphModule) -> GraphModule:
        annotated = super().annotate(model)  # type: ignore[misc]
        give_parts_outputs(model)
        return annotated


def give_parts_outputs(model: GraphModule) -> None:
    """Annotate the output of every part as its input is."""
    for node in model.graph.nodes:
        source, annotation = node.meta.get(PART), annotation_of(node)
        if source is None or annotation is None:
            continue
        spec = resolved(input_spec(node, node.args[source]))
        if spec is not None and not getattr(spec, "is_dynamic", False):
            node.meta[ANNOTATION] = replace(annotation, output_qspec=spec)
