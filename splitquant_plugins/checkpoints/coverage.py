"""Which share of a model's weights was split and quantized, and which large tensors stay float, and why."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr
from torch import nn

if TYPE_CHECKING:
    from splitquant_plugins.manifest import Manifest

LARGE = 0.005  # of all values of a model; smaller tensors are counted, and not named

LEFT = "the backend left its parts float"
# Kinds of modules whose stacks are no experts.
_NO_EXPERTS = ("ParametrizationList",)


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
    """List the parameters of a float model, each once; to be called before anything is split or quantized."""
    found = []
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        module = model.get_submodule(owner)
        embeds = isinstance(module, nn.Embedding)
        values = 0 if isinstance(parameter, nn.UninitializedParameter) else parameter.numel()
        shape = tuple(parameter.shape) if values else ()
        found.append(FloatTensor(name, owner, type(module).__name__, shape, values, embeds))
    return found


class FloatRecord(BaseModel):
    """A large tensor that stays float, for `reason`."""

    model_config = ConfigDict(extra="forbid")

    tensor: str
    shape: tuple[int, ...]
    values: int
    reason: str


class Coverage(BaseModel):
    """Which share of a model's `values`, all those of its parameters, is in split and in quantized weights.

    `quantized_share` is None until a backend has quantized the model; `left_float` are then the large tensors that
    were not split.
    """

    model_config = ConfigDict(extra="forbid")

    values: int
    split_share: float
    quantized_share: float | None = None
    left_float: list[FloatRecord] = Field(default_factory=list)
    _tensors: Sequence[FloatTensor] = PrivateAttr(())

    def __eq__(self, other: object) -> bool:
        """Whether the other says the same."""
        return isinstance(other, Coverage) and self.model_dump() == other.model_dump()


def coverage(tensors: Sequence[FloatTensor], quantized: Collection[str] | None, manifest: Manifest | None) -> Coverage:
    """Return the shares of all values that are in split and in quantized weights, and the large float tensors.

    `quantized` names the layers whose weights the backend stores as integers; None where that is not known yet.
    """
    total = sum(tensor.values for tensor in tensors)
    split = {name for r in (manifest.split if manifest else ()) for name in (r.name, *r.also_known_as)}
    reasons = {name: str(r.reason) for r in (manifest.kept if manifest else ()) for name in (r.name, *r.also_known_as)}
    of_split = "it was split, and " + ("no backend has quantized it yet" if quantized is None else LEFT)
    reasons.update(dict.fromkeys(split, of_split))
    weights = {tensor.name: tensor.owner for tensor in tensors if tensor.name.rpartition(".")[2] == "weight"}
    parts = {name for name, owner in weights.items() if owner in split}
    inside = parts if quantized is None else {name for name, owner in weights.items() if owner in quantized}
    found = Coverage(
        values=total,
        split_share=_share(tensors, parts, total),
        quantized_share=None if quantized is None else _share(tensors, inside, total),
        left_float=[
            FloatRecord(tensor=tensor.name, shape=tensor.shape, values=tensor.values, reason=why(tensor, reasons))
            for tensor in tensors
            if tensor.name not in inside and tensor.values and tensor.values >= LARGE * total
        ],
    )
    found._tensors = tensors
    return found


def note_quantized(manifest: Manifest, quantized: Collection[str]) -> None:
    """Note in a manifest which layers, by their names in the float model, a backend has quantized."""
    known = manifest.coverage
    if known is not None and known._tensors:  # one that was read from a file is left as it is
        manifest.coverage = coverage(known._tensors, quantized, manifest)


def with_reasons(found: Coverage, reasons: Mapping[str, str]) -> Coverage:
    """Return the same with the reasons of the layers of those names, where they stay float."""
    records = [
        each.model_copy(update={"reason": reasons.get(each.tensor.rpartition(".")[0], each.reason)})
        for each in found.left_float
    ]
    return found.model_copy(update={"left_float": records})


def why(tensor: FloatTensor, reasons: Mapping[str, str]) -> str:
    """Why a tensor stays float."""
    if tensor.is_embedding:
        return "an embedding is looked up and not multiplied; no backend here quantizes it"
    own = tensor.name.rpartition(".")[2]
    if len(tensor.shape) == 3 and tensor.shape[0] > 1 and own != "weight" and tensor.kind not in _NO_EXPERTS:
        return (
            f"{tensor.kind} keeps the weights of {tensor.shape[0]} experts as one tensor, which is no layer: neither "
            "the pass nor its backends touch it"
        )
    return reasons.get(tensor.owner, f"no backend quantizes the {tensor.name.rpartition('.')[2]} of a {tensor.kind}")


def sentences(found: Coverage) -> list[str]:
    """Say in lines what `coverage` found."""
    shares = [] if found.quantized_share is None else [f"{found.quantized_share:.1%} quantized"]
    shares.append(f"{found.split_share:.1%} split")
    lines = [f"Of the model's values, {' and '.join(shares)}."]
    lines += [f"{each.tensor} {list(each.shape)} stays float: {each.reason}" for each in found.left_float]
    return lines


def coverage_of(row: Mapping[str, Any]) -> Coverage:
    """Return what a row of figures says of it."""
    return Coverage(values=0, **{key: row[key] for key in ("split_share", "quantized_share", "left_float")})


def _share(tensors: Sequence[FloatTensor], names: Collection[str], total: int) -> float:
    return sum(tensor.values for tensor in tensors if tensor.name in names) / max(total, 1)
