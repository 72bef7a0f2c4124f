"""A convolutional net for a chip that takes symmetric weights with one scale per tensor, by PT2E: plain and split.

    python examples/convolutional_net_for_an_npu.py --weights int4

It trains a small net of depthwise-separable convolutions first, in seconds and without a network: BatchNorm, folded
into them, gives each channel a range of its own, and a scale per tensor has to cover them all. Activations are INT8.
`splitquant compare net.py:load --data net.py:test --backend pt2e --granularity tensor --scheme symmetric` does it for a
net of yours. Needs `pip install ".[pt2e]"`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import small_models
import torch
from torch import Tensor, nn


def quantized(model: nn.Module, images: Tensor, quantizer: Any) -> nn.Module:
    """Return a model quantized by PT2E, calibrated on some images."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(model, (images,), dynamic_shapes=({0: batch},)).module()
    prepared = prepare_pt2e(exported, quantizer)
    prepared(images)
    graph: nn.Module = convert_pt2e(prepared)
    return graph


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Read the command line, run, and print what came of it: the accuracy of each model."""
    from splitquant_pt2e import LowBitWeightQuantizer

    from splitquant_plugins import SplitQuantPass

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", choices=("int2", "int4", "int8"), default="int2")
    weights = parser.parse_args(arguments).weights
    model = small_models.convolutional_net()
    (images, labels), (calibration, _) = small_models.stripes(1000, seed=1), small_models.stripes(64, seed=2)

    def quantizer() -> LowBitWeightQuantizer:
        return LowBitWeightQuantizer(weights, granularity="tensor", scheme="symmetric", activations="int8")

    models = {
        "float": model,
        f"{weights}, plain": quantized(model, calibration, quantizer()),
        f"{weights}, split": quantized(model, calibration, SplitQuantPass() + quantizer()),
    }
    accuracy = {}
    with torch.no_grad():
        for name, one in models.items():
            accuracy[name] = float((one(images).argmax(dim=1) == labels).float().mean())
            print(f"{name}: {accuracy[name]:.1%} of {len(labels)} images")
    print("The split net runs and stores three parts for each layer.")
    return accuracy


if __name__ == "__main__":
    main()
