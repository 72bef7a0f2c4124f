"""What all passes have in common: they rewrite a float model, and go in front of a recipe with `+`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from splitquant_plugins.grid import Grid
    from splitquant_plugins.plugins import Plugins

GridRule = Callable[[str], "Grid | None"]


class ModelPass(ABC):
    """A pass over a float model that can be put in front of a backend's recipe with `+`."""

    plugins: Plugins

    @property
    def splits_activations(self) -> bool:
        """Whether the pass splits activation layers, which weight-only backends refuse."""
        return False

    @property
    def needs_modules(self) -> bool:
        """Whether the pass works on modules only, and not on the layers of an exported graph."""
        return True

    @abstractmethod
    def apply(self, model: nn.Module, *, grid: Grid | GridRule | None = None, ignore: Sequence[str] = ()) -> nn.Module:
        """Rewrite the model in place and return it.

        `grid` is the grid that the recipe will round to, for all layers or by name; `ignore` are patterns of
        layer names that the recipe does not quantize.
        """

    def __call__(self, model: nn.Module) -> nn.Module:
        """Rewrite the model in place and return it."""
        return self.apply(model)

    def __add__(self, recipe: Any) -> Any:
        """Return a recipe of the same kind as `recipe`, or a longer pass, that runs this pass first."""
        if isinstance(recipe, ModelPass):
            return PassSequence([self, recipe])
        return self.plugins.attach(self, recipe)


class PassSequence(ModelPass):
    """Several passes, one after the other."""

    def __init__(self, passes: Sequence[ModelPass]) -> None:
        self.passes = tuple(passes)
        self.plugins = self.passes[0].plugins

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.passes))

    @property
    def splits_activations(self) -> bool:
        """Whether any of the passes splits activation layers."""
        return any(one.splits_activations for one in self.passes)

    def apply(self, model: nn.Module, *, grid: Grid | GridRule | None = None, ignore: Sequence[str] = ()) -> nn.Module:
        """Run the passes in order."""
        for one in self.passes:
            model = one.apply(model, grid=grid, ignore=ignore)
        return model
