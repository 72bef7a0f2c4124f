"""The options of the pass, validated: an unknown or impossible one is an error that says what is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from splitquant_plugins.errors import ConfigError


class SplitConfig(BaseModel):
    """Options of SplitQuantPass."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    k: int = Field(3, ge=1, le=16, description="parts per layer")
    splitter: str = Field(
        "auto",
        description="strategy that makes the parts, see `splitquant plugins`; auto: `grid` where the recipe's grid is "
        "known, else `kmeans`, the paper's",
    )
    granularity: Literal["auto", "tensor", "channel"] = Field(
        "auto",
        description="what is clustered at once; auto: the tensor where it shares one scale, else a Linear's tensor "
        "and a convolution's output channel",
    )
    include: tuple[str, ...] = Field((), description="shell patterns of layer names; empty: all layers")
    exclude: tuple[str, ...] = Field((), description="shell patterns of layer names that stay whole")
    split_bias: bool = Field(True, description="split the bias too; otherwise the first part keeps it")
    activations: bool = Field(False, description="split activation layers along their features as well")
    activation_dim: int | None = Field(
        None, description="feature dimension of activations; None: last after a Linear, channel after a conv"
    )
    fold_batchnorm: bool = Field(True, description="fold BatchNorm into the convolution before it first")
    untie_embeddings: bool = Field(
        False, description="split a Linear whose weight is an embedding's, which unties them"
    )
    budget: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="stored bits per weight over the layers; chooses 1 to 4 parts per layer by gain",
    )
    objective: Literal["outputs", "predictions"] = Field(
        "outputs",
        description="with calibration, what errors are of: a layer's outputs, or as they reach the model's predictions",
    )
    objective_groups: int = Field(
        4, ge=1, le=64, description="for the objective predictions: groups of output channels that weigh differently"
    )
    seed: int = Field(0, ge=0, le=2**32 - 1, description="for splitters that use one")


def config_from(options: dict[str, Any]) -> SplitConfig:
    """Validate keyword options of SplitQuantPass."""
    config: SplitConfig = validated(SplitConfig, options, "SplitQuantPass")
    return config


def validated(model: type[BaseModel], options: dict[str, Any], owner: str, also: Sequence[str] = ()) -> Any:
    """Return `model(**options)`, or raise ConfigError with one readable line per wrong option.

    Lists are taken for tuples, a single pattern for a tuple of one. `also` are further keywords that `owner` takes.
    """
    cleaned = dict(options)
    for name, field in model.model_fields.items():
        value = cleaned.get(name)
        if get_origin(field.annotation) is tuple and isinstance(value, (list, str)):
            cleaned[name] = (value,) if isinstance(value, str) else tuple(value)
    try:
        return model(**cleaned)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            name = ".".join(str(part) for part in problem["loc"])
            if problem["type"] == "extra_forbidden":
                allowed = ", ".join(sorted([*model.model_fields, *also])) or "none"
                lines.append(f"{owner} has no option {name!r}; it takes: {allowed}")
            else:
                lines.append(f"{owner} option {name}={problem['input']!r}: {problem['msg'].lower()}")
        raise ConfigError("; ".join(lines)) from None
