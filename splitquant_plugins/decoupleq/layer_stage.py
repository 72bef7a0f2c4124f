"""The layer stage of a block: its layers, group by group, each solved on the inputs that those before it make."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from splitquant_plugins.decoupleq.asymmetric_calibration import (
    FloatInputs,
    PairedMoments,
    asymmetric_target,
    iter_paired_moments,
)
from splitquant_plugins.decoupleq.capture import BlockInputs, Call
from splitquant_plugins.decoupleq.config import DecoupleQConfig
from splitquant_plugins.decoupleq.layer_order import Stage
from splitquant_plugins.decoupleq.layers import LayerToSolve
from splitquant_plugins.decoupleq.output_moments import output_moments
from splitquant_plugins.decoupleq.solve_weight import SolvedWeight, solve_weight
from splitquant_plugins.errors import ConfigError, InputError, first_line
from splitquant_plugins.manifest import ValuesRecord
from splitquant_plugins.passes.calibration import iter_second_moments, out_features


class LayerStage:
    """Solves the layers of one block after another; `notes` has what is to be told of them.

    `layers` are all those of the model that are solved, by name, `twins` the others that share a weight with one;
    `float_values` switches the model to its float values for a while. At most `calibration_bytes` of statistics are
    held at once. `output_moments_of` finds G of all layers by the model's predictions; without it coupled rows count as
    they reach their block's outputs.
    """

    def __init__(
        self,
        layers: Mapping[str, LayerToSolve],
        twins: Mapping[str, Sequence[LayerToSolve]],
        config: DecoupleQConfig,
        float_values: Callable[[], AbstractContextManager[Any]],
        calibration_bytes: int,
        output_moments_of: Callable[[Mapping[str, nn.Module]], dict[str, Tensor]] | None = None,
    ) -> None:
        self._output_moments_of = output_moments_of
        self.notes: list[str] = []
        self._layers, self._twins, self._config = layers, twins, config
        self._float_values, self._calibration_bytes = float_values, calibration_bytes

    def solve(
        self, stage: Stage, inputs: BlockInputs, before: Sequence[Call] | None
    ) -> Iterator[tuple[str, SolvedWeight, ValuesRecord]]:
        """Solve the layers of a stage and yield each, which then holds what the backend rounds it to.

        `before` are the calls of the block in the float model, None without asymmetric calibration. Layers that the
        batches never reach are left out.
        """
        wanted = None
        together: dict[str, Tensor] = {}
        if before is not None:
            modules = {name: self._layers[name].modules[0] for name in stage.layers}
            wanted = FloatInputs(inputs.block, before, self._float_values, modules, self._calibration_bytes)
            if self._config.coupled_rows and stage.block is not None:
                together = self._output_moments(stage.name or "the model", inputs, wanted)
        for group in stage.groups:
            for name, pair in self._moments(group, inputs, wanted):
                if not pair.moment.samples:
                    continue
                started = time.perf_counter()
                solution = self._solved(name, pair, together.get(name))
                layer, moment = self._layers[name], pair.moment
                layer.put(solution.rounded, self._twins[name])
                record = ValuesRecord(
                    action="solved",
                    grid=repr(layer.grid),
                    error_before=solution.error_before,
                    error_after=solution.error_after,
                    rounds=solution.rounds,
                    samples=moment.samples,
                    plain_rows=solution.plain_rows,
                    joint=len(layer.modules) > 1,
                    seconds=time.perf_counter() - started,
                )
                width = moment.matrix.shape[-1]
                if moment.samples < width:
                    self.notes.append(
                        f"{name}: {moment.samples} calibration inputs for {width} weights per output are few, and on "
                        "others the solution may be worse than plain rounding: give more calibration data"
                    )
                yield name, solution, record

    def _solved(self, name: str, pair: PairedMoments, output_moment: Tensor | None) -> SolvedWeight:
        layer, config = self._layers[name], self._config
        moment, options = pair.moment.matrix, config.solve_options()
        try:
            weight = asymmetric_target(layer.weight(), pair, config.asymmetric_calibration, config.damping)
            return solve_weight(
                weight, layer.parts(), moment, layer.grid, options, output_moment=output_moment, name=name
            )
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            raise InputError(
                f"{name}: the second moment of its inputs has no factor with damping={config.damping}; choose a larger "
                "one, such as 0.01, or give more calibration data"
            ) from None

    def _output_moments(self, title: str, inputs: BlockInputs, before: FloatInputs) -> dict[str, Tensor]:
        """G of those layers whose outputs make up for each other: not of those that are added to the block's anyway."""
        layers = {name: layer for name, layer in before.layers.items() if name not in before.added}
        if self._output_moments_of is not None:
            return {name: each for name, each in self._moments_of_predictions.items() if name in layers}
        try:
            with self._float_values():
                limit = self._calibration_bytes // 4
                return output_moments(inputs.block, before.calls, inputs.masks, layers, limit)
        except (InputError, RuntimeError) as error:  # what has no gradients is solved row by row
            self.notes.append(f"{title}: no coupled rows: {first_line(error)}")
            return {}

    @cached_property
    def _moments_of_predictions(self) -> dict[str, Tensor]:
        assert self._output_moments_of is not None
        modules = {name: layer.modules[0] for name, layer in self._layers.items()}
        sizes = {name: 8 * out_features(module) ** 2 for name, module in modules.items()}
        if sum(sizes.values()) > self._calibration_bytes:
            raise ConfigError(
                f"objective='predictions' holds {sum(sizes.values()):,} bytes of statistics of all layers' outputs: "
                "raise calibration_bytes, or choose objective='outputs'"
            )
        with self._float_values():
            return self._output_moments_of(modules)

    def _moments(
        self, group: Sequence[str], inputs: BlockInputs, before: FloatInputs | None
    ) -> Iterator[tuple[str, PairedMoments]]:
        """Second moments of layers, and where there are the float model's inputs too, those across the two."""
        modules: dict[str, nn.Module] = {name: self._layers[name].modules[0] for name in group}
        limit = self._calibration_bytes
        if before is not None:
            yield from iter_paired_moments(inputs, before, modules, limit)
            return
        found = iter_second_moments(inputs, inputs.batches, modules, max_bytes=limit)
        while True:
            # What is observed in several passes is observed behind layers that were solved in between.
            with nullcontext() if self._config.sequential else self._float_values():
                one = next(found, None)
            if one is None:
                return
            yield one[0], PairedMoments(one[1], None)
