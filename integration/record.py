"""Measure the matrix and write reference.json: run it when a backend's upgrade changes a number on purpose."""

from __future__ import annotations

import sys
from importlib import metadata
from itertools import product
from pathlib import Path

from assets import locate

from splitquant_plugins.backends import WeightRequest
from splitquant_plugins.checkpoints.files import write_json
from splitquant_plugins.evaluation.compare import load_subject, plan_runs, row_of
from splitquant_plugins.plugins import Plugins

KEPT = (
    "n",
    "backend",
    "weights",
    "granularity",
    "group_size",
    "scheme",
    "split",
    "k",
    "seed",
    "accuracy",
    "fp32_accuracy",
    "agreement",
    "logit_sqnr_db",
    "weight_sqnr_db",
    "linear_bits_per_weight",
    "linear_bytes",
    "layers_split",
    "layers_quantized",
)
PACKAGES = ("torch", "transformers", "optimum-quanto", "neural-compressor", "torchao", "scikit-learn")
TOLERANCE = {"accuracy": 0.005, "fp32_accuracy": 1e-9, "weight_sqnr_db": 0.05, "logit_sqnr_db": 0.5}
OTHER_GRIDS: dict[str, list] = {"pt2e": [("int2", "tensor", None, "affine"), ("int2", "channel", None, "symmetric")]}
# The splitter that knows the grid, on emotion: request and options of SplitQuantPass.
GRID_SPLITS: dict[str, list[tuple[tuple, dict]]] = {
    "quanto": [(("int2",), {})],
    "inc": [(("int2",), {})],
    "pt2e": [
        *[(("int2", *grid), {}) for grid in product(("tensor", "channel"), (None,), ("affine", "symmetric"))],
        (("int2", "tensor", None, "affine"), {"k": 2}),
        (("int2", "tensor", None, "affine"), {"budget": 4.0}),
    ],
}


def main() -> None:
    """Run every cell of the matrix on both tasks."""
    plugins = Plugins.load()
    backends = sys.argv[1:] or ["quanto", "inc", "pt2e"]
    rows = []
    for task in ("emotion", "sms"):
        subject = load_subject(*locate(task), by_length=True)
        for backend in backends:
            defaults = [WeightRequest(width) for width in ("int2", "int4", "int8")]
            others = [WeightRequest(*one) for one in OTHER_GRIDS.get(backend, []) if task == "emotion"]
            cells = [([*defaults, *others], ["none", "kmeans"], {})]
            if task == "emotion":
                cells += [([WeightRequest(*one)], ["grid"], options) for one, options in GRID_SPLITS[backend]]
            for requests, splits, options in cells:
                for run in plan_runs(plugins, [backend], requests, splits, options=options):
                    row = row_of(subject, run)
                    usual = run.format == run.backend.resolve(WeightRequest(run.format.weights))
                    kept = {key: row[key] for key in KEPT}
                    rows.append({"task": task, "default_grid": usual, "options": options, **kept})
                    print(task, run.title, row["granularity"], row["scheme"], options, row["accuracy"])
    versions = {package: metadata.version(package) for package in PACKAGES}
    reference = {"tolerance": TOLERANCE, "versions": versions, "rows": rows}
    write_json(Path(__file__).with_name("reference.json"), reference)


if __name__ == "__main__":
    main()
