"""A quantizer of the same kind as another that leaves some layers float, whatever it is itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import GraphModule

from splitquant_plugins.errors import ConfigError
from splitquant_pt2e.annotation import annotation_of, references, set_untouched
from splitquant_pt2e.layers import layer_calls, layer_name
from splitquant_pt2e.mixing import with_mixin


class LeavingFloat:
    """What is mixed into the class of a quantizer."""

    left_float: frozenset[str]

    def annotate(self, model: GraphModule) -> GraphModule:
        """Annotate the graph, and take the annotations of those layers off again."""
        annotated = super().annotate(model)  # type: ignore[misc]
        nodes = [call.node for call in layer_calls(model) if layer_name(call) in self.left_float]
        for node in nodes:
            if annotation_of(node) is not None:
                set_untouched(node, annotation_of(node))
        for place in references(model):
            user = place[1] if isinstance(place, tuple) else place
            if user in nodes:
                raise ConfigError(
                    f"{user.name}: this quantizer gives other layers its scale, and so it cannot be left float; "
                    "quantize it too"
                )
        return annotated


def leaving_float(quantizer: Any, names: Sequence[str]) -> Any:
    """Return a quantizer with the same settings that leaves the layers of those names float."""
    if not names:
        return quantizer
    made = with_mixin(quantizer, LeavingFloat, "LeavingFloat")
    made.left_float = frozenset(names)
    return made
