"""`SplitQuantPass() + config`: a configuration of the same class that runs the pass when INC first looks at the model.

INC asks a configuration for `get_model_info(model)` before it does anything to the model, in `prepare`,
`convert`, `quantize` and every trial of `autotune`. The recipe is a subclass of the user's configuration class,
made for one pass, that answers it after running the pass. INC builds further instances from `self.__class__`
and its parameters (for lists of options, and for its global configuration), so the pass sits on the class.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from neural_compressor.common.base_config import BaseConfig

import splitquant_plugins.decoupleq.decoupleq_pass
import splitquant_plugins.passes.clip
import splitquant_plugins.passes.splitquant  # noqa: F401
from splitquant_plugins.checkpoints.files import read_json
from splitquant_plugins.errors import ConfigError
from splitquant_plugins.passes.base import ModelPass, pass_from_dict

JOINED = (
    "INC joins configurations into a ComposableConfig, which quantizes nothing in INC 3.10; quantize with one "
    "configuration, and use set_local for layers that need another"
)


class PassFirst:
    """Mixed in before the user's configuration class."""

    first: ClassVar[ModelPass]
    plain: ClassVar[type[BaseConfig]]
    mixin: ClassVar[type[PassFirst]]
    __hash__: ClassVar[None]  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        """Equal to a recipe with the same pass and options; never to one without a pass.

        INC's autotune skips a configuration that equals an earlier one.
        """
        if not isinstance(other, PassFirst) or self.plain is not other.plain or self.first != other.first:
            return False
        return bool(_plain(self) == _plain(other))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickles and copies hold the pass, the plain class, and the options; the class is made anew."""
        return _made_anew, (self.mixin, self.first, self.plain, dict(self.__dict__))

    def to_dict(self) -> dict[str, Any]:
        """Return the options as INC does, and those of the pass, but for its calibration data."""
        return {**super().to_dict(), "first": self.first.to_dict()}  # type: ignore[misc]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any]) -> Any:
        """Make what `to_dict` described."""
        options = dict(config_dict)
        first = pass_from_dict(options.pop("first")) if "first" in options else cls.first
        return _made_anew(cls.mixin, first, cls.plain, cls.plain.from_dict(options).__dict__)

    @classmethod
    def from_json_file(cls, filename: str) -> Any:
        """Make what `to_json_file` wrote."""
        return cls.from_dict(read_json(Path(filename)))

    def __add__(self, other: Any) -> Any:
        """Take over the layer options of a configuration of the same kind, as INC does."""
        if isinstance(other, self.plain):
            for name, config in other.local_config.items():
                self.set_local(name, config)  # type: ignore[attr-defined]
            return self
        raise ConfigError(f"a recipe with a pass + {type(other).__name__}: {JOINED}")

    def __radd__(self, other: Any) -> Any:
        """Refuse: the pass has to come first, or it would be lost."""
        raise ConfigError(
            f"{type(other).__name__} + a recipe with a pass: put the pass first, SplitQuantPass() + (...)"
        )


def recipe_class(mixin: type[PassFirst], first: ModelPass, plain: type[BaseConfig]) -> type[Any]:
    """Return the subclass of INC's class that runs the pass first."""
    return type(f"PassFirst{plain.__name__}", (mixin, plain), {"first": first, "plain": plain, "mixin": mixin})


def _made_anew(mixin: type[PassFirst], first: ModelPass, plain: type[BaseConfig], options: dict[str, Any]) -> Any:
    kind = recipe_class(mixin, first, plain)
    made = object.__new__(kind)
    made.__dict__.update(options)
    return made


def _plain(recipe: PassFirst) -> BaseConfig:
    made: BaseConfig = object.__new__(recipe.plain)
    made.__dict__.update(recipe.__dict__)
    return made
