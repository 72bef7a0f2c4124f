"""States with the codes of a split layer's parts joined where their supports are disjoint, and taken apart again.

On disk, a joined layer has the tensors `codes`, one for each weight, and `part_of`, the number of the part that holds
it, both packed in bytes, in place of the codes of its parts; scales and the rest stay where they are. What is taken
apart is the same bit for bit: a layer of which that does not hold is left as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, equal

from splitquant_plugins.checkpoints.base_k import pack_digits, unpack_digits
from splitquant_plugins.checkpoints.disjoint_parts import joined, parted
from splitquant_plugins.errors import SkeletonMismatchError, SplitQuantError

if TYPE_CHECKING:
    from splitquant_plugins.checkpoints.saved_layers import SavedLayers

CODES, PART_OF = "codes", "part_of"
_MOST_BITS = 8


class JoinedLayer(BaseModel):
    """The shape of a joined layer's codes, as the backend lays them out, and the bits of each."""

    model_config = ConfigDict(extra="forbid")

    shape: tuple[Annotated[int, Field(ge=1)], ...]
    bits: Literal[1, 2, 4, 8]


def joined_state(
    state: Mapping[str, Tensor],
    layers: Mapping[str, Mapping[str, Any]],
    parts: Mapping[str, Sequence[str]],
    saved: SavedLayers,
) -> tuple[dict[str, Tensor], dict[str, JoinedLayer]]:
    """Return the state with layers joined where they can be, and a description of those.

    `layers` is what `saved` says of quantized layers, `parts` gives the names of each split layer's parts.
    """
    left = dict(state)
    found: dict[str, JoinedLayer] = {}
    for layer, names in parts.items():
        if len(names) < 2 or not all(name in layers for name in names):
            continue
        tensors = {name: _within(left, name) for name in names}
        made = _join(layer, tensors, layers, saved)
        if made is not None:
            for name in names:
                for key in tensors[name]:
                    del left[f"{name}.{key}"]
            found[layer] = made[1]
            left.update(made[0])
    return left, found


def separated_state(
    state: Mapping[str, Tensor],
    described: Mapping[str, JoinedLayer],
    layers: Mapping[str, Mapping[str, Any]],
    parts: Mapping[str, Sequence[str]],
    saved: SavedLayers,
) -> dict[str, Tensor]:
    """Return what `joined_state` was given; SkeletonMismatchError where the tensors are not what the rest says."""
    left = dict(state)
    for layer, form in described.items():
        names = parts.get(layer, ())
        if len(names) < 2 or not all(name in layers for name in names):
            raise SkeletonMismatchError(f"the codes of {layer} are joined, which is not a split, quantized layer here")
        try:
            left.update(_separate(left, layer, form, names, layers, saved))
            del left[f"{layer}.{CODES}"], left[f"{layer}.{PART_OF}"]
        except KeyError as error:
            raise SkeletonMismatchError(f"{layer}: there is no tensor {error} to take its codes apart") from None
        except SplitQuantError:
            raise
        except (ValueError, RuntimeError) as error:  # RuntimeError is torch's, for shapes
            raise SkeletonMismatchError(f"{layer}: its joined codes cannot be taken apart: {error}") from None
    return left


def _join(
    layer: str,
    tensors: Mapping[str, dict[str, Tensor]],
    layers: Mapping[str, Mapping[str, Any]],
    saved: SavedLayers,
) -> tuple[dict[str, Tensor], JoinedLayer] | None:
    split = [saved.part_codes(layers[name], within) for name, within in tensors.items()]
    known = [part for part in split if part is not None]
    first = known[0] if known else None
    if first is None or len(known) < len(split) or first.bits not in (1, 2, 4, _MOST_BITS):
        return None
    if any(part.bits != first.bits or part.codes.shape != first.codes.shape for part in known):
        return None
    pair = joined([part.codes for part in known], [part.zeros for part in known])
    if pair is None:
        return None
    form = JoinedLayer(shape=tuple(first.codes.shape), bits=first.bits)
    made = {
        f"{layer}.{CODES}": pack_digits(pair[0], 2**first.bits),
        f"{layer}.{PART_OF}": pack_digits(pair[1], len(known)),
        **{f"{name}.{key}": each for name, part in zip(tensors, known, strict=True) for key, each in part.rest.items()},
    }
    again = _separate(made, layer, form, list(tensors), layers, saved)
    wanted = {f"{name}.{key}": each for name, within in tensors.items() for key, each in within.items()}
    return (made, form) if _same(again, wanted) else None


def _separate(
    state: Mapping[str, Tensor],
    layer: str,
    form: JoinedLayer,
    names: Sequence[str],
    layers: Mapping[str, Mapping[str, Any]],
    saved: SavedLayers,
) -> dict[str, Tensor]:
    count = prod(form.shape)
    codes = unpack_digits(state[f"{layer}.{CODES}"], 2**form.bits, count).view(form.shape)
    part_of = unpack_digits(state[f"{layer}.{PART_OF}"], len(names), count).view(form.shape)
    rests = [_within(state, name) for name in names]
    zeros = [saved.zero_codes(layers[name], rest) for name, rest in zip(names, rests, strict=True)]
    made: dict[str, Tensor] = {}
    for name, rest, part in zip(names, rests, parted(codes, part_of, zeros), strict=True):
        whole = {**rest, **saved.with_codes(layers[name], rest, part)}
        made.update({f"{name}.{key}": tensor for key, tensor in whole.items()})
    return made


def _within(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    prefix = f"{name}."
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        tensor.dtype == other[key].dtype and equal(tensor, other[key]) for key, tensor in one.items()
    )
