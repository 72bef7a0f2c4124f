"""Saving a split, quantized model and loading it back; everything that can be wrong with the files."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from splitquant_plugins import SplitQuantPass, manifest_of
from splitquant_plugins.checkpoints.source import SINGLE_FILE
from splitquant_plugins.errors import AlreadySplitError, InputError, SkeletonMismatchError, SplitQuantError
from splitquant_plugins.manifest import FILE_NAME, Manifest

quanto = pytest.importorskip("optimum.quanto")
pytest.importorskip("transformers")

from splitquant_quanto import QuantizedSplitModel, load, save  # noqa: E402
from splitquant_quanto.quantization import quantize_after  # noqa: E402
from splitquant_quanto.storage import QMAP_FILE, STORAGE_FILE, saved_tensors, validated_entry  # noqa: E402

FILES = {SINGLE_FILE, QMAP_FILE, STORAGE_FILE, FILE_NAME}


def outputs(model, *inputs):
    with torch.no_grad():
        output = model(*inputs)
    return getattr(output, "logits", output)


@pytest.fixture
def split(plugins):
    """Split, by the quickest splitter for the grid, unless told, and quantize."""

    def make(model, weights="int2", **options):
        return quantize_after(SplitQuantPass(plugins=plugins, **{"splitter": "residual", **options}), model, weights)

    return make


@pytest.fixture
def bert_folder(split, models, tmp_path):
    save(split(models.bert()), tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def mlp_folder(split, models, tmp_path):
    save(split(models.mlp(), "int4"), tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize(
    ("name", "weights", "splitter"),
    [
        ("bert", "int2", "auto"),
        ("bert", "int8", "kmeans"),
        ("gpt2", "int4", "residual"),
        ("resnet", "int2", "kmeans"),
        ("resnet", "int8", "auto"),
        ("vit", "int4", "kmeans"),
    ],
)
def test_models_come_back_with_identical_outputs(split, models, images, tokens, tmp_path, name, weights, splitter):
    model = split(getattr(models, name)(), weights, splitter=splitter, untie_embeddings=name == "gpt2")
    save(model, tmp_path)
    torch.manual_seed(1)
    back = load(tmp_path)
    assert not back.training
    assert type(back) is type(model)
    inputs = images if name in ("resnet", "vit") else tokens
    assert torch.equal(outputs(back, inputs), outputs(model, inputs))
    assert manifest_of(back) == manifest_of(model)
    generates = {"generation_config.json"} if name == "gpt2" else set()
    assert {path.name for path in tmp_path.iterdir()} == {*FILES, "config.json", *generates}


def test_a_fresh_process_gives_identical_outputs(bert_folder, split, models, tokens, tmp_path, python_path):
    torch.manual_seed(0)
    save_file({"tokens": tokens}, tmp_path / "tokens.safetensors")
    code = f"""
import torch
from safetensors.torch import load_file, save_file
from splitquant_quanto import load
torch.set_num_threads({torch.get_num_threads()})
torch.manual_seed(7)
model = load({str(bert_folder)!r})
with torch.no_grad():
    save_file({{"logits": model(load_file({str(tmp_path / "tokens.safetensors")!r})["tokens"]).logits}},
              {str(tmp_path / "logits.safetensors")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=python_path())
    here = outputs(load(bert_folder), tokens)
    assert torch.equal(load_file(tmp_path / "logits.safetensors")["logits"], here)


def test_bfloat16_comes_back(split, models, tokens, tmp_path):
    model = split(models.bert().to(torch.bfloat16))
    save(model, tmp_path)
    assert torch.equal(outputs(load(tmp_path), tokens), outputs(model, tokens))


def test_groups_of_128_in_bfloat16_come_back(split, tmp_path):
    def make():
        return nn.Sequential(nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 4)).to(torch.bfloat16)

    model, x = split(make(), "int4", splitter="auto"), torch.randn(3, 256, dtype=torch.bfloat16)
    save(model, tmp_path)
    assert torch.equal(outputs(load(tmp_path, make()), x), outputs(model, x))


