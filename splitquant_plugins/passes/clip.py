"""ClipPass: narrower ranges for coarse grids, without data and at no cost in storage.

Each layer's weight is clipped where that lowers the error of its rounded values; a backend that takes its range from
the weights' minimum and maximum then rounds on the finer grid.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from splitquant_plugins.config import SplitConfig, validated
from splitquant_plugins.errors import AlreadySplitError, ConfigError, InputError
from splitquant_plugins.grid import Grid
from splitquant_plugins.manifest import ATTRIBUTE, ClippingRecord, LayerRecord, Manifest, set_manifest
from splitquant_plugins.modules import SplitModule
from splitquant_plugins.passes.base import GridRule, ModelPass
from splitquant_plugins.passes.checks import refuse_quantized_model, refuse_unfit_modules, refuse_unfit_weights
from splitquant_plugins.passes.module_tree import restored_on_error
from splitquant_plugins.passes.record import ignored_record, new_manifest
from splitquant_plugins.passes.select import Layer, select_layers
from splitquant_plugins.plugins import Plugins
from splitquant_plugins.solvers.clipping import Clipped, clip_to_grid

_UNSPLIT = SplitConfig(k=1, split_bias=False, fold_batchnorm=False)
_NOT_SPLIT = "it was not split: there was no SplitQuantPass"
_NO_GRID = "the recipe has no linear grid for it that is known beforehand"


class ClipConfig(BaseModel):
    """Options of ClipPass."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    include: tuple[str, ...] = Field((), description="shell patterns of layer names; empty: all layers")
    exclude: tuple[str, ...] = Field((), description="shell patterns of layer names that keep their range")


class ClipPass(ModelPass):
    """Clip the weights of each layer to the ranges that leave the least squared error on the recipe's grid.

    Options are those of `ClipConfig`, as keywords; an unknown one is an error that lists them. It needs no calibration
    data. Behind a SplitQuantPass it clips the layers that stayed whole, as under a budget. The manifest is found with
    `manifest_of(model)`.

    Sources: OCS, arXiv 1901.09504, and ACIQ, arXiv 1810.05723, for ranges of least mean square error.
    """

    def __init__(self, *, plugins: Plugins | None = None, **options: Any) -> None:
        self.plugins = plugins or Plugins.load()
        self.config: ClipConfig = validated(ClipConfig, options, "ClipPass")

    def options(self) -> dict[str, Any]:
        """Return all keywords but plugins, as JSON takes them."""
        return self.config.model_dump(mode="json")

    def __repr__(self) -> str:
        chosen = self.config.model_dump(exclude_defaults=True)
        return f"ClipPass({', '.join(f'{key}={value!r}' for key, value in chosen.items())})"

    def __add__(self, recipe: Any) -> Any:
        """Return a recipe of the same kind as `recipe` that runs this pass first."""
        if isinstance(recipe, ModelPass):
            raise ConfigError(
                f"ClipPass + {type(recipe).__name__}: ranges are chosen last, for whole layers; write "
                "SplitQuantPass(...) + ClipPass(...) + recipe, or leave ClipPass out, since DecoupleQPass chooses its "
                "own ranges"
            )
        return super().__add__(recipe)

    def apply(self, model: nn.Module, *, grid: Grid | GridRule | None = None, ignore: Sequence[str] = ()) -> nn.Module:
        """Replace the weights of the model's whole layers by clipped ones and return the model.

        On an error the model is put back as it was.
        """
        _refuse_unfit(model)
        if isinstance(ignore, str):
            raise ConfigError(f"ignore={ignore!r}: give a list of layer names")
        if grid is None:
            raise ConfigError(
                "ClipPass needs the grid that the weights will be rounded to: attach it to a recipe (ClipPass(...) + "
                "recipe), or call .apply(model, grid=UniformGrid(...)); of recipes whose grid is not known beforehand, "
                "such as HQQ, leave it out"
            )
        started = time.perf_counter()
        layers, records = self._select(model, ignore)
        done: dict[int, tuple[nn.Parameter, ClippingRecord]] = {}
        with restored_on_error(model):
            for layer in layers:
                known = grid(layer.name) if callable(grid) else grid
                record = ignored_record(layer.names, _NOT_SPLIT if known is not None else _NO_GRID, layer.kind)
                if known is not None:
                    weight, clipping = _clipped(layer, known, done)
                    layer.module.weight = weight
                    record = record.model_copy(update={"clipping": clipping})
                records.append(record)
        manifest = _manifest(model, records)
        manifest.seconds += time.perf_counter() - started
        set_manifest(model, manifest)
        for record in records:
            self.plugins.after_layer(record)
        self.plugins.after_split(model, manifest)
        return model

    def _select(self, model: nn.Module, ignore: Sequence[str]) -> tuple[list[Layer], list[LayerRecord]]:
        """Return the whole layers to be clipped, and the records of those that are not."""
        patterns = _UNSPLIT.model_copy(update={"include": self.config.include, "exclude": self.config.exclude})
        selection = select_layers(model, patterns, self.plugins, ignore)
        splits = tuple(f"{n}." if n else "" for n, module in model.named_modules() if isinstance(module, SplitModule))
        whole = [layer for layer in selection.split if not layer.name.startswith(splits)]
        if not whole and not splits:
            reasons = "; ".join(sorted({str(layer.reason) for layer in selection.ignored})) or "it has no layers"
            raise ConfigError(f"ClipPass finds no layer to clip in {type(model).__name__}: {reasons}")
        refuse_unfit_weights(whole)
        ignored = [layer for layer in selection.ignored if not f"{layer.name}.".startswith(splits)]
        return whole, [ignored_record(layer.names, str(layer.reason), layer.kind) for layer in ignored]


