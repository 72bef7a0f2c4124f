"""Stock quantizers of NPUs: their grids are known, their programs stay whole, and a split never makes them worse."""

from __future__ import annotations

import copy
import importlib
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch
from splitquant_pt2e import Pt2eGrid
from splitquant_pt2e.programs import TARGETS, export_program
from splitquant_pt2e.stock_grid import stock_grid
from splitquant_pt2e.stock_quantizers import STOCK, installed, make
from torch import nn

from splitquant_plugins.errors import ConfigError, InputError, MissingExtraError

pytest.importorskip("executorch", reason="executorch is not installed: tox run -e npu")
pytestmark = pytest.mark.filterwarnings("ignore")  # executorch and torch.export deprecate their own


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return self.head(torch.relu(x + self.body(x)).mean((2, 3)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    model = Net().eval()
    with torch.no_grad():
        for layer in (model.stem, model.body, model.head):
            layer.weight.view(-1)[::37] *= 6
    return model


@pytest.mark.parametrize("name", STOCK)
def test_the_grid_of_a_stock_quantizer_is_closed(name):
    if reason := installed(name):
        pytest.skip(reason)
    if name == "openvino-int4":  # its observers answer with codes, and no scale for every channel
        with pytest.raises(ConfigError, match=r"'openvino-int4' rounds weights to a grid that cannot be told"):
            stock_grid(name)
    else:
        assert isinstance(stock_grid(name), Pt2eGrid)


@pytest.mark.parametrize("target", TARGETS)
def test_a_split_program_is_as_whole_as_a_plain_one(net, split, target):
    if reason := installed(TARGETS[target].quantizer):
        pytest.skip(reason)
    if target.startswith("ethos"):
        pytest.importorskip("ethosu.vela", reason="ethos-u-vela is not installed: tox run -e npu")
    if target == "cadence" and sys.version_info < (3, 12):
        pytest.skip("executorch's compiler for cadence needs Python 3.12")
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    batches = [(image,) for image in images.split(1)]
    plain, parts = (export_program(net, target, first, batches) for first in (None, split(k=2, splitter="grid")))
    assert parts.manifest is not None
    assert len(parts.manifest.split) == (1 if target == "vulkan" else 3)  # Vulkan's quantizer knows linear layers alone
    assert parts.delegates == plain.delegates
    ours = dict(parts.host)
    if target in ("cortex-m", "cadence"):  # no delegates there: kernels of the target, and more of them
        ours = {name: min(number, plain.host.get(name, 0)) for name, number in ours.items()}
    assert ours == plain.host
    assert len(plain.content) < len(parts.content) < 3 * len(plain.content)
    if target.startswith("ethos"):
        assert plain.delegates == 1
        assert all("quantize" in name for name in plain.host)
        assert plain.cycles < parts.cycles < 4 * plain.cycles
    with torch.no_grad():
        wrong = [sum((one.model(image) - net(image)).square().sum() for (image,) in batches) for one in (plain, parts)]
    if target == "cortex-m":  # rounds sums of parts to 8 bits; `auto` leaves these layers whole, `grid` warns
        assert wrong[1] < 1.5 * wrong[0]
    else:
        assert wrong[1] < 1.07 * wrong[0]  # 0.3 dB


@pytest.mark.parametrize("parts", [False, True], ids=["plain", "split"])
@pytest.mark.parametrize("target", ["ethos-u55", "ethos-u85"])
def test_the_tosa_of_an_ethos_program_computes_what_the_quantized_model_does(
    net, split, target, parts, tmp_path, monkeypatch
):
    """By Arm's reference model: the codes of the outputs are the same, but for roundings that fall between two."""
    if reason := installed("ethos-u"):
        pytest.skip(reason)
    pytest.importorskip("ethosu.vela", reason="ethos-u-vela is not installed: tox run -e npu")
    reference = pytest.importorskip("tosa_reference_model", reason="tosa-tools is not installed: tox run -e npu")
    home = importlib.import_module("executorch.backends.arm.ethosu")
    plain = home.EthosUCompileSpec
    monkeypatch.setattr(
        home,
        "EthosUCompileSpec",
        lambda *given, **named: plain(*given, **named).dump_intermediate_artifacts_to(str(tmp_path)),
    )
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    program = export_program(
        net, target, split(k=2, splitter="grid") if parts else None, [(image,) for image in images.split(1)]
    )
    (tosa,) = tmp_path.glob("*_TOSA*.tosa")
    steps = [node for node in program.model.graph.nodes if "quantize_per_tensor" in str(node.target)]
    scale, zero_point, least, most = next(n for n in steps if "dequantize" not in str(n.target)).args[1:5]
    unit, zero = next(n for n in reversed(steps) if "dequantize" in str(n.target)).args[1:3]
    for image in images.split(1):
        codes = ((image / scale).round() + zero_point).clamp(least, most).to(torch.int8)
        (found,), status = reference.run(tosa.read_bytes(), [codes.numpy()])
        assert status == reference.GraphStatus.TOSA_VALID
        with torch.no_grad():
            expected = program.model(image) / unit + zero
        assert expected.unique().numel() > 2
        assert (torch.from_numpy(found).double() - expected).abs().max() < 1.01


def test_a_pool_over_the_whole_picture_does_not_cut_an_ethos_program(net, split):
    """Its stride is more than an Ethos-U55 can step, and is never made."""
    if reason := installed("ethos-u"):
        pytest.skip(reason)
    pytest.importorskip("ethosu.vela", reason="ethos-u-vela is not installed: tox run -e npu")
    pooled = nn.Sequential(net.stem, nn.ReLU(), net.body, nn.ReLU(), nn.AvgPool2d(8), nn.Flatten(), net.head)
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    for first in (None, split(k=2, splitter="grid")):
        program = export_program(pooled, "ethos-u55", first, [(image,) for image in images.split(1)])
        assert program.delegates == 1
        assert all("quantize" in name for name in program.host)


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="here the compiler for Cadence works")
def test_the_compiler_for_cadence_says_what_it_needs(net):
    if reason := installed("cadence"):
        pytest.skip(reason)
    with pytest.raises(MissingExtraError, match=r"compiler for cadence needs Python 3\.12; this is 3\."):
        export_program(net, "cadence", None, [(torch.randn(1, 3, 8, 8),)])


def test_images_for_cortex_m_are_in_the_order_that_its_quantizer_knows(net):
    """Of others it leaves the convolutions float."""
    if reason := installed("cortex-m"):
        pytest.skip(reason)
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    program = export_program(net, "cortex-m", None, [(image,) for image in images.split(1)])
    assert program.host["cortex_m.quantized_conv2d"] == 2
    assert not any("convolution" in name for name in program.host)


def test_what_a_compiler_refuses_is_an_error_that_says_so(split):
    class Odd(nn.Module):
        def forward(self, x):
            return x[x > 0]

    with pytest.raises(InputError, match=r"XNNPACKQuantizer|compiler of xnnpack|torch\.export"):
        export_program(Odd(), "xnnpack", split(k=2), [(torch.randn(2, 3),)])
    with pytest.raises(ConfigError, match="no target 'toaster'"):
        export_program(Odd(), "toaster", None, [(torch.randn(2, 3),)])


def depthwise():
    """A net of separable convolutions, trained on noisy patterns, with images that it has not seen."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(10, 3, 12, 12, generator=generator)

    def draw(number):
        labels = torch.randint(0, 10, (number,), generator=generator)
        return patterns[labels] + 1.5 * torch.randn(number, 3, 12, 12, generator=generator), labels

    def separable(inputs, outputs, stride):
        yield nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False)
        yield from (nn.BatchNorm2d(inputs), nn.ReLU6(), nn.Conv2d(inputs, outputs, 1, bias=False))
        yield from (nn.BatchNorm2d(outputs), nn.ReLU6())

    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6()),
        *(*separable(16, 24, 2), *separable(24, 32, 1), *separable(32, 48, 2)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10)),
    )
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(80):
        images, labels = draw(64)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model.eval(), draw(64)[0], draw(128)[0]


@pytest.fixture(scope="module")
def trained():
    return depthwise()


def decibels(model, quantizer, calibration, images):
    from splitquant_pt2e.compat import convert_pt2e, prepare_pt2e

    exported = torch.export.export(copy.deepcopy(model), (images[:32],), strict=True).module(check_guards=False)
    prepared = prepare_pt2e(exported, quantizer)
    with torch.no_grad():
        for batch in calibration.split(32):
            prepared(batch)
        converted, expected = convert_pt2e(prepared), model(images)
        wrong = torch.cat([converted(batch) for batch in images.split(32)]) - expected
    return float(10 * torch.log10(expected.square().sum() / wrong.square().sum()))


@pytest.mark.parametrize("name", STOCK)
def test_the_default_split_does_no_harm_to_a_depthwise_net(trained, split, name):
    if reason := installed(name):
        pytest.skip(reason)
    plain, parts = (decibels(trained[0], q, *trained[1:]) for q in (make(name), split(k=2) + make(name)))
    assert parts > plain - 0.3


@pytest.mark.parametrize("name", ["qnn-16a4w", "qnn-16a4w-channel", "qnn-8a4w", "qnn-8a4w-channel"])
def test_four_bits_on_resnet20_are_within_a_point_of_float(name, monkeypatch):
    assets = os.environ.get("SPLITQUANT_ASSETS")
    if not assets:
        pytest.skip("SPLITQUANT_ASSETS names no folder")
    benchmark = runpy.run_path(str(Path(__file__).parents[3] / "benchmarks" / "stock_quantizers.py"))
    row = benchmark["row_of"](name, benchmark["resnet20"](Path(assets), 400), programs=False)
    assert row["k"] == 2
    assert row["auto"]["accuracy"] >= row["float_accuracy"] - 0.01
    assert row["auto"]["logit_sqnr_db"] > row["plain"]["logit_sqnr_db"] + 10
