"""Every stock PT2E quantizer that is installed, plain and with the default split, on ResNet-20.

Run `python benchmarks/stock_quantizers.py --assets FOLDER [NAME ...] [--programs] [--page]`, or `--smoke`. FOLDER holds
`models/resnet20-cifar10` and `datasets/cifar10_jpeg`. Quantizers calibrate on 150 images; accuracy is that of the first
`--limit` test images (400), dB the signal-to-noise ratio of the logits against the float model's. `--programs` also
lowers quantizers that have a target of `splitquant export`. `--page` puts the rows into docs/backends/quantizers.json
and writes docs/backends/quantizers.md from it; rows that were not measured again stay.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import logging
import sys
import time
import warnings
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from splitquant_plugins import SplitQuantPass, manifest_of
from splitquant_plugins.errors import SplitQuantError
from splitquant_plugins.evaluation.metrics import sqnr_db

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

DOCS = Path(__file__).resolve().parent.parent / "docs" / "backends"
ROWS = DOCS / "quantizers.json"
PAGE = DOCS / "quantizers.md"
CALIBRATION, BATCH = 150, 50
PACKAGES = ("torch", "torchao", "executorch", "ethos-u-vela", "coremltools", "nncf")
# A third part where two bits are not enough for two.
PARTS = {"qnn-16a2w": 3, "qnn-16a2w-channel": 3}
Subject = tuple[nn.Module, "Tensor", "Tensor", "Tensor"]


def resnet20(assets: Path, limit: int) -> Subject:
    """The float model, test images and labels, and calibration images."""
    home = assets / "models" / "resnet20-cifar10" / "resnet20.py"
    spec = importlib.util.spec_from_file_location("resnet20", home)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["resnet20"] = importlib.util.module_from_spec(spec)  # torch.export looks it up by name
    spec.loader.exec_module(module)
    images, labels = module.test()
    return module.load(), images[:limit], labels[:limit], module.calibration()[0][:CALIBRATION]


def small() -> Subject:
    """An untrained net and noise: for trying the script."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 10)).eval()
    images = torch.randn(20, 3, 8, 8)
    return model, images, model(images).argmax(-1), images[:10]


def quantized(subject: Subject, quantizer: Any) -> nn.Module:
    """Export, annotate, calibrate and convert the model, as the quantizers' own examples do."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    model, images, _, calibration = subject
    size = min(BATCH, len(calibration), len(images))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        exported = torch.export.export(copy.deepcopy(model), (calibration[:size],), strict=True)
        prepared = prepare_pt2e(exported.module(check_guards=False), quantizer)
        for batch in calibration.split(size):
            prepared(batch)
        return convert_pt2e(prepared)


@torch.no_grad()
def row_of(name: str, subject: Subject, *, programs: bool) -> dict[str, Any]:
    """One quantizer, plain and split."""
    from splitquant_pt2e.programs import TARGETS
    from splitquant_pt2e.stock_quantizers import STOCK, make

    model, images, labels, calibration = subject
    images, calibration = STOCK[name].ordered([images, calibration])
    subject = (model, images, labels, calibration)
    size = min(BATCH, len(calibration), len(images))
    reference = torch.cat([model(batch) for batch in images.split(size)])
    k = PARTS.get(name, 2)
    row: dict[str, Any] = {"quantizer": name, "description": STOCK[name].description, "k": k, "n": len(images)}
    row["float_accuracy"] = float((reference.argmax(-1) == labels).double().mean())
    target = next((target for target, one in TARGETS.items() if one.quantizer == name), None)
    for way in ("plain", "auto"):
        first = None if way == "plain" else SplitQuantPass(k=k)
        started = time.process_time()
        graph = quantized(subject, make(name) if first is None else first + make(name))
        outputs = torch.cat([graph(batch) for batch in images.split(size)])
        found: dict[str, Any] = {
            "accuracy": float((outputs.argmax(-1) == labels).double().mean()),
            "logit_sqnr_db": sqnr_db(reference, outputs),
            "cpu_seconds": round(time.process_time() - started, 1),
        }
        if first is not None:
            manifest = manifest_of(graph)
            found |= {"layers_split": len(manifest.split), "layers": len(manifest.layers)}
        if programs and target is not None:
            found |= program_of(model, target, first, calibration)
        row[way] = found
    return row


def program_of(model: nn.Module, target: str, first: Any, calibration: Tensor) -> dict[str, Any]:
    """What the target's program is like, or why there is none."""
    from splitquant_pt2e.programs import export_program

    batches = [(image,) for image in calibration[:20].split(1)]
    try:
        program = export_program(copy.deepcopy(model), target, first, batches)
    except SplitQuantError as error:
        return {"target": target, "refused": str(error)}
    sizes = {"bytes": len(program.content), "cycles": program.cycles}
    return {"target": target, "delegates": program.delegates, "host_operators": sum(program.host.values()), **sizes}


