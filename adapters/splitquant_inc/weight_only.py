"""RTN, GPTQ, HQQ and AWQ behind a pass."""

from __future__ import annotations

import copy
import glob
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from splitquant_inc.exact_hqq import keep_zeros_exact
from splitquant_inc.grid import IncRtnGrid
from splitquant_inc.part_names import Info, PartName, layer_infos, match_parts, part_infos
from splitquant_inc.recipe import JOINED, PassFirst
from splitquant_inc.refuse import (
    bits_of,
    is_integer,
    refuse_clipping,
    refuse_ignored,
    refuse_import_order,
    refuse_reload,
    refuse_scaling,
    refuse_wrapping,
)
from splitquant_plugins.errors import ConfigError, InputError
from splitquant_plugins.grid import Grid
from splitquant_plugins.passes.checks import refuse_quantized_model, refuse_unfit_model


class WeightOnlyRecipe(PassFirst):
    """Splits the layers that INC will quantize, then gives every part its layer's options."""

    def get_model_info(self, *args: Any, model: nn.Module | None = None) -> list[Info]:
        """Run the pass, unless `prepare` did, and list the layers that INC may quantize.

        INC calls this with `model` as a keyword; a ComposableConfig with it in position.
        """
        if args or model is None:
            raise ConfigError(f"a recipe with a pass within a ComposableConfig: {JOINED}")
        if not getattr(model, "is_prepared", False):
            self._run_pass(model)
        else:
            refuse_quantized_model(model)  # INC leaves its mark on what it has converted, too
        return part_infos(super().get_model_info(model=model), model)  # type: ignore[misc]

    def to_config_mapping(self, config_list: Any = None, model_info: Any = None) -> OrderedDict[Info, Any]:
        """Give each module of `model_info` its options: those of its layer, unless a pattern names the part."""
        of_layers = super().to_config_mapping(config_list, layer_infos(model_info))  # type: ignore[misc]
        by_pattern = {key: value for key, value in self.local_config.items() if isinstance(key, str)}  # type: ignore[attr-defined]
        matched = match_parts(model_info, of_layers, by_pattern)
        return OrderedDict((info, self._adapted(config, info[0])) for info, config in matched.items())

    def _adapted(self, config: Any, name: str) -> Any:
        """Return a copy of one layer's options as a split model needs them.

        INC reads what concerns the whole model from whichever layer comes last. Weights are in memory, so that
        nothing is reloaded layer by layer. The zero points of HQQ's parts are not quantized themselves: those of
        a part are nearly equal, and INC's 16-bit scale for them overflows.
        """
        adapted = copy.copy(config)
        whole_model = {"model_path", "quant_lm_head"} & adapted.__dict__.keys() & self.__dict__.keys()
        adapted.__dict__.update({key: self.__dict__[key] for key in whole_model})
        if "use_layer_wise" in adapted.__dict__:
            adapted.__dict__["use_layer_wise"] = False
        if config.name == "hqq" and isinstance(name, PartName) and name != name.layer:
            adapted.__dict__["quant_zero"] = False
        return adapted

    def _run_pass(self, model: nn.Module) -> None:
        refuse_unfit_model(model)
        refuse_import_order()
        if isinstance(model, _kinds_of(self)):
            raise InputError(f"the model is a single {type(model).__name__}; put it into an nn.Sequential to split it")
        chosen = self._chosen(model)
        if not chosen:
            raise ConfigError(f"{type(self).plain.__name__} quantizes no layer of this {type(model).__name__}")
        refuse_wrapping(chosen)
        refuse_clipping(chosen)
        refuse_scaling(chosen)
        refuse_reload(self, chosen, model)
        ignore = [glob.escape(name) for name, _ in model.named_modules() if name and name not in chosen]
        grids = {name: grid_of(config) for name, config in chosen.items()}
        rule = grids.get if any(grids.values()) else None
        if rule is None and self.first.rounds_to_recipe:
            raise ConfigError(
                f"{type(self).plain.__name__} has no linear grid that is known beforehand, and {self.first!r} chooses "
                "values for one: use RTNConfig, without double quantization and mse search"
            )
        self.first.apply(model, grid=rule, ignore=ignore)
        own_weights(model, _kinds_of(self), chosen)
        widen_bfloat16(model, chosen)
        if type(self).plain.__name__ == "HQQConfig":
            keep_zeros_exact(model, self.first.plugins)

    def _chosen(self, model: nn.Module) -> dict[str, Any]:
        """Options of the float layers that INC will quantize, by name."""
        infos = super().get_model_info(model=model)  # type: ignore[misc]
        mapping: Mapping[Info, Any] = super().to_config_mapping(model_info=infos)  # type: ignore[misc]
        chosen = _quantized_layers(mapping, model, _kinds_of(self))
        if self.name == "gptq":  # type: ignore[attr-defined]
            blocks, last = layers_in_blocks(model)
            refuse_ignored(blocks, chosen)
            if self.quant_lm_head and last:  # type: ignore[attr-defined]
                blocks = [*blocks, last]
            chosen = {name: config for name, config in chosen.items() if name in blocks}
        return chosen


