"""Saving a split, quantized model as safetensors and JSON, and loading it back.

A folder holds config.json (of a transformers model), model.safetensors (packed codes, scales, shifts and the
rest of the state) or shards of it with model.safetensors.index.json, quanto_qmap.json (what quanto quantized),
splitquant_manifest.json (what was split) and splitquant_storage.json. transformers' and quanto's own loaders build
the unsplit architecture and skip what does not fit it; `load` rebuilds the split one first, and takes a missing or
unexpected tensor for an error.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from accelerate import init_empty_weights
from optimum.quanto import quantization_map, requantize
from optimum.quanto.models.transformers_models import QuantizedTransformersModel
from optimum.quanto.nn import QModuleMixin
from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError
from torch import Tensor, nn
from transformers import PreTrainedModel

from splitquant_plugins.checkpoints.coverage import note_quantized
from splitquant_plugins.checkpoints.files import read_described, write_json
from splitquant_plugins.checkpoints.headers import TensorSpec
from splitquant_plugins.checkpoints.pretrained_config import is_pretrained
from splitquant_plugins.checkpoints.source import SINGLE_FILE
from splitquant_plugins.checkpoints.tensors import read_state, untied_state, write_tensors
from splitquant_plugins.checkpoints.transformers_models import load_model, model_of_folder, save_configs
from splitquant_plugins.errors import InputError, SkeletonMismatchError
from splitquant_plugins.manifest import FILE_NAME, Manifest
from splitquant_plugins.modules import SplitModule, layer_of_part
from splitquant_plugins.passes.rebuild import apply_manifest, manifest_to_save
from splitquant_plugins.passes.splitquant import SplitQuantPass
from splitquant_quanto.grid import group_size_of
from splitquant_quanto.quantization import LAYERS, quantize_after

QMAP_FILE = "quanto_qmap.json"
STORAGE_FILE = "splitquant_storage.json"
ACTIVATION_SCALES = ("input_scale", "output_scale")


class Storage(BaseModel):
    """What is needed beside the tensors: tensors that share memory with another, by name."""

    model_config = ConfigDict(extra="forbid")

    format: Literal[1] = 1
    backend: Literal["quanto"] = "quanto"
    same_as: dict[str, str] = {}


class _QMapEntry(BaseModel):
    model_config = ConfigDict(extra="forbid")

    weights: Literal["qint2", "qint4", "qint8"]
    activations: Literal["none"]


class _QMap(RootModel):
    root: Annotated[dict[str, _QMapEntry], Field(min_length=1)]


def save(model: nn.Module, folder: str | Path) -> None:
    """Save a split model that quanto has quantized and frozen.

    Raises SkeletonMismatchError where the model was not split, InputError where it is not quantized.
    """
    folder = Path(folder)
    manifest = manifest_to_save(model)
    qmap = quantization_map(model)
    if not qmap:
        raise InputError(f"{type(model).__name__} holds no quanto layer; call quantize and freeze first")
    unfrozen = [name for name in qmap if not model.get_submodule(name).frozen]
    if unfrozen:
        raise InputError(f"{unfrozen[0]} is not frozen; call optimum.quanto.freeze(model) before saving")
    folder.mkdir(parents=True, exist_ok=True)
    # The manifest is written last, and `load` wants it first: a folder whose saving broke off does not load.
    (folder / FILE_NAME).unlink(missing_ok=True)
    layers = layer_of_part(model)
    note_quantized(manifest, {layers.get(name, name) for name in qmap})
    state, same_as = untied_state(model.state_dict())
    write_tensors(folder / SINGLE_FILE, state)
    write_description(folder, model, qmap, same_as)
    manifest.save(folder)


def write_description(folder: Path, model: nn.Module, qmap: dict[str, dict[str, str]], same_as: dict[str, str]) -> None:
    """Write what stands beside the tensors, but for the manifest; of the model only its configuration is read."""
    write_json(folder / QMAP_FILE, qmap)
    write_json(folder / STORAGE_FILE, Storage(same_as=same_as).model_dump())
    save_configs(model, folder)


def load(folder: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Load what `save`, `splitquant quantize` or a transformers model's `save_pretrained` saved, in evaluation mode.

    A transformers model is made from config.json; for any other, pass the unsplit float `model` to load into.
    Raises InputError for a missing or damaged file, SkeletonMismatchError where the files and the model do
    not fit each other.
    """
    folder = Path(folder)
    if model is None and is_pretrained(folder):
        return load_model(str(folder))
    manifest = Manifest.load(folder)
    qmap, same_as = read_description(folder)
    if model is None:
        with init_empty_weights():
            model = model_of_folder(folder)
    model = apply_manifest(model, manifest)
    for name in qmap:
        if name not in dict(model.named_modules()):
            raise SkeletonMismatchError(f"{folder} quantizes {name}, which {type(model).__name__} does not have")
    state = read_state(folder, same_as)
    _adopt_dtypes(model, state, qmap)
    _refuse_misfit(model, state, qmap, folder)
    try:
        requantize(model, dict(state), qmap, device=torch.device("cpu"))
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:  # quanto's and torch's, for misfits
        problem = " ".join(str(error).split()) or "a tensor is of the wrong kind"
        raise SkeletonMismatchError(f"{folder}: the tensors do not fit the model: {problem}") from None
    quantized = {name: module for name, module in model.named_modules() if name in qmap}
    missed = [name for name, module in quantized.items() if not (isinstance(module, QModuleMixin) and module.frozen)]
    if missed:
        raise SkeletonMismatchError(f"{folder}: {len(missed)} quantized layers were not found, {missed[0]} among them")
    if isinstance(model, PreTrainedModel) and getattr(model.config, "tie_word_embeddings", False):
        weights = {name: module.weight for name, module in quantized.items()}
        model.tie_weights()
        for name, weight in weights.items():  # a quantized head has a weight of its own
            quantized[name].weight = weight
    return model.eval()


