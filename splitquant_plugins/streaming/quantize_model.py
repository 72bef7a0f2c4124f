"""From a float model on disk to a split, quantized one on disk; the folder appears whole or not at all."""

from __future__ import annotations

import secrets
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from splitquant_plugins.backends import Backend, Batch, QuantizedModel, WeightFormat, WeightRequest, quantize_leaving
from splitquant_plugins.checkpoints.coverage import Coverage, coverage, float_tensors, with_reasons
from splitquant_plugins.checkpoints.files import refuse_output_folder
from splitquant_plugins.checkpoints.pretrained_config import saves_itself
from splitquant_plugins.checkpoints.source import is_sharded
from splitquant_plugins.decoupleq.decoupleq_pass import DecoupleQPass
from splitquant_plugins.errors import ConfigError, InputError, first_line
from splitquant_plugins.evaluation.compare import DECOUPLEQ, UNSPLIT
from splitquant_plugins.evaluation.disk_bits import bits_saved
from splitquant_plugins.evaluation.python_functions import split_function
from splitquant_plugins.evaluation.tasks.base import Task
from splitquant_plugins.evaluation.tasks.language_model import HEAD_REASON
from splitquant_plugins.evaluation.tasks.text_classification import OtherTextModel
from splitquant_plugins.manifest import Manifest, manifest_of
from splitquant_plugins.passes.base import ModelPass
from splitquant_plugins.passes.splitquant import SplitQuantPass
from splitquant_plugins.plugins import Plugins
from splitquant_plugins.pretrained.streamed_folder import describe_streamed
from splitquant_plugins.streaming.layout import empty_skeleton
from splitquant_plugins.streaming.run import stream_model
from splitquant_plugins.streaming.stream_solved import stream_solved

