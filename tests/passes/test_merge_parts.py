import copy
import pickle

import pytest
import torch
from torch import nn

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


def calls_of(model: nn.Module, inputs: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Output, and how many Linear and convolution modules ran."""
    count = []
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    handles = [layer.register_forward_hook(lambda *_: count.append(1)) for layer in layers]
    with torch.no_grad():
        output = model(inputs)
    for handle in handles:
        handle.remove()
    return output, len(count)


@pytest.mark.parametrize("mode", ["materialised", "rebuilt"])
def test_one_product_per_layer_and_the_same_outputs(mode: str) -> None:
    model = SplitQuantPass()(conv_net())
    inputs = torch.randn(2, 3, 12, 12)
    before, products = calls_of(model, inputs)
    state = copy.deepcopy(model.state_dict())
    fused, fused_products = calls_of(fuse(model, mode), inputs)
    torch.testing.assert_close(fused, before, rtol=1e-5, atol=1e-5)
    assert (products, fused_products) == (9, 0)
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
