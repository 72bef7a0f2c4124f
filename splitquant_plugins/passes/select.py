"""Which layers are chosen: every module is asked about, and every answer is kept, with a reason where it is no."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Protocol, TypeVar

from torch import nn

from splitquant_plugins.config import SplitConfig
from splitquant_plugins.errors import ConfigError, InputError
from splitquant_plugins.passes.module_tree import occurrences
from splitquant_plugins.plan import LayerPlan, Skip
from splitquant_plugins.plugins import Plugins

NOT_QUANTIZED = "the recipe does not quantize it"


class Patterns(Protocol):
    """The options that choose layers by shell patterns of their names, as the passes' configurations have them."""

    @property
    def include(self) -> tuple[str, ...]:
        """Layers to be chosen; empty: all."""

    @property
    def exclude(self) -> tuple[str, ...]:
        """Layers to be ignored."""


@dataclass(frozen=True)
class Layer:
    """A layer with all the names it is reached by, and what is to become of it: a plan, or the reason to ignore it."""

    names: tuple[str, ...]
    module: nn.Module
    answer: LayerPlan | Skip

    @property
    def name(self) -> str:
        """Its first name."""
        return self.names[0]

    @property
    def plan(self) -> LayerPlan:
        """How it is to be split; only a layer that is not ignored has one."""
        assert isinstance(self.answer, LayerPlan), f"{self.name} is ignored: {self.reason}"
        return self.answer

    @property
    def reason(self) -> str | None:
        """Why it is ignored; None where it is to be split."""
        return self.answer.reason if isinstance(self.answer, Skip) else None

    @property
    def kind(self) -> str:
        """Its kind for the record: that of its plan, or the class of its module."""
        return self.answer.kind if isinstance(self.answer, LayerPlan) else type(self.module).__name__


AnyLayer = TypeVar("AnyLayer", bound=Layer)


@dataclass(frozen=True)
class Selection:
    """The layers of a model, to be split or ignored."""

    split: list[Layer]
    ignored: list[Layer]


def select_layers(model: nn.Module, config: SplitConfig, plugins: Plugins, ignore: Sequence[str] = ()) -> Selection:
    """Ask the plugins about every module; `ignore` are patterns of names that the recipe does not quantize."""
    names_of_modules = [name for name, _ in model.named_modules(remove_duplicate=False)]
    refuse_unmatched_patterns(
        config,
        names_of_modules,
        f"module of {type(model).__name__}; its modules are named like {', '.join(names_of_modules[1:4])}",
    )
    selection = Selection([], [])
    embeddings = {id(module.weight): name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    inside: list[str] = []
    for module, names in occurrences(model):
        if any(name.startswith(prefix) for name in names for prefix in inside):
            continue
        answer = plugins.select_layer(names[0], module, config)
        if isinstance(answer, LayerPlan):
            inside += [f"{name}." if name else "" for name in names]
        chosen = _answer(answer, module, names, config, ignore, embeddings)
        if chosen is not None:
            layer = Layer(tuple(names), module, chosen)
            (selection.split if layer.reason is None else selection.ignored).append(layer)
    if not selection.split and not any(True for _ in model.parameters()):
        raise InputError(f"{type(model).__name__} has no parameters: there is nothing to split")
    return selection


def reason_to_ignore(names: Collection[str], patterns: Patterns, ignore: Sequence[str] = ()) -> str | None:
    """Why a layer of these names is ignored; None where it is chosen.

    It is where no include pattern matches it, an exclude pattern does, or one of `ignore`, which are patterns of
    names that the recipe does not quantize.
    """
    if patterns.include and not matches(names, patterns.include):
        return "no include pattern matches it"
    if matches(names, patterns.exclude):
        return "an exclude pattern matches it"
    return NOT_QUANTIZED if matches(names, ignore) else None


def matches(names: Iterable[str], patterns: Sequence[str]) -> bool:
    """Whether any of the shell patterns matches any of the names, in full and minding the case."""
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def tied_reason(embedding: str) -> str:
    """Why a layer is ignored whose weight is that of an embedding of this name."""
    return f"its weight is that of embedding {embedding}; untie_embeddings splits it"


def refuse_unmatched_patterns(patterns: Patterns, names: Collection[str], what: str) -> None:
    """Raise ConfigError for an include or exclude pattern that matches no name; `what` says what they are names of."""
    for option, given in (("include", patterns.include), ("exclude", patterns.exclude)):
        for pattern in given:
            if not matches(names, [pattern]):
                raise ConfigError(f"{option} pattern {pattern!r} matches no {what}")


def _answer(
    answer: LayerPlan | Skip | None,
    module: nn.Module,
    names: Sequence[str],
    config: SplitConfig,
    ignore: Sequence[str],
    embeddings: dict[int, str],
) -> LayerPlan | Skip | None:
    """What becomes of a module, once the options have had their say; None where it is no layer."""
    if answer is None and any(True for _ in module.parameters(recurse=False)):
        return Skip(_no_layer(module))
    if not isinstance(answer, LayerPlan):
        return answer
    if not answer.weight.numel():
        return Skip("it has no values")
    reason = reason_to_ignore(names, config, ignore)
    if reason is None and not config.untie_embeddings:
        tied = [embeddings[id(p)] for p in module.parameters() if id(p) in embeddings]
        reason = tied_reason(tied[0]) if tied else None
    return answer if reason is None else Skip(reason)


def _no_layer(module: nn.Module) -> str:
    """Why a module that holds parameters is no layer to split."""
    parameters = module.named_parameters(recurse=False)  # positions and the like are a stack of one
    stacked = [name for name, each in parameters if each.ndim == 3 and each.shape[0] > 1]
    if stacked and not isinstance(module, nn.modules.conv._ConvNd):
        return (
            f"{type(module).__name__} keeps the weights of several experts as one tensor ({', '.join(stacked)}), which "
            "is no layer; it is of no type that a plugin splits"
        )
    return f"{type(module).__name__} is of no type that a plugin splits"
