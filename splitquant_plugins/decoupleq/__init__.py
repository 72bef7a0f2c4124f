"""decoupleQ (arXiv 2404.12759): integers and floats of a quantized weight, optimised in turns.

`solve_weight` is the layer stage, for a whole weight or one that is split into k layers, and `tune_block` the block
stage. Second moments come from `splitquant_plugins.passes.calibration`.
"""

from splitquant_plugins.decoupleq.alternation import SolveOptions
from splitquant_plugins.decoupleq.block_tuning import BlockOptions, BlockReport, QuantizedAffine, tune_block
from splitquant_plugins.decoupleq.capture import block_outputs, capture_inputs
from splitquant_plugins.decoupleq.layer_order import find_blocks
from splitquant_plugins.decoupleq.solve_weight import SolvedWeight, solve_weight
from splitquant_plugins.decoupleq.solver_grid import Affine

__all__ = [
    "Affine",
    "BlockOptions",
    "BlockReport",
    "QuantizedAffine",
    "SolveOptions",
    "SolvedWeight",
    "block_outputs",
    "capture_inputs",
    "find_blocks",
    "solve_weight",
    "tune_block",
]