def layers_in_blocks(model: nn.Module) -> tuple[list[str], str | None]:
    """Names of the layers that INC's GPTQ quantizes, those of the last stack of blocks, and of the module behind it."""
    from neural_compressor.torch.algorithms.weight_only.gptq import find_layers, trace_gptq_target_blocks

    found = trace_gptq_target_blocks(model)
    names = []
    for index, block in enumerate(found["transformers"]):
        names += [f"{found['transformers_name']}.{index}.{name}" for name in find_layers(block)]
    return names, found["transformers_post"].get("name")


def leave_float(recipe: Any, names: Sequence[str], model: nn.Module) -> None:
    """Have a configuration that has no pass leave the layers of those names float, and no others."""
    # INC copies the weight of a tied head by these keys, and fails on a model that has none.
    recipe.quant_lm_head = not names and bool(getattr(model, "_tied_weights_keys", None))
    for name in names:
        recipe.set_local(f"{re.escape(name)}$", type(recipe)(dtype="fp32"))


def chosen_layers(recipe: Any, model: nn.Module) -> dict[str, Any]:
    """Options of the layers that INC will quantize with a configuration that has no pass, by name."""
    asked = copy.deepcopy(recipe)  # INC adds to the options of the configuration that it asks
    mapping = asked.to_config_mapping(model_info=asked.get_model_info(model=model))
    return _quantized_layers(mapping, model, _kinds_of(recipe))


def _quantized_layers(
    mapping: Mapping[Info, Any], model: nn.Module, kinds: tuple[type[nn.Module], ...]
) -> dict[str, Any]:
    return {
        name: config
        for (name, _), config in mapping.items()
        if config.dtype != "fp32" and isinstance(model.get_submodule(name), kinds)
    }


def _kinds_of(recipe: Any) -> tuple[type[nn.Module], ...]:
    from neural_compressor.torch.quantization.config import WOQ_WHITE_LIST

    return (nn.Linear,) if recipe.name == "hqq" else tuple(WOQ_WHITE_LIST)


def grid_of(config: Any) -> Grid | None:
    """Return the grid of one layer's options; None where there is no closed one.

    HQQ and a range found by search depend on the values, nf4 and its kin are no linear grids, and quantized
    scales depend on those of the whole layer. GPTQ starts from RTN's grid and then moves weights along it; AWQ
    looks for narrower ranges than RTN's, which a part that lies on that grid does not gain from.
    """
    if config.name not in ("rtn", "gptq", "awq") or not is_integer(config) or not 2 <= bits_of(config) <= 8:
        return None
    if config.use_mse_search or config.use_double_quant or getattr(config, "group_dim", 1) != 1:
        return None
    return IncRtnGrid(
        bits_of(config),
        "symmetric" if config.use_sym else "affine",
        None if config.group_size == -1 else int(config.group_size),
        bool(getattr(config, "use_full_range", False)),
    )


def own_weights(model: nn.Module, kinds: tuple[type[nn.Module], ...], chosen: Iterable[str]) -> None:
    """Give the `chosen` layers, or their parts, weights of their own: INC writes codes into the float weight."""
    holders: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            holders[parameter.data_ptr()] = holders.get(parameter.data_ptr(), 0) + 1
    modules = [part for name in chosen for part in model.get_submodule(name).modules()]
    layers: list[Any] = [module for module in modules if isinstance(module, kinds)]
    for module in layers:
        if holders[module.weight.data_ptr()] > 1:
            module.weight = nn.Parameter(module.weight.detach().clone(), module.weight.requires_grad)


def widen_bfloat16(model: nn.Module, chosen: Mapping[str, Any]) -> None:
    """Give asymmetric layers of RTN and AWQ, or their parts, 32 bits: INC hands numpy codes of the weight's dtype."""
    for name, config in chosen.items():
        if config.name not in ("rtn", "awq") or config.use_sym:
            continue
        for module in model.get_submodule(name).modules():
            weight = module._parameters.get("weight")
            if weight is not None and weight.dtype == torch.bfloat16:
                module.weight = nn.Parameter(weight.detach().float(), requires_grad=False)
