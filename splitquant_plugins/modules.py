"""The modules that take a layer's place: k parts in parallel, summed, or k chunks of an activation.

Parts are named children and real `nn.Linear` or `nn.Conv*d`, so that every backend finds them. They are not
in a ModuleList, which some backends take for a stack of transformer blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pkgutil import resolve_name
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from splitquant_plugins.errors import InputError
from splitquant_plugins.parts import sum_parts
from splitquant_plugins.read_only import ReadOnlyTensor

PartReplaced = Callable[["SplitModule", str, nn.Module], None]
Fusion = Literal["materialised", "rebuilt"]


def part_names(k: int) -> tuple[str, ...]:
    """Names of k parts by their place: lower, middle, upper for k = 3; only k-means orders parts by their values."""
    if k == 1:
        return ("whole",)
    middle = ("middle",) if k == 3 else tuple(f"middle_{number}" for number in range(1, k - 1))
    return ("lower", *middle, "upper")


def layer_of_part(model: nn.Module) -> dict[str, str]:
    """Return the name of the split layer that each part belongs to, by the part's name."""
    return {
        f"{name}.{part}" if name else part: name
        for name, module in model.named_modules()
        if isinstance(module, SplitModule)
        for part in module.part_names
    }


def parts_of(model: nn.Module) -> dict[str, list[str]]:
    """Return the names of each split layer's parts, by the layer's name."""
    found: dict[str, list[str]] = {}
    for part, layer in layer_of_part(model).items():
        found.setdefault(layer, []).append(part)
    return found


