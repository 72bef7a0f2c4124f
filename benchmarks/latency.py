"""Running a quantized model: plain, split, and split and fused, with quanto's INT4 weights and in float.

Run `python benchmarks/latency.py [--smoke] [--json FILE] [--threads N]`. Every row is timed in turn with the
plain model, in one process. `memory` is what the tensors of the model take, the materialised sums included.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
from _harness import alternate, report
from _models import bert_tiny
from torch import Tensor, nn

from splitquant_plugins import SplitQuantPass, fuse


def run(smoke: bool, runs: int = 15) -> list[dict[str, Any]]:
    """Measure; `smoke` takes a tiny model and one run."""
    model = bert_tiny(1, 32) if smoke else bert_tiny()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 1000, (2 if smoke else 32, 8 if smoke else 64), generator=generator)
    rows = []
    for kind, finish in (("float", nn.Module.eval), ("quanto int4", _int4)):
        plain = finish(copy.deepcopy(model))
        splits = [finish(SplitQuantPass()(copy.deepcopy(model))) for _ in range(3)]
        variants = {
            "split": splits[0],
            "split, fused (materialised)": fuse(splits[1]),
            "split, fused (rebuilt)": fuse(splits[2], "rebuilt"),
        }
        for name, variant in variants.items():
            rows.append(_compare(kind, name, plain, variant, ids, 1 if smoke else runs))
    return rows


@torch.no_grad()
def _compare(kind: str, name: str, plain: nn.Module, variant: nn.Module, ids: Tensor, runs: int) -> dict[str, Any]:
    plain(ids), variant(ids)
    (ours, base), ratio = alternate(lambda: variant(ids), lambda: plain(ids), runs)
    return {
        "weights": kind,
        "model": name,
        "ms": 1000 * ours,
        "plain, ms": 1000 * base,
        "times plain": ratio,
        "memory, MB": _megabytes(variant),
        "plain, MB": _megabytes(plain),
        "runs": runs,
    }


def _int4(model: nn.Module) -> nn.Module:
    from optimum.quanto import freeze, qint4, quantize

    quantize(model, weights=qint4)
    freeze(model)
    return model.eval()


def _megabytes(model: nn.Module) -> float:
    stored = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    fused = [getattr(module, "fused_weight", None) for module in model.modules()]
    return (stored + sum(t.numel() * t.element_size() for t in fused if t is not None)) / 1e6


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--json")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    report("Inference latency, BERT-Tiny at batch 32, 64 tokens", run(arguments.smoke), arguments.json)
