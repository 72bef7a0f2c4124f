"""What becomes of each tensor of a checkpoint, and which shard of the output it goes to; decided from shapes alone."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import torch
from torch import nn

from splitquant_plugins.backends import Packer
from splitquant_plugins.checkpoints.headers import TensorSpec
from splitquant_plugins.checkpoints.source import Source
from splitquant_plugins.checkpoints.transformers_models import empty_model, load_config
from splitquant_plugins.errors import AlreadyQuantizedError, ConfigError, InputError
from splitquant_plugins.modules import part_names
from splitquant_plugins.passes.checks import refuse_unfit_modules
from splitquant_plugins.passes.module_tree import is_transformers_conv1d, occurrences
from splitquant_plugins.passes.select import Layer, Selection, select_layers
from splitquant_plugins.passes.split_layer import MOST_BUDGET_PARTS
from splitquant_plugins.passes.splitquant import WITHIN_BUDGET, SplitQuantPass
from splitquant_plugins.plan import LayerPlan, Skip
from splitquant_plugins.streaming.parameters import IN_MEMORY, Parameters

# A method of a class is changed for a while.
_one_at_a_time = Lock()


@dataclass(frozen=True)
class Unit:
    """One step of the work: a layer to be split and packed, one to be packed whole, or a tensor to be copied.

    `names` are those of the layer, or of the tensor; what is written goes under the first. `sources` are the
    tensors of the checkpoint by parameter name ("" for a tensor that is copied). A layer that is split becomes at
    most `k` parts; a `transposed` one stores its weight as [in, out].
    """

    names: tuple[str, ...]
    sources: Mapping[str, str]
    outputs: tuple[tuple[str, TensorSpec], ...]
    kind: Literal["split", "whole", "copy"]
    plan: LayerPlan | None = None
    transposed: bool = False
    k: int = 1

    @property
    def bytes(self) -> int:
        """Bytes that it writes at most."""
        return sum(spec.bytes for _, spec in self.outputs)


@dataclass
class Layout:
    """The plan of the whole work."""

    model: nn.Module
    units: list[Unit]
    ignored: list[Layer]
    order: list[str]
    dtypes: dict[str, torch.dtype]
    same_as: dict[str, str] = field(default_factory=dict)

    def shards(self, limit: int) -> list[list[Unit]]:
        """Cut the units, in order, into runs that write at most `limit` bytes, or one unit."""
        runs: list[list[Unit]] = []
        taken = 0
        for unit in self.units:
            if not runs or taken + unit.bytes > limit:
                runs.append([])
                taken = 0
            runs[-1].append(unit)
            taken += unit.bytes
        return runs


def empty_skeleton(folder: Path, *, buffers: bool = False) -> tuple[nn.Module, torch.dtype | None]:
    """Make the model of a folder on the meta device; also return the dtype that its configuration states.

    With `buffers` it can be run once its parameters have values: buffers, which may be in no file, have theirs.
    """
    config = load_config(folder)
    if getattr(config, "quantization_config", None):
        raise AlreadyQuantizedError(f"{folder} is quantized, says its config.json; split first, then quantize")
    with _parameters_on_meta() if buffers else torch.device("meta"):
        model: Any = empty_model(config, folder).eval()
    model.tie_weights()
    dtype = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    return model, dtype if isinstance(dtype, torch.dtype) else None


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """New modules get parameters without values, and compute their buffers."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, None if param is None else nn.Parameter(param.to("meta"), param.requires_grad))

    with _one_at_a_time:
        nn.Module.register_parameter = on_meta  # type: ignore[assignment, method-assign]
        try:
            yield
        finally:
            nn.Module.register_parameter = register  # type: ignore[method-assign]


