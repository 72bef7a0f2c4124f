"""Random nests of layers: the pass keeps the function, accounts for every layer, and puts back what it broke off."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from splitquant_plugins import SplitQuantPass, manifest_of
from splitquant_plugins.modules import SplitModule
from splitquant_plugins.passes.module_tree import occurrences

WIDTH = 6


class Added(nn.Linear):
    gain = 2.0


class Overrides(nn.Linear):
    def forward(self, input):
        return super().forward(input) * 2


class Bare(nn.Linear):
    pass


class Residual(nn.Module):
    """Traced where its input decides nothing, and reads its layer."""

    def __init__(self, inner, *, branches):
        super().__init__()
        self.inner = inner
        self.branches = branches

    def forward(self, x):
        if self.branches and x.abs().max() > 1e6:
            return x
        gain = getattr(self.inner, "gain", 1.0)
        return x + self.inner(x) * gain


class Twice(nn.Module):
    """One module in two places."""

    def __init__(self, inner):
        super().__init__()
        self.first = inner
        self.second = inner

    def forward(self, x):
        return self.second(self.first(x))


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.two(self.one(x))


class Convolved(nn.Module):
    """A convolution with its norm, over the width, and one more use of the convolution where that is drawn."""

    def __init__(self, *, again, branches):
        super().__init__()
        self.conv = nn.Conv1d(1, 2, 3, padding=1)
        self.norm = nn.BatchNorm1d(2)
        self.norm.running_var.fill_(3.0)
        self.again, self.branches = again, branches

    def forward(self, x):
        if self.branches and x.abs().max() > 1e6:
            return x
        y = self.norm(self.conv(x.unsqueeze(1)))
        return (y + self.conv(x.unsqueeze(1)) if self.again else y).sum(1)


LAYERS = (
    lambda: nn.Linear(WIDTH, WIDTH),
    lambda: nn.Linear(WIDTH, WIDTH, bias=False),
    lambda: Added(WIDTH, WIDTH),
    lambda: Overrides(WIDTH, WIDTH),
    lambda: Bare(WIDTH, WIDTH),
    lambda: nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)),
    lambda: nn.LayerNorm(WIDTH),
    nn.ReLU,
    Tied,
    *[lambda a=a, b=b: Convolved(again=a, branches=b) for a in (False, True) for b in (False, True)],
)
WRAPPERS = (
    lambda inner: nn.Sequential(inner, nn.GELU()),
    lambda inner: Residual(inner, branches=False),
    lambda inner: Residual(inner, branches=True),
    Twice,
    lambda inner: Residual(Twice(inner), branches=True),
)
BLOCKS = st.recursive(
    st.sampled_from(LAYERS),
    lambda inner: st.builds(lambda wrap, make: lambda: wrap(make()), st.sampled_from(WRAPPERS), inner),
    max_leaves=4,
)
MODELS = st.lists(BLOCKS, min_size=1, max_size=4)


def build(makers):
    torch.manual_seed(len(makers))
    return nn.Sequential(*(make() for make in makers)).double().eval()


def searching(fuzz):
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=40 * fuzz, deadline=None, derandomize=fuzz == 1, suppress_health_check=checks)


def quietly(split_pass, model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of the models have nothing to split
        return split_pass(model)


def test_function_and_manifest(fuzz, count_cases):
    tried = []

    @searching(fuzz)
    @given(MODELS)
    def check(makers):
        model = build(makers)
        x = torch.randn(3, WIDTH, dtype=torch.float64)
        expected = model(x)
        holders = {
            name
            for module, names in occurrences(model)
            for name in names[:1]
            if isinstance(module, (nn.Linear, nn.Conv1d))
        }
        if not any(True for _ in model.parameters()):
            return
        made = quietly(SplitQuantPass(), copy.deepcopy(model))
        torch.testing.assert_close(made(x), expected, rtol=1e-9, atol=1e-9)
        manifest = manifest_of(made)
        recorded = {name for record in manifest.layers for name in (record.name, *record.also_known_as)}
        assert holders <= recorded
        assert all(record.reason for record in manifest.kept)
        places = {name for name, m in made.named_modules(remove_duplicate=False) if isinstance(m, SplitModule)}
        assert places == {name for record in manifest.split for name in (record.name, *record.also_known_as)}
        tried.append(len(manifest.split))

    check()
    count_cases("random models split", len(tried), f"{sum(tried)} layers split")
    assert sum(tried) > len(tried) / 2


def test_restoration(fuzz, count_cases, plugins, monkeypatch):
    """Wherever the pass breaks off, modules, values and attributes are those of before."""
    tried = []

    @searching(fuzz)
    @given(MODELS, st.integers(0, 3))
    def check(makers, when):
        model = build(makers)
        before = [(name, module) for name, module in model.named_modules(remove_duplicate=False)]
        values = {key: value.clone() for key, value in model.state_dict().items()}
        seen = []

        def after_layer(record):
            seen.append(record)
            if len(seen) > when:
                raise KeyboardInterrupt

        monkeypatch.setattr(plugins, "after_layer", after_layer)
        try:
            quietly(SplitQuantPass(plugins=plugins), model)
        except KeyboardInterrupt:
            found = list(model.named_modules(remove_duplicate=False))
            assert [name for name, _ in found] == [name for name, _ in before]
            assert all(a is b for (_, a), (_, b) in zip(found, before, strict=True))
            assert model.state_dict().keys() == values.keys()
            assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())
            with pytest.raises(Exception, match="was not split"):
                manifest_of(model)
            tried.append(1)
        except ValueError as error:
            assert "no parameters" in str(error)  # noqa: PT017 - a model of activations alone

    check()
    count_cases("random models put back", len(tried))
    assert tried
