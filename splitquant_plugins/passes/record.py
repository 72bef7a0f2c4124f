"""Fill the manifest: a record of each layer, as the fields in `manifest.py` have it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from splitquant_plugins.config import SplitConfig
from splitquant_plugins.errors import SplitQuantWarning
from splitquant_plugins.manifest import LayerRecord, Manifest
from splitquant_plugins.modules import part_names
from splitquant_plugins.passes.split_layer import SplitTensors
from splitquant_plugins.plan import LayerPlan
from splitquant_plugins.plugins import version_of


def new_manifest(
    config: SplitConfig,
    splitter_options: Mapping[str, Any] | None = None,
    notes: Iterable[str] = (),
    layers: Iterable[LayerRecord] = (),
) -> Manifest:
    """Return a manifest of this version of the package."""
    return Manifest(
        version=version_of(),
        config=config,
        splitter_options=dict(splitter_options or {}),
        notes=list(notes),
        layers=list(layers),
    )


def layer_record(names: Sequence[str], plan: LayerPlan, tensors: SplitTensors) -> LayerRecord:
    """Return the record of a layer whose tensors were split, or were found to stay whole."""
    chosen: dict[str, Any] = {"splitter": tensors.splitter, "why": tensors.why}
    if tensors.error is not None:
        chosen.update(error_whole=tensors.error.whole, error_split=tensors.error.split)
    if tensors.reason is not None:
        return ignored_record(names, tensors.reason, plan.kind).model_copy(update=chosen)
    parts = part_names(len(tensors.weight))
    return LayerRecord(
        name=names[0],
        kind=plan.kind,
        action="split",
        also_known_as=tuple(names[1:]),
        shared_with=tensors.shared_with,
        shape=tuple(plan.weight.shape),
        dtype=str(plan.weight.dtype).removeprefix("torch."),
        granularity=tensors.granularity,
        k=len(parts),
        parts=parts,
        bias_parts=tuple(n for n, part in zip(parts, tensors.bias, strict=True) if part is not None),
        seconds=0.0 if tensors.shared_with else tensors.seconds,
        **chosen,
    )


def ignored_record(names: Sequence[str], reason: str, kind: str) -> LayerRecord:
    """Return the record of a layer that stays whole."""
    return LayerRecord(name=names[0], kind=kind, action="kept", reason=reason, also_known_as=tuple(names[1:]))


def warn_of_harm(manifest: Manifest) -> None:
    """Warn where splits that were asked for make the recipe's error larger."""
    harmed = manifest.harmed
    if harmed:
        worst = harmed[0]
        warnings.warn(
            f"{len(harmed)} of {len(manifest.split)} split layers lose by their split on the recipe's grid, most "
            f"of all {worst.name} (squared error {worst.error_whole:.4g} whole, {worst.error_split:.4g} split by "
            f"{worst.splitter!r}); splitter='auto' leaves such layers whole",
            SplitQuantWarning,
            stacklevel=4,
        )