def versions() -> dict[str, str]:
    """The packages that figures depend on, with the versions that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            continue
    return found


def render(stored: Mapping[str, Any]) -> str:
    """The page, from what was measured."""
    rows: Sequence[Mapping[str, Any]] = stored["rows"]
    first = rows[0]
    used = ", ".join(f"{name} {version}" for name, version in stored["versions"].items())
    lines = [
        "# The quantizers that ship with torchao, executorch and nncf",
        "",
        "This page is written by a command; every row can be measured again with it, all of them without a name:",
        "```bash",
        "python benchmarks/stock_quantizers.py --assets FOLDER --programs --page NAME",
        "```",
        "",
        f"ResNet-20 on CIFAR-10, the first {first['n']} test images, one run, calibrated on {CALIBRATION} images; "
        f"float accuracy {100 * first['float_accuracy']:.2f} %. `auto` is `SplitQuantPass(k=k) + quantizer`. dB: the "
        "logits against the float model's. Layers: how many are split; what would not gain stays whole, with its "
        f"reason in the manifest. An accuracy is known to ±{_interval(first):.1f} points (95 %). "
        f"{used}; CPU.",
        "",
        "| quantizer | what | k | plain | auto | layers split |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        plain, auto = row["plain"], row["auto"]
        cells = [f"{100 * each['accuracy']:.2f} %, {each['logit_sqnr_db']:.1f} dB" for each in (plain, auto)]
        split = f"{auto['layers_split']} of {auto['layers']}"
        lines.append(f"| `{row['quantizer']}` | {row['description']} | {row['k']} | {' | '.join(cells)} | {split} |")
    lowered = [row for row in rows if "delegates" in row["auto"]]
    if lowered:
        lines += [
            "",
            "## Programs",
            "`splitquant export MODEL --target TARGET --output FILE.pte`, a batch of one. Cycles are vela's estimates.",
            "",
            "| target | way | delegates | host operators | kB | cycles |",
            "|---|---|---|---|---|---|",
        ]
    for row in lowered:
        for way in ("plain", "auto"):
            one = row[way]
            cycles = "" if one["cycles"] is None else f"{one['cycles']:,}"
            cells = [one["target"], way, one["delegates"], one["host_operators"], f"{one['bytes'] / 1000:,.0f}", cycles]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += [
        f"\nNo program for {one['target']}: {one['refused']}."
        for one in (row["plain"] for row in rows)
        if "refused" in one
    ]
    return "\n".join(lines) + "\n"


def _interval(row: Mapping[str, Any]) -> float:
    """Half of the 95 % interval of an accuracy, in points."""
    p = row["float_accuracy"]
    return float(196 * (p * (1 - p) / row["n"]) ** 0.5)


def store(rows: Sequence[dict[str, Any]]) -> None:
    """Put rows into the file of all, in the order of the quantizers' table, and write the page."""
    from splitquant_pt2e.stock_quantizers import STOCK

    known = json.loads(ROWS.read_text("utf-8"))["rows"] if ROWS.exists() else []
    merged = {row["quantizer"]: row for row in [*known, *rows]}
    stored = {"versions": versions(), "rows": [merged[name] for name in STOCK if name in merged]}
    ROWS.write_text(json.dumps(stored, indent=1) + "\n", "utf-8")
    PAGE.write_text(render(stored), "utf-8")


def run(names: Sequence[str], subject: Subject, *, programs: bool = False, page: bool = False) -> list[dict[str, Any]]:
    """Measure quantizers, those that cannot be built here with the reason on standard error, and print each row."""
    from splitquant_pt2e.stock_quantizers import installed

    rows = []
    for name in names:
        if reason := installed(name):
            print(f"{name}: {reason}", file=sys.stderr)
            continue
        with torch.backends.mkldnn.flags(enabled=True):  # Qualcomm's turns it off on AMD, for all that come after
            row = row_of(name, subject, programs=programs)
        print(json.dumps(row), flush=True)
        rows.append(row)
        if page:
            store([row])
    return rows


if __name__ == "__main__":
    from splitquant_pt2e.stock_quantizers import STOCK

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(STOCK)}; without, all")
    parser.add_argument("--assets", type=Path)
    parser.add_argument("--limit", type=int, default=400)
    parser.add_argument("--programs", action="store_true")
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.disable(logging.WARNING)  # vendors' packages say much
    if arguments.smoke:
        run(arguments.names or ["x86-inductor"], small())
    elif arguments.assets is None:
        parser.error("--assets FOLDER, or --smoke")
    else:
        wanted = arguments.names or list(STOCK)
        chosen = resnet20(arguments.assets, arguments.limit)
        run(wanted, chosen, programs=arguments.programs, page=arguments.page)
