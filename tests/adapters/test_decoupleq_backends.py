"""DecoupleQPass through every backend: what it stores is what was solved."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from splitquant_plugins import DecoupleQPass, SplitQuantPass, manifest_of
from splitquant_plugins.backends import WeightRequest
from splitquant_plugins.errors import ConfigError, InputError
from splitquant_plugins.evaluation.compare import plan_runs, row_of
from splitquant_plugins.evaluation.subject import make_subject
from splitquant_plugins.evaluation.tasks.text_classification import TEXT_CLASSIFICATION, labelled_batches
from splitquant_plugins.evaluation.texts import LabelledTexts
from splitquant_plugins.grid import UniformGrid
from splitquant_plugins.testing import small_batch, small_classifier

FAST = {"rounds": 1, "starts": (1.0,), "sweeps": 1, "search_inputs": 0}
NEEDS = {
    "inc": "neural_compressor.torch",
    "quanto": "optimum.quanto",
    "pt2e": "torchao.quantization.pt2e",
    "simulated": "torch",
}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(1, 120, (8, 12), generator=generator) for _ in range(3)]
    return [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in ids]


def choose(name, plugins, **options):
    pytest.importorskip(NEEDS[name])
    backend = plugins.backend(name)
    return backend, backend.resolve(WeightRequest("int2", **options))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("inc", {}),
        ("inc", {"granularity": "group", "group_size": 32}),
        ("inc", {"scheme": "symmetric"}),
        ("quanto", {}),
        ("pt2e", {}),
        ("simulated", {"granularity": "tensor"}),
    ],
)
def test_the_backend_stores_the_solution(name, options, plugins, batches, tmp_path):
    backend, form = choose(name, plugins, **options)
    solver = DecoupleQPass(calibration=batches, plugins=plugins, **FAST)
    grid = backend.grid(form)
    reference = solver.apply(small_classifier(), grid=grid)
    own = getattr(grid, "whole", grid)
    quantized = backend.quantize(small_classifier(), form, solver, [small_batch()])
    assert quantized.layers_quantized == 8
    assert len(quantized.manifest.solved) == 8
    for layer, (stored,) in quantized.layers.items():
        weight = reference.get_submodule(layer).weight.detach()
        assert torch.equal(stored.weight, own.quantize_dequantize(weight)), layer
    ratios = [record.values.error_after / record.values.error_before for record in quantized.manifest.solved]
    assert max(ratios) < 1
    assert sum(ratios) / len(ratios) < 0.45  # layers of 32 inputs leave less to gain than wide ones
    if name == "simulated":
        return
    with torch.no_grad():
        expected = quantized.run(small_batch())
        backend.save(quantized, tmp_path)
        loaded = backend.load(tmp_path)
        output = loaded(**small_batch())
    assert torch.equal(getattr(output, "logits", output), expected)
    assert len(manifest_of(loaded).solved) == 8


@pytest.mark.parametrize(
    ("name", "options"),
    [("inc", {}), ("quanto", {}), ("pt2e", {"granularity": "tensor", "scheme": "symmetric"})],
)
def test_behind_a_split_the_parts_serve_their_sum(name, options, plugins, batches, tmp_path):
    backend, form = choose(name, plugins, **options)
    first = SplitQuantPass(k=2, splitter="kmeans", plugins=plugins) + DecoupleQPass(
        calibration=batches, plugins=plugins, **FAST
    )
    reference = first.apply(small_classifier(), grid=backend.grid(form))
    quantized = backend.quantize(small_classifier(), form, first, [small_batch()])
    assert quantized.layers_quantized == 16
    assert set(quantized.layers) == {record.name for record in quantized.manifest.solved}
    for layer, stored in quantized.layers.items():
        for part, kept in zip(reference.get_submodule(layer).parts(), stored, strict=True):
            assert torch.equal(kept.weight, backend.grid(form).quantize_dequantize(part.weight.detach())), layer
    for record in quantized.manifest.solved:
        assert record.values.joint
        assert record.values.error_after < 0.5 * record.values.error_before, record.name
    with torch.no_grad():
        expected = quantized.run(small_batch())
        backend.save(quantized, tmp_path)
        output = backend.load(tmp_path)(**small_batch())
    assert torch.equal(getattr(output, "logits", output), expected)


def test_a_recipe_takes_the_pass(plugins, batches):
    pytest.importorskip(NEEDS["inc"])
    from neural_compressor.torch.quantization import RTNConfig, quantize

    solver = DecoupleQPass(calibration=batches, bits=2, plugins=plugins, **FAST)
    recipe = solver + RTNConfig(bits=2, use_sym=False, group_size=-1)
    model = quantize(small_classifier(), recipe)
    assert len(manifest_of(model).solved) == 8
    with pytest.raises(ConfigError, match=r"bits=2.*bits=4"):
        quantize(small_classifier(), solver + RTNConfig(bits=4, use_sym=False))


def test_a_quanto_config_takes_the_pass(plugins, batches):
    pytest.importorskip(NEEDS["quanto"])
    from transformers import QuantoConfig

    recipe = DecoupleQPass(calibration=batches, plugins=plugins, **FAST) + QuantoConfig(weights="int2")
    assert isinstance(recipe, QuantoConfig)


def test_an_exported_graph_is_refused_with_what_to_do_instead(plugins, batches):
    graph = torch.export.export(nn.Linear(3, 3), (torch.randn(2, 3),)).module()
    with pytest.raises(InputError, match=r"DecoupleQPass\(...\) \+ quantizer"):
        DecoupleQPass(calibration=batches, plugins=plugins).apply(graph, grid=UniformGrid(2, "affine", "channel"))


def subject(batches):
    model = small_classifier()
    texts = LabelledTexts("made", [""] * 24, [index % 3 for index in range(24)])
    return make_subject("small", TEXT_CLASSIFICATION, model, labelled_batches(texts, batches))


def test_values_are_a_dimension_of_the_comparison(plugins, batches):
    pytest.importorskip(NEEDS["inc"])
    methods = ["rtn", "decoupleq", "gptq"]
    runs = plan_runs(
        plugins, ["inc"], [WeightRequest("int2")], ["none", "kmeans"], methods=methods, calibration=batches
    )
    made = [run for run in runs if run.split == "none" or run.method == "decoupleq"]
    with torch.no_grad():
        rows = {(row["split"], row["method"]): row for row in (row_of(subject(batches), run) for run in made)}
    assert len(rows) == len(made) == 4
    assert {row["layers_solved"] for row in rows.values()} == {0, 8}
    plain, solved = rows["none", "rtn"], rows["none", "decoupleq"]
    assert solved["linear_bits_per_weight"] == plain["linear_bits_per_weight"]
    assert solved["logit_sqnr_db"] > plain["logit_sqnr_db"] + 3
    assert rows["kmeans", "decoupleq"]["logit_sqnr_db"] > solved["logit_sqnr_db"] + 3
    assert all(row["peak_mb"] is None or row["peak_mb"] >= 0 for row in rows.values())


def test_values_that_cannot_be_are_refused(plugins, batches):
    def plan(methods, backend="inc", splits=("none",), calibration=None, request="int2"):
        pytest.importorskip(NEEDS[backend])
        return plan_runs(plugins, [backend], [WeightRequest(request)], splits, methods=methods, calibration=calibration)

    with pytest.raises(ConfigError, match=r"backend quanto has no method 'gptq': choose from rtn, hqq"):
        plan(["gptq"], "quanto", calibration=batches)
    with pytest.raises(ConfigError, match="'hqq' at int8"):
        plan(["hqq"], "quanto", request="int8")
    with pytest.raises(ConfigError, match="'gptq' of backend inc needs calibration"):
        plan(["gptq"])
    with pytest.raises(ConfigError, match="needs calibration"):
        plan(["decoupleq"])
    with pytest.raises(ConfigError, match="makes use of it"):
        plan(["rtn"], calibration=batches)
    assert copy.deepcopy(plan(["gptq"], calibration=batches)[0]).calibration is not None
