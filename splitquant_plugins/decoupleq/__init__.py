"""decoupleQ (arXiv 2404.12759): integers and floats of a quantized weight, optimised in turns.

`solve_layer` is the layer stage, `solve_parts` the same for a weight that is split into k layers, and
`tune_block` the block stage. Second moments come from `splitquant_plugins.passes.calibration`.
"""

from splitquant_plugins.decoupleq.alternation import SolveOptions
from splitquant_plugins.decoupleq.blocks import (
    BlockOptions,
    BlockReport,
    QuantizedAffine,
    block_outputs,
    capture_inputs,
    find_blocks,
    tune_block,
)
from splitquant_plugins.decoupleq.grids import Affine, ValueGrid
from splitquant_plugins.decoupleq.joint import JointSolution, solve_parts
from splitquant_plugins.decoupleq.solve import QuantizedWeight, Solution, solve_layer

__all__ = [
    "Affine",
    "BlockOptions",
    "BlockReport",
    "JointSolution",
    "QuantizedAffine",
    "QuantizedWeight",
    "Solution",
    "SolveOptions",
    "ValueGrid",
    "block_outputs",
    "capture_inputs",
    "find_blocks",
    "solve_layer",
    "solve_parts",
    "tune_block",
]
