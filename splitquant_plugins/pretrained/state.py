"""What `save_pretrained` writes of a split model: its tensors, and what its configuration says of them."""

from __future__ import annotations

import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from splitquant_plugins.checkpoints.joined_codes import JoinedLayer, joined_state
from splitquant_plugins.checkpoints.transformers_models import forget_tied_embeddings
from splitquant_plugins.errors import InputError, PluginError
from splitquant_plugins.modules import SplitModule, is_tensor_subclass, layer_of_part, parts_of
from splitquant_plugins.passes.rebuild import manifest_to_save
from splitquant_plugins.plugins import Plugins
from splitquant_plugins.pretrained.checkpoint_config import SplitCheckpointConfig
from splitquant_plugins.pretrained.guards import guards

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Mapping

    from splitquant_plugins.checkpoints.saved_layers import SavedLayers


def describe_and_state(model: nn.Module) -> tuple[SplitCheckpointConfig, dict[str, Tensor]]:
    """Return the description of a split model as it is now, and its tensors.

    Raises InputError where a layer is quantized by what cannot say how, SkeletonMismatchError where nothing was split.
    """
    manifest = manifest_to_save(model)
    backend, saved, layers = _quantized(model)
    _refuse_unknown_parts(model, layers)
    state = dict(model.state_dict()) if saved is None else saved.state(model)
    untie_packed(model, layers)
    dtype = str(getattr(model, "dtype", "")).removeprefix("torch.")
    joined: dict[str, JoinedLayer] = {}
    if saved is not None:
        state, joined = joined_state(state, layers, parts_of(model), saved)
    described = SplitCheckpointConfig(manifest, backend, layers, dtype, _cast_buffers(model), joined)
    return described, {**_apart(state, [*layers, *_split(model)]), **guards(guarded_layers(model, layers))}


def refuse_other_tensors(model: nn.Module, given: Mapping[str, Tensor] | None) -> None:
    """Raise InputError where `given`, what `save_pretrained` was asked to write, is not what the model holds.

    How a split model is written depends on its layers, so that it is written as it is. A name may be left out where
    another has the same tensor, as of tied weights.
    """
    if given is None:
        return
    own = model.state_dict()
    there = {own[name].data_ptr() for name in given if name in own}
    other = [name for name, tensor in given.items() if name not in own or not _is_same(tensor, own[name])]
    other += [name for name, tensor in own.items() if name not in given and tensor.data_ptr() not in there]
    if other:
        raise InputError(
            f"state_dict is not what the model holds ({other[0]}, one of {len(other)}), and a split model is saved as "
            "it is: call model.load_state_dict(state_dict) first, and leave state_dict out"
        )


def _is_same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return one.data_ptr() == other.data_ptr() or torch.equal(one, other.to(one.device))


def _cast_buffers(model: nn.Module) -> dict[str, str]:
    """Dtypes of the float buffers that are not saved, where they are not transformers' float32."""
    return {
        f"{name}.{key}" if name else key: str(module._buffers[key].dtype).removeprefix("torch.")
        for name, module in model.named_modules()
        if not isinstance(module, SplitModule)  # what fusing materialised
        for key in unsaved_buffers(module)
        if module._buffers[key].is_floating_point() and module._buffers[key].dtype != torch.float32
    }


def unsaved_buffers(module: nn.Module) -> list[str]:
    """Names of a module's own buffers that are not saved."""
    return [key for key in sorted(module._non_persistent_buffers_set) if module._buffers.get(key) is not None]


def guarded_layers(model: nn.Module, layers: Iterable[str]) -> list[str]:
    """Names of the layers whose own weight is not saved: split ones, by all names, and quantized whole ones."""
    parts = layer_of_part(model)
    return [*_split(model), *(name for name in layers if name not in parts)]


def untie_packed(model: nn.Module, layers: Container[str]) -> None:
    """Tell a transformers model that a tied head that was quantized has codes of its own."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    if any(name.rpartition(".")[0] in layers for name in tied):
        forget_tied_embeddings(model, layers)


def _quantized(model: nn.Module) -> tuple[str | None, SavedLayers | None, dict[str, dict[str, Any]]]:
    """The backend whose layers the model holds, and what it says of them; only imported ones can have made any."""
    plugins = Plugins.load()
    for name in plugins.backends:
        try:
            backend = plugins.backend(name)
        except PluginError:  # what is broken has quantized nothing
            continue
        if backend.library and backend.library in sys.modules:
            saved = backend.saved_layers()
            layers = {} if saved is None else saved.describe(model)
            if layers:
                return name, saved, layers
    return None, None, {}


def _refuse_unknown_parts(model: nn.Module, layers: Container[str]) -> None:
    """Raise InputError for a part that holds anything but float tensors and that no backend describes."""
    for part, layer in layer_of_part(model).items():
        if part in layers:
            continue
        module = model.get_submodule(part)
        odd = [t for t in module.state_dict().values() if is_tensor_subclass(t) or not t.is_floating_point()]
        if odd:
            raise InputError(
                f"{part}, a part of {layer}, is a {type(module).__name__} with a tensor that no backend of splitquant "
                f"says how to save ({type(odd[0]).__name__}, {odd[0].dtype}); save the model before that step"
            )


def _split(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, SplitModule)]


def _apart(state: dict[str, Tensor], layers: list[str]) -> dict[str, Tensor]:
    """Copy apart the tensors of split and quantized layers that share memory, which safetensors does not take.

    transformers knows of none of them, and would refuse to save them. `fill_skeleton` lets parts share again.
    """
    storages = Counter(tensor.untyped_storage().data_ptr() for tensor in state.values())
    prefixes = tuple(f"{name}." for name in layers)
    return {
        name: tensor.clone()
        if name.startswith(prefixes) and storages[tensor.untyped_storage().data_ptr()] > 1
        else tensor
        for name, tensor in state.items()
    }
