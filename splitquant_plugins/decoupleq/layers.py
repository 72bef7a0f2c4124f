"""Which layers decoupleQ solves: chosen as for a split, whole or with their parts, each with the grid it is for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

from torch import Tensor, nn

from splitquant_plugins.config import SplitConfig
from splitquant_plugins.decoupleq.parts import most_parts
from splitquant_plugins.decoupleq.solver_grid import solver_grid
from splitquant_plugins.errors import ConfigError
from splitquant_plugins.modules import SplitModule, part_names
from splitquant_plugins.parts import sum_parts
from splitquant_plugins.passes.calibration import CALIBRATED_KINDS
from splitquant_plugins.passes.checks import refuse_unfit_weights
from splitquant_plugins.passes.select import Layer, reason_to_ignore, select_layers

if TYPE_CHECKING:
    from splitquant_plugins.decoupleq.config import DecoupleQConfig
    from splitquant_plugins.grid import Grid
    from splitquant_plugins.passes.base import GridRule
    from splitquant_plugins.plugins import Plugins

UNSPLIT = SplitConfig(k=1, split_bias=False, fold_batchnorm=False)


class LayerToSolve:
    """A layer to be solved: a whole one, or a split one with its parts. Weights have output channels first."""

    grid: Grid

    def __init__(self, names: Sequence[str], kind: str, modules: Sequence[nn.Module], is_split: bool) -> None:
        self.names = tuple(names)
        self.kind = kind
        self.modules = tuple(modules)
        self.is_split = is_split
        self.original = [cast(nn.Parameter, module.weight) for module in modules]

    @classmethod
    def whole(cls, layer: Layer) -> LayerToSolve:
        """A layer that was not split."""
        return cls(layer.names, layer.kind, [layer.module], False)

    @classmethod
    def split(cls, name: str, module: SplitModule) -> LayerToSolve:
        """A layer with its parts, which are plain layers."""
        parts = module.parts()
        kinds = {nn.Linear: "linear", nn.Conv1d: "conv1d", nn.Conv2d: "conv2d", nn.Conv3d: "conv3d"}
        kind = kinds.get(type(parts[0]), type(parts[0]).__name__)
        return cls([name], kind, parts, True)

    @property
    def paths(self) -> tuple[str, ...]:
        """Names of the modules that hold the weights."""
        if not self.is_split:
            return self.names[:1]
        return tuple(f"{self.names[0]}.{part}" for part in part_names(len(self.modules)))

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored [in, out]."""
        return self.kind == "conv1d_hf"

    def parts(self) -> list[Tensor]:
        """The float weights, output channels first."""
        return [weight.detach().t() if self.transposed else weight.detach() for weight in self.original]

    def weight(self) -> Tensor:
        """The weight of the float layer: the sum of its parts."""
        return sum_parts(self.parts())

    def put(self, weights: Sequence[Tensor], twins: Sequence[LayerToSolve] = ()) -> None:
        """Replace the weights, also those of layers that share them."""
        for number, (weight, original) in enumerate(zip(weights, self.original, strict=True)):
            stored = (weight.t() if self.transposed else weight).contiguous()
            parameter = nn.Parameter(stored, requires_grad=original.requires_grad)
            for layer in (self, *twins):
                layer.modules[number].weight = parameter


@contextmanager
def with_float_weights(layers: Iterable[LayerToSolve], twins: Iterable[LayerToSolve] = ()) -> Iterator[None]:
    """The layers, and others that share their weights, as they were, for the time of the block."""
    every = [
        (module, original)
        for layer in (*layers, *twins)
        for module, original in zip(layer.modules, layer.original, strict=True)
    ]
    weights = [module.weight for module, _ in every]
    for module, original in every:
        module.weight = original
    try:
        yield
    finally:
        for (module, _), weight in zip(every, weights, strict=True):
            module.weight = weight


def layers_to_solve(
    model: nn.Module,
    config: DecoupleQConfig,
    plugins: Plugins,
    grid: Grid | GridRule | None,
    ignore: Sequence[str],
    *,
    loaded: bool = True,
) -> tuple[dict[str, LayerToSolve], dict[str, str]]:
    """Return the layers to be solved by name, and why the others are not; ConfigError where there are none.

    `loaded`: the weights are in memory, and checked.
    """
    splits = {name: module for name, module in model.named_modules() if isinstance(module, SplitModule)}
    inside = tuple(f"{name}." if name else "" for name in splits)
    patterns = UNSPLIT.model_copy(update={"include": config.include, "exclude": config.exclude})
    selection = select_layers(model, patterns, plugins, ignore)
    kept = {one.name: str(one.reason) for one in selection.ignored if not one.name.startswith(inside)}
    whole = [layer for layer in selection.split if not layer.name.startswith(inside)]
    if loaded:
        refuse_unfit_weights(whole)
    found = {layer.name: LayerToSolve.whole(layer) for layer in whole}
    for name, split in splits.items():
        reason = reason_to_ignore([name], config, ignore)
        if reason is None:
            found[name] = LayerToSolve.split(name, split)
        else:
            kept[name] = reason
    for name, layer in list(found.items()):
        chosen = grid(name) if callable(grid) else config.grid(grid)
        if layer.kind not in CALIBRATED_KINDS:
            kept[name] = f"no second moment is known for layers of kind {layer.kind}"
        elif chosen is None:
            kept[name] = "the recipe has no linear grid for it that is known beforehand"
        elif len(layer.modules) > most_parts(solver_grid(chosen, layer.parts()[0].shape)):
            kept[name] = f"{len(layer.modules)} parts of {chosen.bits} bits are too many to be solved together"
        else:
            checked = config.grid(chosen)
            # Whole layers may be rounded to a grid that parts are not.
            layer.grid = checked if layer.is_split else getattr(checked, "whole", checked)
            continue
        del found[name]
    if not found:
        reasons = "; ".join(sorted(set(kept.values()))) or "it has no layers"
        raise ConfigError(f"DecoupleQPass finds no layer to solve in {type(model).__name__}: {reasons}")
    return found, kept
