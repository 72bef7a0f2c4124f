"""Splitting activation layers: which are elementwise, along which dimension, and the surgery."""

from __future__ import annotations

from torch import nn

from splitquant_plugins.config import SplitConfig
from splitquant_plugins.errors import ConfigError
from splitquant_plugins.modules import SplitActivation
from splitquant_plugins.passes.module_tree import occurrences, replace_module
from splitquant_plugins.passes.select import reason_to_ignore

ELEMENTWISE = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.ELU,
    nn.SELU,
    nn.CELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Tanh,
    nn.Sigmoid,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.Hardtanh,
    nn.Softplus,
    nn.Softsign,
    nn.Tanhshrink,
    nn.Hardshrink,
    nn.Softshrink,
    nn.LogSigmoid,
)
LINEAR_RANKS = (1, 5)  # a Linear takes any number of dimensions; no model is known to give it more
REFUSED = {
    nn.Softmax: "it is not elementwise",
    nn.Softmax2d: "it is not elementwise",
    nn.LogSoftmax: "it is not elementwise",
    nn.Softmin: "it is not elementwise",
    nn.GLU: "it is not elementwise",
    nn.PReLU: "it has a parameter per channel",
    nn.RReLU: "it is random in training",
}


def split_activations(model: nn.Module, config: SplitConfig) -> list[str]:
    """Replace every elementwise activation module by a SplitActivation; return notes for the manifest.

    The feature dimension is `config.activation_dim`, or else what the Linear or convolution that was
    registered last before the activation puts its features in: last, or the channel dimension.
    """
    notes = []
    # Of the layer before: the dimension of its features, from the end, and the least and the most dimensions it gives.
    dim, ranks = -1, LINEAR_RANKS
    for module, names in occurrences(model):
        name = names[0]
        if isinstance(module, nn.Linear):
            dim, ranks = -1, LINEAR_RANKS
        elif isinstance(module, nn.modules.conv._ConvNd):
            spatial = len(module.kernel_size)
            dim, ranks = -1 - spatial, (spatial + 1, spatial + 2)
        reason = next((reason for kind, reason in REFUSED.items() if isinstance(module, kind)), None)
        if reason:
            notes.append(f"activation {name} ({type(module).__name__}) is left whole: {reason}")
        elif is_elementwise(module) and reason_to_ignore([name], config) is None:
            chosen = dim if config.activation_dim is None else config.activation_dim
            if not -max(ranks) <= chosen < max(ranks):
                raise ConfigError(
                    f"activation_dim={chosen}: activation {name} is given tensors of {min(ranks)} to {max(ranks)} "
                    f"dimensions; choose {-max(ranks)} to {max(ranks) - 1}, or leave it out"
                )
            split = SplitActivation(module, config.k, chosen).train(module.training)
            for place in names:
                replace_module(model, place, split)
            notes.append(f"activation {name} ({type(module).__name__}) is split in {config.k} along {chosen}")
    return notes


def is_elementwise(module: nn.Module) -> bool:
    """Whether a module applies one function to each value: torch's activations and transformers' classes."""
    if type(module) in ELEMENTWISE:
        return True
    is_hugging_face = type(module).__module__ == "transformers.activations"
    return is_hugging_face and not any(True for _ in module.parameters())
