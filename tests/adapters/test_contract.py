"""Every backend of this distribution keeps the contract."""

from typing import Any

import pytest
import torch

from splitquant_plugins import SplitQuantPass, fuse
from splitquant_plugins.backends import WeightRequest
from splitquant_plugins.plugins import Plugins
from splitquant_plugins.testing import BackendContract, small_batch, small_classifier


class TestQuanto(BackendContract):
    backend_name = "quanto"

    def recipe(self) -> Any:
        pytest.importorskip("optimum.quanto")
        from transformers import QuantoConfig

        return QuantoConfig(weights="int2")

    @pytest.fixture(autouse=True)
    def needs(self) -> None:
        pytest.importorskip("optimum.quanto")


class TestInc(BackendContract):
    backend_name = "inc"

    def recipe(self) -> Any:
        pytest.importorskip("neural_compressor.torch")
        from neural_compressor.torch.quantization import RTNConfig

        return RTNConfig(bits=2, use_sym=False, group_size=-1)

    @pytest.fixture(autouse=True)
    def needs(self) -> None:
        pytest.importorskip("neural_compressor.torch")


class TestPt2e(BackendContract):
    backend_name = "pt2e"

    def recipe(self) -> Any:
        from splitquant_pt2e import LowBitWeightQuantizer

        return LowBitWeightQuantizer("int2")

    @pytest.fixture(autouse=True)
    def needs(self) -> None:
        pytest.importorskip("torchao.quantization.pt2e")


@pytest.mark.parametrize("contract", [TestQuanto, TestInc], ids=["quanto", "inc"])
def test_a_fused_model_computes_the_same(contract: type[BackendContract]) -> None:
    contract().recipe()  # skips where the backend is missing
    backend = Plugins.load().backend(contract.backend_name)
    quantized = backend.quantize(
        small_classifier(), backend.resolve(WeightRequest("int4")), SplitQuantPass(splitter="residual"), [small_batch()]
    )
    with torch.no_grad():
        expected = quantized.run(small_batch())
        for mode in ("materialised", "rebuilt"):
            fuse(quantized.model, mode)
            torch.testing.assert_close(quantized.run(small_batch()), expected, rtol=1e-3, atol=1e-3)
