"""Second moments of layer inputs, streamed over unlabelled calibration batches.

For a layer with inputs x (one row per token or per output pixel) the error that a change D of its weight
causes is, in the mean over the data, tr(D H Dᵀ) with H = mean of x xᵀ. H is all that weight optimisers such
as GPTQ (arXiv 2210.17323) or decoupleQ (arXiv 2404.12759) need of the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from splitquant_plugins.errors import ConfigError, InputError, SplitQuantError, first_line
from splitquant_plugins.passes.module_tree import is_transformers_conv1d
from splitquant_plugins.passes.token_masks import MaskFinder, TokenMasks

Batches = Iterable[Any] | Callable[[], Iterable[Any]]

# Kinds of layers, as plans name them, whose inputs are observed.
CALIBRATED_KINDS = ("linear", "conv1d", "conv2d", "conv3d", "conv1d_hf")
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Rows that are unfolded and multiplied at once: bounds the copy that the unfolding of a convolution makes.
_CHUNK_ELEMENTS = 1 << 24
_NO_LABEL = -100  # of padding, in transformers


@dataclass(frozen=True)
class SecondMoment:
    """Mean of x xᵀ over the inputs x of a layer.

    `matrix`: [groups, d, d], groups is 1 but for grouped convolutions; d counts the weights of one output
    channel in the order (inputs / groups, *kernel). `samples`: rows seen; 0 (and a zero matrix) for a layer
    that the batches never reached.
    """

    matrix: Tensor
    samples: int


def collect_second_moments(
    model: nn.Module,
    batches: Batches,
    layers: Mapping[str, nn.Module],
    *,
    dtype: torch.dtype = torch.float64,
    max_bytes: int | None = None,
) -> dict[str, SecondMoment]:
    """Run the batches through the model and return the second moment of every layer's inputs.

    As `iter_second_moments`, but all results are held at once; `max_bytes` then bounds only what is
    accumulated in one pass. Use the iterator where the matrices of all layers do not fit into memory.
    """
    return dict(iter_second_moments(model, batches, layers, dtype=dtype, max_bytes=max_bytes))


def iter_second_moments(
    model: nn.Module,
    batches: Batches,
    layers: Mapping[str, nn.Module],
    *,
    dtype: torch.dtype = torch.float64,
    max_bytes: int | None = None,
) -> Iterator[tuple[str, SecondMoment]]:
    """Yield (name, second moment) of each layer, in the order of `layers`.

    `layers` are submodules of `model`: nn.Linear, nn.Conv1d/2d/3d, or transformers' Conv1D. `batches` is an
    iterable of dicts (keyword arguments; `labels` is dropped), tuples or lists (positional arguments) or
    single tensors, or a callable that returns such an iterable. An `attention_mask` of shape [batch, seq] in
    a dict leaves padded tokens out of the statistics of every layer whose input is [batch, seq, features], or these
    flattened; in an encoder-decoder, of the layers that read the encoder's tokens, and `decoder_attention_mask` of the
    others.

    Where the matrices take more than `max_bytes`, the batches are run once per subset of layers that fits;
    a layer too large by itself gets a pass of its own. Products are computed in `dtype`. The model runs in
    evaluation mode without gradients, and is left as it was, also where an exception ends the run.

    Raises InputError for NaN or infinity in a layer's inputs (naming the layer), for no batches at all, and
    for a one-shot iterator that would have to be read twice; ConfigError for a layer of another type.
    """
    if not dtype.is_floating_point:
        raise ConfigError(f"dtype={dtype}: second moments need a floating-point type, such as torch.float64")
    sizes = {name: moment_shape(name, layer) for name, layer in layers.items()}
    passes = plan_passes(sizes, dtype.itemsize, max_bytes)
    if len(passes) > 1 and isinstance(batches, Iterator):
        raise InputError(
            f"the second moments of {len(sizes)} layers take more than max_bytes={max_bytes}, so the batches "
            f"are read {len(passes)} times, but they are a one-shot iterator: pass a list, a DataLoader or "
            "a function that returns a new iterator, or raise max_bytes"
        )
    for names in passes:
        sums = {name: RunningMean(name, layers[name], sizes[name], dtype) for name in names}
        _observe(model, batches, sums)
        # Hand over one at a time, so that a consumer can free each matrix before it takes the next.
        for name in names:
            mean = sums.pop(name)
            yield name, SecondMoment(mean.matrix, mean.samples)


def input_rows(layer: nn.Module, inputs: Tensor) -> Tensor:
    """The rows that a layer multiplies with its weight: [groups, rows, d].

    For a convolution these are the unfolded patches with its stride, padding and dilation, such that
    weight[out].flatten() @ row is one output value (without bias).
    """
    if not isinstance(layer, CONVOLUTIONS):
        return inputs.reshape(1, -1, inputs.shape[-1])
    kernel, dilation = layer.kernel_size, layer.dilation
    spatial = len(kernel)
    if inputs.ndim == spatial + 1:
        inputs = inputs.unsqueeze(0)
    patches = _pad(layer, inputs)
    for axis in range(spatial):
        extent = (kernel[axis] - 1) * dilation[axis] + 1
        patches = patches.unfold(2 + axis, extent, layer.stride[axis])[..., :: dilation[axis]]
    # [batch, channels, *out, *kernel] -> [groups, batch, *out, channels / groups, *kernel]
    patches = patches.reshape(len(patches), layer.groups, -1, *patches.shape[2:])
    out_axes = list(range(3, 3 + spatial))
    kernel_axes = list(range(3 + spatial, 3 + 2 * spatial))
    patches = patches.permute(1, 0, *out_axes, 2, *kernel_axes)
    return patches.reshape(layer.groups, -1, moment_shape("", layer)[-1])


def counted_rows(inputs: Tensor, mask: Tensor | None) -> Tensor:
    """The rows [n, features] of inputs [..., features] but for those that a mask [batch, tokens] says are padding.

    The mask is for inputs [batch, tokens, ..., features], and for the same without a batch dimension.
    """
    if mask is not None:
        counted = mask.to(inputs.device) != 0
        if inputs.ndim >= 3 and inputs.shape[:2] == mask.shape:
            inputs = inputs[counted]
        elif inputs.ndim == 2 and mask.shape[1] > 1 and len(inputs) == mask.numel():
            inputs = inputs[counted.flatten()]
    return inputs.reshape(-1, inputs.shape[-1])


class RunningMean:
    """The streaming mean of x xᵀ, or of y xᵀ, over the inputs x of one layer: `matrix`, after `samples` rows."""

    def __init__(self, name: str, layer: nn.Module, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        self.name = name
        self.layer = layer
        self.matrix = torch.zeros(shape, dtype=dtype, device=next(layer.parameters()).device)
        self.samples = 0

    def add(self, inputs: Tensor, mask: Tensor | None, others: Tensor | None = None) -> None:
        """Take in the inputs of a call; `others`, of the same shape but for the last axis, are the y."""
        rows = self._rows(inputs, mask, self.matrix.shape[2])
        if others is None:
            for row in rows:
                self._add(row, row)
            return
        for row, other in zip(rows, self._rows(others, mask, self.matrix.shape[1]), strict=True):
            self._add(row, other)

    def _rows(self, inputs: Tensor, mask: Tensor | None, width: int) -> Iterator[Tensor]:
        layer = self.layer
        axis, taps = -1, 1
        if isinstance(layer, CONVOLUTIONS):
            width, axis, taps = layer.in_channels, 1 - layer.weight.ndim, layer.weight[0, 0].numel()
        if inputs.ndim < -axis or inputs.shape[axis] != width:
            raise InputError(f"{self.name or 'the model'} takes {width} features, and gets {tuple(inputs.shape)}")
        if not isinstance(layer, CONVOLUTIONS):
            inputs = counted_rows(inputs, mask)
        refuse_not_finite(self.name, inputs)
        # A chunk is a run of examples: an unfolded image takes kernel-size times its own memory.
        if isinstance(layer, CONVOLUTIONS) and inputs.ndim == layer.weight.ndim - 1:
            inputs = inputs.unsqueeze(0)
        per_example = max(inputs[:1].numel(), 1) * taps
        for chunk in torch.split(inputs, max(_CHUNK_ELEMENTS // per_example, 1)):
            yield input_rows(layer, chunk).to(self.matrix)

    def _add(self, rows: Tensor, others: Tensor) -> None:
        if rows.shape[1] == 0:
            return
        total = self.samples + rows.shape[1]
        self.matrix.baddbmm_(others.mT, rows, beta=self.samples / total, alpha=1 / total)
        self.samples = total


def _observe(model: nn.Module, batches: Batches, means: Mapping[str, RunningMean]) -> None:
    """One pass over the batches, with a hook on each layer."""
    finder, masks = MaskFinder(model), TokenMasks()

    def hook_of(mean: RunningMean) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            mean.add(only_input(mean.name, args, kwargs), masks.of(mean.layer))

        return hook

    seen = False
    with evaluating(model), torch.no_grad():
        for number, (args, kwargs) in enumerate(iter_calls(model, batches), start=1):
            with naming_batch(number, model), ExitStack() as hooks:
                masks = finder.masks(args, kwargs)
                for mean in means.values():
                    hooks.callback(mean.layer.register_forward_pre_hook(hook_of(mean), with_kwargs=True).remove)
                model(*args, **kwargs)
            seen = True
    if not seen:
        raise InputError("no calibration batches: the iterable is empty (or a one-shot iterator was used up)")


def refuse_not_finite(name: str, inputs: Tensor) -> None:
    """Raise InputError for NaN or infinity in the calibration inputs of a layer of that name."""
    if not torch.isfinite(inputs).all():
        raise InputError(
            f"{name}: its calibration inputs contain NaN or infinity; check the batches, or run the model in a wider "
            "dtype"
        )


def only_input(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The tensor that a layer is called with; InputError where it is none."""
    inputs = args[0] if args else next(iter(kwargs.values()), None)
    if not isinstance(inputs, Tensor):
        raise InputError(f"{name}: expected a tensor as input, found {type(inputs).__name__}")
    return inputs


