"""Split and quantize a checkpoint layer by layer into a folder of shards, within bounded memory."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from splitquant_plugins.backends import Packer
from splitquant_plugins.checkpoints.files import write_json
from splitquant_plugins.checkpoints.headers import TensorSpec, longest_header
from splitquant_plugins.checkpoints.source import INDEX_FILE, Source
from splitquant_plugins.checkpoints.transformers_models import forget_tied_embeddings
from splitquant_plugins.errors import ConfigError, InputError, SplitFailedError
from splitquant_plugins.manifest import LayerRecord, Manifest
from splitquant_plugins.passes.record import ignored_record, layer_record, new_manifest
from splitquant_plugins.passes.splitquant import SplitQuantPass
from splitquant_plugins.plugins import own_version
from splitquant_plugins.progress import track
from splitquant_plugins.streaming.layout import IN_MEMORY, Layout, Unit, make_layout
from splitquant_plugins.streaming.pipeline import in_order
from splitquant_plugins.streaming.workplace import ShardRecord, Workplace
from splitquant_plugins.streaming.writer import ShardWriter

if TYPE_CHECKING:
    from splitquant_plugins.backends import WeightFormat

SHARD_BYTES = 1 << 29
# What the layers that are worked on at once may take, unless a single one takes more.
WORKING_BYTES = 3 << 28


@dataclass(frozen=True)
class Streamed:
    """What was made: figures over all layers, those of shards that were done before included."""

    manifest: Manifest
    packed: int
    bits: int
    weights: int
    bytes: int
    split_seconds: float
    pack_seconds: float
    shards: int
    shards_found_done: int


def stream_model(
    folder: Path,
    output: Path,
    first: SplitQuantPass,
    packer: Packer,
    form: WeightFormat,
    *,
    extras: Callable[[Path], None] | None = None,
    shard_bytes: int = SHARD_BYTES,
    working_bytes: int = WORKING_BYTES,
) -> Streamed:
    """Split and quantize the safetensors checkpoint in `folder` into `output`, which must not exist yet.

    What is worked on at once takes at most `working_bytes`, or what the largest layer takes; output shards have
    at most `shard_bytes`, or one layer. `extras` adds files to the output. Killed and started again, it goes on
    with the first shard that is not done. Raises InputError for a checkpoint that contradicts itself or the
    model, for a full disk, and where other work was begun for the same output; ConfigError for options that
    need the whole model.
    """
    _refuse_what_needs_the_model(first)
    source = Source(folder)
    layout = make_layout(source, first, packer)
    place = Workplace(output)
    with place.locked():
        place.begin(_plan(source, first, form, shard_bytes))
        try:
            return _Run(source, layout, first, packer, place).finish(shard_bytes, working_bytes, extras)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise InputError(
                f"the disk of {place.folder} is full; free some space and run the command again: finished shards are "
                "kept, and it goes on from there"
            ) from None


@dataclass
class _Done:
    """What one unit became; tensors by the names they are saved under."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    packed: list[str] = field(default_factory=list)
    layer: LayerRecord | None = None
    pack_seconds: float = 0.0


