"""Which layers are split: every module is asked about, and every answer is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from torch import nn

from splitquant_plugins.errors import ConfigError, InputError
from splitquant_plugins.passes.module_tree import occurrences
from splitquant_plugins.plan import LayerPlan, Skip

if TYPE_CHECKING:
    from splitquant_plugins.config import SplitConfig
    from splitquant_plugins.plugins import Plugins


@dataclass(frozen=True)
class Layer:
    """A layer that is to be split, with all the names it is reached by."""

    names: tuple[str, ...]
    module: nn.Module
    plan: LayerPlan

    @property
    def name(self) -> str:
        """Its first name."""
        return self.names[0]


@dataclass(frozen=True)
class KeptLayer:
    """A layer that stays whole, and why."""

    names: tuple[str, ...]
    module: nn.Module
    reason: str


@dataclass(frozen=True)
class Selection:
    """The layers of a model, to be split or kept."""

    split: list[Layer]
    kept: list[KeptLayer]


def select_layers(model: nn.Module, config: SplitConfig, plugins: Plugins, leave: Sequence[str] = ()) -> Selection:
    """Ask the plugins about every module; `leave` are patterns of names that the recipe does not quantize."""
    _refuse_idle_patterns(model, config)
    selection = Selection([], [])
    embeddings = {id(module.weight): name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    inside: list[str] = []
    for module, names in occurrences(model):
        if any(name.startswith(prefix) for name in names for prefix in inside):
            continue
        answer = plugins.select_layer(names[0], module, config)
        if isinstance(answer, LayerPlan):
            inside += [f"{name}." if name else "" for name in names]
        reason = _reason(answer, module, names, config, leave, embeddings)
        if isinstance(answer, LayerPlan) and reason is None:
            selection.split.append(Layer(tuple(names), module, answer))
        elif reason is not None:
            selection.kept.append(KeptLayer(tuple(names), module, reason))
    if not selection.split and not any(True for _ in model.parameters()):
        raise InputError(f"{type(model).__name__} has no parameters: there is nothing to split")
    return selection


def _reason(
    answer: LayerPlan | Skip | None,
    module: nn.Module,
    names: Sequence[str],
    config: SplitConfig,
    leave: Sequence[str],
    embeddings: dict[int, str],
) -> str | None:
    """Why a layer stays whole; None where it does not, or where the module is no layer."""
    if isinstance(answer, Skip):
        return answer.reason
    if answer is None:
        if any(True for _ in module.parameters(recurse=False)):
            return f"{type(module).__name__} is of no type that a plugin splits"
        return None
    if not answer.weight.numel():
        return "it has no values"
    if config.include and not _matches(names, config.include):
        return "no include pattern matches it"
    if _matches(names, config.exclude):
        return "an exclude pattern matches it"
    if _matches(names, leave):
        return "the recipe does not quantize it"
    if not config.untie_embeddings:
        for parameter in module.parameters(recurse=False):
            if id(parameter) in embeddings:
                return f"its weight is that of embedding {embeddings[id(parameter)]}; untie_embeddings splits it"
    return None


def _matches(names: Sequence[str], patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _refuse_idle_patterns(model: nn.Module, config: SplitConfig) -> None:
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    for option in ("include", "exclude"):
        for pattern in getattr(config, option):
            if not _matches(names, [pattern]):
                raise ConfigError(
                    f"{option} pattern {pattern!r} matches no module of {type(model).__name__}; "
                    f"its modules are named like {', '.join(names[1:4])}"
                )
