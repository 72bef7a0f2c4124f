"""`SplitQuantPass() + QuantoConfig(...)`: the recipe that it becomes, made known to transformers."""

from __future__ import annotations

from transformers import QuantoConfig

from splitquant_plugins.errors import ConfigError
from splitquant_plugins.passes.base import ModelPass
from splitquant_quanto.quantization import refuse_activations
from splitquant_quanto.recipe import SplitQuantoConfig

WEIGHTS = ("int2", "int4", "int8")


def attach(first: ModelPass, recipe: QuantoConfig) -> SplitQuantoConfig:
    """Return a recipe with the arguments of `recipe` that runs the pass before it quantizes."""
    if isinstance(recipe, SplitQuantoConfig):
        raise ConfigError("this QuantoConfig has a pass attached already; a model is split once")
    refuse_activations(first)
    if recipe.activations is not None:
        raise ConfigError(f"QuantoConfig(activations={recipe.activations!r}): the quanto adapter is for weights only")
    if recipe.weights not in WEIGHTS:
        raise ConfigError(f"QuantoConfig(weights={recipe.weights!r}): a split is for {', '.join(WEIGHTS)}")
    return SplitQuantoConfig(recipe.weights, first, modules_to_not_convert=recipe.modules_to_not_convert)
