"""Which tensor of a checkpoint stands for which parameter or buffer of a model."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from splitquant_plugins.checkpoints.headers import TensorSpec
from splitquant_plugins.checkpoints.source import Source
from splitquant_plugins.errors import InputError

IN_MEMORY = "use --no-stream to load the model into memory"


class Parameters:
    """Which tensor of the checkpoint belongs to which name of the model's state, and in which dtype."""

    def __init__(self, model: nn.Module, source: Source, dtype: torch.dtype | None) -> None:
        self._source = source
        self._model = model
        state = model.state_dict(keep_vars=True)
        # Tied tensors are one object on the meta device too.
        self._groups: dict[int, list[str]] = {}
        for name, tensor in state.items():
            self._groups.setdefault(id(tensor), []).append(name)
        self._sources: dict[str, str] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for group in self._groups.values():
            found = self._find(group, state[group[0]])
            self._sources.update(dict.fromkeys(group, found))
            stored = source.spec(found).dtype
            wanted = None if dtype is None else _kept_wider(model, group[0], dtype)
            self.dtypes[found] = wanted if wanted is not None and stored.is_floating_point else stored

    def source_of(self, name: str) -> str:
        """The name in the checkpoint."""
        return self._sources[name]

    def spec_of(self, source: str) -> TensorSpec:
        """What the model holds of a tensor of the checkpoint."""
        return TensorSpec(self.dtypes[source], self._source.spec(source).shape)

    def tied_groups(self, consumed: set[str]) -> list[list[str]]:
        """Names that are copied, those of one tensor together."""
        groups = ([name for name in group if name not in consumed] for group in self._groups.values())
        return [group for group in groups if group]

    def refuse_unused(self) -> None:
        """Raise for a tensor of the checkpoint that the model has no place for, and does not know as obsolete."""
        obsolete = getattr(self._model, "_keys_to_ignore_on_load_unexpected", None) or ()
        for name in self._source.names:
            if name not in self._sources and not any(re.search(pattern, name) for pattern in obsolete):
                raise InputError(
                    f"{self._source.folder} has a tensor {name}, which {type(self._model).__name__} does not; "
                    f"if transformers renames it while loading, {IN_MEMORY}"
                )

    def _find(self, group: Sequence[str], tensor: Tensor) -> str:
        there = [name for name in group if name in self._source]
        kind = type(self._model).__name__
        if not there:
            raise InputError(
                f"{self._source.folder} has no tensor {group[0]}, which {kind} needs; "
                f"if transformers renames or makes it while loading, {IN_MEMORY}"
            )
        for name in there:
            spec = self._source.spec(name)
            if spec.shape != tuple(tensor.shape):
                raise InputError(
                    f"{self._source.folder}: {name} is {list(spec.shape)}, and {list(tensor.shape)} in {kind}"
                )
            if spec.dtype.is_floating_point != tensor.is_floating_point():
                raise InputError(f"{self._source.folder}: {name} is {spec.dtype}, and {tensor.dtype} in {kind}")
            if name != there[0] and not self._source.same(there[0], name):
                raise InputError(f"{self._source.folder}: {there[0]} and {name} are tied in {kind}, and differ here")
        return there[0]


def _kept_wider(model: nn.Module, name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype that transformers loads a tensor in: some modules keep float32 where the others have 16 bits."""
    wide = [*(getattr(model, "_keep_in_fp32_modules_strict", None) or ())]
    if dtype == torch.float16:
        wide += getattr(model, "_keep_in_fp32_modules", None) or ()
    inside = any(re.search(rf"(^|\.){module}($|\.)", name) for module in wide)
    return torch.float32 if inside and dtype in (torch.float16, torch.bfloat16) else dtype
