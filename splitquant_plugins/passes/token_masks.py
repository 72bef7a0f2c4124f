"""Which tokens of a call are padding, for each layer: an encoder-decoder has a mask for what each of the two reads."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class TokenMasks:
    """The masks [batch, tokens] of a call, not 0 at tokens; None where there is none.

    `own` is that of the layers which read the decoder's tokens, or the only ones; `encoder` that of the modules
    `reads_encoder`.
    """

    own: Tensor | None = None
    encoder: Tensor | None = None
    reads_encoder: frozenset[nn.Module] = frozenset()

    def of(self, module: nn.Module) -> Tensor | None:
        """The mask for a module's inputs and outputs."""
        return self.encoder if module in self.reads_encoder else self.own


class MaskFinder:
    """Finds the masks of a model's calls. The model of the first call tells which modules read the encoder's tokens."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._encoder = _encoder(model)
        self._reads_encoder: frozenset[nn.Module] | None = None

    def masks(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TokenMasks:
        """The masks of a call; an encoder-decoder is run with the first one. Call it in evaluation mode."""
        given = kwargs.get("masks")  # of a replay
        if isinstance(given, TokenMasks):
            return given
        named = self._named(args, kwargs)
        mask = _mask(named.get("attention_mask"))
        if self._encoder is None:
            return TokenMasks(mask)
        if self._reads_encoder is None:
            self._reads_encoder = _reading(self._model, self._encoder, args, kwargs)
        own = _mask(named.get("decoder_attention_mask"))
        if all(named.get(name) is None for name in ("decoder_input_ids", "decoder_inputs_embeds")) and own is None:
            own = mask  # the decoder reads what the encoder does
        return TokenMasks(own, mask, self._reads_encoder)

    def _named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        """The arguments of a call by their names, also those that are given by position."""
        if not args:
            return kwargs
        try:
            return inspect.signature(self._model.forward).bind_partial(*args, **kwargs).arguments
        except (TypeError, ValueError):  # the call itself will say what does not fit
            return kwargs


def _mask(value: Any) -> Tensor | None:
    return value if isinstance(value, Tensor) and value.ndim == 2 else None


def _encoder(model: nn.Module) -> nn.Module | None:
    """The encoder of transformers' encoder-decoders."""
    get_encoder = getattr(model, "get_encoder", None)
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False) or not callable(get_encoder):
        return None
    encoder = get_encoder()
    return encoder if isinstance(encoder, nn.Module) and encoder is not model else None


@torch.no_grad()
def _reading(
    model: nn.Module, encoder: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> frozenset[nn.Module]:
    """The encoder's modules, and those outside it that are given what it returns: a decoder's cross-attention.

    Or what a module made of that, as a projection to the decoder's width.
    """
    inside = set(encoder.modules())
    found = set(inside)
    returned: dict[int, Tensor] = {}  # kept alive: their memory is not to be another tensor's

    def keep(output: Any) -> None:
        values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else (output,)
        returned.update({value.data_ptr(): value for value in values if isinstance(value, Tensor)})

    def look(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        given = next((value for value in (*inputs, *named.values()) if isinstance(value, Tensor)), None)
        if given is not None and given.data_ptr() in returned:
            found.add(module)
            keep(output)

    keep(kwargs.get("encoder_outputs"))
    with ExitStack() as hooks:
        hooks.callback(encoder.register_forward_hook(lambda *call: keep(call[-1])).remove)
        for module in model.modules():
            if module not in inside and not any(module.children()):
                hooks.callback(module.register_forward_hook(look, with_kwargs=True).remove)
        model(*args, **kwargs)
    return frozenset(found)
