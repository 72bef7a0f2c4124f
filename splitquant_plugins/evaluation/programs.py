"""What a program for a device is like, beside the float model that it was made from."""

from __future__ import annotations

import copy
import time
from typing import TYPE_CHECKING, Any

from splitquant_plugins.evaluation.exportable import logits_of_batches
from splitquant_plugins.evaluation.metrics import sqnr_db

if TYPE_CHECKING:
    from splitquant_plugins.backends import Backend, Program
    from splitquant_plugins.evaluation.exportable import Exportable
    from splitquant_plugins.passes.splitquant import SplitQuantPass


def program_row(
    backend: Backend, subject: Exportable, target: str, first: SplitQuantPass | None
) -> tuple[Program, dict[str, Any]]:
    """Make the program of a copy of the model and measure it.

    `agreement` is the share of rows of the first output whose largest value is where the float model has it.
    """
    reference = logits_of_batches(subject.model, subject.batches)
    started = time.perf_counter()
    program = backend.program(copy.deepcopy(subject.model), target, first, subject.batches)
    seconds = time.perf_counter() - started
    outputs = logits_of_batches(program.model, subject.batches)
    return program, {
        "model": subject.name,
        "target": target,
        "split": "none" if first is None else first.config.splitter,
        "k": 1 if first is None else first.config.k,
        "layers_split": len(program.manifest.split) if program.manifest else 0,
        "bytes": len(program.content),
        "cycles": program.cycles,
        "delegates": program.delegates,
        "host_operators": sum(program.host.values()),
        "host": dict(program.host),
        "output_sqnr_db": sqnr_db(reference, outputs),
        "agreement": float((outputs.argmax(-1) == reference.argmax(-1)).double().mean()),
        "n": len(reference),
        "seconds": seconds,
    }