def iter_calls(model: nn.Module, batches: Batches) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Yield the (args, kwargs) of a forward call per batch, on the device of the model's first tensor.

    Accepts what `iter_second_moments` accepts; `labels` is dropped from dicts, so that no loss is computed, but for
    what a decoder of transformers reads of them. Tensors are copied: a model that writes into its inputs leaves the
    batches as they are for the next run.
    """
    first = next(model.parameters(), None)
    found = batches() if callable(batches) else batches
    if isinstance(found, Mapping) or not isinstance(found, Iterable):
        raise InputError(f"calibration is a {type(found).__name__}: give a list of batches, even of a single one")
    for number, batch in enumerate(found, start=1):
        args: tuple[Any, ...] = ()
        kwargs: dict[str, Any] = {}
        if isinstance(batch, Mapping):
            kwargs = {str(key): value for key, value in batch.items() if key != "labels"}
            kwargs.update(_decoder_inputs(model, batch))
        elif isinstance(batch, (tuple, list)):
            args = tuple(batch)
        elif isinstance(batch, Tensor):
            args = (batch,)
        else:
            raise InputError(
                f"calibration batch {number} is a {type(batch).__name__}: expected a dict, a tuple, a list or a tensor"
            )
        if any(isinstance(value, Tensor) and not value.numel() for value in (*args, *kwargs.values())):
            raise InputError(f"calibration batch {number} holds a tensor without values: leave it out")
        if first is not None:
            args = tuple(_copied_to(value, first.device) for value in args)
            kwargs = {key: _copied_to(value, first.device) for key, value in kwargs.items()}
        yield args, kwargs


def _decoder_inputs(model: nn.Module, batch: Mapping[Any, Any]) -> dict[str, Tensor]:
    """What transformers' encoder-decoders make of labels that are dropped: the text that their decoder reads."""
    shifted = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    labels = batch.get("labels")
    given = any(batch.get(name) is not None for name in ("decoder_input_ids", "decoder_inputs_embeds"))
    if shifted is None or not isinstance(labels, Tensor) or given:
        return {}
    found = {"decoder_input_ids": shifted(labels)}
    if batch.get("decoder_attention_mask") is None:
        found["decoder_attention_mask"] = (labels != _NO_LABEL).long()
    return found


