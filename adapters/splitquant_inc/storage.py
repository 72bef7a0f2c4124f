"""Saving a model that INC has quantized as safetensors and JSON, and loading it back.

A folder holds config.json (of a transformers model), model.safetensors (INC's packed codes, scales and zero
points, and the rest of the state) or shards of it with model.safetensors.index.json, splitquant_inc.json (how each
layer is packed) and, for a split model, splitquant_manifest.json.
INC's own `save` writes a pickle, and its `load` leaves a model float without a word where the split layers are not
there; `load` rebuilds them first, and any misfit is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from neural_compressor.torch.algorithms.weight_only.hqq.core import HQQLinear
from torch import Tensor, nn
from torch.fx import GraphModule

from splitquant_inc.packing import PackedHqq, PackedInc, Storage, empty_module, packed_layer
from splitquant_inc.stored_layers import quantized_layers
from splitquant_plugins.checkpoints.coverage import note_quantized
from splitquant_plugins.checkpoints.files import read_described, write_json
from splitquant_plugins.checkpoints.pretrained_config import is_pretrained
from splitquant_plugins.checkpoints.source import SINGLE_FILE
from splitquant_plugins.checkpoints.tensors import read_state, untied_state, write_tensors
from splitquant_plugins.checkpoints.transformers_models import load_model, model_of_folder, save_configs
from splitquant_plugins.errors import InputError, SkeletonMismatchError
from splitquant_plugins.manifest import ATTRIBUTE, FILE_NAME, Manifest
from splitquant_plugins.modules import layer_of_part
from splitquant_plugins.passes.module_tree import is_transformers_conv1d, replace_module
from splitquant_plugins.passes.rebuild import apply_manifest, manifest_to_save

STORAGE_FILE = "splitquant_inc.json"


def save(model: nn.Module, folder: str | Path) -> None:
    """Save a model with RTN, GPTQ or HQQ weights, split or not.

    Raises InputError where INC has quantized no layer, or the model is an exported graph.
    """
    if isinstance(model, GraphModule):
        raise InputError(
            "an exported W8A8 graph is saved as it is: model.save(example_inputs=..., output_dir=...), and loaded "
            "with neural_compressor.torch.quantization.load(output_dir)"
        )
    state, layers = state_of(model)
    if not layers:
        raise InputError(f"{type(model).__name__} holds no layer that INC has quantized; call convert first")
    kept, same_as = untied_state(state)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / SINGLE_FILE, kept)
    write_description(folder, model, layers, same_as)
    manifest = getattr(model, ATTRIBUTE, None)
    if manifest is not None:
        manifest = manifest_to_save(model)
        note_quantized(manifest, {layer_of_part(model).get(name, name) for name in layers})
        manifest.save(folder)
    else:  # that of a split model that was saved here before
        (folder / FILE_NAME).unlink(missing_ok=True)


def write_description(
    folder: Path, model: nn.Module, layers: Mapping[str, PackedInc | PackedHqq], same_as: Mapping[str, str]
) -> None:
    """Write what stands beside the tensors, but for the manifest; of the model only its configuration is read."""
    write_json(folder / STORAGE_FILE, Storage(layers=dict(layers), same_as=dict(same_as)).model_dump())
    save_configs(model, folder)


def load(folder: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Load what `save`, `splitquant quantize` or a transformers model's `save_pretrained` saved, in evaluation mode.

    A transformers model is made from config.json; for any other, pass the unsplit float `model` to load into.
    Raises InputError for a missing or damaged file, SkeletonMismatchError where the files and the model do not
    fit each other, AlreadySplitError where `model` was split before.
    """
    folder = Path(folder)
    if model is None and is_pretrained(folder):
        return load_model(str(folder))
    storage = read_described(folder / STORAGE_FILE, Storage)
    state = read_state(folder, storage.same_as)
    if model is None:
        model = model_of_folder(folder)
    if (folder / FILE_NAME).is_file():
        model = apply_manifest(model, Manifest.load(folder))
    for name, layer in storage.layers.items():
        _fit(model, name, layer, folder)
    hqq = {name: layer for name, layer in storage.layers.items() if isinstance(layer, PackedHqq)}
    for name in hqq:  # their state is nested, and read separately
        replace_module(model, name, nn.Identity())
    rest = {key: value for key, value in state.items() if not _within(key, hqq)}
    for name, layer in storage.layers.items():
        if isinstance(layer, PackedInc):
            replace_module(model, name, empty_module(layer))
    try:
        model.load_state_dict(rest, strict=True, assign=True)
    except RuntimeError as error:
        problem = " ".join(str(error).split())
        raise SkeletonMismatchError(f"{folder} does not fit {type(model).__name__}: {problem}") from None
    for name, layer in hqq.items():
        prefix = f"{name}."
        inside = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        replace_module(model, name, layer.module(inside, f"{folder}: {name}"))
    return model.eval()


def state_of(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, PackedInc | PackedHqq]]:
    """Return the tensors of a quantized model as they are saved, and how its layers are packed.

    A forward pass of INC's layers widens their bias and unpacks some scales; here they are as they were packed.
    """
    layers: dict[str, PackedInc | PackedHqq] = {}
    state: dict[str, Tensor] = {}
    quantized = quantized_layers(model)
    hqq = {name for name, module in quantized.items() if isinstance(module, HQQLinear)}
    for key, value in model.state_dict().items():
        if not _within(key, hqq):
            state[key] = cast(Tensor, value)
    for name, module in quantized.items():
        layers[name], tensors = packed_layer(module)
        state.update({f"{name}.{key}": value for key, value in tensors.items()})
    return state, layers


def _fit(model: nn.Module, name: str, layer: PackedInc | PackedHqq, folder: Path) -> None:
    try:
        module: Any = model.get_submodule(name)
    except AttributeError:
        raise SkeletonMismatchError(
            f"{folder} quantizes {name}, which {type(model).__name__} does not have; if it is a part of a split "
            f"layer, {FILE_NAME} is missing"
        ) from None
    refuse_misfit(module, name, layer, folder)


def refuse_misfit(module: Any, name: str, layer: PackedInc | PackedHqq, where: str | Path) -> None:
    """Raise SkeletonMismatchError unless a packed layer has the inputs and outputs of the float one."""
    inputs, outputs = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if is_transformers_conv1d(module):
        inputs, outputs = module.weight.shape
    if (inputs, outputs) != (layer.in_features, layer.out_features):
        raise SkeletonMismatchError(
            f"{where}: {name} is packed with {layer.in_features} inputs and {layer.out_features} outputs, and is a "
            f"{type(module).__name__} with {inputs} and {outputs} here"
        )


def _within(key: str, names: Mapping[str, Any] | set[str]) -> bool:
    owner = key
    while owner:
        owner = owner.rpartition(".")[0]
        if owner in names:
            return True
    return False
