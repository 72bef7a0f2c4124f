"""`SplitQuantPass() + quantizer`: the quantizer that it becomes."""

from __future__ import annotations

from typing import Any

from splitquant_plugins.errors import ConfigError
from splitquant_plugins.passes.base import ModelPass
from splitquant_plugins.passes.splitquant import SplitQuantPass
from splitquant_pt2e.recipe import SplittingQuantizer, splitting


def attach(split_pass: ModelPass, quantizer: Any) -> Any:
    """Return a quantizer of the same kind, with its settings, that splits; the given one stays as it is.

    Raises ConfigError for a pass that does not work on graphs, and for a second split.
    """
    if not isinstance(split_pass, SplitQuantPass):
        raise ConfigError(
            f"{type(split_pass).__name__} does not work on exported graphs, only SplitQuantPass does: apply it to the "
            "model before torch.export.export"
        )
    if isinstance(quantizer, SplittingQuantizer):
        raise ConfigError("this quantizer has a pass attached already; a model is split once")
    return splitting(split_pass, quantizer)