def make_layout(
    source: Source, first: SplitQuantPass, packer: Packer, parts: Mapping[str, int] | None = None
) -> Layout:
    """Decide what becomes of each tensor; `parts` are those of each layer, where a budget has chosen them.

    Raises InputError where checkpoint and model do not fit each other, ConfigError for what needs the model in
    memory.
    """
    model, dtype = empty_skeleton(source.folder)
    refuse_unfit_modules(model)
    notes = first.plugins.prepare_model(model, first.config)
    if notes:
        raise ConfigError(f"streaming cannot prepare the model ({notes[0]}); {IN_MEMORY}")
    stays_float = packer.ignore or ()
    ignored = [*packer.ignored(model), *map(glob.escape, stays_float)]
    selection = select_layers(model, first.config, first.plugins, ignored)
    selection = _within_budget(selection, parts or {})
    most = first.config.k if first.config.budget is None else MOST_BUDGET_PARTS
    chosen = {layer.name: layer.plan for layer in selection.split}
    quantized = set(packer.quantized(model)).difference(stays_float)
    if not quantized:
        raise InputError(f"there is no layer to quantize in {type(model).__name__}")
    for layer in selection.split:
        as_stored = layer.plan.weight is layer.module.weight or is_transformers_conv1d(layer.module)
        if layer.name not in quantized or not as_stored:
            raise ConfigError(f"streaming cannot pack {layer.name}, a {layer.plan.kind}; exclude it, or {IN_MEMORY}")
    parameters = Parameters(model, source, dtype)
    units: list[Unit] = []
    same_as: dict[str, str] = {}
    consumed: set[str] = set()
    shared: dict[str, str] = {}
    for module, names in occurrences(model):
        if names[0] not in quantized:
            continue
        split = names[0] in chosen
        # A split layer's bias becomes those of the parts; a whole one's is packed with it or a tensor like any.
        roles = [role for role in module._parameters if module._parameters[role] is not None]
        taken = roles if split or packer.packs_bias else ["weight"]
        sources = {role: parameters.source_of(_join(names[0], role)) for role in taken}
        consumed.update(_join(name, role) for name in names for role in taken)
        if split and shared.setdefault(sources["weight"], names[0]) != names[0]:
            raise ConfigError(
                f"{shared[sources['weight']]} and {names[0]} have one weight, which streaming cannot split; {IN_MEMORY}"
            )
        transposed = is_transformers_conv1d(module)
        specs = {role: parameters.spec_of(name) for role, name in sources.items()}
        if transposed:
            specs["weight"] = TensorSpec(specs["weight"].dtype, specs["weight"].shape[::-1])
        k = (parts or {}).get(names[0], most)
        outputs = _outputs(names[0], specs, packer, k if split else 0)
        kind: Literal["split", "whole"] = "split" if split else "whole"
        units.append(Unit(tuple(names), sources, outputs, kind, chosen.get(names[0]), transposed, k))
    for group in parameters.tied_groups(consumed):
        origin = parameters.source_of(group[0])
        units.append(Unit(tuple(group), {"": origin}, ((group[0], parameters.spec_of(origin)),), "copy"))
        same_as.update(dict.fromkeys(group[1:], group[0]))
    position = {name: number for number, name in enumerate(source.names)}
    units.sort(key=lambda unit: position[unit.sources.get("weight", unit.sources.get("", ""))])
    parameters.refuse_unused()
    return Layout(
        model, units, selection.ignored, [layer.name for layer in selection.split], parameters.dtypes, same_as
    )


def _within_budget(selection: Selection, parts: Mapping[str, int]) -> Selection:
    """The selection without the layers to which a budget gives one part."""
    whole = [replace(layer, answer=Skip(WITHIN_BUDGET)) for layer in selection.split if parts.get(layer.name) == 1]
    split = [layer for layer in selection.split if parts.get(layer.name) != 1]
    return Selection(split, [*selection.ignored, *whole])


def _outputs(layer: str, specs: Mapping[str, TensorSpec], packer: Packer, k: int) -> tuple[tuple[str, TensorSpec], ...]:
    """What a layer is saved as: in `k` parts, which is the most it can become, or whole where k is 0."""
    weight = specs["weight"]
    try:
        made = packer.spec(torch.Size(weight.shape), weight.dtype, part=k > 0)
    except ConfigError as error:
        raise ConfigError(f"{layer}: {error}") from None
    if k == 0:
        return tuple((_join(layer, key), spec) for key, spec in made.items())
    if not packer.packs_bias:
        made.update({role: spec for role, spec in specs.items() if role != "weight"})
    parts = [_join(layer, part) for part in part_names(max(k, 2))]
    return tuple((_join(part, key), spec) for part in parts for key, spec in made.items())


def _join(owner: str, name: str) -> str:
    return f"{owner}.{name}" if owner else name