def test_any_other_model_is_loaded_into_its_float_form(split, models, images, tmp_path):
    for name, inputs in (("mlp", torch.randn(3, 12)), ("conv", images), ("tied", torch.randn(3, 6))):
        model = split(getattr(models, name)(), "int4")
        save(model, tmp_path / name)
        back = load(tmp_path / name, getattr(models, name)().train())
        assert torch.equal(outputs(back, inputs), outputs(model, inputs))


def test_it_works_after_stock_quantize_and_freeze(plugins, models, tokens, tmp_path):
    model = SplitQuantPass(plugins=plugins)(models.bert())
    quanto.quantize(model, weights=quanto.qint4)
    quanto.freeze(model)
    save(model, tmp_path)
    assert torch.equal(outputs(load(tmp_path), tokens), outputs(model, tokens))


def test_the_wrapper_of_quanto(plugins, models, tokens, tmp_path):
    wrapped = QuantizedSplitModel.quantize(
        models.bert(), "int2", SplitQuantPass(plugins=plugins), exclude=["classifier"]
    )
    assert type(wrapped.classifier) is nn.Linear
    wrapped.save_pretrained(tmp_path / "out")
    back = QuantizedSplitModel.from_pretrained(tmp_path / "out")
    assert torch.equal(outputs(back, tokens), outputs(wrapped, tokens))
    with pytest.raises(InputError, match="not a folder with a split model"):
        QuantizedSplitModel.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="takes a transformers model, not a Sequential"):
        QuantizedSplitModel.quantize(models.mlp())


def test_weights_are_stored_packed(split, models, tmp_path):
    model = models.bert()
    numbers = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    save(split(model, "int2"), tmp_path)
    packed = [t for name, t in load_file(tmp_path / SINGLE_FILE).items() if t.dtype == torch.uint8]
    assert sum(t.numel() for t in packed) <= 3 * numbers / 4 * 1.2


def test_what_cannot_be_saved(plugins, models, tmp_path):
    model = models.mlp()
    with pytest.raises(SkeletonMismatchError, match="was not split"):
        save(model, tmp_path / "out")
    model = SplitQuantPass(plugins=plugins)(model)
    with pytest.raises(InputError, match="no quanto layer"):
        save(model, tmp_path / "out")
    quanto.quantize(model, weights=quanto.qint4)
    with pytest.raises(InputError, match=r"is not frozen; call optimum\.quanto\.freeze"):
        save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [*sorted(FILES), "config.json"])
def test_a_missing_file_is_named(bert_folder, name):
    (bert_folder / name).unlink()
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        load(bert_folder)


@pytest.mark.parametrize("keep", [0, 0.5])
@pytest.mark.parametrize("name", [*sorted(FILES), "config.json"])
def test_a_truncated_file_is_named(bert_folder, name, keep):
    content = (bert_folder / name).read_bytes()
    (bert_folder / name).write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        load(bert_folder)


def change_state(folder, change):
    state = load_file(folder / SINGLE_FILE)
    change(state)
    save_file(state, folder / SINGLE_FILE)


def rename(state):
    state["0.lower.bias_"] = state.pop("0.lower.bias")


HARM = {
    "a missing bias": lambda s: s.pop("0.lower.bias"),
    "a missing scale": lambda s: s.pop("0.lower.weight._scale"),
    "missing codes": lambda s: s.pop("0.lower.weight._data._data"),
    "an unexpected tensor": lambda s: s.update(surprise=torch.zeros(3)),
    "a renamed tensor": rename,
    "a bias of another shape": lambda s: s.update({"0.lower.bias": torch.zeros(5)}),
    "a bias of another dtype": lambda s: s.update({"0.lower.bias": s["0.lower.bias"].double()}),
    "codes of another shape": lambda s: s.update(
        {"0.lower.weight._data._data": s["0.lower.weight._data._data"][:-1].clone()}
    ),
    "transposed codes": lambda s: s.update(
        {"0.lower.weight._data._data": s["0.lower.weight._data._data"].t().contiguous()}
    ),
    "codes of another layer": lambda s: s.update(
        {"0.lower.weight._data._data": s["2.lower.weight._data._data"].clone()}
    ),
    "a scale of another shape": lambda s: s.update({"0.lower.weight._scale": s["0.lower.weight._scale"][:-1].clone()}),
    "codes of another dtype": lambda s: s.update(
        {"0.lower.weight._data._data": s["0.lower.weight._data._data"].float()}
    ),
}


