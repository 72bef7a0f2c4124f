"""What a quantized model takes less on disk, where codes of disjoint parts are stored once, than in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from splitquant_plugins.checkpoints.joined_codes import joined_state
from splitquant_plugins.modules import parts_of

if TYPE_CHECKING:
    from torch import Tensor

    from splitquant_plugins.backends import Backend, QuantizedModel


def bits_saved(quantized: QuantizedModel, backend: Backend) -> int:
    """Bits that the layers take less on disk than in memory, as `save_pretrained` writes them."""
    saved = backend.saved_layers()
    layers = {} if saved is None else saved.describe(quantized.model)
    if saved is None or not layers:
        return 0
    state = saved.state(quantized.model)
    return 8 * (_bytes(state) - _bytes(joined_state(state, layers, parts_of(quantized.model), saved)[0]))


def _bytes(state: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())