TOKENIZER_FILES = (
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
# Where generation stops, and how it samples; how images and sounds are prepared.
OTHER_FILES = ("generation_config.json", "preprocessor_config.json", "processor_config.json")


def quantize_model(
    plugins: Plugins,
    model: str,
    backend: str,
    request: WeightRequest,
    splitter: str,
    output: Path,
    options: dict[str, Any],
    stream: bool | None = None,
    scheduler: str | None = None,
    *,
    pretrained: bool = False,
    decoupleq: dict[str, Any] | None = None,
    calibration: Sequence[Batch] | None = None,
    task: Task | None = None,
) -> dict[str, Any]:
    """Split and quantize a model and save it into `output`, which must not exist yet.

    `task` says how it is loaded and what it leaves float; without one it is a transformers model by the architecture
    that it names, of which nothing is left float that the backend quantizes.

    With `stream`, a folder's safetensors are worked on layer by layer, and the model is never in memory; None
    streams a sharded checkpoint where backend and options can. `scheduler` is the address of a Dask scheduler whose
    workers do the streaming. With `pretrained`, what is not streamed is saved by the model's `save_pretrained`, else by
    the backend's `save`, as what is streamed. `decoupleq` are the options of DecoupleQPass, which then chooses the
    values; it, splitters and methods that need them use the batches `calibration`. Returns a row of figures. Everything
    that the arguments can be wrong in is checked before work begins.
    """
    chosen = plugins.backend(backend)
    chosen.require()
    form = chosen.resolve(request)
    first = None
    if splitter != UNSPLIT:
        example = task is not None and task.example_is_data  # for backends that trace the model
        used_later = decoupleq is not None or form.method in chosen.calibrated or example
        given = calibration if plugins.splitter(splitter).uses_calibration or not used_later else None
        own = options if given is None else {**options, "calibration": given}
        first = SplitQuantPass(splitter=splitter, plugins=plugins, **own)
    if calibration is None and (decoupleq is not None or form.method in chosen.calibrated):
        method = f"{form.method!r} of backend {backend}" if decoupleq is None else "'decoupleq'"
        raise ConfigError(f"method {method} needs calibration data: give --calibration")
    solver = None if decoupleq is None else DecoupleQPass(calibration=calibration, plugins=plugins, **decoupleq)
    if first is None and solver is None:
        raise ConfigError("split 'none': a plain model is saved by the backend's own tools; choose a splitter")
    refuse_output_folder(output)
    passes: Any
    whole_model = form.method in chosen.calibrated or (solver is not None and first is not None)
    if scheduler is not None:
        if stream is False:
            raise ConfigError("a scheduler works on checkpoints that are streamed; leave out --no-stream")
        stream = True
    if stream and whole_model:
        raise ConfigError(
            "decoupleQ behind a split, and methods of the backend that run calibration data, need the whole model; "
            "leave out --stream, or the split with --split none"
        )
    if scheduler is not None and solver is not None:
        raise ConfigError("decoupleQ solves one block after another, on one machine; leave out --scheduler")
    if stream is None:
        runs_data = first is not None and (first.calibration is not None or first.config.activations)
        needs_model = solver is not None or whole_model or first is None or runs_data
        stream = is_sharded(model) and chosen.packer(form) is not None and not needs_model
    if stream:
        passes = first or solver
        figures = _stream(chosen, model, task, form, passes, output, scheduler=scheduler, pretrained=pretrained)
    else:
        passes = first if solver is None else solver if first is None else first + solver
        batches = calibration if form.method in chosen.calibrated else None
        figures = _in_memory(
            chosen, task or OtherTextModel(model), form, passes, output, batches, pretrained=pretrained
        )
    return {
        "model": model,
        "task": None if task is None else task.kind.name,
        "output": str(output),
        "backend": backend,
        "weights": form.weights,
        "granularity": form.granularity,
        "group_size": form.group_size,
        "scheme": form.scheme,
        "split": splitter,
        "method": form.method if solver is None else DECOUPLEQ,
        "k": 1 if first is None else first.config.k,
        "seed": options.get("seed", 0),
        "streamed": stream,
        **figures,
        "tokenizer_files": [name for name in TOKENIZER_FILES if (output / name).is_file()],
    }


def _recipe(chosen: Backend, form: WeightFormat, ignore: Sequence[str] | None, task: Task | None) -> dict[str, object]:
    """What a recipe file says of the backend, the weight format, the head, and the context that was asked for."""
    found = {"granularity": form.granularity, "group_size": form.group_size, "scheme": form.scheme}
    found["context"] = None if task is None else task.given_context
    known: dict[str, object] = {name: value for name, value in found.items() if value is not None}
    head = {"head": True} if ignore == () else {}
    return {"backend": chosen.name, "weights": form.weights, **known, "method": form.method, **head}


def _in_memory(
    chosen: Backend,
    task: Task,
    form: WeightFormat,
    first: ModelPass,
    output: Path,
    batches: Sequence[Batch] | None,
    *,
    pretrained: bool,
) -> dict[str, Any]:
    loaded = task.load_model()
    ignore = task.stays_float(loaded)
    tensors = float_tensors(loaded)
    example = task.example_batch(loaded)
    with _appearing(output) as temporary:
        given = batches or ([] if example is None else [example])
        quantized = quantize_leaving(chosen, loaded, form, first, given, ignore)
        if quantized.manifest is not None:
            quantized.manifest.recipe = _recipe(chosen, form, ignore, task)
        source = _folder_of(task.model)
        with _writing(output):
            _save(chosen, quantized, temporary, pretrained=pretrained)
            if source is not None:
                _copy_files(source, temporary)
    covered = quantized.manifest.coverage if quantized.manifest else None
    covered = covered or coverage(tensors, quantized.layers, quantized.manifest)
    stored = [part for parts in quantized.layers.values() for part in parts]
    weights = sum(parts[0].weight.numel() for parts in quantized.layers.values())
    less = bits_saved(quantized, chosen) if pretrained and saves_itself(quantized.model) else 0
    return {
        "layers_split": len(quantized.manifest.split) if quantized.manifest else 0,
        "layers_quantized": quantized.layers_quantized,
        **_shares(covered, ignore),
        "bits_per_weight": sum(part.bits for part in stored) / weights,
        "disk_bits_per_weight": (sum(part.bits for part in stored) - less) / weights,
        "model_bytes": quantized.state_bytes,
        "split_seconds": quantized.split_seconds,
        "quantize_seconds": quantized.quantize_seconds,
    }


def _save(chosen: Backend, quantized: QuantizedModel, folder: Path, *, pretrained: bool) -> None:
    """Save for `from_pretrained`, whose folder the adapter loads too, or for the adapter alone."""
    if pretrained and chosen.library and saves_itself(quantized.model):
        model: Any = quantized.model
        model.save_pretrained(folder)
        manifest_of(model).save(folder)
    else:
        chosen.save(quantized, folder)


def _stream(
    chosen: Backend,
    model: str,
    task: Task | None,
    form: WeightFormat,
    passes: SplitQuantPass | DecoupleQPass,
    output: Path,
    *,
    scheduler: str | None,
    pretrained: bool,
) -> dict[str, Any]:
    folder = Path(model)
    if not folder.is_dir():
        raise InputError(f"{model} is not a folder, and only local checkpoints are streamed; download it first")
    ignore = None if task is None else task.stays_float(empty_skeleton(folder)[0])
    saved = chosen.saved_layers() if pretrained else None

    def finish(made: Path, manifest: Manifest) -> None:
        _copy_files(folder, made)
        manifest.recipe = _recipe(chosen, form, ignore, task)
        manifest.save(made)
        if saved is not None:
            describe_streamed(made, chosen.name, saved)

    if isinstance(passes, DecoupleQPass):
        made = stream_solved(folder, output, passes, chosen, form, ignore=ignore, finish=finish)
    else:
        made = stream_model(folder, output, passes, chosen, form, ignore=ignore, finish=finish, scheduler=scheduler)
    return {
        "layers_split": len(made.manifest.split),
        "layers_quantized": made.packed,
        "bits_per_weight": made.bits / made.weights,
        "disk_bits_per_weight": made.bits / made.weights,
        "model_bytes": made.bytes,
        "split_seconds": made.split_seconds,
        "quantize_seconds": made.pack_seconds,
        **_shares(made.coverage, ignore),
        "shards": made.shards,
        "shards_found_done": made.shards_found_done,
    }


def _shares(found: Coverage, ignore: Sequence[str] | None) -> dict[str, Any]:
    """What a row says of what stays float; `ignore` are the heads among that."""
    reasoned = with_reasons(found, dict.fromkeys(ignore or (), HEAD_REASON))
    return {**reasoned.model_dump(mode="json", exclude={"values"}), "ignored": list(ignore or ())}


@contextmanager
def _appearing(output: Path) -> Iterator[Path]:
    """A folder beside `output` that takes its place in the end; it is made first, so that no work is lost."""
    with _writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = output.with_name(f".{output.name}.{secrets.token_hex(4)}")
        temporary.mkdir()  # with the permissions that the umask leaves
    try:
        yield temporary
        allowed = stat.S_IMODE(temporary.stat().st_mode) & 0o666
        for file in temporary.rglob("*"):  # safetensors makes files that nobody else may read
            if file.is_file():
                file.chmod(allowed)
        with _writing(output):
            temporary.replace(output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def _writing(output: Path) -> Iterator[None]:
    """Name the folder that the user asked for, and not a temporary one, where it cannot be written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"cannot write {output}: {reason}; choose another --output") from None


def _folder_of(model: str) -> Path | None:
    """The folder of a model, or that of the Hub's cache with its tokenizer and the like; None for a function's."""
    if split_function(model) is not None:
        return None
    folder = Path(model)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, allow_patterns=[*TOKENIZER_FILES, *OTHER_FILES]))


def _copy_files(source: Path, target: Path) -> None:
    for name in (*TOKENIZER_FILES, *OTHER_FILES):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
