"""Every backend of this distribution keeps the contract."""

from typing import Any

import pytest

from splitquant_plugins.testing import BackendContract


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
