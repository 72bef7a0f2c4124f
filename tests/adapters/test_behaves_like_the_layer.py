"""What can be done with a model can be done with it split: float, and behind each backend.

The table is MODELS times OPERATIONS. A split model does what the same model does unsplit; what a backend itself
cannot do is listed in CANNOT, with what it says, and the split model says the same.
"""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from splitquant_plugins import SplitQuantPass, fuse
from splitquant_plugins.modules import SplitModule
from splitquant_plugins.passes.base import ModelPass

pytestmark = pytest.mark.filterwarnings("ignore")  # INC, torchao and torch.export deprecate their own

Make = Callable[["ModelPass | None", int], nn.Module]


def net(seed: int, outputs: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, outputs)).eval()


def inputs() -> Tensor:
    return torch.randn(6, 12, generator=torch.Generator().manual_seed(5))


def as_float(first: ModelPass | None, seed: int) -> nn.Module:
    return net(seed) if first is None else first(net(seed))


def fused(make: Make) -> Make:
    return lambda first, seed: make(first, seed) if first is None else fuse(make(first, seed))


def by_quanto(weights: str) -> Make:
    def make(first: ModelPass | None, seed: int) -> nn.Module:
        pytest.importorskip("optimum.quanto")
        from splitquant_quanto.quantization import quantize_after

        return quantize_after(first, net(seed), weights)

    return make


def by_inc(kind: str, **options: Any) -> Make:
    def make(first: ModelPass | None, seed: int) -> nn.Module:
        quantization = pytest.importorskip("neural_compressor.torch.quantization")
        recipe = getattr(quantization, kind)(group_size=-1, **options)
        gc.freeze()  # INC collects garbage twice for each layer, which takes seconds where much is imported
        try:
            return quantization.convert(quantization.prepare(net(seed), recipe if first is None else first + recipe))
        finally:
            gc.unfreeze()

    return make


def as_graph(first: ModelPass | None, seed: int) -> nn.Module:
    pytest.importorskip("torchao")
    from splitquant_pt2e.graph import split_graph

    graph = torch.export.export(net(seed), (inputs(),)).module()
    if first is not None:
        split_graph(graph, first)
    return graph


def by_pt2e(quantizer: Callable[[], Any]) -> Make:
    def make(first: ModelPass | None, seed: int) -> nn.Module:
        pytest.importorskip("torchao")
        from splitquant_pt2e.compat import convert_pt2e, prepare_pt2e

        recipe = quantizer()
        graph = torch.export.export(net(seed), (inputs(),)).module()
        prepared = prepare_pt2e(graph, recipe if first is None else first + recipe)
        prepared(inputs())
        return convert_pt2e(prepared)

    return make


def low_bit() -> Any:
    return pytest.importorskip("splitquant_pt2e").LowBitWeightQuantizer("int2")


def x86() -> Any:
    home = pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    return home.X86InductorQuantizer().set_global(home.get_default_x86_inductor_quantization_config())


MODELS: dict[str, Make] = {
    "float": as_float,
    "float, fused": fused(as_float),
    "quanto int2": by_quanto("int2"),
    "quanto int8": by_quanto("int8"),
    "quanto int2, fused": fused(by_quanto("int2")),
    "inc rtn": by_inc("RTNConfig", bits=2, use_sym=False, use_layer_wise=False),
    "inc hqq": by_inc("HQQConfig", bits=4, quant_zero=False),
    "pt2e float": as_graph,
    "pt2e weights": by_pt2e(low_bit),
    "pt2e integers": by_pt2e(x86),
}


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(inputs())


def gradient_of_the_input(model: nn.Module, other: nn.Module) -> str:
    """Against central differences: the network is linear in pieces."""
    x = inputs().requires_grad_()
    model(x).square().sum().backward()
    if x.grad is None:
        return "has none"
    torch.manual_seed(0)
    step = 1e-3 * torch.randn(x.shape)
    with torch.no_grad():
        measured = (model(x + step).square().sum() - model(x - step).square().sum()) / 2
    torch.testing.assert_close((x.grad * step).sum(), measured, rtol=0.02, atol=1e-4)
    return "works"


def gradients_of_the_parameters(model: nn.Module, other: nn.Module) -> str:
    output = model(inputs())
    if not output.requires_grad:
        return "has none"
    model.zero_grad()
    output.square().sum().backward()
    layers = [module.parts() for module in model.modules() if isinstance(module, SplitModule)]
    for parts in layers:  # every part moves the sum alike
        if all(isinstance(part.weight, nn.Parameter) for part in parts):
            first, *rest = [part.weight.grad for part in parts]
            assert first is not None
            assert first.abs().sum() > 0
            assert all(torch.equal(first, gradient) for gradient in rest)
    reached = {name.rpartition(".")[2] for name, parameter in model.named_parameters() if parameter.grad is not None}
    return "works" if reached == {"weight", "bias"} else f"reach {', '.join(sorted(reached))}"