@pytest.mark.parametrize("case", HARM)
def test_tensors_that_do_not_fit_are_an_error(mlp_folder, models, case):
    change_state(mlp_folder, HARM[case])
    with pytest.raises(SkeletonMismatchError, match=r"0\.lower|surprise|wrong kind"):
        load(mlp_folder, models.mlp())


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda q: q.update({"nowhere": {"weights": "qint4", "activations": "none"}}), SkeletonMismatchError),
        (lambda q: q.pop("0.lower"), SkeletonMismatchError),
        (lambda q: q["0.lower"].update(weights="qint3"), InputError),
        (lambda q: q["0.lower"].update(weights="qint8"), SkeletonMismatchError),
        (lambda q: q["0.lower"].update(weights="qint2"), SkeletonMismatchError),
        (lambda q: q["0.lower"].update(activations="qint8"), InputError),
        (lambda q: q.update({"0.lower": None}), InputError),
        (lambda q: q.clear(), InputError),
    ],
)
def test_a_damaged_map_is_an_error(mlp_folder, models, change, kind):
    path = mlp_folder / QMAP_FILE
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(kind):
        load(mlp_folder, models.mlp())


@pytest.mark.parametrize(
    "content", [{"format": 2}, {"backend": "other"}, {"surprise": 1}, {"same_as": 3}, {"same_as": {"a": "nowhere"}}]
)
def test_a_damaged_storage_file_is_an_error(mlp_folder, models, content):
    (mlp_folder / STORAGE_FILE).write_text(json.dumps(content))
    with pytest.raises(SplitQuantError):
        load(mlp_folder, models.mlp())


def wrong_skeletons(models):
    return {
        "other sizes": nn.Sequential(nn.Linear(12, 17), nn.ReLU(), nn.Linear(17, 16), nn.GELU(), nn.Linear(16, 2)),
        "fewer layers": nn.Sequential(nn.Linear(12, 16), nn.ReLU()),
        "more layers": nn.Sequential(*models.mlp(), nn.Linear(2, 2)),
        "a norm more": nn.Sequential(*models.mlp(), nn.LayerNorm(2)),
        "no bias": nn.Sequential(nn.Linear(12, 16, bias=False), *list(models.mlp())[1:]),
    }


@pytest.mark.parametrize("case", ["other sizes", "fewer layers", "more layers", "a norm more", "no bias"])
def test_the_wrong_skeleton_is_an_error(mlp_folder, models, case):
    with pytest.raises(SkeletonMismatchError):
        load(mlp_folder, wrong_skeletons(models)[case])


def test_a_split_model_is_no_skeleton(mlp_folder, plugins, models):
    with pytest.raises(AlreadySplitError):
        load(mlp_folder, SplitQuantPass(plugins=plugins)(models.mlp()))


def test_a_manifest_of_another_model_is_an_error(bert_folder, mlp_folder, models):
    # Both fixtures save into one folder: the MLP's files are written over BERT's, whose config.json stays.
    with pytest.raises(SkeletonMismatchError, match="has none of that name"):
        load(mlp_folder)


@pytest.mark.parametrize("broken", ["save_file", "write_json", "manifest"])
@pytest.mark.parametrize("again", [False, True])
def test_a_save_that_breaks_off_leaves_nothing_that_loads(split, models, tmp_path, monkeypatch, broken, again):
    model, folder = split(models.bert()), tmp_path / "out"
    if again:
        save(model, folder)

    def fail(*arguments, **options):
        raise OSError("disk full")

    target = {
        "save_file": "splitquant_plugins.checkpoints.tensors.save_file",
        "write_json": "splitquant_quanto.storage.write_json",
        "manifest": "splitquant_plugins.manifest.write_text",
    }[broken]
    with monkeypatch.context() as patch:
        patch.setattr(target, fail)
        with pytest.raises(OSError, match="disk full"):
            save(model, folder)
    assert not list(folder.rglob(".*"))
    with pytest.raises(InputError, match=FILE_NAME):
        load(folder)
    save(model, folder)
    load(folder)


