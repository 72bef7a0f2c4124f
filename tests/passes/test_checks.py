"""The check of parts, apart from the pass."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from splitquant_plugins import DecoupleQPass, LayerPlan, Manifest, SplitConfig, SplitQuantPass
from splitquant_plugins.errors import AlreadyQuantizedError, AlreadySplitError, InputError, SplitFailedError
from splitquant_plugins.grid import UniformGrid
from splitquant_plugins.manifest import ATTRIBUTE, LayerRecord
from splitquant_plugins.modules import SplitActivation, SplitLinear
from splitquant_plugins.passes import checks
from splitquant_plugins.passes.checks import (
    QUANTIZED_PACKAGES,
    check_parts,
    refuse_quantized_model,
    refuse_unfit_model,
    refuse_unfit_weights,
)
from splitquant_plugins.passes.select import Layer

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def tensor_of(seed, dtype):
    return torch.randn(6, 7, generator=torch.Generator().manual_seed(seed)).to(dtype)


@given(st.integers(0, 99), st.sampled_from(DTYPES), st.integers(1, 5))
def test_disjoint_parts_pass(seed, dtype, k):
    tensor = tensor_of(seed, dtype)
    label = torch.randint(k, tensor.shape)
    check_parts("w", tensor, [torch.where(label == part, tensor, 0) for part in range(k)], k)


@given(st.integers(0, 99), st.sampled_from(DTYPES), st.integers(2, 5))
def test_parts_that_overlap_pass_within_rounding(seed, dtype, k):
    tensor = tensor_of(seed, dtype)
    parts, left = [], tensor
    for _ in range(k - 1):
        part = (left.float() * torch.rand(tensor.shape) * 2).to(dtype)
        parts.append(part)
        left = left - part
    check_parts("w", tensor, [*parts, left], k)


@given(st.integers(0, 99), st.sampled_from(DTYPES), st.integers(2, 4), st.integers(0, 41))
def test_one_wrong_value_is_found(seed, dtype, k, place):
    tensor = tensor_of(seed, dtype)
    label = torch.randint(k, tensor.shape)
    parts = [torch.where(label == part, tensor, 0) for part in range(k)]
    value = parts[label.view(-1)[place]].view(-1)
    value[place] = value[place] * (1 + 8 * k * torch.finfo(dtype).eps)
    with pytest.raises(SplitFailedError, match="w: the parts miss the tensor"):
        check_parts("w", tensor, parts, k)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_parts_that_are_not_finite_are_found(value):
    tensor = torch.ones(2, 2)
    part = tensor.clone()
    part[0, 0] = value
    with pytest.raises(SplitFailedError):
        check_parts("w", tensor, [part, tensor - part], 2)


def test_a_dropped_part_is_found():
    tensor = torch.tensor([[-2.0, 0.1], [0.2, 3.0]])
    parts = [torch.where(kind, tensor, 0) for kind in (tensor < 0, (tensor > 0) & (tensor < 1), tensor > 1)]
    check_parts("w", tensor, parts, 3)
    for drop in range(3):
        with pytest.raises(SplitFailedError):
            check_parts("w", tensor, parts[:drop] + parts[drop + 1 :], 3)


@pytest.mark.parametrize(
    "part",
    [torch.zeros(3, 2), torch.zeros(2, 2, dtype=torch.float64), torch.zeros(2, 2, device="meta")],
    ids=["shape", "dtype", "device"],
)
def test_parts_of_another_kind_are_found(part):
    tensor = torch.ones(2, 2)
    with pytest.raises(SplitFailedError, match="w: a part is"):
        check_parts("w", tensor, [tensor, part], 2)


@pytest.mark.parametrize("number", [0, 3])
def test_the_number_of_parts(number):
    with pytest.raises(SplitFailedError, match=f"made {number} parts of k = 2"):
        check_parts("w", torch.zeros(2), [torch.zeros(2)] * number, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [2, 3])
def test_the_tolerance_is_the_rounding_of_the_additions(dtype, k):
    """One unit of the largest part for each addition is allowed, and nothing more."""
    eps = torch.finfo(dtype).eps
    tensor = torch.ones(8, dtype=dtype)
    rest = [torch.zeros(8, dtype=dtype)] * (k - 2)
    within, beyond = tensor.clone(), tensor.clone()
    within[3] += (k - 1) * eps
    beyond[3] += k * eps
    zeros = torch.zeros(8, dtype=dtype)
    check_parts("w", tensor, [within, zeros, *rest], k)
    with pytest.raises(SplitFailedError, match=f"w: the parts miss the tensor by up to {k * eps:.3g}"):
        check_parts("w", tensor, [beyond, zeros, *rest], k)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_error_that_is_allowed(dtype):
    """Parts that nearly cancel leave one unit of the larger; where both are zero nothing is allowed, or left."""
    eps = torch.finfo(dtype).eps
    parts = [torch.tensor([0.0, 1.0], dtype=dtype), torch.tensor([0.0, -1 + eps], dtype=dtype)]
    check_parts("w", torch.zeros(2, dtype=dtype), parts, 2)
    with pytest.raises(SplitFailedError, match="miss the tensor by up to"):
        check_parts("w", torch.zeros(2, dtype=dtype), [parts[0], parts[1] * (1 - eps)], 2)
    with pytest.raises(SplitFailedError, match="miss the tensor by up to"):
        check_parts("w", torch.tensor([eps, 0.0], dtype=dtype), parts, 2)


def test_one_part_has_to_be_the_tensor_itself():
    tensor = torch.ones(4)
    with pytest.raises(SplitFailedError):
        check_parts("w", tensor, [tensor + torch.finfo(torch.float32).eps], 1)


def test_parts_that_are_not_contiguous_are_checked_too():
    tensor = torch.randn(6, 7)
    parts = [tensor.t().clamp(max=0).t(), tensor.t().clamp(min=0).contiguous().t()]
    assert not all(part.is_contiguous() for part in parts)
    check_parts("w", tensor, parts, 2)
    parts[1][2, 3] += 1
    with pytest.raises(SplitFailedError):
        check_parts("w", tensor, parts, 2)


def test_large_tensors_are_checked_in_pieces_and_others_at_once(monkeypatch):
    sizes = []
    monkeypatch.setattr(checks, "_sum_is_close", lambda tensor, parts: sizes.append(tensor.numel()) or True)
    tensor = torch.randn(3, 30_000)
    check_parts("w", tensor, [tensor], 1)
    assert len(sizes) > 1
    assert sum(sizes) == tensor.numel()
    sizes.clear()
    check_parts("w", tensor, [tensor.t().contiguous().t()], 1)
    check_parts("w", tensor.to("meta"), [tensor.to("meta")], 1)
    assert sizes == [tensor.numel()] * 2


def test_a_wrong_value_is_found_anywhere_in_a_large_tensor(monkeypatch):
    monkeypatch.setattr("splitquant_plugins.passes.checks.spans", lambda n: [slice(0, n // 2), slice(n // 2, n)])
    tensor = torch.randn(3, 30_000)
    for place in (0, 24_575, 24_576, 44_999, 45_000, 89_999):
        parts = [tensor.clamp(max=0), tensor.clamp(min=0)]
        parts[0].view(-1)[place] -= 1
        with pytest.raises(SplitFailedError):
            check_parts("w", tensor, parts, 2)


def net():
    return nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.ReLU(), nn.Conv1d(3, 2, 1)))


@pytest.mark.parametrize("model", [net(), nn.Linear(3, 3), nn.ReLU()])
def test_float_models_may_be_split(model):
    refuse_unfit_model(model)


@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv1d])
def test_a_traced_graph_has_layers_and_an_exported_one_has_none(kind):
    layer = nn.Sequential(nn.Linear(3, 3) if kind is nn.Linear else nn.Conv1d(3, 3, 1))
    refuse_unfit_model(torch.fx.symbolic_trace(layer))
    exported = torch.export.export(layer, (torch.randn(3, 3),))
    for graph in (exported, exported.module()):
        with pytest.raises(InputError, match=r"^an exported graph has no layer modules to split; attach the pass"):
            refuse_unfit_model(graph)


@pytest.mark.parametrize("model", [None, {"model": net()}, net().state_dict(), nn.Linear, "model"])
def test_what_is_no_model_is_refused(model):
    with pytest.raises(InputError, match=f"takes a torch.nn.Module, not a {type(model).__name__}$"):
        refuse_unfit_model(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "^the model was split before"),
        ({"values": {"bits": 2}}, "^DecoupleQPass was applied to this model, and SplitQuantPass goes first"),
        ({"values": {"bits": 2}, "layers": [LayerRecord(name="0", kind="linear", action="split")]}, "^the model was s"),
        ({"layers": [LayerRecord(name="0", kind="linear", action="split")]}, "^the model was split before"),
        ({"values": {}}, "^DecoupleQPass was applied"),
    ],
)
def test_a_model_with_a_manifest_is_refused(options, message):
    model = net()
    setattr(model, ATTRIBUTE, Manifest(config=SplitConfig(), **options))
    with pytest.raises(AlreadySplitError, match=message):
        refuse_unfit_model(model)


def test_any_mark_of_a_split_is_a_refusal():
    model = net()
    setattr(model, ATTRIBUTE, {"from": "another version"})
    with pytest.raises(AlreadySplitError, match=r"^the model was split before"):
        refuse_unfit_model(model)


@pytest.mark.parametrize("split", [SplitLinear([nn.Linear(2, 2)]), SplitActivation(nn.ReLU(), 2, -1)])
def test_split_modules_without_a_manifest_are_named(split):
    with pytest.raises(AlreadySplitError, match=r"^1\.0 was split before; load the model afresh$"):
        refuse_unfit_model(nn.Sequential(nn.Linear(2, 2), nn.Sequential(split)))
    with pytest.raises(AlreadySplitError, match=r"^the model was split before; load the model afresh$"):
        refuse_unfit_model(split)


@pytest.mark.parametrize("package", [*QUANTIZED_PACKAGES, "torchao.quantization.modules", "optimum.quanto.nn.qlinear"])
@pytest.mark.parametrize("refuse", [refuse_quantized_model, refuse_unfit_model])
def test_modules_of_quantizers_are_named(package, refuse):
    layer = type("QLinear", (nn.Linear,), {"__module__": package})(2, 2)
    with pytest.raises(AlreadyQuantizedError, match=r"^1\.0 is a quantized QLinear; split first, then quantize$"):
        refuse(nn.Sequential(nn.Linear(2, 2), nn.Sequential(layer)))
    with pytest.raises(AlreadyQuantizedError, match=r"^the model is a quantized QLinear"):
        refuse(layer)


class Packed(torch.Tensor):
    """A weight as backends keep them: a tensor of another class."""


def test_quantized_parameters_are_named():
    model = nn.Sequential(nn.ReLU(), nn.Sequential(nn.Linear(2, 2)))
    model[1][0].bias = nn.Parameter(torch.zeros(2).as_subclass(Packed), requires_grad=False)
    with pytest.raises(AlreadyQuantizedError, match=r"^1\.0\.bias is a Packed; split first, then quantize$"):
        refuse_quantized_model(model)


def layer(weight, bias=None, name="head"):
    return Layer((name, "again"), nn.Identity(), LayerPlan("linear", weight, bias))


def test_finite_float_weights_are_accepted():
    refuse_unfit_weights([])
    large = torch.full((4, 4), torch.finfo(torch.float32).max)  # whose sum is infinite
    refuse_unfit_weights([layer(torch.ones(2, 2, dtype=dtype), torch.ones(2, dtype=dtype)) for dtype in DTYPES])
    refuse_unfit_weights([layer(large), layer(torch.ones(2, 2), large)])


@pytest.mark.parametrize(
    ("tensor", "error", "message"),
    [
        (torch.ones(2, 2, dtype=torch.int8), InputError, "is torch.int8; a split takes float64, float32, float16, bf"),
        (torch.ones(2, 2, dtype=torch.complex64), InputError, "is torch.complex64; a split takes"),
        (torch.ones(2, 2, device="meta"), InputError, "is on the meta device; load the model's weights first"),
        (torch.tensor([1.0, float("nan"), float("inf")]), SplitFailedError, "has 2 NaN or infinite values; repair"),
        (torch.tensor([1.0, -float("inf")]), SplitFailedError, "has 1 NaN or infinite values; repair the checkpoint"),
    ],
)
def test_weights_that_cannot_be_split_are_named(tensor, error, message):
    good = layer(torch.ones(2, 2), torch.ones(2), "good")
    with pytest.raises(error, match=f"^head.weight {message}"):
        refuse_unfit_weights([good, layer(tensor)])
    with pytest.raises(error, match=f"^head.bias {message}"):
        refuse_unfit_weights([good, layer(torch.ones(2, 2), tensor)])
    with pytest.raises(error, match=f"^head.bias {message}"):
        refuse_unfit_weights([layer(torch.ones(2, 2), None, "bare"), layer(torch.ones(2, 2), tensor)])


def test_a_model_wrapped_for_several_processes_is_refused():
    """Its wrapper would go on synchronising the parameters of the layers that are gone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(4, 4)))
        grid = UniformGrid(bits=2, granularity="channel", scheme="affine")
        with pytest.raises(InputError, match=r"is a DistributedDataParallel.*give its \.module"):
            SplitQuantPass()(wrapped)
        with pytest.raises(InputError, match=r"inner is a DistributedDataParallel"):
            DecoupleQPass(calibration=[torch.ones(2, 4)]).apply(nn.ModuleDict({"inner": wrapped}), grid=grid)
        assert isinstance(SplitQuantPass()(wrapped.module)[0], SplitLinear)
    finally:
        torch.distributed.destroy_process_group()


def test_a_model_that_writes_into_the_weights_of_its_layers_is_refused():
    class RwkvModel(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = SimpleNamespace(rescale_every=6)
            self.layer = nn.Linear(4, 4)

    model = RwkvModel()
    with pytest.raises(InputError, match=r"the model divides the weights.*rescale_every = 0"):
        SplitQuantPass()(model)
    model.config.rescale_every = 0
    assert isinstance(SplitQuantPass()(model).layer, SplitLinear)
