"""What an adapter tells the rest of the package about its backend, and what a quantized model is to it."""

from __future__ import annotations

import inspect
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeVar

import torch
from torch import nn

from splitquant_plugins.checkpoints.coverage import note_quantized
from splitquant_plugins.checkpoints.tensors import state_bytes
from splitquant_plugins.errors import ConfigError, InputError, MissingExtraError
from splitquant_plugins.manifest import Manifest, manifest_of

if TYPE_CHECKING:
    from torch import Tensor

    from splitquant_plugins.checkpoints.headers import TensorSpec
    from splitquant_plugins.checkpoints.saved_layers import SavedLayers
    from splitquant_plugins.grid import Granularity, Grid, Scheme
    from splitquant_plugins.passes.base import ModelPass

Choice = TypeVar("Choice", bound=str)
Batch = Mapping[str, "Tensor"]
ROUND_TO_NEAREST = "rtn"


@dataclass(frozen=True)
class WeightRequest:
    """The weight format that a user asks for; None leaves the choice to the backend.

    `weights` is int2, int4 or int8. `method` is how the backend chooses codes, one of its `methods`. `quantizer` names
    one of the backend's stock quantizers, which fixes all the rest: `weights` is then left empty.
    """

    weights: str
    granularity: Granularity | None = None
    group_size: int | None = None
    scheme: Scheme | None = None
    method: str = ROUND_TO_NEAREST
    quantizer: str | None = None


@dataclass(frozen=True)
class WeightFormat:
    """The weight format that a backend will use: a request with every gap filled."""

    weights: str
    bits: int
    granularity: Granularity
    group_size: int | None
    scheme: Scheme
    method: str = ROUND_TO_NEAREST
    quantizer: str | None = None


@dataclass(frozen=True)
class StockQuantizers:
    """The quantizers that come with a backend's packages: their descriptions by name, and why some cannot be used."""

    descriptions: Mapping[str, str]
    missing: Mapping[str, str]


@dataclass(frozen=True)
class StoredWeight:
    """A quantized weight: what it dequantizes to, and the bits that it takes, scales and zero points included.

    `weight` has the shape of the float layer's weight.
    """

    weight: Tensor
    bits: int


@dataclass
class QuantizedModel:
    """A quantized model, ready to run.

    `run` maps a batch of inputs by name to logits [batch, labels], or what else the model returns first. `layers`
    holds, by the name of the float layer, the stored weights whose sum takes its place: one, or one per part.
    `state_bytes` is the size of the whole model as it is saved, `seconds` the time that all of it took, the passes in
    front included.
    """

    model: nn.Module
    run: Callable[[Batch], Tensor]
    layers: dict[str, list[StoredWeight]]
    state_bytes: int
    seconds: float = 0.0
    manifest: Manifest | None = None

    @property
    def split_seconds(self) -> float:
        """What the passes in front took."""
        return self.manifest.seconds if self.manifest is not None else 0.0

    @property
    def quantize_seconds(self) -> float:
        """What the backend took."""
        return self.seconds - self.split_seconds

    @property
    def layers_quantized(self) -> int:
        """Layers that the backend quantized, parts counted one by one."""
        return sum(len(parts) for parts in self.layers.values())


@dataclass(frozen=True)
class Program:
    """A program for a device.

    `delegates` counts the pieces that go to the device's own kernels, `host` the operators that are left to the host,
    by name. `cycles` is what the target's compiler estimates, where it does. `model` runs as the program should.
    """

    content: bytes
    delegates: int
    host: Mapping[str, int]
    cycles: int | None
    model: nn.Module
    manifest: Manifest | None


def run_of(model: nn.Module) -> Callable[[Batch], Tensor]:
    """Return what maps a batch to the logits of a transformers model, or to the first tensor that a model returns."""

    @torch.no_grad()
    def run(batch: Batch) -> Tensor:
        output = model(**batch)
        found = getattr(output, "logits", output)
        if isinstance(found, Mapping):
            found = tuple(found.values())
        while isinstance(found, (tuple, list)) and found:
            found = found[0]
        if not isinstance(found, torch.Tensor):
            raise InputError(f"{type(model).__name__} returns a {type(output).__name__}, and no tensor first")
        return found

    return run


