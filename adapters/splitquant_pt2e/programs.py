"""ExecuTorch programs: what lowers a converted graph for each target, and what the target's program is like."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from splitquant_plugins.backends import Program
from splitquant_plugins.errors import ConfigError, InputError, MissingExtraError, SplitQuantError, first_line
from splitquant_plugins.manifest import manifest_of
from splitquant_plugins.passes.base import ModelPass
from splitquant_pt2e import stock_quantizers
from splitquant_pt2e.compat import convert_pt2e, prepare_pt2e
from splitquant_pt2e.quiet import quiet
from splitquant_pt2e.single_windows import step_by_one

Inputs = tuple[Tensor, ...]
_CYCLES = re.compile(r"^Total cycles\s+(\d+) cycles/batch", re.MULTILINE)  # as vela prints them, for each delegate


@dataclass(frozen=True)
class Target:
    """One target: the stock quantizer for it, and what lowers a quantized program, given that quantizer.

    `integer_outputs`: its static kernels write integers, though its quantizer does not say so. `python`: the least
    version that its compiler works with.
    """

    quantizer: str
    lower: Callable[[torch.export.ExportedProgram, Any], Any]
    description: str
    integer_outputs: bool = False
    python: tuple[int, int] = (3, 10)


def export_program(
    model: nn.Module, target: str, first: ModelPass | None, batches: Sequence[Inputs], *, strict: bool | None = None
) -> Program:
    """Quantize a float model with a target's stock quantizer and lower it to a program.

    `model` takes the tensors of a batch by position; the sizes of the first batch are those of the program, and all
    batches calibrate it. A program for Cortex-M takes images in channels-last order. Raises ConfigError for an unknown
    target, MissingExtraError where its packages or its Python are missing, and InputError where torch cannot export the
    model or the compiler of the target refuses it.
    """
    chosen = target_of(target)
    if sys.version_info < chosen.python:
        needed, here = (".".join(map(str, version[:2])) for version in (chosen.python, sys.version_info))
        raise MissingExtraError(f"executorch's compiler for {target} needs Python {needed}; this is {here}")
    plain = stock_quantizers.make(chosen.quantizer)
    quantizer = plain if first is None else first + plain
    if first is not None and chosen.integer_outputs:
        from splitquant_pt2e.part_outputs import integer_parts

        quantizer = integer_parts(quantizer)
    stock = stock_quantizers.STOCK[chosen.quantizer]
    batches = [stock.ordered(batch) for batch in batches]
    example = batches[0]
    strict = stock.strict if strict is None else strict
    with quiet() as said, torch.no_grad():
        graph = _step("torch.export cannot trace the model", lambda: _exported(model, example, strict))
        prepared = _step(f"{type(plain).__name__} cannot annotate the model", lambda: prepare_pt2e(graph, quantizer))
        _step("the model cannot be run on its calibration batches", lambda: [prepared(*batch) for batch in batches])
        converted = convert_pt2e(prepared)
        program = _step("torch.export refuses the quantized model", lambda: torch.export.export(converted, example))
        lowered = _step(f"the compiler of {target} refuses the model", lambda: chosen.lower(program, plain))
        delegates, host = calls_of(lowered)  # writing the program adds its memory management
        content = _step("ExecuTorch cannot write the program", lambda: lowered.to_executorch().buffer)
    manifest = None if first is None else manifest_of(converted)
    cycles = [int(found) for found in _CYCLES.findall(said.getvalue())]
    return Program(bytes(content), delegates, host, sum(cycles) if cycles else None, converted, manifest)


def target_of(name: str) -> Target:
    """Look a target up; ConfigError names those there are."""
    if name not in TARGETS:
        raise ConfigError(f"no target {name!r}; choose from {', '.join(TARGETS)}")
    return TARGETS[name]


def calls_of(lowered: Any) -> tuple[int, dict[str, int]]:
    """Number of delegates of a lowered program, and how often it calls each operator that is left to the host."""
    nodes = [node for node in lowered.exported_program().graph.nodes if node.op == "call_function"]
    names = [_operator(node.target) for node in nodes]
    delegates = sum("delegate" in name for name in names)
    host = Counter(name for name in names if "delegate" not in name and name != "getitem")
    return delegates, dict(host)


def _operator(target: Any) -> str:
    name = str(getattr(target, "__name__", target))
    return name.removesuffix(".default")


def _exported(model: nn.Module, example: Inputs, strict: bool) -> GraphModule:
    exported = torch.export.export(model, example, strict=strict)
    graph: Any = exported.module(check_guards=False) if strict else exported.module()
    return graph


def _step(what: str, work: Callable[[], Any]) -> Any:
    """Do one step; what torch, a quantizer or a compiler raises becomes an InputError that says which step it was."""
    try:
        return work()
    except SplitQuantError:
        raise
    except Exception as error:  # vendors' compilers raise whatever they like
        raise InputError(f"{what}: {type(error).__name__}: {first_line(error)}") from error


def _delegated(partitioner: Callable[[], Any]) -> Callable[[torch.export.ExportedProgram, Any], Any]:
    def lower(program: torch.export.ExportedProgram, _: Any) -> Any:
        from executorch.exir import to_edge_transform_and_lower

        return to_edge_transform_and_lower(program, partitioner=[partitioner()])

    return lower


def _xnnpack() -> Any:
    return import_module("executorch.backends.xnnpack.partition.xnnpack_partitioner").XnnpackPartitioner()


def _vulkan() -> Any:
    return import_module("executorch.backends.vulkan.partitioner.vulkan_partitioner").VulkanPartitioner()


def _ethos(unit: str) -> Callable[[torch.export.ExportedProgram, Any], Any]:
    def make() -> Any:
        home = import_module("executorch.backends.arm.ethosu")
        return home.EthosUPartitioner(home.EthosUCompileSpec(unit, extra_flags=["--verbose-cycle-estimate"]))

    def lower(program: torch.export.ExportedProgram, quantizer: Any) -> Any:
        step_by_one(program.graph_module)
        return _delegated(make)(program, quantizer)

    return lower


def _cortex_m(program: torch.export.ExportedProgram, _: Any) -> Any:
    from executorch.backends.cortex_m.edge_compile_config import cortex_m_edge_compile_config
    from executorch.backends.cortex_m.passes.cortex_m_pass_manager import CortexMPassManager
    from executorch.backends.cortex_m.target_config import CortexM, CortexMTargetConfig
    from executorch.exir import to_edge

    edge = to_edge(program, compile_config=cortex_m_edge_compile_config())
    manager = CortexMPassManager(
        edge.exported_program(), CortexMPassManager.pass_list, target_config=CortexMTargetConfig(cpu=CortexM.M55)
    )
    edge._edge_programs["forward"] = manager.transform()
    return edge


def _cadence(program: torch.export.ExportedProgram, quantizer: Any) -> Any:
    home = import_module("executorch.backends.cadence.aot.compiler")
    fused = home.apply_pre_edge_transform_passes(program, quantizer)
    return home._lower_ep_to_cadence(fused)


TARGETS: dict[str, Target] = {
    "xnnpack": Target("xnnpack-channel", _delegated(_xnnpack), "XNNPACK on CPUs", integer_outputs=True),
    "ethos-u55": Target("ethos-u", _ethos("ethos-u55-128"), "Arm Ethos-U55 with 128 MACs, by vela"),
    "ethos-u85": Target("ethos-u85", _ethos("ethos-u85-256"), "Arm Ethos-U85 with 256 MACs, by vela"),
    "vulkan": Target("vulkan", _delegated(_vulkan), "GPUs through Vulkan"),
    "cortex-m": Target("cortex-m", _cortex_m, "Arm Cortex-M55 by CMSIS-NN"),
    "cadence": Target("cadence", _cadence, "Cadence HiFi DSPs", python=(3, 12)),
}