class QuantizedSplitModel(QuantizedTransformersModel):
    """A split transformers model quantized by quanto, with the methods of quanto's QuantizedTransformersModel."""

    @classmethod
    def quantize(
        cls,
        model: PreTrainedModel,
        weights: str = "int4",
        split: SplitQuantPass | None = None,
        exclude: list[str] | None = None,
    ) -> QuantizedSplitModel:
        """Split, quantize and freeze a transformers model in place."""
        if not isinstance(model, PreTrainedModel):
            raise InputError(f"QuantizedSplitModel takes a transformers model, not a {type(model).__name__}")
        return cls(quantize_after(split or SplitQuantPass(), model, weights, ignore=exclude or []))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> QuantizedSplitModel:
        """Load a folder that `save_pretrained` or `splitquant quantize` wrote."""
        if not (Path(pretrained_model_name_or_path) / FILE_NAME).is_file():
            raise InputError(f"{pretrained_model_name_or_path} is not a folder with a split model")
        return cls(load(pretrained_model_name_or_path))

    def _save_pretrained(self, save_directory: Path) -> None:
        save(self._wrapped, save_directory)


def read_description(folder: Path) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Read quanto's map of quantized layers, and the names of shared tensors; InputError for a damaged file."""
    qmap: dict[str, dict[str, str]] = read_described(folder / QMAP_FILE, _QMap).model_dump()
    return qmap, read_described(folder / STORAGE_FILE, Storage).same_as


def validated_entry(entry: Any, where: str) -> dict[str, str]:
    """Return what quanto's map says of one layer, or raise InputError."""
    try:
        return _QMapEntry.model_validate(entry).model_dump()
    except ValidationError as error:
        raise InputError(f"{where} is damaged or not for weights alone: {error.errors()[0]['msg']}") from None


def saved_tensors(shape: torch.Size, dtype: torch.dtype, bits: int, *, part: bool) -> dict[str, TensorSpec]:
    """Return what quanto saves for a layer whose weight has that shape and dtype, besides the bias.

    That is codes, scales and shifts, and the scales of activations, which it saves for weights alone too. A layer
    with a single output that is no part has, at INT2 and INT4, a scale for each index of the last dimension.
    """
    rows = torch.empty(shape, device="meta")
    size = group_size_of(shape[1:].numel(), bits)
    rows = rows if size is None else rows.reshape(-1, size)
    scale = TensorSpec(dtype, (len(rows), *[1] * (rows.ndim - 1)))
    last = {name: TensorSpec(dtype, ()) for name in ACTIVATION_SCALES}
    if bits == 8:
        scale = TensorSpec(dtype, ()) if len(rows) == 1 else scale
        return {"weight._data": TensorSpec(torch.int8, tuple(shape)), "weight._scale": scale, **last}
    if len(rows) == 1 and not part:
        scale = TensorSpec(dtype, (*[1] * (rows.ndim - 1), rows.shape[-1]))
    data = TensorSpec(torch.uint8, (-(-len(rows) * bits // 8), *rows.shape[1:]))
    return {"weight._data._data": data, "weight._scale": scale, "weight._shift": scale, **last}


def _adopt_dtypes(model: nn.Module, state: dict[str, Tensor], qmap: dict[str, dict[str, str]]) -> None:
    """Give what was not split the dtype that it was saved in; that of the parts is in the manifest."""
    parts = tuple(f"{name}." if name else "" for name, m in model.named_modules() if isinstance(m, SplitModule))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        owner, _, role = name.rpartition(".")
        packed = owner in qmap and role == "weight"
        saved = state.get(f"{name}._scale" if packed else name)
        if saved is None or name.startswith(parts):
            continue
        if tensor.is_floating_point() and saved.is_floating_point():
            tensor.data = tensor.data.to(saved.dtype)


def _refuse_misfit(model: nn.Module, state: dict[str, Tensor], qmap: dict[str, dict[str, str]], folder: Path) -> None:
    """Raise unless the tensors are those of the split model, not yet quantized, with packed weights for its own.

    Names, shapes and dtypes say it all; asking the quantized weights themselves would unpack each of them.
    """
    expected = {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in model.state_dict().items()}
    parts = {id(part) for module in model.modules() if isinstance(module, SplitModule) for part in module.parts()}
    bits = {id(model.get_submodule(name)): int(entry["weights"][len("qint") :]) for name, entry in qmap.items()}
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) in bits:
            if not isinstance(module, LAYERS):
                raise SkeletonMismatchError(f"{folder} quantizes {name}, which is a {type(module).__name__} here")
            weight = expected.pop(_join(name, "weight"))
            part = id(module) in parts
            saved = saved_tensors(torch.Size(weight.shape), weight.dtype, bits[id(module)], part=part)
            expected.update({_join(name, key): spec for key, spec in saved.items()})
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or unexpected:
        what = f"there is no tensor {missing[0]}" if missing else f"the model has no tensor {unexpected[0]}"
        raise SkeletonMismatchError(f"{folder}: {what} ({len(missing) + len(unexpected)} such tensors)")
    for name, tensor in state.items():
        if TensorSpec(tensor.dtype, tuple(tensor.shape)) != expected[name]:
            wanted = f"{expected[name].shape} {expected[name].dtype}"
            raise SkeletonMismatchError(f"{folder}: {name} is {tuple(tensor.shape)} {tensor.dtype}, and not {wanted}")


def _join(owner: str, name: str) -> str:
    return f"{owner}.{name}" if owner else name