def quantize_leaving(
    backend: Backend,
    model: nn.Module,
    chosen: WeightFormat,
    first: ModelPass | None,
    batches: Iterable[Batch],
    ignore: Sequence[str] | None,
) -> QuantizedModel:
    """Quantize with a backend, and see to it that the layers in `ignore` stay float; None leaves that to the backend.

    ConfigError for a backend that leaves none float.
    """
    able = "ignore" in inspect.signature(backend.quantize).parameters
    if ignore and not able:
        raise ConfigError(
            f"backend {backend.name} cannot leave {ignore[0]} float: its `quantize` takes no `ignore`; quantize the "
            "head too, with --head"
        )
    more = {"ignore": ignore} if able and ignore is not None else {}
    quantized = backend.quantize(model, chosen, first, batches, **more)
    for name in ignore or ():
        if name in quantized.layers:
            raise InputError(f"backend {backend.name} quantized {name}, which was to stay float")
    return quantized


def quantized_by(
    work: Callable[[], nn.Module],
    first: ModelPass | None,
    *,
    layers: Callable[[nn.Module], dict[str, list[StoredWeight]]],
    state: Callable[[nn.Module], Mapping[str, Tensor]] = nn.Module.state_dict,
    run: Callable[[nn.Module], Callable[[Batch], Tensor]] = run_of,
) -> QuantizedModel:
    """Do the work that makes a quantized model, with `first` in front of it, and describe what came of it.

    Of the model that `work` returns, `layers` gives what is stored, `state` what is saved, and `run` how it is called.
    The time is that of `work` alone.
    """
    started = time.perf_counter()
    model = work()
    seconds = time.perf_counter() - started
    stored = layers(model)
    manifest = manifest_of(model) if first is not None else None
    if manifest is not None:
        note_quantized(manifest, stored)
    return QuantizedModel(
        model=model,
        run=run(model),
        layers=stored,
        state_bytes=state_bytes(state(model)),
        seconds=seconds,
        manifest=manifest,
    )


@dataclass(frozen=True)
class Support:
    """One group of a backend's table: what can be chosen at a weight width; the first entry is the default."""

    granularities: tuple[Granularity, ...]
    schemes: tuple[Scheme, ...]
    group_sizes: tuple[int, ...] | None = None


class Packer(ABC):
    """Quantizes single weights to what the backend saves for them; see `Backend.packer`.

    `grid` is the grid that weights are rounded to. Tensors of a layer whose names start with one of
    `weight_prefixes` count as its stored bits. `packs_bias` tells that biases are saved in a form of the backend's
    own, by `pack`; otherwise they are copied. Weights come as [out, in, ...], also those of layers that store
    them transposed. `pack` is called from several threads at once.

    `ignore` are names of layers that stay float, set before a model is asked about: streaming leaves them out, whatever
    `quantized` answers. None is the backend's own choice, and () is none.
    """

    grid: Grid
    ignore: Sequence[str] | None = None
    weight_prefixes: ClassVar[tuple[str, ...]] = ("weight",)
    packs_bias: ClassVar[bool] = False

    @abstractmethod
    def quantized(self, model: nn.Module) -> Sequence[str]:
        """Names of the layers of an unsplit model, on the meta device, whose weight this backend quantizes."""

    @abstractmethod
    def ignored(self, model: nn.Module) -> Sequence[str]:
        """Patterns of names of layers that are not to be split, because this backend keeps them float."""

    @abstractmethod
    def spec(self, shape: torch.Size, dtype: torch.dtype, *, part: bool) -> dict[str, TensorSpec]:
        """Return what `pack` makes of a weight, by the names it is saved under within the layer.

        ConfigError for a weight that the backend cannot hold.
        """

    @abstractmethod
    def pack(self, weight: Tensor, bias: Tensor | None = None, *, part: bool) -> dict[str, Tensor]:
        """Quantize a weight: one part of a split layer, or a layer that stays whole.

        `bias` is given where there is one and `packs_bias` holds.
        """

    @abstractmethod
    def describe(self, folder: Path, model: nn.Module, layers: Sequence[str], same_as: Mapping[str, str]) -> None:
        """Write the files beside the tensors, but for the manifest.

        `layers` are the names of what was packed, parts and whole layers; `same_as` gives for tensors that are
        not stored the one that they share. `model` is the unsplit model on the meta device.
        """


