"""Measure the matrix and write reference.json: run it when a backend's upgrade changes a number on purpose."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from conftest import locate

from splitquant_plugins.backends import WeightRequest
from splitquant_plugins.compare import load_subject, plan_runs, row_of
from splitquant_plugins.files import write_json
from splitquant_plugins.plugins import Plugins

KEPT = (
    "n backend weights granularity group_size scheme split k seed accuracy fp32_accuracy agreement "
    "logit_sqnr_db weight_sqnr_db linear_bits_per_weight linear_bytes layers_split layers_quantized"
).split()
PACKAGES = ("torch", "transformers", "optimum-quanto", "neural-compressor", "torchao", "scikit-learn")
TOLERANCE = {"accuracy": 0.005, "fp32_accuracy": 1e-9, "weight_sqnr_db": 0.05, "logit_sqnr_db": 0.5}
EXTRA_GRIDS = {"pt2e": [("int2", "tensor", "affine"), ("int2", "channel", "symmetric")]}


def main() -> None:
    """Run every cell of the matrix on both tasks."""
    plugins = Plugins.load()
    backends = sys.argv[1:] or ["quanto", "inc", "pt2e"]
    rows = []
    for task in ("emotion", "sms"):
        subject = load_subject(*locate(task))
        for backend in backends:
            requests = [WeightRequest(width) for width in ("int2", "int4", "int8")]
            if task == "emotion":
                requests += [WeightRequest(w, g, None, s) for w, g, s in EXTRA_GRIDS.get(backend, [])]  # type: ignore[arg-type]
            for run in plan_runs(plugins, [backend], requests, ["none", "kmeans"]):
                row = row_of(subject, run)
                rows.append({"task": task, **{key: row[key] for key in KEPT}})
                print(task, run.title, row["granularity"], row["scheme"], row["accuracy"], row["weight_sqnr_db"])
    versions = {package: metadata.version(package) for package in PACKAGES}
    reference = {"tolerance": TOLERANCE, "versions": versions, "rows": rows}
    write_json(Path(__file__).with_name("reference.json"), reference)


if __name__ == "__main__":
    main()
