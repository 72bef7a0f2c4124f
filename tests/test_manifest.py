"""The manifest: what it records, its way to disk and back, damaged files."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from splitquant_plugins import Manifest, SplitConfig, SplitQuantPass, manifest_of
from splitquant_plugins.errors import InputError, SkeletonMismatchError
from splitquant_plugins.manifest import ATTRIBUTE, FILE_NAME, LayerRecord, manifest_from, set_manifest


def test_what_it_records(models):
    model = SplitQuantPass(exclude="head")(models.conv())
    manifest = manifest_of(model)
    assert manifest.config.exclude == ("head",)
    assert manifest.version
    assert manifest.seconds > 0
    stem = next(record for record in manifest.split if record.name == "stem")
    assert (stem.kind, stem.shape, stem.dtype, stem.granularity) == ("conv2d", (8, 3, 3, 3), "float32", "channel")
    assert (stem.k, stem.parts, stem.splitter) == (3, ("lower", "middle", "upper"), "kmeans")
    assert [(record.name, record.kind) for record in manifest.kept] == [("head", "Linear")]
    assert len(manifest.notes) == 2


def test_it_comes_back_from_disk(models, tmp_path, no_leftovers):
    manifest = manifest_of(SplitQuantPass(exclude=["head"], activations=True)(models.conv()))
    path = manifest.save(tmp_path)
    assert path == tmp_path / FILE_NAME
    assert Manifest.load(tmp_path) == manifest


@given(
    config=st.builds(
        SplitConfig,
        k=st.integers(1, 16),
        include=st.lists(st.text(), max_size=2).map(tuple),
        activation_dim=st.none() | st.integers(-3, 3),
    ),
    notes=st.lists(st.text()),
    layers=st.lists(
        st.builds(
            LayerRecord,
            name=st.text(),
            kind=st.text(),
            action=st.sampled_from(["split", "kept"]),
            reason=st.none() | st.text(),
            also_known_as=st.lists(st.text()).map(tuple),
            shared_with=st.none() | st.text(),
            shape=st.lists(st.integers(0, 9)).map(tuple),
            parts=st.lists(st.text()).map(tuple),
            k=st.integers(1, 16),
            seconds=st.floats(0, 1e6),
        ),
        max_size=3,
    ),
)
def test_any_manifest_survives_json(config, notes, layers):
    manifest = Manifest(config=config, notes=notes, layers=layers, splitter_options={"n_init": 3})
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest


def test_it_is_plain_json(models, tmp_path):
    manifest_of(SplitQuantPass()(models.mlp())).save(tmp_path)
    content = json.loads((tmp_path / FILE_NAME).read_text())
    assert content["format"] == 1
    assert content["layers"][0]["parts"] == ["lower", "middle", "upper"]


def test_a_missing_file(tmp_path):
    with pytest.raises(InputError, match=rf"holds no {FILE_NAME}: it is not a model saved by splitquant"):
        Manifest.load(tmp_path)


def damage(change):
    def apply(text):
        content = json.loads(text)
        change(content)
        return json.dumps(content)

    return apply


@pytest.mark.parametrize(
    "harm",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: "\x00\xff",
        damage(lambda c: c.update(format=2)),
        damage(lambda c: c.update(surprise=1)),
        damage(lambda c: c["layers"][0].update(action="burnt")),
        damage(lambda c: c["layers"][0].pop("name")),
        damage(lambda c: c["layers"][0].update(k=10**9)),
        damage(lambda c: c["config"].update(k=0)),
        damage(lambda c: c.pop("config")),
    ],
)
def test_a_damaged_file_is_named(models, tmp_path, harm):
    path = manifest_of(SplitQuantPass()(models.mlp())).save(tmp_path)
    path.write_text(harm(path.read_text()))
    with pytest.raises(InputError, match=rf"{FILE_NAME} is (damaged or of another version|not JSON)"):
        Manifest.load(tmp_path)


def test_an_unsplit_model_has_none():
    with pytest.raises(SkeletonMismatchError, match="Linear was not split"):
        manifest_of(nn.Linear(2, 2))


def test_it_is_no_part_of_the_state(models):
    model = SplitQuantPass()(models.mlp())
    assert all(isinstance(tensor, torch.Tensor) for tensor in model.state_dict().values())
    assert isinstance(model.splitquant_manifest, Manifest)


def test_folders_may_be_text(models, tmp_path):
    manifest = manifest_of(SplitQuantPass()(models.mlp()))
    assert manifest.save(str(tmp_path)) == tmp_path / FILE_NAME
    assert Manifest.load(str(tmp_path)) == manifest


def test_it_is_readable_text(tmp_path):
    path = Manifest(config=SplitConfig(), version="1").save(tmp_path)
    assert path.read_text().splitlines()[:3] == ["{", ' "format": 1,', ' "version": "1",']


def test_json_that_was_read_already_is_checked_alike():
    manifest = Manifest(config=SplitConfig(k=2), notes=["a"])
    assert manifest_from(json.loads(manifest.model_dump_json()), "here") == manifest
    with pytest.raises(InputError, match=r"^here is damaged or of another version: notes"):
        manifest_from({"config": {}, "notes": 3}, "here")


def test_a_graph_module_keeps_it_in_its_meta():
    one, other = Manifest(config=SplitConfig(k=2)), Manifest(config=SplitConfig(k=4))
    model = nn.Linear(2, 2)
    model.meta = None
    with pytest.raises(SkeletonMismatchError, match="Linear was not split: it carries no manifest"):
        manifest_of(model)
    model.meta = {ATTRIBUTE: {"format": 1}}
    with pytest.raises(SkeletonMismatchError, match="was not split"):
        manifest_of(model)
    model.meta = {ATTRIBUTE: one}
    assert manifest_of(model) is one
    setattr(model, ATTRIBUTE, other)
    assert manifest_of(model) is other


def test_it_is_described_to_transformers_when_it_is_set(monkeypatch):
    told = []
    monkeypatch.setattr("splitquant_plugins.manifest.describe_to_transformers", lambda *given: told.append(given))
    model, manifest = nn.Linear(2, 2), Manifest(config=SplitConfig())
    set_manifest(model, manifest)
    assert told == [(model, manifest)]
    assert manifest_of(model) is manifest
