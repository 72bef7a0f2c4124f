"""A split layer behaves as the layer did: reading, training, copying, saving, compiling; a write never vanishes."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from splitquant_plugins import SplitQuantPass, fuse
from splitquant_plugins.errors import InputError, ReadOnlyError
from splitquant_plugins.modules import SplitLinear
from splitquant_plugins.read_only import ReadOnlyTensor


def split_mlp():
    return SplitQuantPass()(nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 2)).eval())


def quantized_mlp():
    quanto = pytest.importorskip("optimum.quanto")
    model = split_mlp()
    quanto.quantize(model, weights=quanto.qint4)
    quanto.freeze(model)
    return model


@pytest.fixture(params=[split_mlp, quantized_mlp], ids=["split", "split-and-quantized"])
def model(request):
    return request.param()


@pytest.fixture
def x():
    return torch.randn(4, 12)


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.add_(1.0),
        lambda w: w.data.add_(1.0),
        lambda w: w.detach().mul_(2),
        lambda w: w.t()[0].zero_(),
        lambda w: w.view(-1)[2:4].fill_(1),
        lambda w: w.__setitem__(0, 1.0),
        lambda w: w.__iadd__(1.0),
        lambda w: setattr(w, "data", torch.zeros(16, 12)),
        lambda w: nn.init.normal_(w),
        lambda w: torch.add(w.detach(), 1, out=w.detach()),
        lambda w: nn.functional.relu(w.detach(), inplace=True),
        lambda w: w.copy_(torch.zeros(16, 12)),
        lambda w: w.unbind(0)[1].add_(1),
        lambda w: w.cpu().to(torch.float32).add_(1),
        lambda w: torch.ops.aten.add_.Tensor(w, w),
    ],
)
def test_w7_a_write_into_the_weight_raises(model, x, write):
    before = model(x).detach()
    with torch.no_grad(), pytest.raises(ReadOnlyError, match="the weight of a SplitLinear, and be lost"):
        write(model[0].weight)
    with torch.no_grad(), pytest.raises(ReadOnlyError, match="the bias of a SplitLinear, and be lost"):
        model[0].bias.data.add_(1.0)
    assert torch.equal(model(x).detach(), before)


def test_w7_numpy_sees_it_read_only(model):
    array = model[0].weight.detach().numpy()
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1
    assert np.array_equal(array, model[0].weight.detach().clone().numpy())


def test_w7_a_single_part_is_written_through(x):
    model = SplitQuantPass(k=1)(nn.Sequential(nn.Linear(12, 4)))
    before = model(x)
    with torch.no_grad():
        model[0].weight.data.add_(1.0)
    assert not torch.equal(model(x), before)


def test_reading_the_weight_works(model, x):
    weight, bias = model[0].weight, model[0].bias
    assert (weight.dtype, weight.device.type, weight.shape, bias.shape) == (torch.float32, "cpu", (16, 12), (16,))
    expected = model[0](x)
    found = nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(found, expected)
    assert type(found) is torch.Tensor
    assert type(weight + 1) is type(weight.clone()) is type(torch.cat([weight, weight])) is torch.Tensor
    clone = weight.detach().clone()
    clone.add_(1)
    assert "ReadOnly" not in repr(weight.detach().clone())
    assert type(copy.deepcopy(weight.detach())) is torch.Tensor
    assert torch.equal(pickle.loads(pickle.dumps(weight.detach())), weight.detach())
    other = nn.Linear(12, 16)
    other.weight.data.copy_(weight)  # as a source it may be used anywhere
    assert torch.equal(other.weight, weight)


def test_gradients_reach_the_parts_through_layer_and_weight(x):
    model = split_mlp()
    model(x).sum().backward()
    assert all(part.weight.grad is not None for part in model[0].parts())
    model.zero_grad()
    model[0].weight.square().sum().backward()
    assert all(part.weight.grad is not None for part in model[0].parts())


def test_state_dict_deepcopy_pickle_and_torch_save(model, x):
    expected = model(x)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), expected)
    assert not any(isinstance(value, ReadOnlyTensor) for value in model.state_dict().values())
    twin = pickle.loads(pickle.dumps(model))
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(x), expected)


def test_deepcopy(x):
    model = split_mlp()
    assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_deepcopy_of_a_quantized_model_does_what_quanto_does(x):
    """Frozen weights of quanto 0.2.7 cannot be copied on torch 2.13, split or not."""
    quanto = pytest.importorskip("optimum.quanto")
    plain = nn.Sequential(nn.Linear(12, 16))
    quanto.quantize(plain, weights=quanto.qint4)
    quanto.freeze(plain)
    outcomes = []
    for model in (plain, quantized_mlp()):
        try:
            outcomes.append(torch.equal(copy.deepcopy(model)(x), model(x)))
        except RuntimeError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]


class Reader(nn.Module):
    """A parent that looks at its layer's weight."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.to(self.layer.weight.dtype)) + nn.functional.linear(x, self.layer.weight)


