"""SplitQuant for PT2E: the split of an exported graph, and a quantizer for weights of 2, 4 and 8 bits."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from splitquant_pt2e.activations import chunk_scales
    from splitquant_pt2e.graph import split_graph
    from splitquant_pt2e.grid import Pt2eGrid
    from splitquant_pt2e.observed_grid import ObservedGrid, grid_of_spec
    from splitquant_pt2e.part_outputs import integer_parts
    from splitquant_pt2e.quantizer import LowBitWeightQuantizer
    from splitquant_pt2e.storage import load, save
    from splitquant_pt2e.stored_layers import stored_weights

_HOME = {
    "LowBitWeightQuantizer": "quantizer",
    "ObservedGrid": "observed_grid",
    "Pt2eGrid": "grid",
    "chunk_scales": "activations",
    "grid_of_spec": "observed_grid",
    "integer_parts": "part_outputs",
    "load": "storage",
    "save": "storage",
    "split_graph": "graph",
    "stored_weights": "stored_layers",
}

__all__ = [
    "LowBitWeightQuantizer",
    "ObservedGrid",
    "Pt2eGrid",
    "chunk_scales",
    "grid_of_spec",
    "integer_parts",
    "load",
    "save",
    "split_graph",
    "stored_weights",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
