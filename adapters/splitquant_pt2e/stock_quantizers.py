"""The PT2E quantizers that ship with torchao and executorch, by name: how each is built, and whether it can be."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from splitquant_plugins.errors import ConfigError, MissingExtraError
from splitquant_pt2e.integer_scalars import leaving_integers


@dataclass(frozen=True)
class StockQuantizer:
    """One quantizer with one setting.

    `build` makes it from the module `home`, which belongs to the package `package`; `needs` are other packages.
    `strict`: its patterns match graphs of a strict export without guards only,
    `torch.export.export(..., strict=True).module(check_guards=False)`. `channels_last`: it quantizes convolutions of
    images in channels-last order only, and leaves others float without a word.
    """

    home: str
    build: Callable[[Any], Any]
    description: str
    package: str = "executorch"
    needs: tuple[str, ...] = ()
    strict: bool = False
    channels_last: bool = False

    def ordered(self, batch: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """A batch as the quantizer needs it: images [batch, channels, height, width] in channels-last order."""
        if not self.channels_last:
            return tuple(batch)
        return tuple(each.contiguous(memory_format=torch.channels_last) if each.ndim == 4 else each for each in batch)


def make(name: str) -> Any:
    """Build a stock quantizer.

    Raises ConfigError for a name that is not known, MissingExtraError where a package is missing.
    """
    if name not in STOCK:
        raise ConfigError(f"no stock quantizer {name!r}; choose from {', '.join(STOCK)}")
    if reason := installed(name):
        raise MissingExtraError(f"stock quantizer {name!r}: {reason}")
    stock = STOCK[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vendors' packages warn of their own insides
        return stock.build(import_module(stock.home))


def missing_packages(name: str) -> str | None:
    """Which packages a stock quantizer lacks here, found without an import; None where it lacks none."""
    stock = STOCK[name]
    missing = [package for package in (stock.package, *stock.needs) if find_spec(package) is None]
    if missing:
        return f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed"
    return None


def installed(name: str) -> str | None:
    """Why a stock quantizer cannot be built here; None where it can."""
    stock = STOCK[name]
    if reason := missing_packages(name):
        return reason
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import_module(stock.home)
    except Exception as error:  # vendors' packages fail at import in ways of their own
        return f"{stock.home} cannot be imported: {type(error).__name__}: {error}"
    return None


def _xnnpack(channel: bool) -> Callable[[Any], Any]:
    def build(home: Any) -> Any:
        config = home.get_symmetric_quantization_config(is_per_channel=channel)
        return leaving_integers(home.XNNPACKQuantizer)().set_global(config)

    return build


def _ethos(channel: bool, unit: str = "ethos-u55-128") -> Callable[[Any], Any]:
    def build(home: Any) -> Any:
        from executorch.backends.arm.ethosu import EthosUCompileSpec

        quantizer = home.EthosUQuantizer(EthosUCompileSpec(unit))
        quantizer.set_global(home.get_symmetric_quantization_config(is_per_channel=channel))
        return quantizer

    return build


def _qnn(kind: str, channel: bool) -> Callable[[Any], Any]:
    def build(home: Any) -> Any:
        # Without it the quantizer, which needs no SDK, sets out to download one.
        os.environ.setdefault("QNN_SDK_ROOT", "")
        quantizer = home.QnnQuantizer()
        quantizer.set_default_quant_config(
            getattr(home.QuantDtype, kind), is_conv_per_channel=channel, is_linear_per_channel=channel
        )
        return quantizer

    return build


def _samsung(channel: bool) -> Callable[[Any], Any]:
    def build(home: Any) -> Any:
        from executorch.backends.samsung.quantizer.qconfig import Precision

        quantizer = home.EnnQuantizer()
        quantizer.setup_quant_params(Precision.A8W8, is_per_channel=channel)
        return quantizer

    return build


def _coreml(channel: bool) -> Callable[[Any], Any]:
    def build(home: Any) -> Any:
        import torch
        from coremltools.optimize.torch.quantization.quantization_config import (
            LinearQuantizerConfig,
            QuantizationScheme,
        )

        options = {
            "quantization_scheme": QuantizationScheme.symmetric,
            "activation_dtype": torch.quint8,
            "weight_dtype": torch.qint8,
            "weight_per_channel": channel,
        }
        return home.CoreMLQuantizer(LinearQuantizerConfig.from_dict({"global_config": options}))

    return build


def _openvino(mode: str) -> Callable[[Any], Any]:
    def build(home: Any) -> Any:
        return home.OpenVINOQuantizer(mode=home.QuantizationMode[mode])

    return build


def _x86(home: Any) -> Any:
    return home.X86InductorQuantizer().set_global(home.get_default_x86_inductor_quantization_config())


def _arm_inductor(home: Any) -> Any:
    return home.ArmInductorQuantizer().set_global(home.get_default_arm_inductor_quantization_config())


def _vulkan(home: Any) -> Any:
    return home.VulkanQuantizer().set_global(home.get_symmetric_quantization_config())


_XNNPACK = "executorch.backends.xnnpack.quantizer.xnnpack_quantizer"
_ARM = "executorch.backends.arm.quantizer"
_QNN = "executorch.backends.qualcomm.quantizer.quantizer"
_SAMSUNG = "executorch.backends.samsung.quantizer.quantizer"
_COREML = "executorch.backends.apple.coreml.quantizer.coreml_quantizer"
_OPENVINO = "executorch.backends.openvino.quantizer.quantizer"
_TORCHAO = "torchao.quantization.pt2e.quantizer"

STOCK: dict[str, StockQuantizer] = {
    "xnnpack": StockQuantizer(_XNNPACK, _xnnpack(False), "XNNPACK, W8A8, weights per tensor (its default)"),
    "xnnpack-channel": StockQuantizer(_XNNPACK, _xnnpack(True), "XNNPACK, W8A8, weights per channel"),
    "ethos-u": StockQuantizer(_ARM, _ethos(False), "Arm Ethos-U, W8A8, weights per tensor", strict=True),
    "ethos-u-channel": StockQuantizer(_ARM, _ethos(True), "Arm Ethos-U, W8A8, weights per channel", strict=True),
    "ethos-u85": StockQuantizer(
        _ARM, _ethos(False, "ethos-u85-256"), "Arm Ethos-U85, W8A8, weights per tensor", strict=True
    ),
    "cortex-m": StockQuantizer(
        "executorch.backends.cortex_m.quantizer.quantizer",
        lambda home: home.CortexMQuantizer(),
        "Arm Cortex-M, W8A8",
        strict=True,
        channels_last=True,
    ),
    "cadence": StockQuantizer(
        "executorch.backends.cadence.aot.quantizer.quantizer",
        lambda home: home.CadenceDefaultQuantizer(),
        "Cadence, W8A8, weights per tensor",
        strict=True,
    ),
    **{
        f"qnn-{kind}{'-channel' if channel else ''}": StockQuantizer(
            _QNN,
            _qnn(f"use_{kind}", channel),
            f"Qualcomm QNN, {kind}, weights per {'channel' if channel else 'tensor'}",
        )
        for kind in ("8a8w", "16a8w", "16a4w", "8a4w", "16a2w")
        for channel in (False, True)
    },
    "samsung": StockQuantizer(_SAMSUNG, _samsung(False), "Samsung Exynos, A8W8, weights per tensor"),
    "samsung-channel": StockQuantizer(_SAMSUNG, _samsung(True), "Samsung Exynos, A8W8, weights per channel"),
    "vulkan": StockQuantizer(
        "executorch.backends.vulkan.quantizer.vulkan_quantizer", _vulkan, "Vulkan, 8-bit weights per channel"
    ),
    "coreml": StockQuantizer(_COREML, _coreml(False), "CoreML, W8A8, weights per tensor", needs=("coremltools",)),
    "coreml-channel": StockQuantizer(
        _COREML, _coreml(True), "CoreML, W8A8, weights per channel", needs=("coremltools",)
    ),
    **{
        name: StockQuantizer(_OPENVINO, _openvino(mode), f"OpenVINO, {text}", needs=("nncf", "openvino"))
        for name, mode, text in (
            ("openvino", "INT8_SYM", "W8A8, symmetric activations"),
            ("openvino-mixed", "INT8_MIXED", "W8A8, affine activations"),
            ("openvino-int4", "INT4WO_SYM", "4-bit weights alone"),
        )
    },
    "x86-inductor": StockQuantizer(
        f"{_TORCHAO}.x86_inductor_quantizer", _x86, "x86 CPUs through Inductor, W8A8, weights per channel", "torchao"
    ),
    "arm-inductor": StockQuantizer(
        f"{_TORCHAO}.arm_inductor_quantizer", _arm_inductor, "Arm CPUs through Inductor, W8A8", "torchao"
    ),
}
