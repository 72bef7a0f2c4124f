"""Running a quantized model: plain, split, and split and fused or stacked; float, quanto INT4 and X86Inductor.

Run `python benchmarks/latency.py [--smoke] [--json FILE] [--threads N] [--kinds NAME,NAME]`. Float and quanto models
are BERT-Tiny at 64 tokens, run eagerly; `x86-inductor` is two Linear layers, 512 and 2048 wide, with 8-bit weights and
activations, compiled by Inductor. Every row is timed in turn with the plain model, in one process, at batch 1 and 32.
`memory` is what the tensors of the model take, the materialised sums included.

`stacked` is one product of k times the outputs, which are then summed: the parts' weights above each other. A scale per
output channel stays what it was; one scale per tensor would be shared by all parts, and the split be lost.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from _harness import alternate, report
from _models import bert_tiny, heavy_tailed
from torch import Tensor, nn

from splitquant_plugins import SplitQuantPass, fuse
from splitquant_plugins.modules import SplitLinear

KINDS = ("float", "quanto-int4", "x86-inductor")


class Stacked(nn.Module):
    """A split Linear as one Linear of k times the outputs, and their sum."""

    def __init__(self, split: SplitLinear) -> None:
        super().__init__()
        parts = list(split.parts())
        self.k, self.outputs = len(parts), split.out_features
        biased = any(part.bias is not None for part in parts)
        self.parts = nn.Linear(split.in_features, self.k * self.outputs, bias=biased)
        with torch.no_grad():
            self.parts.weight.copy_(torch.cat([part.weight for part in parts]))
            if biased:
                zeros = torch.zeros(self.outputs)
                self.parts.bias.copy_(torch.cat([zeros if part.bias is None else part.bias for part in parts]))

    def forward(self, inputs: Tensor) -> Tensor:
        """One product, and the sum of its k pieces."""
        total, *rest = self.parts(inputs).split(self.outputs, dim=-1)
        for piece in rest:
            total = total + piece
        return total


def stack(model: nn.Module) -> nn.Module:
    """Put stacked layers in the places of split Linear layers."""
    for name, module in list(model.named_children()):
        if isinstance(module, SplitLinear):
            setattr(model, name, Stacked(module).train(module.training))
        else:
            stack(module)
    return model


def run(smoke: bool, runs: int = 15, kinds: Sequence[str] = KINDS, k: int = 2) -> list[dict[str, Any]]:
    """Measure; `smoke` takes a tiny model and one run."""
    rows = []
    for kind in kinds:
        if kind == "x86-inductor":
            rows += _compiled(smoke, runs, k)
            continue
        model = bert_tiny(1, 32) if smoke else bert_tiny()
        finish = _int4 if kind == "quanto-int4" else nn.Module.eval
        plain = finish(copy.deepcopy(model))
        splits = [SplitQuantPass(k=k)(copy.deepcopy(model)) for _ in range(4)]
        variants = {
            "split": finish(splits[0]),
            "split, fused (materialised)": fuse(finish(splits[1])),
            "split, fused (rebuilt)": fuse(finish(splits[2]), "rebuilt"),
            "split, stacked": finish(stack(splits[3])),
        }
        for batch in (1, 2 if smoke else 32):
            generator = torch.Generator().manual_seed(0)
            ids = torch.randint(1, 1000, (batch, 8 if smoke else 64), generator=generator)
            for name, variant in variants.items():
                rows.append(_compare(kind, name, batch, plain, variant, ids, 1 if smoke else runs))
    return rows


def _compiled(smoke: bool, runs: int, k: int) -> list[dict[str, Any]]:
    """PT2E with X86InductorQuantizer, compiled with frozen weights; a graph has no layers left to fuse."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    width = 64 if smoke else 512
    torch.manual_seed(0)
    model = heavy_tailed(nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width)).eval())
    torch._inductor.config.freezing = True
    rows = []
    for batch in (1, 32):
        inputs = torch.randn(batch, width)

        def made(
            quantizer: Any, change: Callable[[nn.Module], nn.Module] = lambda same: same, inputs: Tensor = inputs
        ) -> Any:
            exported = torch.export.export(change(copy.deepcopy(model)), (inputs,)).module()
            prepared = prepare_pt2e(exported, quantizer)
            prepared(inputs)
            converted = convert_pt2e(prepared)
            if smoke:
                return converted
            return torch.compile(converted)

        def recipe() -> Any:
            return X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())

        with torch.no_grad():
            plain = made(recipe())
            variants = {
                "split": made(SplitQuantPass(k=k) + recipe()),
                "split, stacked": made(recipe(), lambda same: stack(SplitQuantPass(k=k)(same))),
            }
        for name, variant in variants.items():
            rows.append(_compare("x86-inductor", name, batch, plain, variant, inputs, 1 if smoke else 20 * runs))
    return rows


@torch.no_grad()
def _compare(
    kind: str, name: str, batch: int, plain: nn.Module, variant: nn.Module, inputs: Tensor, runs: int
) -> dict[str, Any]:
    plain(inputs), variant(inputs)
    (ours, base), ratio = alternate(lambda: variant(inputs), lambda: plain(inputs), runs)
    return {
        "weights": kind,
        "model": name,
        "batch": batch,
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--json")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kinds", default=",".join(KINDS))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found = run(arguments.smoke, kinds=arguments.kinds.split(","))
    report("Inference latency beside the plain quantized model, k = 2", found, arguments.json)