@contextmanager
def naming_batch(number: int, model: nn.Module) -> Iterator[None]:
    """Turn what the model raises for a batch (counted from 1) into an InputError that names batch and cause."""
    try:
        yield
    except InputError as error:
        raise InputError(f"calibration batch {number}: {error}") from None
    except (SplitQuantError, torch.OutOfMemoryError):
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"calibration batch {number} does not fit {type(model).__name__} "
            f"({type(error).__name__}: {first_line(error)}); give batches as the model's forward takes them"
        ) from error


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the time of the block; every submodule gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _copied_to(value: Any, device: torch.device) -> Any:
    return value.detach().to(device, copy=True) if isinstance(value, Tensor) else value


def moment_shape(name: str, layer: nn.Module) -> tuple[int, int, int]:
    """Groups, d, d of a layer's second moment; ConfigError for a layer of another kind, with its name."""
    if isinstance(layer, CONVOLUTIONS):
        return layer.groups, layer.weight[0].numel(), layer.weight[0].numel()
    if isinstance(layer, nn.Linear):
        return 1, layer.in_features, layer.in_features
    if is_transformers_conv1d(layer):
        inputs = cast("Tensor", layer.weight).shape[0]
        return 1, inputs, inputs
    raise ConfigError(
        f"{name}: no second moment for {type(layer).__name__}; choose nn.Linear, nn.Conv1d/2d/3d or Conv1D"
    )


def out_features(layer: nn.Module) -> int:
    """Outputs of a layer that `moment_shape` knows."""
    weight = cast("Tensor", layer.weight)
    return weight.shape[1] if is_transformers_conv1d(layer) else len(weight)


def plan_passes(sizes: Mapping[str, tuple[int, int, int]], itemsize: int, max_bytes: int | None) -> list[list[str]]:
    """Consecutive runs of layers whose matrices fit into max_bytes together."""
    if max_bytes is not None and max_bytes < 1:
        raise ConfigError(f"max_bytes={max_bytes}: give a positive number of bytes, or None for no limit")
    passes: list[list[str]] = []
    used = 0
    for name, (groups, rows, columns) in sizes.items():
        need = groups * rows * columns * itemsize
        if not passes or (max_bytes is not None and used + need > max_bytes):
            passes.append([])
            used = 0
        passes[-1].append(name)
        used += need
    return passes


def _pad(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, inputs: Tensor) -> Tensor:
    """Pad the spatial axes as the convolution does."""
    margins = layer._reversed_padding_repeated_twice
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return nn.functional.pad(inputs, margins, mode=mode) if any(margins) else inputs