def test_compile_and_export(x):
    with torch.no_grad():
        for model in (split_mlp(), Reader(split_mlp()[0])):
            expected = model(x)
            assert torch.allclose(torch.compile(model, backend="eager", fullgraph=True)(x), expected, atol=1e-6)
            assert torch.allclose(torch.export.export(model, (x,)).module()(x), expected, atol=1e-6)


class Writer(Reader):
    """A parent that writes into its layer's weight in every call."""

    def __init__(self, layer, write):
        super().__init__(layer)
        self.write = write

    def forward(self, x):
        self.write(self.layer.weight)
        return super().forward(x)


MAKERS = {
    "compile": lambda model, x: torch.compile(model, backend="eager")(x),
    "compile, whole": lambda model, x: torch.compile(model, backend="eager", fullgraph=True)(x),
    "export": lambda model, x: torch.export.export(model, (x,)),
    "strict export": lambda model, x: torch.export.export(model, (x,), strict=True),
}


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.data.add_(1.0),
        lambda w: w.t()[0].zero_(),
        lambda w: w.__setitem__(0, 1.0),
        lambda w: torch.add(w.detach(), 1, out=w.view(16, 12)),
        lambda w: w.unbind(0)[1].add_(1),
    ],
)
def test_w7_a_write_into_the_weight_raises_when_compiled_or_exported(x, write, make):
    model = Writer(split_mlp()[0], write)
    with torch.no_grad(), pytest.raises(Exception, match="would write into the weight of a SplitLinear, and be lost"):
        MAKERS[make](model, x)


@pytest.mark.parametrize("make", MAKERS)
def test_what_is_computed_of_the_weight_may_be_written_into_when_compiled_or_exported(x, make):
    with torch.no_grad():
        MAKERS[make](Writer(split_mlp()[0], lambda w: (w.clone().add_(1), (w + 1).t().zero_())), x)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated", "ignore:.*torch.jit.*is not supported")
def test_w7_a_write_into_the_weight_raises_when_traced(x):
    with torch.no_grad(), pytest.raises(ReadOnlyError, match="would write into the weight"):
        torch.jit.trace(Writer(split_mlp()[0], lambda w: w.data.add_(1.0)), (x,), check_trace=False)


def test_compile_of_a_quantized_model(x):
    model = quantized_mlp()
    with torch.no_grad():
        assert torch.allclose(torch.compile(model, backend="eager")(x), model(x), atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*is not supported")
def test_c6_torch_jit_script_says_why_not_and_leaves_the_model_alone(x):
    model = split_mlp()
    before, modules = model(x), list(model.modules())
    with pytest.raises(InputError, match=r"torch\.jit\.script compiles no SplitLinear; use torch\.jit\.trace"):
        torch.jit.script(model)
    assert list(model.modules()) == modules
    assert torch.equal(model(x), before)


def test_w9_a_fused_model_trains(x):
    model = fuse(split_mlp())
    with torch.no_grad():
        before = model(x)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.train()
    model(x).square().sum().backward()
    assert all(part.weight.grad is not None for part in model[0].parts())
    optimizer.step()
    model.eval()
    with torch.no_grad():
        after = model(x)
        assert not torch.allclose(after, before)
        torch.testing.assert_close(after, model[3](model[2](model[1](model[0](x)))))


def peft_of(model, name):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=[name], init_lora_weights=False))


def test_peft_lora_on_a_split_layer_says_why_not():
    """PEFT knows Linear and convolutions by their classes, and refuses a split layer by name."""
    pytest.importorskip("peft")
    with pytest.raises(ValueError, match="SplitLinear"):
        peft_of(split_mlp(), "0")


def test_peft_lora_on_the_parts_trains_and_merges(x):
    model = split_mlp()
    before = model(x)
    lora = peft_of(model, "0.lower")
    optimizer = torch.optim.SGD([p for p in lora.parameters() if p.requires_grad], 0.1)
    lora(x).square().sum().backward()
    optimizer.step()
    trained = lora(x)
    assert not torch.allclose(trained, before)
    merged = lora.merge_and_unload()
    torch.testing.assert_close(merged(x), trained)
    assert isinstance(merged[0], SplitLinear)