class Backend(ABC):
    """One backend. Subclasses live in `adapters/`, and are registered by their plugin module.

    `packages` are the distributions to be installed, `extra` the extra that installs them. `support` lists,
    by weight width, what the backend can do; `any_group_size` whether `group_size` is free. `methods` are the ways
    to choose codes, of which `calibrated` ones run the batches that `quantize` is given. `library` is the module that
    is imported wherever the backend has quantized a layer. `storage` is the module whose functions
    `save(model, folder)` and `load(folder)` do that; a backend without one has methods of its own.
    """

    name: ClassVar[str]
    extra: ClassVar[str]
    packages: ClassVar[tuple[str, ...]]
    support: ClassVar[Mapping[str, Support]]
    default_group_size: ClassVar[int | None] = None
    methods: ClassVar[tuple[str, ...]] = (ROUND_TO_NEAREST,)
    calibrated: ClassVar[tuple[str, ...]] = ()
    library: ClassVar[str] = ""
    storage: ClassVar[str]

    def require(self) -> None:
        """Raise MissingExtraError unless the backend's packages are installed."""
        for package in self.packages:
            try:
                metadata.version(package)
            except metadata.PackageNotFoundError:
                raise MissingExtraError(
                    f"backend {self.name} needs {package}, which is not installed: "
                    f'pip install "splitquant-plugins[{self.extra}]"'
                ) from None

    def resolve(self, request: WeightRequest) -> WeightFormat:
        """Fill the gaps of a request with what works best here; ConfigError for what is not supported."""
        if request.quantizer is not None:
            return self.stock_format(request)
        if request.weights not in self.support:
            raise ConfigError(
                f"backend {self.name} has no weights {request.weights!r}: choose from {', '.join(self.support)}"
            )
        if request.method not in self.methods:
            raise ConfigError(
                f"backend {self.name} has no method {request.method!r}: choose from {', '.join(self.methods)}"
            )
        support = self.support[request.weights]
        granularity = self._choice("granularity", request.granularity, support.granularities, request.weights)
        scheme = self._choice("scheme", request.scheme, support.schemes, request.weights)
        group_size = request.group_size
        if granularity != "group" and group_size is not None:
            raise ConfigError(f"group_size={group_size} goes with granularity 'group', not {granularity!r}")
        if granularity == "group":
            group_size = self.default_group_size if group_size is None else group_size
            if group_size is None:
                raise ConfigError("granularity 'group' needs a group_size")
            if support.group_sizes is not None and group_size not in support.group_sizes:
                allowed = ", ".join(map(str, support.group_sizes))
                raise ConfigError(f"backend {self.name}: group_size={group_size}; choose from {allowed}")
        bits = int(request.weights.removeprefix("int"))
        return WeightFormat(request.weights, bits, granularity, group_size, scheme, request.method)

    def _choice(self, option: str, value: Choice | None, allowed: tuple[Choice, ...], weights: str) -> Choice:
        if value is None:
            return allowed[0]
        if value not in allowed:
            raise ConfigError(
                f"backend {self.name} has no {option} {value!r} at {weights}: choose from {', '.join(allowed)}"
            )
        return value

    def packer(self, chosen: WeightFormat) -> Packer | None:
        """Return what quantizes single weights, so that checkpoints can be streamed; None where it cannot."""
        return None

    def saved_layers(self) -> SavedLayers | None:
        """Return how single layers are saved by transformers' `save_pretrained`; None where they cannot be."""
        return None

    def stock_quantizers(self) -> StockQuantizers:
        """Return the quantizers of its own that a request may name; nothing is imported to find out."""
        return StockQuantizers({}, {})

    def stock_format(self, request: WeightRequest) -> WeightFormat:
        """Return the weight format of a stock quantizer."""
        raise ConfigError(f"backend {self.name} has no stock quantizers, and so no {request.quantizer!r}")

    def targets(self) -> Mapping[str, str]:
        """Devices that `program` writes programs for, each with a description."""
        return {}

    def program(
        self, model: nn.Module, target: str, first: ModelPass | None, batches: Sequence[tuple[Tensor, ...]]
    ) -> Program:
        """Quantize a float model for a target, with the pass `first` in front, and lower it.

        `model` takes the tensors of a batch by position; the first batch has the program's sizes, all calibrate it.
        """
        raise ConfigError(f"backend {self.name} writes no programs")

    @abstractmethod
    def grid(self, chosen: WeightFormat) -> Grid:
        """Return the grid that this backend rounds weights of that format to."""

    @abstractmethod
    def quantize(
        self,
        model: nn.Module,
        chosen: WeightFormat,
        first: ModelPass | None = None,
        batches: Iterable[Batch] = (),
        ignore: Sequence[str] | None = None,
    ) -> QuantizedModel:
        """Quantize a float model, running the pass `first` in front; the model may be changed in place.

        `batches` are a few example inputs, for backends that trace the model. `ignore` are names of layers that stay
        float and whole; None is the backend's own choice, and () is none.
        """

    def save(self, quantized: QuantizedModel, folder: Path) -> None:
        """Save a quantized model as safetensors and JSON, such that `load` gives identical outputs."""
        import_module(self.storage).save(quantized.model, folder)

    def load(self, folder: Path) -> nn.Module:
        """Load what `save` saved; the model on disk says what it is."""
        loaded: nn.Module = import_module(self.storage).load(folder)
        return loaded