class _Run:
    def __init__(self, source: Source, layout: Layout, first: SplitQuantPass, packer: Packer, place: Workplace) -> None:
        self._source = source
        self._layout = layout
        self._first = first
        self._packer = packer
        self._place = place

    def finish(self, shard_bytes: int, working_bytes: int, extras: Callable[[Path], None] | None) -> Streamed:
        """Write the shards that are not done, then everything beside them, and publish the folder."""
        shards = self._layout.shards(shard_bytes)
        files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
        records = [self._place.record_of(file) for file in files]
        found = sum(record is not None for record in records)
        todo = [number for number, record in enumerate(records) if record is None]
        units = [unit for number in todo for unit in shards[number]]
        _refuse_small_disk(self._place.folder, sum(unit.bytes for unit in units))
        bar = track(units, "splitting and packing", enabled=self._first.progress)
        work = in_order(self._work, units, cost=self._cost, budget=working_bytes, threads=self._threads())
        with closing(work) as made:
            for number in todo:
                records[number] = self._write_shard(files[number], shards[number], made, bar)
        for _ in bar:  # lets the bar end
            pass
        return self._conclude(files, [record for record in records if record is not None], found, extras)

    def _threads(self) -> int:
        """As many as `jobs` says; as torch would use on one layer, where it says no more than that."""
        jobs = self._first.jobs
        return torch.get_num_threads() if jobs == 1 else jobs if jobs > 0 else os.cpu_count() or 1

    def _write_shard(self, file: str, units: list[Unit], made: Iterator[_Done], bar: Iterator[Unit]) -> ShardRecord:
        record = ShardRecord(bytes=0, tensors={})
        header = longest_header([output for unit in units for output in unit.outputs])
        with ShardWriter(self._place.model / file, header) as writer:
            for unit in units:
                next(bar)
                self._write(unit, next(made), writer, record)
            record.bytes = writer.finish()
            record.digest = writer.digest
            self._place.write_record(file, record)
            writer.publish()
        return record

    def _write(self, unit: Unit, done: _Done, writer: ShardWriter, record: ShardRecord) -> None:
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
            self._first.plugins.after_layer(done.layer)

    @torch.no_grad()
    def _work(self, unit: Unit) -> _Done:
        """Read, split and pack one layer; what is copied is left to the writer."""
        if unit.kind == "copy":
            return _Done()
        started = time.perf_counter()
        tensors = {role: self._source.read(name, self._layout.dtypes[name]) for role, name in unit.sources.items()}
        for role, name in unit.sources.items():
            _refuse_unfit_values(name, tensors[role])
        if unit.transposed:
            tensors["weight"] = tensors["weight"].t()
        name = unit.names[0]
        done = _Done()
        parts: list[tuple[str, Tensor, Tensor | None]] = []
        if unit.plan is not None:
            plan = replace(unit.plan, weight=tensors["weight"], bias=tensors.get("bias"))
            split = self._first.split_tensors(name, plan, self._packer.grid)
            done.layer = layer_record(unit.names, plan, split, self._first.config.splitter)
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

    def _cost(self, unit: Unit) -> int:
        """Bytes that a unit takes while it is worked on: the weight, its parts, what they become, and their sum."""
        if unit.kind == "copy":
            return 0
        copies = self._first.config.k + 3 if unit.kind == "split" else 1
        return copies * self._source.spec(unit.sources["weight"]).bytes + unit.bytes

    def _conclude(
        self, files: list[str], records: list[ShardRecord], found: int, extras: Callable[[Path], None] | None
    ) -> Streamed:
        folder = self._place.model
        by_name = {layer.name: layer for record in records for layer in record.layers}
        ignored = [ignored_record(layer.names, str(layer.reason), layer.kind) for layer in self._layout.ignored]
        layers = [*ignored, *(by_name[name] for name in self._layout.order)]
        manifest = new_manifest(self._first.config, self._first.splitter_options.model_dump(), layers=layers)
        manifest.seconds = sum(layer.seconds for layer in layers)
        if self._first.config.untie_embeddings:
            forget_tied_embeddings(self._layout.model)
        same_as = dict(self._layout.same_as)
        for record in records:
            same_as.update(record.same_as)
        packed = [layer for record in records for layer in record.packed]
        self._packer.describe(folder, self._layout.model, packed, same_as)
        total = sum(sum(record.tensors.values()) for record in records)
        weight_map = {name: file for file, record in zip(files, records, strict=True) for name in record.tensors}
        write_json(
            folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        )
        if extras is not None:
            extras(folder)
        manifest.save(folder)
        self._place.publish()
        return Streamed(
            manifest=manifest,
            packed=len(packed),
            bits=sum(record.bits for record in records),
            weights=sum(record.weights for record in records),
            bytes=total,
            split_seconds=manifest.seconds,
            pack_seconds=sum(record.pack_seconds for record in records),
            shards=len(records),
            shards_found_done=found,
        )


def _refuse_unfit_values(name: str, tensor: Tensor) -> None:
    # Extremes are finite where all values are, and need no second tensor.
    if tensor.numel() and not all(bool(torch.isfinite(bound)) for bound in torch.aminmax(tensor)):
        count = int((~torch.isfinite(tensor)).sum())
        raise SplitFailedError(f"{name} has {count} NaN or infinite values; repair the checkpoint")


def _refuse_what_needs_the_model(first: SplitQuantPass) -> None:
    for option, given in (
        ("calibration", first.calibration is not None),
        ("budget", first.config.budget is not None),
        ("activations", first.config.activations),
    ):
        if given:
            raise ConfigError(
                f"{option} needs the whole model, which streaming never has; leave it out, or {IN_MEMORY}"
            )


def _refuse_small_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(f"{folder} needs up to {_size(needed)} more, and its disk has {_size(free)} free")


def _size(count: int) -> str:
    """Bytes in the largest unit that leaves at least 1."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def _plan(source: Source, first: SplitQuantPass, form: WeightFormat, shard_bytes: int) -> dict[str, Any]:
    """Everything that the output depends on, as JSON has it."""
    plan = {
        "checkpoint": source.fingerprint(),
        "config.json": (source.folder / "config.json").read_text("utf-8"),
        "weight format": form.__dict__,
        "options": first.config.model_dump(mode="json"),
        "splitter options": first.splitter_options.model_dump(mode="json"),
        "version": own_version(),
        "shard size": shard_bytes,
    }
    answer: dict[str, Any] = json.loads(json.dumps(plan))
    return answer
