"""INC's RTN weights made one at a time, in blocks of rows and without modules; the same bits as INC's own."""

from __future__ import annotations

import copy
import glob
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from splitquant_inc.grid import WORD_BITS, IncRtnGrid
from splitquant_inc.packing import rtn_layer
from splitquant_inc.storage import write_description
from splitquant_inc.weight_only import chosen_layers, leave_float
from splitquant_plugins.backends import Packer
from splitquant_plugins.checkpoints.headers import TensorSpec
from splitquant_plugins.errors import ConfigError
from splitquant_plugins.parallel import chunks
from splitquant_plugins.passes.module_tree import is_transformers_conv1d, occurrences

if TYPE_CHECKING:
    from neural_compressor.torch.quantization import RTNConfig

# Values quantized at once: enough to make calls cheap, few enough to stay in the cache.
BLOCK = 1 << 19


class IncRtnPacker(Packer):
    """Packs as INC's `convert` does with that configuration, layers' parts and whole layers alike."""

    weight_prefixes: ClassVar = ("qweight", "scales", "qzeros")
    packs_bias: ClassVar = True

    def __init__(self, grid: IncRtnGrid, recipe: RTNConfig) -> None:
        self.grid: IncRtnGrid = grid
        self._recipe = recipe

    def quantized(self, model: nn.Module) -> Sequence[str]:
        """The layers that the configuration quantizes: Linear and Conv1D, but for those in `ignore`.

        Where that is None, INC leaves the head of a language model float.
        """
        names = self._chosen(model)
        for _, also in occurrences(model):
            if len(also) > 1 and also[0] in names:
                raise ConfigError(
                    f"{also[0]} is {also[1]} too, and INC replaces a layer in one place only; use another backend"
                )
        return names

    def ignored(self, model: nn.Module) -> Sequence[str]:
        quantized = set(self._chosen(model))
        return [glob.escape(name) for name, _ in model.named_modules() if name and name not in quantized]

    def _chosen(self, model: nn.Module) -> list[str]:
        recipe = copy.deepcopy(self._recipe)
        if self.ignore is not None:
            leave_float(recipe, self.ignore, model)
        return list(chosen_layers(recipe, model))

    def spec(self, shape: torch.Size, dtype: torch.dtype, *, part: bool) -> dict[str, TensorSpec]:
        """Codes, scales, zero points and bias, which INC stores for every layer, and its scale for FP8."""
        outputs, inputs = shape
        groups = 1 if self.grid.group_size is None else -(-inputs // self.grid.group_size)
        per_word = WORD_BITS // self.grid.bits
        return {
            "scale_bf16_to_fp8": TensorSpec(torch.bfloat16, (1,)),
            "scales": TensorSpec(torch.float16, (groups, outputs)),
            "qweight": TensorSpec(torch.int32, (-(-inputs // per_word), outputs)),
            "qzeros": TensorSpec(torch.int32, (groups, -(-outputs // per_word))),
            "bias": TensorSpec(torch.float16, (outputs,)),
        }

    def pack(self, weight: Tensor, bias: Tensor | None = None, *, part: bool) -> dict[str, Tensor]:
        """Quantize a weight [out, in], and store the bias in 16 bits; zeros where there is none."""
        made = {
            name: torch.zeros(spec.shape, dtype=spec.dtype)
            for name, spec in self.spec(weight.shape, weight.dtype, part=part).items()
        }
        zero_points = torch.empty(len(weight), len(made["scales"]), dtype=torch.int32)
        for rows in chunks(slice(0, len(weight)), max(1, BLOCK // weight.shape[1])):
            codes, scales, zeros = self._quantize(weight[rows])
            made["scales"][:, rows] = scales.t()
            made["qweight"][:, rows] = _words(codes, self.grid.bits).t()
            zero_points[rows] = zeros
        # One less than the zero point is stored, as the format of GPTQ has it.
        made["qzeros"].copy_(_words((zero_points - 1).t(), self.grid.bits))
        if bias is not None:
            made["bias"].copy_(bias)
        return made

    def _quantize(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes [rows, in], and scales and zero points [rows, groups]; codes are not negative."""
        found: list[list[Tensor]] = [[], [], []]
        shift = -self.grid.quant_min
        for groups in self.grid.groups(rows):
            codes, scale, zero_point = self.grid.quantize(groups)
            for column, tensor in zip(found, (codes.to(torch.int32) + shift, scale, zero_point + shift), strict=True):
                column.append(tensor.reshape(len(rows), -1))
        codes, scales, zeros = (torch.cat(column, dim=1) for column in found)
        return codes, scales, zeros

    def describe(self, folder: Path, model: nn.Module, layers: Sequence[str], same_as: Mapping[str, str]) -> None:
        shapes = {name: _features(module) for name, module in model.named_modules()}
        packed = {}
        for layer in layers:
            inputs, outputs = shapes.get(layer) or shapes[layer.rpartition(".")[0]]
            packed[layer] = rtn_layer(inputs, outputs, self.grid.bits, self.grid.group_size)
        write_description(folder, model, packed, dict(same_as))


def _features(module: Any) -> tuple[int, int]:
    """Inputs and outputs of a layer; of a Conv1D, too, whose weight is [in, out]."""
    weight = getattr(module, "weight", None)
    if weight is None or weight.ndim != 2:
        return (0, 0)
    one, other = weight.shape
    return (one, other) if is_transformers_conv1d(module) else (other, one)


def _words(codes: Tensor, bits: int) -> Tensor:
    """Pack whole numbers [rows, n] into 32-bit words [rows, ⌈n / per word⌉], lowest bits first."""
    per_word = WORD_BITS // bits
    width = -(-codes.shape[1] // per_word)
    words = torch.zeros(len(codes), width, dtype=torch.int32)
    for lane in range(per_word):
        column = codes[:, lane::per_word].to(torch.int32) & ((1 << bits) - 1)
        words[:, : column.shape[1]] |= column << (bits * lane)
    return words