def _clipped(
    layer: Layer, grid: Grid, done: dict[int, tuple[nn.Parameter, ClippingRecord]]
) -> tuple[nn.Parameter, ClippingRecord]:
    """Return the layer's clipped weight as it stores it, the same one for layers that share theirs."""
    stored = layer.module.weight
    assert isinstance(stored, nn.Parameter)  # plans are made of nothing else
    if id(stored) in done:
        return done[id(stored)]
    weight = layer.plan.weight.detach()
    # Whole layers may be rounded to a grid that parts are not. In inference mode torch would make no parameter.
    with torch.inference_mode(False):
        found = clip_to_grid(weight, getattr(grid, "whole", grid))
        transposed = layer.kind == "conv1d_hf"
        values = (found.weight.t() if transposed else found.weight).contiguous()
        changed = bool((found.error_after < found.error_before).any())
        kept = nn.Parameter(values, requires_grad=stored.requires_grad) if changed else stored
    done[id(stored)] = kept, _record(found)
    return done[id(stored)]


def _record(found: Clipped) -> ClippingRecord:
    return ClippingRecord(
        error_before=float(found.error_before.sum()),
        error_after=float(found.error_after.sum()),
        groups=len(found.error_before),
        clipped_groups=int((found.error_after < found.error_before).sum()),
    )


def _manifest(model: nn.Module, records: Sequence[LayerRecord]) -> Manifest:
    """The manifest of the split, or a new one, with what was clipped."""
    before = getattr(model, ATTRIBUTE, None)
    if not isinstance(before, Manifest):
        return new_manifest(_UNSPLIT, notes=[_note(records)], layers=records)
    clipped = {record.name: record.clipping for record in records}
    layers = [record.model_copy(update={"clipping": clipped.get(record.name)}) for record in before.layers]
    return before.model_copy(update={"layers": layers, "notes": [*before.notes, _note(records)]})


def _note(records: Sequence[LayerRecord]) -> str:
    done = [record.clipping for record in records if record.clipping is not None and record.clipping.clipped_groups]
    return f"ClipPass clipped the weights of {len(done)} layers, which are no longer those of the float model"


def _refuse_unfit(model: object) -> None:
    if isinstance(model, (torch.export.ExportedProgram, torch.fx.GraphModule)):
        raise InputError(
            "an exported graph has no layer modules: attach the pass to the PT2E quantizer instead, "
            "ClipPass(...) + quantizer"
        )
    if not isinstance(model, nn.Module):
        raise InputError(f"ClipPass takes a torch.nn.Module, not a {type(model).__name__}")
    manifest = getattr(model, ATTRIBUTE, None)
    if isinstance(manifest, Manifest):
        if manifest.values is not None:
            raise AlreadySplitError(
                "DecoupleQPass chose the values of this model, ranges included: load it afresh for ClipPass"
            )
        if any(record.clipping is not None for record in manifest.layers):
            raise AlreadySplitError("ClipPass was applied to this model before; load it afresh")
    refuse_quantized_model(model)
    refuse_unfit_modules(model)