class Mixed(nn.Module):
    """What is split, quantized whole and left float, with statistics, a counter and tied tensors."""

    def __init__(self):
        super().__init__()
        self.split = nn.Linear(8, 6)
        self.norm = nn.BatchNorm1d(6)
        self.whole = nn.Linear(6, 6)
        self.same = nn.Linear(6, 6)
        self.plain = nn.Linear(6, 1)
        self.plain_too = nn.Linear(6, 1)
        self.plain_too.bias = self.plain.bias
        self.one = nn.Linear(6, 1)
        self.one_whole = nn.Linear(6, 1)

    def forward(self, x):
        x = self.whole(self.norm(self.split(x)).relu())
        x = self.same(x)
        return self.plain(x) + self.plain_too(x) + self.one(x) + self.one_whole(x)


@pytest.fixture
def mixed(plugins):
    """Split by a splitter that needs no grid, then quantized by quanto alone."""
    model = Mixed().eval().to(torch.bfloat16)
    model.norm.running_mean.add_(0.3)
    model = SplitQuantPass(plugins=plugins, splitter="kmeans", exclude=["whole", "plain*", "one_whole"])(model)
    quanto.quantize(model, weights=quanto.qint4, exclude=["plain*", "same*"])
    quanto.freeze(model)
    return model


def test_whatever_a_model_holds_comes_back_in_its_dtype(mixed, tmp_path):
    folder = tmp_path / "new" / "below"
    save(mixed, folder)
    save(mixed, folder)
    assert json.loads((folder / STORAGE_FILE).read_text())["same_as"] == {"plain_too.bias": "plain.bias"}
    x = torch.randn(3, 8, dtype=torch.bfloat16)
    for made in (Mixed(), Mixed().double()):
        back = load(str(folder), made.train())
        assert not any(module.training for module in back.modules())
        assert outputs(back, x).dtype == torch.bfloat16
        assert torch.equal(outputs(back, x), outputs(mixed, x))
        expected = mixed.state_dict()
        assert {name: t.dtype for name, t in back.state_dict().items()} == {n: t.dtype for n, t in expected.items()}


def test_the_manifest_says_what_was_quantized(mixed, tmp_path):
    save(mixed, tmp_path)
    found = Manifest.load(tmp_path).coverage
    left = {record.tensor for record in found.left_float if record.tensor.endswith("weight")}
    assert left == {"norm.weight", "same.weight", "plain.weight", "plain_too.weight"}
    weights = [mixed.get_submodule(name).weight.numel() for name in ("whole", "one_whole")]
    assert round(found.quantized_share * found.values) == 8 * 6 + 6 + sum(weights)


def test_a_model_that_is_one_layer(plugins, tmp_path):
    model = SplitQuantPass(plugins=plugins, splitter="kmeans")(nn.Linear(8, 6).to(torch.bfloat16))
    quanto.quantize(model, weights=quanto.qint4)
    quanto.freeze(model)
    save(model, tmp_path)
    x = torch.randn(2, 8, dtype=torch.bfloat16)
    assert torch.equal(outputs(load(tmp_path, nn.Linear(8, 6)), x), outputs(model, x))


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(8, 6),
        lambda: nn.Linear(8, 6).to(torch.bfloat16),
        lambda: nn.Linear(8, 1),
        lambda: nn.Linear(256, 3),
        *(lambda outputs=outputs: nn.Conv2d(4, outputs, 3) for outputs in (1, 3, 5)),
    ],
)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_what_quanto_saves_is_known(make, bits):
    check_saved(make(), bits)


