"""A model whole and split, exported with optimum-onnx and quantized with its ORTQuantizer: logits against float.

It runs in an environment of its own, since optimum-onnx wants another transformers than the rest:

    pip install torch==2.13.0 "optimum-onnx[onnxruntime]" .
    python benchmarks/optimum_onnx.py --assets FOLDER
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from optimum.exporters.onnx import onnx_export_from_model
from optimum.onnxruntime import ORTModelForSequenceClassification, ORTQuantizer
from optimum.onnxruntime.configuration import AutoQuantizationConfig
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from splitquant_plugins import SplitQuantPass
from splitquant_plugins.grid import UniformGrid

TOKENS = 48
PACKAGES = ("optimum-onnx", "onnxruntime", "onnx", "transformers", "torch")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=64)
    options = parser.parse_args()
    folder = options.assets / "models" / "bert-tiny-emotion"
    with (options.assets / "datasets" / "emotion" / "test.csv").open() as file:
        texts = [row["text"] for row in csv.DictReader(file)][: options.texts]
    inputs = AutoTokenizer.from_pretrained(folder)(
        texts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
    )

    def net() -> torch.nn.Module:
        return AutoModelForSequenceClassification.from_pretrained(folder).eval()

    wanted = net()(**inputs).logits
    print(", ".join(f"{name} {version(name)}" for name in PACKAGES), f"n={len(texts)}")
    for granularity in ("tensor", "channel"):
        grid = UniformGrid(8, "symmetric", granularity)
        for k in (1, 2, 3):
            model = net() if k == 1 else SplitQuantPass(k=k).apply(net(), grid=grid)
            with tempfile.TemporaryDirectory() as made:
                found, size = by_optimum(model, Path(made), granularity == "channel", inputs)
            print(f"per {granularity}, k={k}: {sqnr(wanted, found):.1f} dB, {size / 1e6:.1f} MB")


def by_optimum(model: torch.nn.Module, folder: Path, per_channel: bool, inputs: dict) -> tuple[torch.Tensor, int]:
    """Logits of the model exported and dynamically quantized to INT8, and the bytes of its file."""
    onnx_export_from_model(model, folder, task="text-classification", monolith=True)
    recipe = AutoQuantizationConfig.avx512_vnni(
        is_static=False, per_channel=per_channel, operators_to_quantize=["MatMul", "Gemm"]
    )
    ORTQuantizer.from_pretrained(folder, file_name="model.onnx").quantize(save_dir=folder, quantization_config=recipe)
    quantized = ORTModelForSequenceClassification.from_pretrained(folder, file_name="model_quantized.onnx")
    return quantized(**inputs).logits, (folder / "model_quantized.onnx").stat().st_size


def sqnr(wanted: torch.Tensor, found: torch.Tensor) -> float:
    """Return the signal-to-noise ratio of the logits, in dB."""
    return float(10 * torch.log10(wanted.square().sum() / (wanted - found).square().sum()))


if __name__ == "__main__":
    main()
