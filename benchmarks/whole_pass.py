"""The whole pass over a model beside the paper's way, a scikit-learn fit for each clustering.

Run `python benchmarks/whole_pass.py [--smoke] [--json FILE] [--threads N]`.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from _harness import alternate, report
from _models import bert_tiny, resnet18
from torch import nn

from splitquant_plugins import SplitQuantPass, manifest_of


def run(smoke: bool, runs: int = 3) -> list[dict[str, Any]]:
    """Measure; `smoke` takes tiny models that show only that everything runs."""
    makers: list[tuple[str, Callable[[], nn.Module]]] = [
        ("BERT-Tiny", (lambda: bert_tiny(1, 32)) if smoke else bert_tiny),
        ("ResNet-18 shape", (lambda: resnet18(4)) if smoke else resnet18),
    ]
    return [_compare(name, make(), 1 if smoke else runs) for name, make in makers]


def _compare(name: str, model: nn.Module, runs: int) -> dict[str, Any]:
    def apply(**options: Any) -> nn.Module:
        return SplitQuantPass(**options)(copy.deepcopy(model))

    split = apply()
    (ours, theirs), ratio = alternate(lambda: apply(), lambda: apply(splitter="kmeans", method="sklearn"), runs)
    return {
        "model": name,
        "layers split": len(manifest_of(split).split),
        "weights": sum(record_size(record.shape) for record in manifest_of(split).split),
        "exact, s": ours,
        "scikit-learn, s": theirs,
        "scikit-learn / exact": 1 / ratio,
        "runs": runs,
    }


def record_size(shape: tuple[int, ...]) -> int:
    """Number of weights of a shape."""
    return torch.Size(shape).numel()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--json")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    report("The whole pass", run(arguments.smoke), arguments.json)
