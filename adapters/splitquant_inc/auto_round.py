"""AutoRound behind a pass: rounding and ranges tuned block by block, so that the parts of a layer learn together.

AutoRound writes rounded floats into the split model that it is given (`export_format="fake"`). Its other formats
are read again with transformers, which builds the layers of the float model and finds no parts.
"""

from __future__ import annotations

import glob
import importlib
from typing import Any

from torch import nn

from splitquant_inc.grid import IncRtnGrid
from splitquant_inc.recipe import PassFirst
from splitquant_plugins.errors import ConfigError, InputError
from splitquant_plugins.grid import Grid
from splitquant_plugins.passes.checks import refuse_unfit_model

MULTIPLE = 32
WHOLE_ROWS = -1
FLOAT_BITS = 16
MOST_BITS = 7


class AutoRoundRecipe(PassFirst):
    """Splits the layers of the blocks that AutoRound will tune."""

    def get_model_info(self, model: nn.Module | None = None) -> None:
        """Run the pass, unless `prepare` did. AutoRound lists the layers by itself.

        Raises ConfigError for options that cannot work with split layers, InputError for a model that is not in
        memory.
        """
        if not isinstance(model, nn.Module):
            raise InputError("AutoRoundConfig with a pass takes a model in memory, not the name of one")
        if not getattr(model, "is_prepared", False):
            self._run_pass(model)

    def _run_pass(self, model: nn.Module) -> None:
        refuse_unfit_model(model)
        _refuse_options(self)
        chosen = tuned_layers(model)
        if not chosen:
            raise ConfigError(
                f"AutoRoundConfig quantizes no layer of this {type(model).__name__}: it takes Linear layers of "
                f"a ModuleList of blocks, both of whose sides are multiples of {MULTIPLE}"
            )
        grid = grid_of(self)
        ignore = [glob.escape(name) for name, _ in model.named_modules() if name and name not in chosen]
        self.first.apply(model, grid=lambda name: grid if name in chosen else None, ignore=ignore)


def tuned_layers(model: nn.Module) -> set[str]:
    """Return the names of the Linear layers that AutoRound quantizes: those in blocks, sides multiples of 32."""
    blocks = tuple(f"{name}." for group in _auto_round("utils").get_block_names(model) for name in group)
    return {
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and name.startswith(blocks)
        and not (module.in_features % MULTIPLE or module.out_features % MULTIPLE)
    }


def grid_of(recipe: Any) -> Grid:
    """Return the grid that AutoRound starts from, and returns to where tuning gains nothing: minmax ranges.

    Symmetric ranges are INC's full ones. Options that are None are those of `scheme`.
    """
    scheme = _scheme(recipe)
    group_size = int(scheme["group_size"])
    return IncRtnGrid(
        int(scheme["bits"]),
        "symmetric" if scheme["sym"] else "affine",
        None if group_size == WHOLE_ROWS else group_size,
        bool(scheme["sym"]),
    )


def _scheme(recipe: Any) -> dict[str, Any]:
    given = recipe.scheme
    if isinstance(given, str):
        given = _auto_round("schemes").preset_name_to_scheme(given)
    chosen = dict(given)
    own = {"bits": "bits", "group_size": "group_size", "use_sym": "sym", "dtype": "data_type", "act_bits": "act_bits"}
    chosen.update({theirs: getattr(recipe, ours) for ours, theirs in own.items() if getattr(recipe, ours) is not None})
    return chosen


def _auto_round(module: str) -> Any:
    try:
        return importlib.import_module(f"auto_round.{module}")
    except ImportError as error:
        raise ConfigError(f"AutoRoundConfig needs the package auto-round ({error}); pip install auto-round") from None


def _refuse_options(recipe: Any) -> None:
    if recipe.export_format != "fake":
        raise ConfigError(
            f"AutoRoundConfig(export_format={recipe.export_format!r}) with a pass: AutoRound reads that format with "
            'transformers, which builds no split layers; use export_format="fake", which rounds the model in memory'
        )
    if recipe.local_config or recipe.to_quant_block_names:
        raise ConfigError(
            "AutoRoundConfig with set_local or to_quant_block_names names float layers, and finds no parts of split "
            "ones; leave it out, and use include= or exclude= of the pass to choose what is split"
        )
    scheme = _scheme(recipe)
    data_type, act_bits = scheme.get("data_type") or "int", scheme.get("act_bits") or FLOAT_BITS
    if data_type != "int" or act_bits < FLOAT_BITS or not 2 <= int(scheme["bits"]) <= MOST_BITS:
        raise ConfigError(
            f"AutoRoundConfig with data_type={data_type!r}, bits={scheme['bits']}, act_bits={act_bits} was not tried "
            f"with split layers; use integer weights of 2 to {MOST_BITS} bits, and float activations"
        )
