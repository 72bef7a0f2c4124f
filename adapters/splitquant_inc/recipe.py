"""`SplitQuantPass() + config`: a configuration of the same class that runs the pass when INC first looks at the model.

INC asks a configuration for `get_model_info(model)` before it does anything to the model, in `prepare`,
`convert`, `quantize` and every trial of `autotune`. The recipe is a subclass of the user's configuration class,
made for one pass, that answers it after running the pass. INC builds further instances from `self.__class__`
and its parameters (for lists of options, and for its global configuration), so the pass sits on the class.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from neural_compressor.common.base_config import BaseConfig

from splitquant_plugins.errors import ConfigError

if TYPE_CHECKING:
    from splitquant_plugins.passes.base import ModelPass

JOINED = (
    "INC joins configurations into a ComposableConfig, which quantizes nothing in INC 3.10; quantize with one "
    "configuration, and use set_local for layers that need another"
)


class PassFirst:
    """Mixed in before the user's configuration class."""

    first: ClassVar[ModelPass]
    plain: ClassVar[type[BaseConfig]]
    __hash__: ClassVar[None]  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        """Equal to a recipe with the same pass and options; never to one without a pass.

        INC's autotune skips a configuration that equals an earlier one.
        """
        if not isinstance(other, PassFirst) or repr(self.first) != repr(other.first):
            return False
        return bool(super().__eq__(other))

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
