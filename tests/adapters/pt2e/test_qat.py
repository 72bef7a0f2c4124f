"""Quantization-aware training: parts are trained; a layer that would be fused with its BatchNorm is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e

from splitquant_plugins import manifest_of
from splitquant_plugins.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore")  # torchao's own


def test_parts_are_trained(split, x86):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    x = torch.randn(64, 8)
    target = x[:, :3].roll(1, 1)
    graph = torch.export.export(model, (x,)).module()
    prepared = prepare_qat_pt2e(graph, split(k=2) + x86(is_qat=True))
    parts = {name: parameter for name, parameter in prepared.named_parameters() if "weight" in name}
    assert sorted(parts) == ["0.lower.weight", "0.upper.weight", "2.lower.weight", "2.upper.weight"]
    before = {name: parameter.detach().clone() for name, parameter in parts.items()}
    optimizer = torch.optim.Adam(prepared.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        loss = nn.functional.mse_loss(prepared(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]
    assert all(not torch.equal(before[name], parameter) for name, parameter in parts.items())
    with torch.no_grad():
        converted = convert_pt2e(prepared)
        assert float(nn.functional.mse_loss(converted(x), target)) == pytest.approx(losses[-1], rel=0.2)
    assert len(manifest_of(converted).split) == 2


def test_a_batchnorm_that_training_fuses_is_refused_with_the_reason(split, x86, quantize):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    x = torch.randn(4, 3, 8, 8)
    graph = torch.export.export(model, (x,)).module()
    with pytest.raises(ConfigError, match="0 has a BatchNorm behind it that was not folded: prepare_qat_pt2e"):
        prepare_qat_pt2e(graph, split(k=2) + x86(is_qat=True))
    assert manifest_of(quantize(model.eval(), split(k=2) + x86(), x)).split  # where it is folded, all is well
