"""`SplitQuantPass() + quantizer`: the quantizer that it becomes."""

from __future__ import annotations

from typing import Any

from splitquant_plugins.errors import ConfigError
from splitquant_plugins.passes.base import ModelPass
from splitquant_plugins.passes.splitquant import SplitQuantPass
from splitquant_pt2e.recipe import SplittingQuantizer, splitting


def attach(split_pass: ModelPass, quantizer: Any) -> Any:
    """Return a quantizer of the same kind, with its settings, that runs the pass; the given one stays as it is.

    Raises ConfigError for passes that split activations among others, and for a second pass.
    """
    if split_pass.splits_activations and not isinstance(split_pass, SplitQuantPass):
        raise ConfigError(
            "activations=True goes with a single SplitQuantPass on exported graphs: leave it out, or apply the passes "
            "to the model before torch.export.export"
        )
    if isinstance(quantizer, SplittingQuantizer):
        raise ConfigError("this quantizer has a pass attached already; a model is split once")
    return splitting(split_pass, quantizer)
