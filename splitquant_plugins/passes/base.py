"""What all passes have in common: they rewrite a float model, and go in front of a recipe with `+`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, equal, nn

from splitquant_plugins.errors import ConfigError
from splitquant_plugins.grid import Grid
from splitquant_plugins.plugins import Plugins

_KINDS: dict[str, type[ModelPass]] = {}
GridRule = Callable[[str], "Grid | None"]


class ModelPass(ABC):
    """A pass over a float model that can be put in front of a backend's recipe with `+`."""

    plugins: Plugins
    calibration: Any = None
    # A pass that was read from JSON had calibration data, which JSON does not keep; they have to be given again.
    calibration_left_out: bool = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        _KINDS[cls.__name__] = cls

    @classmethod
    def from_options(cls, options: dict[str, Any], plugins: Plugins | None = None) -> ModelPass:
        """Make a pass of what `options` returned."""
        kind: Any = cls
        made: ModelPass = kind(**options, plugins=plugins)
        return made

    def options(self) -> dict[str, Any]:
        """Return the keywords that make such a pass, as JSON takes them, without calibration data and plugins."""
        raise ConfigError(f"{type(self).__name__} does not say how it is written as JSON; give it a method options()")

    def to_dict(self) -> dict[str, Any]:
        """Return the pass as JSON takes it; `pass_from_dict` makes it anew.

        Calibration data are left out, and the pass that is made anew wants them before it runs.
        """
        left_out = self.calibration is not None or self.calibration_left_out
        return {"pass": type(self).__name__, **self.options(), **({"calibration": "left out"} if left_out else {})}

    def refuse_missing_calibration(self) -> None:
        """Raise ConfigError where the calibration data were left out, and not given since."""
        if self.calibration_left_out and self.calibration is None:
            raise ConfigError(
                f"{type(self).__name__} was read from JSON, which keeps no calibration data: set its attribute "
                "calibration to the batches, or to a function that returns an iterator over them, before it runs"
            )

    def __eq__(self, other: object) -> bool:
        """Whether the other pass has the same options and the same calibration data."""
        if not isinstance(other, ModelPass) or type(self) is not type(other):
            return NotImplemented
        try:
            return self.to_dict() == other.to_dict() and _same(self.calibration, other.calibration)
        except ConfigError:
            return self is other

    def __hash__(self) -> int:
        return hash(type(self).__name__)

    @property
    def splits_activations(self) -> bool:
        """Whether the pass splits activation layers, which weight-only backends refuse."""
        return False

    @property
    def needs_modules(self) -> bool:
        """Whether a backend that exports the model should run the pass before, on modules."""
        return True

    @property
    def rounds_to_recipe(self) -> bool:
        """Whether what the pass makes is of use only for a recipe whose grid is known beforehand."""
        return False

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

    def options(self) -> dict[str, Any]:
        return {"passes": [one.to_dict() for one in self.passes]}

    def __eq__(self, other: object) -> bool:
        """Whether the other holds equal passes."""
        return isinstance(other, PassSequence) and self.passes == other.passes

    __hash__ = ModelPass.__hash__

    def __add__(self, recipe: Any) -> Any:
        """Return a recipe, or a longer pass; ConfigError for a pass that the last one may not precede."""
        if isinstance(recipe, ModelPass):
            return PassSequence([*self.passes[:-1], *(self.passes[-1] + recipe).passes])
        return super().__add__(recipe)

    @property
    def splits_activations(self) -> bool:
        return any(one.splits_activations for one in self.passes)

    @property
    def rounds_to_recipe(self) -> bool:
        return any(one.rounds_to_recipe for one in self.passes)

    def apply(self, model: nn.Module, *, grid: Grid | GridRule | None = None, ignore: Sequence[str] = ()) -> nn.Module:
        """Run the passes in order."""
        for one in self.passes:
            model = one.apply(model, grid=grid, ignore=ignore)
        return model


def pass_from_dict(described: Any, plugins: Plugins | None = None) -> ModelPass:
    """Make the pass that `ModelPass.to_dict` described, of a class that is imported already.

    Raises ConfigError for another class and for options that it does not take.
    """
    if not isinstance(described, dict) or described.get("pass") not in _KINDS:
        name = described.get("pass") if isinstance(described, dict) else described
        raise ConfigError(f"no pass is called {name!r}; there are {', '.join(sorted(_KINDS))}")
    kind: Any = _KINDS[described["pass"]]
    options = {key: value for key, value in described.items() if key not in ("pass", "calibration")}
    if kind is PassSequence:
        if set(options) != {"passes"} or not isinstance(options["passes"], list) or len(options["passes"]) < 2:
            raise ConfigError("a sequence of passes is described by a list of them")
        return PassSequence([pass_from_dict(one, plugins) for one in options["passes"]])
    left_out = described.get("calibration") == "left out"
    if "plugins" in options or ("calibration" in described and not left_out):
        raise ConfigError(f"{kind.__name__}: JSON holds neither calibration data nor plugins")
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    made: ModelPass = kind.from_options(given, plugins)
    made.calibration_left_out = left_out
    return made


def _same(one: Any, other: Any) -> bool:
    """Whether two calibrations hold the same batches; functions and loaders are compared as they compare."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and type(one) is type(other):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one is other or one == other)
