import copy
import pickle

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from splitquant_plugins import SplitQuantPass, fuse, unfuse
from splitquant_plugins.errors import ConfigError, InputError


def conv_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular"),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2, stride=2, dilation=2, bias=False),
        nn.Flatten(),
        nn.Linear(8 * 16, 5),
    ).eval()


class Products(TorchFunctionMode):
    """Counts products with a weight."""

    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += function in (nn.functional.linear, nn.functional.conv2d)
        return function(*args, **(kwargs or {}))


def calls_of(model: nn.Module, inputs: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Output, and the number of products."""
    with torch.no_grad(), Products() as products:
        return model(inputs), products.count


@pytest.mark.parametrize("mode", ["materialised", "rebuilt"])
def test_one_product_per_layer_and_the_same_outputs(mode: str) -> None:
    model = SplitQuantPass()(conv_net())
    inputs = torch.randn(2, 3, 12, 12)
    before, products = calls_of(model, inputs)
    state = copy.deepcopy(model.state_dict())
    fused, fused_products = calls_of(fuse(model, mode), inputs)
    torch.testing.assert_close(fused, before, rtol=1e-5, atol=1e-5)
    assert (products, fused_products) == (9, 3)
    assert model.state_dict().keys() == state.keys()
    again, products = calls_of(unfuse(model), inputs)
    assert torch.equal(again, before)
    assert products == 9


def test_a_materialised_sum_is_never_stale() -> None:
    model = fuse(SplitQuantPass()(conv_net()))
    inputs = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        model(inputs)
        doubled = {name: 2 * value for name, value in model.state_dict().items()}
        model.load_state_dict(doubled)
        fused = model(inputs)
        parts = unfuse(model)(inputs)
    torch.testing.assert_close(fused, parts, rtol=1e-5, atol=1e-4)


def test_a_part_that_changes_is_seen() -> None:
    model = fuse(SplitQuantPass()(conv_net()))
    inputs = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        before = model(inputs)
        model[4].lower.weight.mul_(3)
        changed = model(inputs)
        assert not torch.allclose(changed, before)
        model[0].upper.weight = nn.Parameter(torch.randn_like(model[0].upper.weight))
        assert not torch.allclose(model(inputs), changed)
        fused = model(inputs)
        torch.testing.assert_close(fused, unfuse(model)(inputs), rtol=1e-5, atol=1e-4)


def test_memory_of_another_tensor_is_seen_and_an_uncounted_write_after_eval() -> None:
    model = fuse(SplitQuantPass()(conv_net()))
    part = model[4].lower
    inputs = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        before = model(inputs)
        part.weight.data = 3 * part.weight.data
        changed = model(inputs)
        assert not torch.allclose(changed, before)
        part.weight.data.copy_(-part.weight)
        again = model.eval()(inputs)
        assert not torch.allclose(again, changed)
        torch.testing.assert_close(again, unfuse(model)(inputs), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("materialised", [False, True], ids=["at once", "after a call"])
@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_part_that_changes_is_seen_by_what_was_compiled(materialised: bool, fullgraph: bool) -> None:
    torch._dynamo.reset()
    model = fuse(SplitQuantPass()(nn.Sequential(nn.Linear(12, 8)).eval()))
    inputs = torch.randn(2, 12)
    with torch.no_grad():
        if materialised:
            model(inputs)
        compiled = torch.compile(model, backend="eager", fullgraph=fullgraph)
        before = compiled(inputs)
        model[0].lower.weight.mul_(3)
        assert not torch.allclose(compiled(inputs), before)
        torch.testing.assert_close(compiled(inputs), model(inputs))
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(model, backend="eager")(inputs), unfuse(model)(inputs))


def test_an_exported_fused_model_has_one_product_and_the_parts() -> None:
    model = fuse(SplitQuantPass()(conv_net()))
    inputs = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        model(inputs)
        exported = torch.export.export(model, (inputs,))
        targets = [str(node.target) for node in exported.graph.nodes]
        assert sum("conv2d" in target or "linear" in target for target in targets) == 3
        assert set(exported.state_dict) == set(model.state_dict())
        torch.testing.assert_close(exported.module()(inputs), model(inputs))


def test_gradients_reach_the_parts_every_time() -> None:
    model = fuse(SplitQuantPass()(conv_net()))
    for _ in range(2):
        model.zero_grad()
        model(torch.randn(2, 3, 12, 12)).sum().backward()
        assert all(part.weight.grad is not None for layer in (model[0], model[2], model[4]) for part in layer.parts())


def test_hooks_on_parts_run() -> None:
    model = fuse(SplitQuantPass()(conv_net()))
    seen = []
    model[4].middle.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        model(torch.randn(2, 3, 12, 12))
    assert seen == [1]


class Adapted(nn.Module):
    """A low-rank adapter around a layer that answers the layer's weight for its own, as PEFT's do."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer, self.more = layer, nn.Linear(layer.in_features, layer.out_features)
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layer(inputs) + self.more(inputs)


def _twice(part: nn.Linear) -> nn.Linear:
    forward = part.forward
    part.forward = lambda inputs: 2 * forward(inputs)
    return part


@pytest.mark.parametrize("change", [Adapted, _twice], ids=["adapter", "forward"])
@pytest.mark.parametrize("first", [True, False], ids=["before fusing", "after it has run fused"])
def test_parts_that_do_more_than_multiply_are_run(change, first: bool) -> None:
    model = SplitQuantPass()(nn.Sequential(nn.Linear(16, 8)).eval())
    inputs = torch.randn(3, 16)
    with torch.no_grad():
        unchanged = model(inputs)
        if not first:
            fuse(model)(inputs)
        model[0].lower = change(model[0].lower).eval()
        found = fuse(model)(inputs)
        torch.testing.assert_close(found, unfuse(model)(inputs))
    assert (found - unchanged).abs().max() > 1e-3


def test_the_weights_that_quanto_will_freeze_are_those_that_run() -> None:
    quanto = pytest.importorskip("optimum.quanto")
    model = SplitQuantPass(splitter="kmeans")(nn.Sequential(nn.Linear(16, 8)).eval())
    inputs = torch.randn(3, 16)
    quanto.quantize(model, weights=quanto.qint2)
    with torch.no_grad():
        expected = model(inputs)
        torch.testing.assert_close(fuse(model)(inputs), expected)
        quanto.freeze(model)
        torch.testing.assert_close(model(inputs), expected)


def test_the_sum_moves_with_the_model_and_is_not_pickled() -> None:
    model = fuse(SplitQuantPass()(conv_net()))
    inputs = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        model(inputs)
    weight = model[4].fused_weight
    assert weight is not None
    assert pickle.loads(pickle.dumps(model))[4].fused_weight is None
    assert model.double()[4].fused_weight.dtype == torch.float64


def test_a_transposed_layer_is_fused_as_it_is_stored() -> None:
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    torch.manual_seed(0)
    layer = pytorch_utils.Conv1D(6, 4)
    inputs = torch.randn(3, 4)
    expected = layer(inputs)
    fused = fuse(SplitQuantPass()(nn.Sequential(layer)).eval())
    torch.testing.assert_close(fused(inputs), expected)


def test_what_cannot_be_fused_is_refused() -> None:
    with pytest.raises(InputError, match="no split layer"):
        fuse(conv_net())
    model = SplitQuantPass()(conv_net())
    with pytest.raises(ConfigError, match="materialised, rebuilt"):
        fuse(model, "fast")
    with pytest.raises(InputError, match="training mode"):
        fuse(model.train())
