"""Rebuilding the split skeleton of a saved model from its manifest."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from splitquant_plugins.checkpoints.transformers_models import forget_tied_embeddings
from splitquant_plugins.errors import AlreadySplitError, SkeletonMismatchError
from splitquant_plugins.manifest import ATTRIBUTE, LayerRecord, Manifest, manifest_of, set_manifest
from splitquant_plugins.modules import SplitModule, is_tensor_subclass, part_names
from splitquant_plugins.passes.build import build_split, replace_everywhere
from splitquant_plugins.passes.calibration import evaluating
from splitquant_plugins.passes.checks import DTYPES
from splitquant_plugins.passes.module_tree import restored_on_error
from splitquant_plugins.plan import LayerPlan
from splitquant_plugins.plugins import Plugins

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


def apply_manifest(model: nn.Module, manifest: Manifest, plugins: Plugins | None = None) -> nn.Module:
    """Rebuild the split skeleton in a freshly made, unsplit model, with empty parts to be loaded into.

    The steps that prepared the model (BatchNorm folding, activations) are repeated first. Every layer is checked before
    the first is replaced; on an error the model is put back as it was.

    Raises SkeletonMismatchError where a layer is missing or has another shape, AlreadySplitError where the
    model was split before.
    """
    if getattr(model, ATTRIBUTE, None) is not None:
        raise AlreadySplitError("the model was split before; rebuild the skeleton in a fresh one")
    plugins = plugins or Plugins.load()
    with restored_on_error(model):
        with evaluating(model):  # the model that was saved had its BatchNorm layers folded in that mode
            plugins.prepare_model(model, manifest.config)
        model = _replace(model, manifest, plugins)
    if manifest.config.untie_embeddings:
        forget_tied_embeddings(model)
    set_manifest(model, manifest)
    return model


def manifest_to_save(model: nn.Module) -> Manifest:
    """Bring the manifest of a split model that is about to be saved up to date with the dtypes of its parts; return it.

    Raises SkeletonMismatchError where a layer that was split is gone, or no longer a split one: such a model could not
    be rebuilt from what is saved.
    """
    manifest = manifest_of(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    records = []
    for record in manifest.layers:
        found = modules.get(record.name)
        if record.action == "split" and record.parts and not isinstance(found, SplitModule):
            what = "is gone" if found is None else f"is a {type(found).__name__} now"
            raise SkeletonMismatchError(
                f"{record.name} was split and {what}, so that what is saved could not be loaded: change layers before "
                "the split"
            )
        if isinstance(found, SplitModule):
            weight = found.parts()[0]._parameters.get("weight")
            if weight is not None and not is_tensor_subclass(weight):
                record = record.model_copy(update={"dtype": str(weight.dtype).removeprefix("torch.")})
        records.append(record)
    manifest.layers = records
    return manifest


def _replace(model: nn.Module, manifest: Manifest, plugins: Plugins) -> nn.Module:
    layers = [(record, *_find(model, record, manifest, plugins)) for record in manifest.split]
    built: dict[str, SplitModule] = {}
    for record, module, plan in layers:
        source = None
        if record.shared_with is not None:
            source = built.get(record.shared_with)
            if source is None:
                raise SkeletonMismatchError(
                    f"{record.name} shares the parts of {record.shared_with}, which was not split before it"
                )
        built[record.name] = build_split(plugins, module, _empty_parts(record, plan, source), plan)
        model = replace_everywhere(model, (record.name, *record.also_known_as), built[record.name])
    return model


def _find(model: nn.Module, record: LayerRecord, manifest: Manifest, plugins: Plugins) -> tuple[nn.Module, LayerPlan]:
    try:
        module = model.get_submodule(record.name)
    except AttributeError:
        raise SkeletonMismatchError(
            f"the saved model has a layer {record.name}, and {type(model).__name__} has none of that name"
        ) from None
    for alias in record.also_known_as:
        if dict(model.named_modules(remove_duplicate=False)).get(alias) is not module:
            raise SkeletonMismatchError(
                f"{alias} was the same module as {record.name} when it was split, and is not in {type(model).__name__}"
            )
    plan = plugins.select_layer(record.name, module, manifest.config)
    if not isinstance(plan, LayerPlan) or plan.kind != record.kind:
        raise SkeletonMismatchError(
            f"{record.name} was a {record.kind} when it was split, and is a {type(module).__name__} here"
        )
    if tuple(plan.weight.shape) != record.shape:
        raise SkeletonMismatchError(
            f"{record.name} had shape {record.shape} when it was split, and has {tuple(plan.weight.shape)} here"
        )
    if record.dtype not in _DTYPES:
        raise SkeletonMismatchError(f"{record.name} had dtype {record.dtype!r}; choose from {', '.join(_DTYPES)}")
    if record.parts != part_names(record.k) or not set(record.bias_parts) <= set(record.parts):
        raise SkeletonMismatchError(f"{record.name}: parts {record.parts} are not those of k = {record.k}")
    if bool(record.bias_parts) != (plan.bias is not None):
        raise SkeletonMismatchError(f"{record.name} has a bias in only one of the saved model and this one")
    return module, plan


def _empty_parts(
    record: LayerRecord, plan: LayerPlan, source: SplitModule | None
) -> dict[str, list[torch.Tensor | None]]:
    def empty(like: torch.Tensor) -> torch.Tensor:
        return nn.Parameter(
            torch.empty(like.shape, dtype=_DTYPES[record.dtype], device=like.device), requires_grad=False
        )

    weights = [empty(plan.weight) for _ in record.parts]
    if source is not None:
        weights = [cast(torch.Tensor, part.weight) for part in source.parts()]
    biases = [
        empty(plan.bias) if plan.bias is not None and name in record.bias_parts else None for name in record.parts
    ]
    return {"weight": list(weights), "bias": biases}
