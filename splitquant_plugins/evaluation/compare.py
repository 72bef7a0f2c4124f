"""One model, one dataset, many ways to quantize it: a row for each."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from typing import Any

from splitquant_plugins.backends import (
    ROUND_TO_NEAREST,
    Backend,
    Batch,
    QuantizedModel,
    WeightFormat,
    WeightRequest,
    quantize_leaving,
)
from splitquant_plugins.checkpoints.coverage import coverage, float_tensors, with_reasons
from splitquant_plugins.decoupleq.decoupleq_pass import DecoupleQPass
from splitquant_plugins.errors import ConfigError, InputError, SplitQuantError, first_line
from splitquant_plugins.evaluation.choices import choices
from splitquant_plugins.evaluation.disk_bits import bits_saved
from splitquant_plugins.evaluation.metrics import WeightMeasures, measure_weights
from splitquant_plugins.evaluation.peak_memory import PeakMemory
from splitquant_plugins.evaluation.subject import Subject, Told, load_task_subject
from splitquant_plugins.evaluation.tasks.choose import task_of
from splitquant_plugins.evaluation.tasks.language_model import HEAD_REASON
from splitquant_plugins.passes.base import ModelPass
from splitquant_plugins.passes.splitquant import SplitQuantPass
from splitquant_plugins.plugins import Plugins

UNSPLIT = "none"
DECOUPLEQ = "decoupleq"
# What outputs may be measured by, whatever the kind of model.
MEASURES = ("accuracy", "agreement", "logit_sqnr_db", "perplexity", "kl", "tokens")
_NEEDS_CALIBRATION = (
    "needs calibration data: give --calibration FILE, data as --data takes them, or --calibration self for a language "
    "model"
)


@dataclass(frozen=True)
class Run:
    """One way to quantize: a backend, a weight format, how to split, if at all, and how to choose the values.

    `solver`: the pass that chooses the values, where the backend's own method does not. `calibration`: batches for
    that method.
    """

    backend: Backend
    format: WeightFormat
    split: str
    seed: int
    splitter: SplitQuantPass | None
    solver: DecoupleQPass | None = None
    calibration: Sequence[Batch] | None = field(default=None, repr=False)

    @property
    def method(self) -> str:
        """How the values are chosen."""
        return self.format.method if self.solver is None else DECOUPLEQ

    @property
    def first(self) -> ModelPass | None:
        """The pass in front of the backend, if any."""
        if self.splitter is None or self.solver is None:
            return self.splitter or self.solver
        return self.splitter + self.solver

    @property
    def title(self) -> str:
        """What a progress bar shows."""
        return f"{self.backend.name} {self.format.quantizer or self.format.weights} {self.split} {self.method}"


def plan_runs(
    plugins: Plugins,
    backends: Sequence[str],
    requests: Sequence[WeightRequest],
    splits: Sequence[str],
    seeds: Sequence[int] = (0,),
    options: dict[str, Any] | None = None,
    methods: Sequence[str] = (ROUND_TO_NEAREST,),
    calibration: Sequence[Batch] | None = None,
    solver_options: dict[str, Any] | None = None,
) -> list[Run]:
    """Check every choice before anything is loaded, and return the runs in the order of the table.

    `options` are those of SplitQuantPass, `solver_options` those of DecoupleQPass. `methods` say how values are chosen,
    as the backends have them, or decoupleq; one that needs `calibration` batches is an error without. An unsplit run
    does not depend on the seed, and is made once.
    """
    options = options or {}
    chosen = [plugins.backend(name) for name in backends]
    for backend in chosen:
        backend.require()
    if DECOUPLEQ in methods and calibration is None:
        raise ConfigError(f"method {DECOUPLEQ!r} {_NEEDS_CALIBRATION}")
    solver = None
    if DECOUPLEQ in methods:
        solver = DecoupleQPass(calibration=calibration, plugins=plugins, **(solver_options or {}))
    formats = []
    for backend, request, method in product(chosen, requests, methods):
        own = ROUND_TO_NEAREST if method == DECOUPLEQ else method
        if request.quantizer is not None and calibration is None:
            raise ConfigError(f"stock quantizer {request.quantizer!r} of backend {backend.name} {_NEEDS_CALIBRATION}")
        if own in backend.calibrated and calibration is None:
            raise ConfigError(f"method {own!r} of backend {backend.name} {_NEEDS_CALIBRATION}")
        form = backend.resolve(replace(request, method=own))
        batches = calibration if own in backend.calibrated or request.quantizer is not None else None
        formats.append((backend, form, solver if method == DECOUPLEQ else None, batches))
    using = {split for split in splits if split != UNSPLIT and plugins.splitter(split).uses_calibration}
    if calibration is not None and not using and solver is None and all(batches is None for *_, batches in formats):
        raise ConfigError("calibration: no splitter and no method chosen here makes use of it; leave it out")
    passes: list[tuple[str, int, SplitQuantPass | None]] = []
    for split, seed in product(splits, seeds):
        if split != UNSPLIT:
            own_options = dict(options)
            if calibration is not None and split in using:
                own_options["calibration"] = calibration
            passes.append((split, seed, SplitQuantPass(splitter=split, seed=seed, plugins=plugins, **own_options)))
        elif seed == seeds[0]:
            passes.append((split, seed, None))
    return [
        Run(backend, form, *one, chooser, batches)
        for (backend, form, chooser, batches), one in product(formats, passes)
    ]


def equal_storage_runs(plugins: Plugins, runs: Sequence[Run]) -> list[Run]:
    """Return, for the split runs, plain ones of as many bits: k parts of b bits against one of k·b, at most 8.

    Against a budget stand its whole bits, at least 2. They are simulated on the same kind of grid, since backends have
    no 6-bit weights.
    """
    backend = plugins.backend("simulated")
    found: dict[WeightFormat, Run] = {}
    for run in runs:
        if run.splitter is not None:
            config = run.splitter.config
            stored = config.k * run.format.bits if config.budget is None else int(config.budget)
            bits = min(8, max(2, stored))
            form = replace(run.format, weights=f"int{bits}", bits=bits, method=ROUND_TO_NEAREST)
            found.setdefault(form, Run(backend, form, UNSPLIT, run.seed, None))
    return list(found.values())


def load_subject(model: str, data: str, limit: int | None = None, *, by_length: bool = False) -> Subject:
    """Load a model of whatever kind and data for it, and run the one over the other.

    `by_length` is for text classifiers: see `TextClassification`.
    """
    return load_task_subject(task_of(model, by_length=by_length), data, limit)


def compare(
    subject: Subject,
    runs: Sequence[Run],
    started: Callable[[Run], object] = lambda run: None,
    told: Told = lambda part: None,
) -> Iterator[dict[str, Any]]:
    """Yield one row for each run; `started` is called before it, `told` with the part of the data that it has seen."""
    for run in runs:
        started(run)
        yield row_of(subject, run, told)


def row_of(subject: Subject, run: Run, told: Told = lambda part: None) -> dict[str, Any]:
    """Quantize a copy of the subject and measure it. What does not apply to the subject's kind is None."""
    try:
        model = copy.deepcopy(subject.model)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"{subject.name} cannot be copied, as each row needs it: {first_line(error)}") from None
    tensors = float_tensors(model)
    batches = run.calibration or subject.examples.batches
    with PeakMemory() as memory:
        quantized = quantize_leaving(run.backend, model, run.format, run.first, batches, subject.ignore)
    try:
        figures = subject.measure(quantized.run, told)
    except SplitQuantError:
        raise
    except Exception as error:  # whatever a backend's layers make of the model's inputs, such as of their dtype
        raise InputError(f"{run.title}: the quantized model cannot be run: {first_line(error)}") from error
    covered = quantized.manifest.coverage if quantized.manifest else None
    covered = covered or coverage(tensors, quantized.layers, quantized.manifest)
    covered = with_reasons(covered, dict.fromkeys(subject.ignore or (), HEAD_REASON))
    weights = measure_weights(quantized, subject.model)
    return {
        "model": subject.name,
        "data": subject.examples.name,
        "task": subject.kind.name,
        "n": subject.examples.count,
        "backend": run.backend.name,
        "quantizer": run.format.quantizer,
        "weights": run.format.weights,
        "granularity": run.format.granularity,
        "group_size": run.format.group_size,
        "scheme": run.format.scheme,
        "split": run.split,
        "method": run.method,
        "values": run.method,  # the name of that field before; to go with the next release
        "k": _parts(run.splitter),
        "budget": run.splitter.config.budget if run.splitter else None,
        **{f"fp32_{name}": subject.figures.get(name) for name in ("accuracy", "perplexity")},
        **{name: figures.get(name) for name in MEASURES},
        **asdict(weights),
        **_on_disk(quantized, run.backend, weights),
        "split_seconds": quantized.split_seconds,
        "quantize_seconds": quantized.quantize_seconds,
        "seconds": quantized.seconds,
        "peak_mb": memory.megabytes,
        "layers_split": len(quantized.manifest.split) if quantized.manifest else 0,
        **covered.model_dump(mode="json", exclude={"values"}),
        "ignored": list(subject.ignore or ()),
        "choices": choices(quantized.manifest),
        "layers_solved": len(quantized.manifest.solved) if quantized.manifest else 0,
        "seed": run.seed,
    }


def _on_disk(quantized: QuantizedModel, backend: Backend, measures: WeightMeasures) -> dict[str, Any]:
    """What the Linear and convolution weights take on disk, as `save_pretrained` writes them."""
    less = bits_saved(quantized, backend)
    weights = 8 * measures.linear_bytes / measures.linear_bits_per_weight
    return {
        "linear_disk_bits_per_weight": measures.linear_bits_per_weight - less / weights,
        "linear_disk_bytes": measures.linear_bytes - less // 8,
    }


def _parts(splitter: SplitQuantPass | None) -> int | None:
    """Parts per layer; None where a budget chooses them."""
    if splitter is None:
        return 1
    return splitter.config.k if splitter.config.budget is None else None
