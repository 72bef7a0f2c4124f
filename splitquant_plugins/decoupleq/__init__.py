"""decoupleQ (arXiv 2404.12759): integers and floats of a quantized weight, optimised in turns, and then by training.

`solve_weight` is the layer stage, for a whole weight or one that is split into k layers. The block stage and the last
stage, over the whole model, are `train` with `block_objective` or `model_objective`. Second moments come from
`splitquant_plugins.passes.calibration`.
"""

from splitquant_plugins.decoupleq.alternation import SolveOptions
from splitquant_plugins.decoupleq.block_tuning import block_objective
from splitquant_plugins.decoupleq.capture import block_outputs, capture_inputs
from splitquant_plugins.decoupleq.layer_order import find_blocks
from splitquant_plugins.decoupleq.learned_rounding import LearnedRounding
from splitquant_plugins.decoupleq.model_tuning import model_objective
from splitquant_plugins.decoupleq.solve_weight import SolvedWeight, solve_weight
from splitquant_plugins.decoupleq.solver_grid import Affine
from splitquant_plugins.decoupleq.training import Learned, Objective, TrainingOptions, TrainingReport, train

__all__ = [
    "Affine",
    "Learned",
    "LearnedRounding",
    "Objective",
    "SolveOptions",
    "SolvedWeight",
    "TrainingOptions",
    "TrainingReport",
    "block_objective",
    "block_outputs",
    "capture_inputs",
    "find_blocks",
    "model_objective",
    "solve_weight",
    "train",
]
