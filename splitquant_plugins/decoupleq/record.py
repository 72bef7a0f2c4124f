"""What the manifest says of a model that was solved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from splitquant_plugins.decoupleq.config import DecoupleQConfig
from splitquant_plugins.decoupleq.layers import UNSPLIT, LayerToSolve
from splitquant_plugins.manifest import ATTRIBUTE, Manifest, ValuesRecord
from splitquant_plugins.passes.record import ignored_record, new_manifest

_NOT_SPLIT = "it was not split: there was no SplitQuantPass"


def manifest_of_run(
    model: nn.Module,
    config: DecoupleQConfig,
    layers: Mapping[str, LayerToSolve],
    solved: Mapping[str, ValuesRecord],
    kept: Mapping[str, str],
    notes: Sequence[str],
) -> Manifest:
    """Return the manifest of the split, or a new one, with what was solved; `kept` says why other layers were not."""
    before = getattr(model, ATTRIBUTE, None)
    manifest = before if isinstance(before, Manifest) else new_manifest(UNSPLIT)
    values = {**solved, **{name: ValuesRecord(action="kept", reason=reason) for name, reason in kept.items()}}
    records = list(manifest.layers)
    known = {record.name for record in records}
    for name in [name for name in values if name not in known]:
        layer = layers.get(name)
        if layer is not None:
            records.append(ignored_record(layer.names, _NOT_SPLIT, layer.kind))
        else:
            records.append(ignored_record([name], kept[name], type(model.get_submodule(name)).__name__))
    told = [*manifest.notes, *notes]
    joint = sum(record.joint for record in solved.values())
    if joint:
        told.append(
            f"DecoupleQPass solved the parts of {joint} layers together; they no longer sum to the float weights"
        )
    told_of = [record.model_copy(update={"values": values.get(record.name)}) for record in records]
    return manifest.model_copy(update={"layers": told_of, "notes": told, "values": config.model_dump(mode="json")})
