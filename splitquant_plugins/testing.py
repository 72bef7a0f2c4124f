"""The contract that every backend adapter keeps, as a pytest class for adapters here and elsewhere.

    from splitquant_plugins.testing import BackendContract

    class TestMyBackend(BackendContract):
        backend_name = "mine"

        def recipe(self):
            return MyConfig(bits=2)

It needs pytest and transformers.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from splitquant_plugins.backends import Backend, QuantizedModel, WeightFormat, WeightRequest
from splitquant_plugins.errors import ConfigError, MissingExtraError, SplitQuantError
from splitquant_plugins.evaluation.metrics import linear_weights, sqnr_db
from splitquant_plugins.manifest import FILE_NAME, manifest_of
from splitquant_plugins.modules import SplitModule
from splitquant_plugins.passes.splitquant import SplitQuantPass
from splitquant_plugins.plugins import Plugins


def small_classifier(seed: int = 0) -> nn.Module:
    """A one-layer BERT classifier with random weights, a few of them large."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=80,
        vocab_size=120,
        max_position_embeddings=32,
        num_labels=3,
    )
    model: nn.Module = transformers.BertForSequenceClassification(config).eval()
    with torch.no_grad():
        for weight in linear_weights(model).values():
            outliers = torch.randint(0, weight.numel(), (max(4, weight.numel() // 500),))
            weight.view(-1)[outliers] += 0.3 * torch.randn(len(outliers)).sign()
    return model


def small_batch() -> dict[str, Tensor]:
    """Token ids for `small_classifier`, [4, 12]."""
    ids = torch.randint(1, 120, (4, 12), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class BackendContract:
    """What a backend promises. Subclasses name it and make a recipe for it."""

    backend_name: ClassVar[str]
    layers: ClassVar[int] = 8
    """Linear layers of `small_classifier` that the backend quantizes."""

    @abstractmethod
    def recipe(self) -> Any:
        """Return a fresh recipe of the backend's own, as its users write it."""

    @pytest.fixture
    def plugins(self) -> Plugins:
        return Plugins.load()

    @pytest.fixture
    def backend(self, plugins: Plugins) -> Backend:
        return plugins.backend(self.backend_name)

    def quantize(self, backend: Backend, weights: str, first: SplitQuantPass | None) -> QuantizedModel:
        """Quantize a fresh small classifier."""
        return backend.quantize(small_classifier(), self.format(backend, weights), first, [small_batch()])

    def format(self, backend: Backend, weights: str) -> WeightFormat:
        """Return the backend's default format at a width."""
        return backend.resolve(WeightRequest(weights))

    @pytest.mark.parametrize("weights", ["int2", "int4", "int8"])
    def test_every_part_is_quantized_on_the_stated_grid_with_its_zeros(
        self, backend: Backend, plugins: Plugins, weights: str
    ) -> None:
        grid = backend.grid(self.format(backend, weights))
        reference = SplitQuantPass(plugins=plugins).apply(small_classifier(), grid=grid)
        quantized = self.quantize(backend, weights, SplitQuantPass(plugins=plugins))
        assert quantized.manifest is not None
        assert len(quantized.manifest.split) == self.layers
        assert quantized.layers_quantized == 3 * self.layers
        for name, stored in quantized.layers.items():
            split = reference.get_submodule(name)
            assert isinstance(split, SplitModule)
            for part, kept in zip(split.parts(), stored, strict=True):
                float_part: Tensor = part.weight.detach()  # type: ignore[operator]
                assert torch.equal(kept.weight, grid.quantize_dequantize(float_part)), name
                assert not kept.weight[float_part == 0].any(), f"{name}: a zero did not come back as 0"
                assert kept.bits >= int(weights[3:]) * kept.weight.numel()

    def test_the_weights_of_a_split_model_are_nearer_to_the_float_ones(
        self, backend: Backend, plugins: Plugins
    ) -> None:
        weights = linear_weights(small_classifier())
        with torch.no_grad():
            plain = self.quantize(backend, "int2", None)
            split = self.quantize(backend, "int2", SplitQuantPass(plugins=plugins))
            assert torch.isfinite(split.run(small_batch())).all()
        for name, weight in weights.items():
            before, after = (torch.stack([p.weight for p in q.layers[name]]).sum(0) for q in (plain, split))
            assert sqnr_db(weight, after) > sqnr_db(weight, before), name

    def test_what_is_saved_and_loaded_computes_the_same(
        self, backend: Backend, plugins: Plugins, tmp_path: Path
    ) -> None:
        quantized = self.quantize(backend, "int2", SplitQuantPass(plugins=plugins))
        batch = small_batch()
        with torch.no_grad():
            expected = quantized.run(batch)
            backend.save(quantized, tmp_path)
            loaded = backend.load(tmp_path)
            output = loaded(**batch)
        assert torch.equal(getattr(output, "logits", output), expected)
        assert len(manifest_of(loaded).split) == self.layers
        pickles = [path for path in tmp_path.rglob("*") if path.suffix in (".pt", ".bin", ".pkl")]
        assert not pickles

    def test_a_damaged_folder_is_refused(self, backend: Backend, plugins: Plugins, tmp_path: Path) -> None:
        backend.save(self.quantize(backend, "int2", SplitQuantPass(plugins=plugins)), tmp_path)
        for path in sorted(tmp_path.iterdir()):
            content = path.read_bytes()
            path.write_bytes(content[: len(content) // 2])
            with pytest.raises(SplitQuantError):
                backend.load(tmp_path)
            path.write_bytes(content)
        (tmp_path / FILE_NAME).unlink()
        with pytest.raises(SplitQuantError):
            backend.load(tmp_path)

    def test_attaching_keeps_the_kind_of_recipe_and_happens_once(self, plugins: Plugins) -> None:
        recipe = self.recipe()
        attached = SplitQuantPass(plugins=plugins) + recipe
        assert isinstance(attached, type(recipe))
        with pytest.raises(SplitQuantError):
            SplitQuantPass(plugins=plugins) + attached
        twin = copy.deepcopy(attached)
        assert isinstance(twin, type(recipe))

    def test_what_is_not_supported_is_an_error_that_lists_what_is(self, backend: Backend) -> None:
        with pytest.raises(ConfigError, match="int2"):
            backend.resolve(WeightRequest("int3"))
        with pytest.raises(ConfigError, match="channel"):
            backend.resolve(WeightRequest("int2", granularity="row"))  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="group_size"):
            backend.resolve(WeightRequest("int2", granularity="channel", group_size=64))

    def test_a_missing_package_names_the_extra(self, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing(name: str) -> str:
            raise metadata.PackageNotFoundError(name)

        monkeypatch.setattr(metadata, "version", missing)
        with pytest.raises(MissingExtraError, match=rf"splitquant-plugins\[{backend.extra}\]"):
            backend.require()