class SplitModule(nn.Module):
    """Base of the split layers: the sum of its parts.

    `weight` and `bias` answer the sum of what the parts hold now (dequantized where a backend has quantized
    them), because parents read a child's dtype, device or values. Assigning to them is an error, and so is writing
    into what they answer, which is computed, unless there is a single part that holds it.
    """

    fused_weight: Tensor | None
    fused_bias: Tensor | None
    _fused_from: Sequence[tuple[Tensor, int, int]]

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.part_names = part_names(len(parts))
        for name, part in zip(self.part_names, parts, strict=True):
            self.add_module(name, part)
        self._part_replaced: PartReplaced | None = None
        self.fusion: Fusion | None = None
        self.register_buffer("fused_weight", None, persistent=False)
        self.register_buffer("fused_bias", None, persistent=False)

    def parts(self) -> list[nn.Module]:
        """The parts in order."""
        return [cast(nn.Module, self._modules[name]) for name in self.part_names]

    def notify(self, part_replaced: PartReplaced | None) -> None:
        """Call `part_replaced(self, name, module)` whenever a backend replaces a part."""
        self._part_replaced = part_replaced

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "bias"):
            raise AttributeError(
                f"the {name} of a {type(self).__name__} is the sum of its parts' and is not assigned to: assign it "
                f"before the split, or to a part, such as .{self.part_names[0]}.{name}"
            )
        super().__setattr__(name, value)
        if isinstance(value, nn.Module) and name in self.__dict__.get("part_names", ()):
            self.forget_fused()
            if self.__dict__.get("_part_replaced") is not None:
                self.__dict__["_part_replaced"](self, name, value)

    def __getstate__(self) -> dict[str, Any]:
        # What fusing materialised is rebuilt, and never saved.
        buffers = {**self._buffers, "fused_weight": None, "fused_bias": None}
        return {**self.__dict__, "_buffers": buffers, "_fused_from": ()}

    def __deepcopy__(self, memo: dict[int, Any]) -> SplitModule:
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        nn.Module.__init__(twin)
        for key, value in self.__dict__.items():
            # Plugins are shared by copies of a model, not copied with it.
            twin.__dict__[key] = value if key == "_part_replaced" else copy.deepcopy(value, memo)
        return twin

    @property
    def weight(self) -> Tensor:
        """The layer's weight: the sum of the parts' weights."""
        return self._answer("weight", [dense_weight(part) for part in self.parts()])

    @property
    def bias(self) -> Tensor | None:
        """The layer's bias: the sum of those parts' biases that have one."""
        biases = self._biases()
        return self._answer("bias", biases) if biases else None

    def _biases(self) -> list[Tensor]:
        return [cast(Tensor, part.bias) for part in self.parts() if getattr(part, "bias", None) is not None]

    def _answer(self, role: str, tensors: list[Tensor]) -> Tensor:
        total = self._dense_sum(tensors)
        held = len(tensors) == 1 and any(total is each or total._base is each for each in self.parameters())
        return total if held else ReadOnlyTensor.of(total, f"the {role} of a {type(self).__name__}")

    def _dense_sum(self, tensors: list[Tensor]) -> Tensor:
        return sum_parts(tensors)

    def forward(self, input: Tensor) -> Tensor:
        """Sum what the parts make of the input; where the layer is fused, use the sum of their weights."""
        if self.fusion is not None and not self.training and not self._parts_do_more():  # what is trained are the parts
            return self._dense_forward(input, *self._fused_tensors(input.dtype))
        first, *rest = self.parts()
        output = first(input)
        for part in rest:
            output = output + part(input)
        return cast(Tensor, output)

    def _dense_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Apply the layer with a single weight, laid out as the parts' weights are."""
        raise NotImplementedError(f"{type(self).__name__} does not say how to run fused; give it _dense_forward")

    def _parts_do_more(self) -> bool:
        """Whether a part does more than multiply by its weight, all of which running fused would leave out.

        It has hooks, modules of its own (adapters, such as LoRA's, or fake quantizers), or a forward that was put over
        its class's.
        """
        return any(
            part._forward_hooks or part._forward_pre_hooks or part._modules or "forward" in part.__dict__
            for part in self.parts()
        )

    def _fused_tensors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        # A compiled or exported graph sums the parts itself: it cannot see that one of them was written into.
        keeps = self.fusion == "materialised" and not torch.compiler.is_compiling()
        sources = [each for part in self.parts() for each in (*part.parameters(), *part.buffers())] if keeps else []
        if keeps and self.fused_weight is not None and self.fused_weight.dtype == dtype and self._is_of(sources):
            return self.fused_weight, self.fused_bias
        # Backends that keep half-precision scales dequantize to half precision; sum in the input's.
        weight = sum_parts([dense_weight(part).to(dtype) for part in self.parts()])
        biases = self._biases()
        bias = sum_parts(biases).to(dtype) if biases else None
        if keeps and not (torch.is_grad_enabled() and weight.requires_grad):  # gradients go on to the parts
            self.fused_weight = weight.detach()
            self.fused_bias = None if bias is None else bias.detach()
            self._fused_from = tuple((tensor, _version(tensor), _address(tensor)) for tensor in sources)
        return weight, bias

    def _is_of(self, sources: Sequence[Tensor]) -> bool:
        """Whether what fusing materialised was made of these tensors as they are now, and needs no gradient."""
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in sources):
            return False
        made_of: Sequence[tuple[Tensor, int, int]] = self.__dict__.get("_fused_from", ())
        return len(made_of) == len(sources) and all(
            tensor is before and _version(tensor) == version and _address(tensor) == address
            for tensor, (before, version, address) in zip(sources, made_of, strict=True)
        )

    def train(self, mode: bool = True) -> SplitModule:
        """Set the mode, as every module does; what fusing materialised is made anew after."""
        self.forget_fused()
        return super().train(mode)

    def __prepare_scriptable__(self) -> nn.Module:
        """Say why torch.jit.script cannot compile this layer: it knows no loop over named children."""
        raise InputError(
            f"torch.jit.script compiles no {type(self).__name__}; use torch.jit.trace, torch.export or torch.compile, "
            "or script the model before the split"
        )

    def forget_fused(self) -> None:
        """Drop what fusing materialised; it is made anew when the layer next runs fused."""
        if self.__dict__.get("_buffers", {}).get("fused_weight") is not None:
            self.fused_weight = None
            self.fused_bias = None
            self._fused_from = ()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.forget_fused()
        super()._load_from_state_dict(*args, **kwargs)


def _tell_installed_plugins(split: SplitModule, part: str, module: nn.Module) -> None:
    """Stand in for the plugins in pickles that were made before plugins themselves could be pickled."""
    split.notify(resolve_name("splitquant_plugins.plugins:Plugins").load().part_replaced)
    split.__dict__["_part_replaced"](split, part, module)


