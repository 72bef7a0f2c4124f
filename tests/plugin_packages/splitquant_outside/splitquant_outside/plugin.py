"""The hooks. Nothing heavy is imported here."""

from splitquant_plugins import hookimpl


@hookimpl
def splitquant_register_splitters(register):
    register("quantile", "splitquant_outside.quantile:QuantileSplitter", "parts of equal size, cut at quantiles")


@hookimpl
def splitquant_select_layer(module, config):
    from torch import nn

    from splitquant_plugins import LayerPlan

    if type(module) is nn.Bilinear:
        return LayerPlan("bilinear", module.weight, module.bias)
    return None


@hookimpl
def splitquant_build_module(parts, plan):
    if plan.kind != "bilinear":
        return None
    from splitquant_outside.bilinear import SplitBilinear, bilinear_part

    return SplitBilinear([bilinear_part(w, b) for w, b in zip(parts["weight"], parts["bias"], strict=True)])