def check_saved(layer, bits):
    shape, dtype = layer.weight.shape, layer.weight.dtype
    model = nn.Sequential(layer)
    quanto.quantize(model, weights=getattr(quanto, f"qint{bits}"))
    quanto.freeze(model)
    found = {name.removeprefix("0."): t for name, t in model.state_dict().items() if name != "0.bias"}
    known = saved_tensors(shape, dtype, bits, part=False)
    assert {n: (t.dtype, tuple(t.shape)) for n, t in found.items()} == {n: (t.dtype, t.shape) for n, t in known.items()}
    part = saved_tensors(shape, dtype, bits, part=True)
    if shape[0] > 1 or bits == 8:
        assert part == known
    else:
        scales = ("weight._scale", "weight._shift")
        assert all(part[name].shape == (1,) * len(shape) and part[name].dtype == dtype for name in scales)
        assert {name: spec for name, spec in known.items() if name not in scales}.items() <= part.items()
        assert part.keys() == known.keys()


def test_an_entry_of_the_map():
    entry = {"weights": "qint4", "activations": "none"}
    assert validated_entry(entry, "here") == entry
    for bad in ({**entry, "weights": "qint3"}, {**entry, "activations": "qint8"}, {**entry, "more": 1}, None):
        with pytest.raises(InputError, match=r"^here is damaged or not for weights alone: (Input|Extra) "):
            validated_entry(bad, "here")


def tensors_gone(state):
    del state["0.lower.bias"], state["2.lower.bias"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (tensors_gone, r"there is no tensor 0\.lower\.bias \(2 such tensors\)"),
        (lambda s: s.update(zz=torch.ones(1), surprise=torch.ones(2)), r"has no tensor surprise \(2 such tensors\)"),
        (rename, r"there is no tensor 0\.lower\.bias \(2 such tensors\)"),
        (
            lambda s: s.update({"0.lower.bias": torch.zeros(5)}),
            r"0\.lower\.bias is \(5,\) torch\.float32, and not \(16,\) torch\.float32",
        ),
    ],
)
def test_the_tensor_that_does_not_fit_is_named(mlp_folder, models, change, message):
    change_state(mlp_folder, change)
    with pytest.raises(SkeletonMismatchError, match=message) as caught:
        load(mlp_folder, models.mlp())
    assert str(caught.value).startswith(f"{mlp_folder}: ")


def test_a_layer_of_the_map_has_to_be_one_that_quanto_quantizes(mlp_folder, models):
    path = mlp_folder / QMAP_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "1": {"weights": "qint4", "activations": "none"}}))
    with pytest.raises(SkeletonMismatchError, match="quantizes 1, which is a ReLU here"):
        load(mlp_folder, models.mlp())


def test_a_folder_of_save_pretrained_is_left_to_transformers(mlp_folder, models, monkeypatch):
    monkeypatch.setattr("splitquant_quanto.storage.is_pretrained", lambda folder: folder == mlp_folder)
    monkeypatch.setattr("splitquant_quanto.storage.load_model", lambda folder: [folder])
    assert load(mlp_folder) == [str(mlp_folder)]
    assert isinstance(load(mlp_folder, models.mlp()), nn.Sequential)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("one\n  line"), "the tensors do not fit the model: one line"),
        (AssertionError(), "the tensors do not fit the model: a tensor is of the wrong kind"),
        (None, "4 quantized layers were not found, 0.lower among them"),
    ],
)
def test_what_quanto_does_not_take_is_told(plugins, tmp_path, monkeypatch, error, message):
    def requantize(*arguments, **options):
        if error is not None:
            raise error

    model = SplitQuantPass(plugins=plugins, splitter="kmeans", k=2)(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    quanto.quantize(model, weights=quanto.qint4)
    quanto.freeze(model)
    save(model, tmp_path)
    monkeypatch.setattr("splitquant_quanto.storage.requantize", requantize)
    with pytest.raises(SkeletonMismatchError) as caught:
        load(tmp_path, nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    assert str(caught.value) == f"{tmp_path}: {message}"
