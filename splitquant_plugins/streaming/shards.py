"""The shards of one output: which there are, and the work of each, whoever calls for it and in whatever order."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from splitquant_plugins.backends import Packer
from splitquant_plugins.checkpoints.headers import TensorSpec, longest_header
from splitquant_plugins.checkpoints.source import Source
from splitquant_plugins.manifest import LayerRecord
from splitquant_plugins.passes.budget import Candidate
from splitquant_plugins.passes.checks import refuse_unfit_values
from splitquant_plugins.passes.record import layer_record
from splitquant_plugins.passes.splitquant import SplitQuantPass
from splitquant_plugins.streaming.layout import Layout, Unit
from splitquant_plugins.streaming.workplace import ShardRecord, Workplace
from splitquant_plugins.streaming.writer import ShardWriter


@dataclass
class Done:
    """What one unit became; tensors by the names they are saved under."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    packed: list[str] = field(default_factory=list)
    layer: LayerRecord | None = None
    pack_seconds: float = 0.0


def nothing_to_tell(layer: LayerRecord | None) -> None:
    """Hear of a unit that was written, and do nothing."""


class Shards:
    """Reads, splits, packs and writes; two of the same arguments write the same bits, on whichever machine.

    `work` may be called for several units at once, as long as their `cost` fits into memory; `write` takes what it
    made of a shard's units, in order.
    """

    def __init__(
        self,
        source: Source,
        layout: Layout,
        first: SplitQuantPass,
        packer: Packer,
        place: Workplace,
        shard_bytes: int,
    ) -> None:
        self.place = place
        self.units: Sequence[Sequence[Unit]] = layout.shards(shard_bytes)
        count = len(self.units)
        self.files = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
        self._source = source
        self._layout = layout
        self._first = first
        self._packer = packer

    def record(self, number: int) -> ShardRecord | None:
        """Return the record of a shard if it is done."""
        return self.place.record_of(self.files[number])

    def cost(self, unit: Unit) -> int:
        """Bytes that a unit takes while it is worked on: the weight, its parts, what they become, and their sum."""
        if unit.kind == "copy":
            return 0
        copies = unit.k + 3 if unit.kind == "split" else 1
        return copies * self._source.spec(unit.sources["weight"]).bytes + unit.bytes

    @torch.no_grad()
    def work(self, unit: Unit) -> Done:
        """Read, split and pack one layer; what is copied is left to `write`."""
        if unit.kind == "copy":
            return Done()
        started = time.perf_counter()
        tensors = {role: self._read(name) for role, name in unit.sources.items()}
        if unit.transposed:
            tensors["weight"] = tensors["weight"].t()
        name = unit.names[0]
        done = Done()
        parts: list[tuple[str, Tensor, Tensor | None]] = []
        if unit.plan is not None:
            plan = replace(unit.plan, weight=tensors["weight"], bias=tensors.get("bias"))
            split = self._first.split_tensors(name, plan, self._packer.grid, unit.k)
            done.layer = layer_record(unit.names, plan, split)
            parts = list(zip((f"{name}.{part}" for part in done.layer.parts), split.weight, split.bias, strict=True))
            split.weight.clear()
            del plan
        started += done.layer.seconds if done.layer is not None else 0.0
        is_part = bool(parts)
        if not is_part:
            parts = [(name, tensors["weight"], tensors.get("bias"))]
        tensors.clear()
        while parts:  # each is let go of as soon as it is packed
            owner, weight, bias = parts.pop(0)
            done.packed.append(owner)
            packed = self._packer.pack(weight, bias if self._packer.packs_bias else None, part=is_part)
            done.tensors.update({f"{owner}.{key}": value for key, value in packed.items()})
            if bias is not None and not self._packer.packs_bias:
                done.tensors[f"{owner}.bias"] = bias
        done.pack_seconds = time.perf_counter() - started
        return done

    @torch.no_grad()
    def candidates(self, unit: Unit) -> list[Candidate]:
        """What a layer that is to be split would store in 1 to 4 parts, and the error of each on the packer's grid."""
        assert unit.plan is not None
        weight = self._read(unit.sources["weight"])
        plan = replace(unit.plan, weight=weight.t() if unit.transposed else weight, bias=None)
        return self._first.candidates(unit.names[0], plan, self._packer.grid)

    def _read(self, name: str) -> Tensor:
        tensor = self._source.read(name, self._layout.dtypes[name])
        refuse_unfit_values(name, tensor)
        return tensor

    def write(
        self, number: int, made: Iterator[Done], tell: Callable[[LayerRecord | None], None] = nothing_to_tell
    ) -> ShardRecord:
        """Write a shard, which appears whole, and its record; `tell` hears of each unit as it is written."""
        units = self.units[number]
        record = ShardRecord(bytes=0, tensors={})
        header = longest_header([output for unit in units for output in unit.outputs])
        file = self.files[number]
        with ShardWriter(self.place.model / file, header) as writer:
            for unit in units:
                done = next(made)
                self._add(unit, done, writer, record)
                tell(done.layer)
            record.bytes = writer.finish()
            record.digest = writer.digest
            self.place.write_record(file, record)
            writer.publish()
        return record

    def _add(self, unit: Unit, done: Done, writer: ShardWriter, record: ShardRecord) -> None:
        if unit.kind == "copy":
            ((name, spec),) = unit.outputs
            writer.add(name, spec, self._source.blocks(unit.sources[""], spec.dtype))
            record.tensors[name] = spec.bytes
            return
        prefixes = self._packer.weight_prefixes
        for name, tensor in done.tensors.items():
            spec = TensorSpec(tensor.dtype, tuple(tensor.shape))
            writer.add(name, spec, [tensor])
            record.tensors[name] = spec.bytes
            if any(name.startswith(f"{layer}.{prefix}") for layer in done.packed for prefix in prefixes):
                record.bits += 8 * spec.bytes
            for alias in unit.names[1:]:
                record.same_as[alias + name.removeprefix(unit.names[0])] = name
        record.packed += done.packed
        record.pack_seconds += done.pack_seconds
        record.weights += torch.Size(self._source.spec(unit.sources["weight"]).shape).numel()
        if done.layer is not None:
            record.layers.append(done.layer)
