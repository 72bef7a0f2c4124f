"""PT2E's classes: torchao's, or torch's own where an older torch still has them and torchao lacks them."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

from torch.fx import GraphModule

from splitquant_plugins.errors import MissingExtraError

ANNOTATION = "quantization_annotation"  # the key of node.meta, the same in both


def _first(*names: str) -> ModuleType:
    for name in names:
        try:
            return import_module(name)
        except ImportError:
            continue
    raise MissingExtraError('PT2E needs torchao, which is not installed: pip install "splitquant-plugins[pt2e]"')


_quantizer = _first("torchao.quantization.pt2e.quantizer", "torch.ao.quantization.quantizer")
_from_torchao = _quantizer.__name__.startswith("torchao")
_observer = import_module("torchao.quantization.pt2e.observer" if _from_torchao else "torch.ao.quantization.observer")
_prepare = import_module("torchao.quantization.pt2e.prepare" if _from_torchao else "torch.ao.quantization.pt2e.prepare")
_flow = import_module(
    "torchao.quantization.pt2e.quantize_pt2e" if _from_torchao else "torch.ao.quantization.quantize_pt2e"
)

Quantizer: Any = _quantizer.Quantizer
QuantizationAnnotation: Any = _quantizer.QuantizationAnnotation
QuantizationSpec: Any = _quantizer.QuantizationSpec
HistogramObserver: Any = _observer.HistogramObserver
MinMaxObserver: Any = _observer.MinMaxObserver
PerChannelMinMaxObserver: Any = _observer.PerChannelMinMaxObserver
prepare_pt2e: Any = _flow.prepare_pt2e
convert_pt2e: Any = _flow.convert_pt2e


def fold_batchnorms(model: GraphModule) -> None:
    """Fold BatchNorms into the layers before them, in place, as prepare_pt2e does first of all."""
    for name in ("_fuse_conv_bn_", "_fuse_linear_bn_"):
        if hasattr(_flow, name):
            getattr(_flow, name)(model)


def new_observer(spec: Any) -> Any:
    """Return a fresh observer (or fake quantizer) of a specification, as prepare_pt2e makes it.

    Raises ValueError for a specification that takes its scale from another place of the graph.
    """
    if not hasattr(spec, "observer_or_fake_quant_ctr") and not hasattr(spec, "scale"):
        raise ValueError(f"a {type(spec).__name__} takes its scale from another place of the graph")
    made: Any = _prepare._create_obs_or_fq_from_qspec(spec, {}, False)
    return made
