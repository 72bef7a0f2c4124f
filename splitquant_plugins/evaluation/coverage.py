"""Which share of a model's weights was split and quantized, and which large tensors stay float, and why."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from splitquant_plugins.manifest import Manifest

LARGE = 0.005  # of all values of a model; smaller tensors are counted, and not named


@dataclass(frozen=True)
class FloatTensor:
    """A parameter of the float model: `owner` is the module that holds it, `kind` the module's class."""

    name: str
    owner: str
    kind: str
    shape: tuple[int, ...]
    values: int
    is_embedding: bool


def float_tensors(model: nn.Module) -> list[FloatTensor]:
    """List the parameters of a float model, each once; to be called before anything is quantized."""
    found = []
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        module = model.get_submodule(owner)
        embeds = isinstance(module, nn.Embedding)
        found.append(FloatTensor(name, owner, type(module).__name__, tuple(parameter.shape), parameter.numel(), embeds))
    return found


def coverage(tensors: Sequence[FloatTensor], quantized: Collection[str], manifest: Manifest | None) -> dict[str, Any]:
    """Return the shares of all values that are in split and in quantized weights, and the large float tensors.

    `quantized` names the layers whose weights the backend stores as integers.
    """
    total = sum(tensor.values for tensor in tensors)
    split = {name for r in (manifest.split if manifest else ()) for name in (r.name, *r.also_known_as)}
    reasons = {name: str(r.reason) for r in (manifest.kept if manifest else ()) for name in (r.name, *r.also_known_as)}
    weights = {tensor.name: tensor.owner for tensor in tensors if tensor.name.endswith("weight")}
    inside = {name for name, owner in weights.items() if owner in quantized}
    parts = {name for name, owner in weights.items() if owner in split}
    return {
        "split_share": sum(tensor.values for tensor in tensors if tensor.name in parts) / max(total, 1),
        "quantized_share": sum(tensor.values for tensor in tensors if tensor.name in inside) / max(total, 1),
        "left_float": [
            {
                "tensor": tensor.name,
                "shape": list(tensor.shape),
                "values": tensor.values,
                "reason": why(tensor, reasons),
            }
            for tensor in tensors
            if tensor.name not in inside and tensor.values >= LARGE * total
        ],
    }


def why(tensor: FloatTensor, reasons: Mapping[str, str]) -> str:
    """Why a tensor stays float."""
    if tensor.is_embedding:
        return "an embedding is looked up and not multiplied; no backend here quantizes it"
    if len(tensor.shape) == 3 and not tensor.name.endswith("weight"):
        return (
            f"{tensor.kind} keeps the weights of {tensor.shape[0]} experts as one tensor, which is no layer: neither "
            "the pass nor its backends touch it"
        )
    return reasons.get(tensor.owner, f"no backend quantizes the {tensor.name.rpartition('.')[2]} of a {tensor.kind}")


def sentences(found: Mapping[str, Any]) -> list[str]:
    """Say in lines what `coverage` found."""
    lines = [f"{found['quantized_share']:.1%} of the model's values are quantized, {found['split_share']:.1%} split."]
    lines += [f"{each['tensor']} {each['shape']} stays float: {each['reason']}" for each in found["left_float"]]
    return lines
