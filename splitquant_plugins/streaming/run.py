"""Split and quantize a checkpoint layer by layer into a folder of shards, within bounded memory."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from splitquant_plugins.backends import Backend, Packer, WeightFormat
from splitquant_plugins.checkpoints.coverage import Coverage, coverage, float_tensors
from splitquant_plugins.checkpoints.files import write_json
from splitquant_plugins.checkpoints.source import INDEX_FILE, Source
from splitquant_plugins.checkpoints.transformers_models import forget_tied_embeddings
from splitquant_plugins.errors import ConfigError, InputError
from splitquant_plugins.manifest import LayerRecord, Manifest
from splitquant_plugins.passes.record import ignored_record, new_manifest
from splitquant_plugins.passes.splitquant import SplitQuantPass
from splitquant_plugins.progress import track
from splitquant_plugins.streaming.budget import parts_within_budget
from splitquant_plugins.streaming.cluster import make_shards_on_cluster
from splitquant_plugins.streaming.job import Job, describe_job, plan_of
from splitquant_plugins.streaming.layout import Layout, make_layout
from splitquant_plugins.streaming.local import make_shards, threads_of
from splitquant_plugins.streaming.parameters import IN_MEMORY
from splitquant_plugins.streaming.shards import Shards
from splitquant_plugins.streaming.workplace import ShardRecord, Workplace

SHARD_BYTES = 1 << 29
# What the layers that are worked on at once may take, unless a single one takes more.
WORKING_BYTES = 3 << 28


@dataclass(frozen=True)
class Streamed:
    """What was made: figures over all layers, those of shards that were done before included."""

    manifest: Manifest
    coverage: Coverage
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
    backend: Backend,
    form: WeightFormat,
    *,
    ignore: Sequence[str] | None = None,
    finish: Callable[[Path, Manifest], None] | None = None,
    scheduler: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    working_bytes: int = WORKING_BYTES,
) -> Streamed:
    """Split and quantize the safetensors checkpoint in `folder` into `output`, which must not exist yet.

    What is worked on at once takes at most `working_bytes`, or what the largest layer takes; output shards have
    at most `shard_bytes`, or one layer. `ignore` are names of layers that stay float; None is the backend's own choice,
    and () is none. `finish` is called with the folder and its manifest before they
    appear, and may add to both. `scheduler` is the address of a Dask
    scheduler, whose workers make the shards. Killed and started again, here or there, it goes on with the first
    shard that is not done. Raises InputError for a checkpoint that contradicts itself or the model, for a full disk,
    and where other work was begun for the same output; ConfigError for options that need the whole model, or
    weights that the backend cannot stream.
    """
    packer = backend.packer(form)
    if packer is None:
        raise ConfigError(
            f"backend {backend.name} cannot stream {form.weights} ({form.method}); leave out --stream, or use quanto "
            "or inc"
        )
    packer.ignore = ignore
    _refuse_what_needs_the_model(first)
    source = Source(folder)
    layout = make_layout(source, first, packer)
    place = Workplace(output)
    with place.locked():
        plan = plan_of(source, first, backend.name, form, shard_bytes, ignore)
        place.begin(plan)
        if first.config.budget is not None:
            layout = make_layout(
                source, first, packer, _chosen_parts(place, source, layout, first, packer, working_bytes)
            )
        shards = Shards(source, layout, first, packer, place, shard_bytes)
        numbers = range(len(shards.files))
        done = {number: record for number in numbers if (record := shards.record(number)) is not None}
        todo = [number for number in numbers if number not in done]
        _refuse_small_disk(place.folder, sum(unit.bytes for number in todo for unit in shards.units[number]))
        try:
            if scheduler is None:
                made = _make_here(shards, todo, first, working_bytes)
            else:
                sizes = {"shard_bytes": shard_bytes, "working_bytes": working_bytes}
                made = _make_there(
                    scheduler, describe_job(source, output, first, backend, plan, **sizes), shards, todo, first
                )
            with closing(made):
                done.update(made)
            records = [done[number] for number in numbers]
            return _conclude(shards, layout, first, packer, records, len(numbers) - len(todo), finish)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            limit = error.errno == errno.EFBIG
            problem = "takes no file of that size; raise the limit (ulimit -f)" if limit else "is full; free some space"
            raise InputError(
                f"the disk of {place.folder} {problem} and run the command again: finished shards are kept, and it "
                "goes on from there"
            ) from None


def _chosen_parts(
    place: Workplace, source: Source, layout: Layout, first: SplitQuantPass, packer: Packer, working_bytes: int
) -> dict[str, int]:
    """The parts that the budget gives to each layer: measured once, and found again by whoever goes on."""
    parts = place.parts()
    if parts is None:
        parts = parts_within_budget(
            Shards(source, layout, first, packer, place, SHARD_BYTES), layout, first, working_bytes=working_bytes
        )
        place.write_parts(parts)
    return parts


def _make_here(
    shards: Shards, todo: Sequence[int], first: SplitQuantPass, working_bytes: int
) -> Generator[tuple[int, ShardRecord], None, None]:
    units = [unit for number in todo for unit in shards.units[number]]
    bar = track(units, "splitting and packing", enabled=first.progress)

    def tell(layer: LayerRecord | None) -> None:
        next(bar)
        if layer is not None:
            first.plugins.after_layer(layer)

    threads = threads_of(first.jobs)
    with closing(make_shards(shards, todo, threads=threads, working_bytes=working_bytes, tell=tell)) as made:
        yield from made
    for _ in bar:  # lets the bar end
        pass


def _make_there(
    scheduler: str, job: Job, shards: Shards, todo: Sequence[int], first: SplitQuantPass
) -> Generator[tuple[int, ShardRecord], None, None]:
    bar = track(todo, "making shards", enabled=first.progress)
    with closing(make_shards_on_cluster(scheduler, job, shards.files, todo)) as made:
        for number, record in made:
            next(bar)
            for layer in record.layers:
                first.plugins.after_layer(layer)
            yield number, record
    for _ in bar:
        pass


def _conclude(
    shards: Shards,
    layout: Layout,
    first: SplitQuantPass,
    packer: Packer,
    records: Sequence[ShardRecord],
    found: int,
    finish: Callable[[Path, Manifest], None] | None,
) -> Streamed:
    """Write what stands beside the shards, and publish the folder."""
    folder = shards.place.model
    by_name = {layer.name: layer for record in records for layer in record.layers}
    ignored = [ignored_record(layer.names, str(layer.reason), layer.kind) for layer in layout.ignored]
    layers = [*ignored, *(by_name[name] for name in layout.order)]
    manifest = new_manifest(first.config, first.splitter_options.model_dump(), layers=layers)
    whole = {name for units in shards.units for unit in units if unit.kind != "copy" for name in unit.names}
    manifest.coverage = coverage(float_tensors(layout.model), whole, manifest)
    manifest.seconds = sum(layer.seconds for layer in layers)
    if first.config.untie_embeddings:
        forget_tied_embeddings(layout.model, whole | by_name.keys())
    same_as = dict(layout.same_as)
    for record in records:
        same_as.update(record.same_as)
    packed = [layer for record in records for layer in record.packed]
    packer.describe(folder, layout.model, packed, same_as)
    total = sum(sum(record.tensors.values()) for record in records)
    weight_map = {name: file for file, record in zip(shards.files, records, strict=True) for name in record.tensors}
    write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    manifest.save(folder)
    if finish is not None:
        finish(folder, manifest)
    shards.place.publish()
    return Streamed(
        manifest=manifest,
        coverage=manifest.coverage,
        packed=len(packed),
        bits=sum(record.bits for record in records),
        weights=sum(record.weights for record in records),
        bytes=total,
        split_seconds=manifest.seconds,
        pack_seconds=sum(record.pack_seconds for record in records),
        shards=len(records),
        shards_found_done=found,
    )


def _refuse_what_needs_the_model(first: SplitQuantPass) -> None:
    for option, given in (
        ("calibration", first.calibration is not None),
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