def dense_weight(module: nn.Module) -> Tensor:
    """Return the weight of a part as a plain tensor, whatever a backend has made of it."""
    if hasattr(module, "recover"):  # INC keeps packed integers and rebuilds the weight
        return cast(Any, module).recover()
    if hasattr(module, "dequantize_weight"):  # as HQQ's layers do
        return cast(Tensor, cast(Any, module).dequantize_weight())
    if getattr(module, "weight_qtype", None) is not None:  # quanto's, which may not be frozen yet
        weight = cast(Tensor, module.qweight)
    else:
        weight = cast(Tensor, module.weight)
    return weight.dequantize() if is_tensor_subclass(weight) else weight


def _version(tensor: Tensor) -> int:
    """How often a tensor was written into; inference tensors do not count that."""
    return 0 if tensor.is_inference() else tensor._version


def _address(tensor: Tensor) -> int:
    """Where a plain tensor's memory begins; backends' quantized ones have none of their own."""
    return 0 if is_tensor_subclass(tensor) else tensor.data_ptr()


def is_tensor_subclass(tensor: Tensor) -> bool:
    """Whether a tensor is more than a plain tensor or parameter, as backends' quantized ones are.

    What stands for a plain tensor while a model is exported or compiled is none: to dequantize it would leave a call in
    the graph, in front of the weight of each part.
    """
    # Not isinstance: backends' tensors that are parameters count as one, and take long to give their data.
    data = tensor.data if issubclass(type(tensor), nn.Parameter) else tensor
    plain = (FakeTensor, FunctionalTensor)
    return type(data) not in (Tensor, ReadOnlyTensor, *plain) and hasattr(data, "dequantize")


class SplitLinear(SplitModule):
    """A Linear as the sum of k parts. `transposed` marks a layer whose weight is stored [in, out]."""

    def __init__(self, parts: Sequence[nn.Module], *, transposed: bool = False) -> None:
        super().__init__(parts)
        self.in_features = parts[0].in_features
        self.out_features = parts[0].out_features
        self.transposed = transposed
        if transposed:  # the names that transformers' Conv1D has for them
            self.nx, self.nf = self.in_features, self.out_features

    def _dense_sum(self, tensors: list[Tensor]) -> Tensor:
        total = sum_parts(tensors)
        return total.t() if self.transposed and total.ndim == 2 else total

    def _dense_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return nn.functional.linear(input, weight, bias)


class _SplitConv(SplitModule):
    plain: ClassVar[type[nn.modules.conv._ConvNd]]

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__(parts)
        self._reversed_padding_repeated_twice = parts[0]._reversed_padding_repeated_twice
        for name in CONV_ATTRIBUTES:
            setattr(self, name, getattr(parts[0], name))

    def _dense_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.plain._conv_forward(self, input, weight, bias)  # type: ignore[arg-type]


CONV_ATTRIBUTES = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "padding_mode",
)


class SplitConv1d(_SplitConv):
    """A Conv1d as the sum of k parts."""

    plain = nn.Conv1d


class SplitConv2d(_SplitConv):
    """A Conv2d as the sum of k parts."""

    plain = nn.Conv2d


class SplitConv3d(_SplitConv):
    """A Conv3d as the sum of k parts."""

    plain = nn.Conv3d


class SplitActivation(nn.Module):
    """An elementwise activation as k of them, each on its own chunk of the features, concatenated.

    A feature dimension of n is cut into k chunks of n/k; where k does not divide n, the first chunks are one
    longer. Every chunk can then be given a scale of its own.
    """

    def __init__(self, activation: nn.Module, k: int, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.chunk_names = tuple(f"chunk_{number}" for number in range(k))
        self.inplace = bool(getattr(activation, "inplace", False))
        for name in self.chunk_names:
            chunk = copy.deepcopy(activation)
            if self.inplace:
                cast(Any, chunk).inplace = False  # autograd forbids writing into one of several views
            self.add_module(name, chunk)

    def forward(self, input: Tensor) -> Tensor:
        """Apply each activation to its chunk."""
        # Autograd may need what the chunks hold now, and an in-place activation overwrites it below.
        source = input.clone() if self.inplace and torch.is_grad_enabled() else input
        chunks = torch.tensor_split(source, len(self.chunk_names), dim=self.dim)
        outputs = [
            cast(nn.Module, self._modules[name])(chunk) for name, chunk in zip(self.chunk_names, chunks, strict=True)
        ]
        output = torch.cat(outputs, dim=self.dim)
        return input.copy_(output) if self.inplace else output
