"""`SplitQuantPass() + config`: which recipe a configuration of INC becomes."""

from __future__ import annotations

import copy
from typing import Any

from neural_compressor.common.base_config import ComposableConfig
from neural_compressor.torch.quantization.config import (
    AutoRoundConfig,
    AWQConfig,
    DynamicQuantConfig,
    GPTQConfig,
    HQQConfig,
    INT8StaticQuantConfig,
    RTNConfig,
)

from splitquant_inc.auto_round import AutoRoundRecipe
from splitquant_inc.exported import ExportedRecipe
from splitquant_inc.recipe import JOINED, PassFirst, recipe_class
from splitquant_inc.unsupported import reason_against
from splitquant_inc.weight_only import WeightOnlyRecipe
from splitquant_plugins.errors import ConfigError
from splitquant_plugins.passes.base import ModelPass

WEIGHT_ONLY = (RTNConfig, GPTQConfig, HQQConfig, AWQConfig)
EXPORTED = (INT8StaticQuantConfig, DynamicQuantConfig)


def attach(first: ModelPass, recipe: Any) -> Any:
    """Return a copy of `recipe`, of a subclass of its class, that runs the pass before INC quantizes.

    Raises ConfigError for a configuration that the pass cannot precede.
    """
    if isinstance(recipe, PassFirst):
        raise ConfigError("this configuration has a pass attached already; a model is split once")
    if isinstance(recipe, ComposableConfig):
        raise ConfigError(f"a pass + ComposableConfig: {JOINED}")
    kind = type(recipe)
    if kind in (*WEIGHT_ONLY, AutoRoundConfig):
        if first.splits_activations:
            raise ConfigError(
                f"activations=True with {kind.__name__}, which quantizes weights only: leave it out, or use "
                "StaticQuantConfig"
            )
        mixin: type[PassFirst] = AutoRoundRecipe if kind is AutoRoundConfig else WeightOnlyRecipe
    elif kind in EXPORTED:
        mixin = ExportedRecipe
    else:
        known = ", ".join(config.__name__ for config in (*WEIGHT_ONLY, AutoRoundConfig, *EXPORTED))
        raise ConfigError(
            f"no pass can be attached to a {kind.__name__}: {reason_against(kind.__name__)}; the inc adapter "
            f"supports {known}"
        )
    new: Any = object.__new__(recipe_class(mixin, first, kind))
    new.__dict__.update(copy.deepcopy(recipe.__dict__))
    return new
