"""The split layers of a saved model, empty, before transformers loads weights; and made whole after.

A packed layer is a placeholder in between, with the tensors that the files have of it: transformers then reads them,
from one file or from shards, onto the devices that they belong on, and needs to know no backend for that.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from splitquant_plugins.checkpoints.headers import TensorSpec, read_header
from splitquant_plugins.checkpoints.joined_codes import CODES, PART_OF, separated_state
from splitquant_plugins.errors import InputError, SkeletonMismatchError
from splitquant_plugins.modules import SplitModule, parts_of
from splitquant_plugins.passes.module_tree import replace_module
from splitquant_plugins.passes.rebuild import apply_manifest
from splitquant_plugins.pretrained.guards import expect_guards, guard_name
from splitquant_plugins.pretrained.placeholders import Placeholder
from splitquant_plugins.pretrained.state import guarded_layers, unsaved_buffers, untie_packed

if TYPE_CHECKING:
    from splitquant_plugins.checkpoints.saved_layers import SavedLayers
    from splitquant_plugins.manifest import LayerRecord, Manifest
    from splitquant_plugins.pretrained.checkpoint_config import SplitCheckpointConfig

_FLOAT_LAYER = "splitquant_float_layer"
_INITIALIZED = "_is_hf_initialized"  # what transformers asks of modules and parameters


def make_skeleton(model: nn.Module, config: SplitCheckpointConfig, files: Sequence[str] | None) -> None:
    """Put empty split layers, and placeholders of packed ones, into a model on the meta device.

    Raises SkeletonMismatchError where the files lack a tensor of theirs, or have one of another shape.
    """
    names, asked = _Names(model), getattr(getattr(model, "config", None), "dtype", None)
    config.manifest = _fitted(config.manifest, names, config.dtype, asked)
    as_saved = config.dtype == str(asked).removeprefix("torch.")
    config.buffers = {names.here(name): kind for name, kind in config.buffers.items() if as_saved and names.has(name)}
    config.layers = {names.here(name): layer for name, layer in config.layers.items() if names.has(name)}
    apply_manifest(model, config.manifest)
    config.joined = {names.here(name): form for name, form in config.joined.items() if names.has(name)}
    made = {name for name, _ in model.named_modules(remove_duplicate=False)}
    if absent := sorted({*config.layers, *config.joined} - made):
        raise SkeletonMismatchError(
            f"config.json describes {absent[0]} as saved by {config.backend}, and its manifest makes no such layer"
        )
    guarded = guarded_layers(model, config.layers)
    expect_guards(model, guarded)
    ours = set(map(guard_name, guarded))
    stored = {names.here(name): spec for name, spec in _specs(files).items() if names.here(name) not in ours}
    for name in config.layers:
        prefix = f"{name}."
        specs = {key.removeprefix(prefix): spec for key, spec in stored.items() if key.startswith(prefix)}
        if not specs:
            raise SkeletonMismatchError(f"the files have no tensor of {name}, which {config.backend} has quantized")
        placeholder = Placeholder(specs)
        layer = model.get_submodule(name)
        placeholder.__dict__[_FLOAT_LAYER] = layer  # not a child: its weight is not to be loaded
        replace_module(model, name, placeholder)
    for name in config.joined:
        _hold_joined(model.get_submodule(name), name, stored)
    untie_packed(model, config.layers)
    _refuse_missing(model, stored)
    _mark_initialized(model, [*guarded, *config.layers], stored)


def fill_skeleton(model: nn.Module, config: SplitCheckpointConfig, saved: SavedLayers | None) -> None:
    """Make the backend's layers of what placeholders hold, and let parts share what they shared."""
    separate = dict(config.layers)
    for layer, form in config.joined.items():  # one by one: what is taken apart is a few times as large
        assert saved is not None
        split, parts = model.get_submodule(layer), {layer: parts_of(model)[layer]}
        state = {f"{layer}.{key}": tensor for key, tensor in split.state_dict().items()}
        state = separated_state(state, {layer: form}, config.layers, parts, saved)
        for key in (CODES, PART_OF):
            del split._buffers[key]
        for part in parts[layer]:
            prefix = f"{part}."
            own = {key.removeprefix(prefix): state.pop(key) for key in list(state) if key.startswith(prefix)}
            _make(model, part, separate.pop(part), own, saved)
    for name, described in separate.items():
        assert saved is not None
        _make(model, name, described, dict(model.get_submodule(name).state_dict()), saved)
    _fill_buffers(model, [*guarded_layers(model, config.layers), *config.layers])
    for name, kind in config.buffers.items():
        owner, _, key = name.rpartition(".")
        module: Any = model.get_submodule(owner)
        module._buffers[key] = module._buffers[key].to(getattr(torch, kind))
    if not config.layers:
        for record in config.manifest.split:
            if record.shared_with is not None:
                _share(model.get_submodule(record.name), model.get_submodule(record.shared_with))


def _make(
    model: nn.Module, name: str, described: Mapping[str, Any], tensors: dict[str, Tensor], saved: SavedLayers
) -> None:
    """Put a backend's layer into the place of its placeholder."""
    placeholder: Any = model.get_submodule(name)
    made = saved.make(placeholder.__dict__[_FLOAT_LAYER], described, tensors, name)
    made.train(placeholder.training)
    replace_module(model, name, made)


def _hold_joined(split: nn.Module, name: str, stored: Mapping[str, TensorSpec]) -> None:
    """Let a split layer hold its joined codes while transformers loads them."""
    for key in (CODES, PART_OF):
        spec = stored.get(f"{name}.{key}")
        if spec is None:
            raise SkeletonMismatchError(f"the files have no tensor {name}.{key}, which config.json says is there")
        split.register_buffer(key, torch.empty(spec.shape, dtype=spec.dtype, device="meta"))


