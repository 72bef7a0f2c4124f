"""The second moments of all layers that a pass works on, in groups that fit into memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from splitquant_plugins.errors import InputError
from splitquant_plugins.passes.calibration import (
    CALIBRATED_KINDS,
    Batches,
    SecondMoment,
    collect_second_moments,
    plan_passes,
)
from splitquant_plugins.passes.loss_moments import collect_loss_moments
from splitquant_plugins.passes.select import AnyLayer

Objective = Literal["outputs", "predictions"]


class LayerMoments:
    """The second moments of layers that are worked on in groups; nothing is read where there are no `batches`.

    A group's matrices, in float32, take at most `max_bytes`, or are those of one layer. Those of a single group are
    kept, so that the batches are read once however often the layers are gone through; of several groups, one is held
    at a time. `objective`: moments of the layers' inputs, or those weighted by the model's predictions.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Batches | None,
        max_bytes: int,
        *,
        objective: Objective = "outputs",
        objective_groups: int = 1,
    ) -> None:
        self._objective = objective
        self._objective_groups = objective_groups
        self._model = model
        self._batches = batches
        self._max_bytes = max(max_bytes, 1)
        self._kept: dict[str, Tensor] = {}
        self._seen: set[str] = set()

    def groups(self, layers: Sequence[AnyLayer]) -> Iterator[tuple[Sequence[AnyLayer], dict[str, Tensor]]]:
        """Yield groups of layers, in order, with the matrices of those that the batches reach, by name."""
        if self._batches is None or self._seen.issuperset(layer.name for layer in layers):
            yield layers, self._kept
            return
        by_name = {layer.name: layer for layer in layers}
        widths = {layer.name: layer.plan.weight[0].numel() for layer in layers}
        matrices = 1 if self._objective == "outputs" else self._objective_groups
        sizes = {
            name: (max(layer.plan.groups, matrices), widths[name], widths[name]) for name, layer in by_name.items()
        }
        groups = plan_passes(sizes, torch.float32.itemsize, self._max_bytes)
        if len(groups) > 1 and isinstance(self._batches, Iterator):
            raise InputError(
                f"calibration: the batches are read {len(groups)} times to keep within calibration_bytes, but they "
                "are a one-shot iterator; pass a list, a DataLoader, or a function that returns an iterator"
            )
        for names in groups:
            modules = {n: by_name[n].module for n in names if by_name[n].plan.kind in CALIBRATED_KINDS}
            moments = self._collected(modules)
            found = {name: moment.matrix for name, moment in moments.items() if moment.samples}
            del moments
            if len(groups) == 1:
                self._kept, self._seen = found, set(names)
            yield [by_name[name] for name in names], found
            if len(groups) > 1:
                found.clear()

    def _collected(self, modules: dict[str, nn.Module]) -> dict[str, SecondMoment]:
        assert self._batches is not None
        if self._objective == "outputs":
            return collect_second_moments(self._model, self._batches, modules, dtype=torch.float32)
        groups = self._objective_groups
        return collect_loss_moments(self._model, self._batches, modules, groups=groups, dtype=torch.float32)