def state_dict(model: nn.Module, other: nn.Module) -> str:
    """Through a file that holds tensors alone, into a model that was made of other weights."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    return same(other, model)


def deepcopy(model: nn.Module, other: nn.Module) -> str:
    twin = copy.deepcopy(model)
    expected = run(model)
    with torch.no_grad():
        for tensor in (*twin.parameters(), *twin.buffers()):
            tensor.zero_()
    assert torch.equal(run(model), expected)  # of its own tensors
    return same(copy.deepcopy(model), model)


def pickled(model: nn.Module, other: nn.Module) -> str:
    return same(pickle.loads(pickle.dumps(model)), model)


def torch_save(model: nn.Module, other: nn.Module) -> str:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return same(torch.load(file, weights_only=False), model)


def compiled(model: nn.Module, other: nn.Module) -> str:
    return same(torch.compile(model, backend="eager"), model)


def compiled_as_one_graph(model: nn.Module, other: nn.Module) -> str:
    return same(torch.compile(model, backend="eager", fullgraph=True), model)


def exported(model: nn.Module, other: nn.Module) -> str:
    return same(torch.export.export(model, (inputs(),)).module(), model)


def exported_and_saved(model: nn.Module, other: nn.Module) -> str:
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (inputs(),)), file)
    file.seek(0)
    return same(torch.export.load(file).module(), model)


def same(made: Any, model: nn.Module) -> str:
    torch.testing.assert_close(run(made), run(model), rtol=1e-5, atol=1e-6)
    return "works"


OPERATIONS = {
    "gradient of the input": gradient_of_the_input,
    "gradients of the parameters": gradients_of_the_parameters,
    "state_dict": state_dict,
    "deepcopy": deepcopy,
    "pickle": pickled,
    "torch.save": torch_save,
    "torch.compile": compiled,
    "torch.compile, one graph": compiled_as_one_graph,
    "torch.export": exported,
    "torch.export, saved": exported_and_saved,
}
# What a backend cannot do with a model, split or not, and how it says so.
NO_WEIGHTS_TO_TRAIN = "reach bias"
HOLDS_A_SAVE_METHOD = "AttributeError: 'Sequential' object has no attribute 'save'"  # on the model, bound to it
HOLDS_A_LOCAL_FUNCTION = "AttributeError: Can't pickle local object"
SCALES_ARE_NUMBERS_OF_THE_GRAPH = "AssertionError: Tensor-likes are not close!"
NO_COPY_OF_A_SUBCLASS = "RuntimeError: The default implementation of __deepcopy__() for wrapper subclasses"
CANNOT: dict[tuple[str, str], str] = {
    ("quanto int2", "deepcopy"): NO_COPY_OF_A_SUBCLASS,
    ("quanto int8", "deepcopy"): NO_COPY_OF_A_SUBCLASS,
    ("quanto int2, fused", "deepcopy"): NO_COPY_OF_A_SUBCLASS,
    ("inc rtn", "gradients of the parameters"): "has none",
    ("inc rtn", "pickle"): HOLDS_A_SAVE_METHOD,
    ("inc rtn", "torch.save"): HOLDS_A_SAVE_METHOD,
    ("inc rtn", "torch.compile, one graph"): "Unsupported: logging.Logger method not supported",
    ("inc rtn", "torch.export"): "RuntimeError: .numpy() is not supported for tensor subclasses.",
    ("inc rtn", "torch.export, saved"): "RuntimeError: .numpy() is not supported for tensor subclasses.",
    ("inc hqq", "gradients of the parameters"): NO_WEIGHTS_TO_TRAIN,
    ("inc hqq", "pickle"): HOLDS_A_SAVE_METHOD,
    ("inc hqq", "torch.save"): HOLDS_A_SAVE_METHOD,
    ("pt2e float", "pickle"): HOLDS_A_LOCAL_FUNCTION,
    ("pt2e float", "torch.save"): HOLDS_A_LOCAL_FUNCTION,
    ("pt2e weights", "gradients of the parameters"): NO_WEIGHTS_TO_TRAIN,
    ("pt2e weights", "pickle"): HOLDS_A_LOCAL_FUNCTION,
    ("pt2e weights", "torch.save"): HOLDS_A_LOCAL_FUNCTION,
    ("pt2e integers", "gradient of the input"): "has none",
    ("pt2e integers", "gradients of the parameters"): NO_WEIGHTS_TO_TRAIN,
    ("pt2e integers", "state_dict"): SCALES_ARE_NUMBERS_OF_THE_GRAPH,
    ("pt2e integers", "pickle"): HOLDS_A_LOCAL_FUNCTION,
    ("pt2e integers", "torch.save"): HOLDS_A_LOCAL_FUNCTION,
}


@pytest.fixture(scope="module", params=MODELS)
def made(request: pytest.FixtureRequest) -> tuple[str, dict[bool, list[nn.Module]]]:
    """The name of a model, and two of it with different weights, unsplit and split; made once for all operations."""
    make = MODELS[request.param]
    models = {split: [make(SplitQuantPass() if split else None, seed) for seed in (0, 1)] for split in (False, True)}
    for model in models[True]:
        if not isinstance(model, torch.fx.GraphModule):
            assert sum(isinstance(module, SplitModule) for module in model.modules()) == 3
    return request.param, models


def outcome(operation: str, model: nn.Module, other: nn.Module) -> str:
    """What came of an operation: that it works, or the first line of its error."""
    torch._dynamo.reset()
    try:
        return OPERATIONS[operation](model, other)
    except Exception as error:
        return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_split_model_does_what_the_model_does(made: tuple[str, dict[bool, list[nn.Module]]], operation: str) -> None:
    name, models = made
    plain, split = (outcome(operation, *models[split]) for split in (False, True))
    assert split == plain
    assert plain == "works" or plain.startswith(CANNOT.get((name, operation), "works"))