class _Names:
    """Names of the model that was saved, in a model that may be that one's base, or have it for its base.

    transformers loads either from the other, and adds or takes away the prefix of the base.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._prefix = f"{getattr(model, 'base_model_prefix', '')}."

    def here(self, name: str) -> str:
        for candidate in (name, name.removeprefix(self._prefix), self._prefix + name):
            if self._reaches(candidate):
                return candidate
        return name

    def has(self, name: str) -> bool:
        """Whether the saved layer's owner is there: a head is not, in a base model or one with another head."""
        return self._reaches(self.here(name))

    def _reaches(self, name: str) -> bool:
        return name.partition(".")[0] in self._modules


def _fitted(manifest: Manifest, names: _Names, saved: str | None, asked: Any) -> Manifest:
    """The manifest with the names of this model, and parts of the dtype that was asked for, where the rest has it."""
    wanted = None if asked is None else str(asked).removeprefix("torch.")

    def fitted(record: LayerRecord) -> LayerRecord:
        return record.model_copy(
            update={
                "name": names.here(record.name),
                "also_known_as": tuple(names.here(name) for name in record.also_known_as if names.has(name)),
                "shared_with": None if record.shared_with is None else names.here(record.shared_with),
                "dtype": wanted if wanted and record.dtype == saved else record.dtype,
            }
        )

    return manifest.model_copy(
        update={"layers": [fitted(record) for record in manifest.layers if names.has(record.name)]}
    )


def _specs(files: Sequence[str] | None) -> dict[str, TensorSpec]:
    if not files or not all(str(file).endswith(".safetensors") for file in files):
        raise InputError(
            "a split model is loaded from safetensors files, which this is not given: leave state_dict out"
        )
    return {name: placed.spec for file in files for name, placed in read_header(Path(file)).items()}


def _refuse_missing(model: nn.Module, stored: Mapping[str, TensorSpec]) -> None:
    """Raise where transformers would make up tensors of a split or quantized layer, or leave some out."""
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, SplitModule):
            continue
        expected = {f"{name}.{key}": tuple(tensor.shape) for key, tensor in module.state_dict().items()}
        found = {key: spec.shape for key, spec in stored.items() if key.startswith(f"{name}.")}
        wrong = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
        if wrong:
            has, wants = found.get(wrong[0], "no such tensor"), expected.get(wrong[0], "none")
            raise SkeletonMismatchError(
                f"the files do not fit the manifest in config.json: {wrong[0]} is {has} there, and {wants} of the "
                f"{type(module).__name__} {name} ({len(wrong)} such tensors); save the model again"
            )


def _mark_initialized(model: nn.Module, layers: Iterable[str], stored: Container[str]) -> None:
    """Keep transformers from initializing the modules around and within those layers, whose tensors are all there.

    Some architectures initialize a child's weight, which a split layer computes, and a placeholder does not have.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    inside = tuple(f"{name}." for name in layers)
    for name in _around(layers):
        if all(key in stored for key in _own_tensors(name, modules[name])):
            modules[name].__dict__[_INITIALIZED] = True
    for name, module in modules.items():
        if name in layers or name.startswith(inside):
            module.__dict__[_INITIALIZED] = True


def _fill_buffers(model: nn.Module, layers: Sequence[str]) -> None:
    """Compute the buffers that no file has, as transformers does, of the modules around those layers.

    Transformers itself was kept from that (`_mark_initialized`). Meanwhile the layers have stand-ins, and all tensors
    that were loaded are marked, so that nothing else is initialized.
    """
    from transformers import PreTrainedModel, initialization

    modules: dict[str, Any] = dict(model.named_modules(remove_duplicate=False))
    lacking = [name for name in sorted(_around(layers)) if unsaved_buffers(modules[name])]
    if not lacking:
        return
    loaded = {id(t): t for t in (*model.parameters(), *model.buffers())}
    for name in lacking:
        for key in unsaved_buffers(modules[name]):
            loaded.pop(id(modules[name]._buffers[key]), None)
    for tensor in loaded.values():
        setattr(tensor, _INITIALIZED, True)
    outermost = [name for name in layers if not name.startswith(tuple(f"{other}." for other in layers))]
    try:
        for name in outermost:
            replace_module(model, name, _stand_in())
        with torch.no_grad(), initialization.guard_torch_init_functions():
            for name in lacking:
                owner = name
                while not isinstance(modules[owner], PreTrainedModel):
                    owner = owner.rpartition(".")[0]
                modules[owner]._init_weights(modules[name])
    finally:
        for name in outermost:
            replace_module(model, name, modules[name])


def _stand_in() -> nn.Module:
    """A layer whose weight and bias need no values."""
    layer = nn.Linear(0, 0, device="meta")
    for tensor in layer.parameters():
        setattr(tensor, _INITIALIZED, True)
    return layer


def _around(layers: Iterable[str]) -> set[str]:
    """Names of all modules that the layers are in."""
    found: set[str] = set()
    around = {name.rpartition(".")[0] for name in layers if name}
    while around - found:
        found |= around
        around = {name.rpartition(".")[0] for name in around if name}
    return found


def _own_tensors(name: str, module: nn.Module) -> list[str]:
    own = [*module._parameters, *(key for key in module._buffers if key not in module._non_persistent_buffers_set)]
    return [f"{name}.{key}" if name else key for key in own]


def _share(module: nn.Module, source: nn.Module) -> None:
    assert isinstance(module, SplitModule)
    assert isinstance(source, SplitModule)
    for part, other in zip(module.parts(), source.parts(), strict=True):
        part.weight = other.weight
