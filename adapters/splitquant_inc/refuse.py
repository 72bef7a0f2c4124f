"""Combinations that INC 3.10 gets wrong, refused by name with the way out."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from torch import nn

from splitquant_plugins.errors import ConfigError, InputError

AWQ_BITS = (2, 4)


def bits_of(config: Any) -> int:
    """Bits of an integer weight; dtype='int4' and its like take precedence, as in INC."""
    dtype = str(config.dtype)
    return int(dtype.removeprefix("int")) if dtype.startswith("int") and dtype != "int" else int(config.bits)


def is_integer(config: Any) -> bool:
    """Whether the weights become integers, rather than nf4, fp4 or fp8."""
    return str(config.dtype).startswith("int")


def refuse_import_order() -> None:
    """Refuse to go on where transformers was imported after INC's first use, which then does not find the name."""
    from neural_compressor.torch.algorithms.weight_only import rtn

    if "transformers" in sys.modules and not hasattr(rtn, "transformers"):
        raise ConfigError(
            "INC fails where transformers is imported after INC's first use; import it before neural_compressor"
        )


def refuse_wrapping(chosen: Mapping[str, Any]) -> None:
    """Refuse 8-bit asymmetric weights: INC subtracts the zero point in 8 bits, where it wraps."""
    for name, config in chosen.items():
        asymmetric = config.name in ("rtn", "gptq", "awq") and not config.use_sym
        if asymmetric and is_integer(config) and bits_of(config) == 8:
            raise ConfigError(
                f"{name}: INC wraps 8-bit asymmetric weights, since it takes code - zero point in 8 bits; "
                "use use_sym=True, or bits=7"
            )


def refuse_clipping(chosen: Mapping[str, Any]) -> None:
    """Refuse symmetric GPTQ: INC scales a row without negative values by half of what it needs.

    It takes (max - 0) / (2^b - 1) for the scale of such a row, and clips the upper half of its values. Every
    row of the upper part of a split layer is like that.
    """
    for name, config in chosen.items():
        if config.name == "gptq" and config.use_sym and is_integer(config):
            raise ConfigError(
                f"{name}: INC's symmetric GPTQ clips rows without negative values, as split layers have them; "
                "use GPTQConfig(use_sym=False)"
            )


def refuse_scaling(chosen: Mapping[str, Any]) -> None:
    """Refuse AWQ's search of scales, and its search of ranges at bits that it does not search at.

    The search divides each row by its largest magnitude, 0 in rows that a part has nothing in, and finds no
    finite loss. Where it finds scales, they move a part off the grid that it was made for. Both searches round
    to 4 bits whatever `bits` is; what lies on a grid of 2 bits lies on one of 4 as well.
    """
    for name, config in chosen.items():
        if config.name != "awq":
            continue
        if config.use_auto_scale:
            raise ConfigError(
                f"{name}: AWQ's search of scales fails on rows of zeros, as parts have them, and scales parts off "
                "the grid that they were made for; use AWQConfig(use_auto_scale=False), or RTNConfig with "
                "SplitQuantPass(calibration=batches), which weighs errors by activations"
            )
        if config.use_auto_clip and is_integer(config) and bits_of(config) not in AWQ_BITS:
            raise ConfigError(
                f"{name}: INC's AWQ searches ranges at 4 bits whatever bits= says, and narrows those of parts at "
                f"bits={bits_of(config)}; use bits=2 or 4, or RTNConfig"
            )


def refuse_reload(recipe: Any, chosen: Mapping[str, Any], model: nn.Module) -> None:
    """Refuse to reload weights layer by layer from a checkpoint, which does not hold the split layers."""
    if recipe.name == "gptq":
        for option in ("use_layer_wise", "use_block_wise"):
            if getattr(recipe, option):
                raise ConfigError(
                    f"GPTQConfig({option}=True) reloads weights by name, and finds no split layer; leave it out"
                )
    for name in chosen:
        if model.get_submodule(name).weight.is_meta:
            raise InputError(
                f"{name}.weight is on the meta device, for use_layer_wise to load; that cannot find split "
                "layers: load the model's weights first"
            )


def refuse_ignored(in_blocks: list[str], chosen: Mapping[str, Any]) -> None:
    """Refuse to leave a layer out of GPTQ's blocks: INC quantizes it all the same, with another's options."""
    for name in in_blocks:
        if name not in chosen:
            raise ConfigError(
                f"{name} is excluded by white_list or dtype='fp32', but INC's GPTQ quantizes every layer of a "
                "transformer block; include it, or use RTNConfig or HQQConfig"
            )
