"""Finished stages on disk: what a fingerprint covers, and which files count."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from splitquant_plugins.decoupleq.resume import Finished, described, fingerprint, refuse_file
from splitquant_plugins.errors import InputError

CALLS = [(("text", 2), {"x": torch.arange(6.0).reshape(2, 3), "scale": 0.5, "mask": None})]


def test_a_fingerprint_stays_what_it_was():
    """Another one makes the folders useless that were begun before."""
    given = {"rounds": 2, "dtype": torch.float16, "bits": [2, None]}
    expected = "8b391a442b3afe914dce2ffb334edb4b9d13859fe9758e8f0fe1e134285302ee"
    assert fingerprint(given, CALLS, [torch.arange(4, dtype=torch.int8)]) == expected
    assert (
        fingerprint(dict(reversed(given.items())), iter(CALLS), iter([torch.arange(4, dtype=torch.int8)])) == expected
    )


def other(**changes: Any) -> list[Any]:
    args, kwargs = CALLS[0]
    return [(args, {**kwargs, **changes})]


class One:
    """A leaf that is no tensor and no plain value."""


class Another(One):
    pass


@pytest.mark.parametrize(
    "calls",
    [
        [],
        CALLS * 2,
        other(scale=0.25),
        other(scale=None),
        other(mask=False),
        other(mask=One()),
        other(x=CALLS[0][1]["x"] + 1),
        other(x=CALLS[0][1]["x"].reshape(3, 2)),
        other(x=CALLS[0][1]["x"].view(torch.int32)),
        [(("text", 3), CALLS[0][1])],
        [(("TEXT", 2), CALLS[0][1])],
        [(("text", 2), {**CALLS[0][1], "X": None})],
    ],
)
def test_whatever_a_call_is_made_of_counts(calls):
    assert fingerprint({}, calls) != fingerprint({}, CALLS)


def test_of_anything_else_the_class_counts():
    assert fingerprint({}, other(mask=One())) == fingerprint({}, other(mask=One()))
    assert fingerprint({}, other(mask=One())) != fingerprint({}, other(mask=Another()))


def test_tensors_count_wherever_and_however_they_are_held():
    weight = torch.randn(3, 4)
    assert fingerprint({}, [], [nn.Parameter(weight)]) == fingerprint({}, [], [weight.t().contiguous().t()])
    for changed in (weight[:2], weight.t(), weight.double(), -weight):
        assert fingerprint({}, [], [changed]) != fingerprint({}, [], [weight])


def test_what_a_model_says_of_itself():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.eps, self.mode, self.gated, self.limit, self.sizes, self.steps = 1e-5, "sum", True, None, [1, 2], 3
            self.act, self.table = torch.relu, {"of": torch.float16, 2: (One(),)}
            self.linear = nn.Linear(4, 2, bias=False)

    model = Scaled()
    name = "test_what_a_model_says_of_itself.<locals>.Scaled"
    more = {"sizes": ["1", "2"], "act": torch.relu.__qualname__, "table": {"'of'": "torch.float16", "2": ["One"]}}
    modules = {
        "": [name, {"eps": "1e-05", "mode": "'sum'", "gated": "True", "limit": "None", "steps": "3", **more}],
        "linear": ["Linear", {"in_features": "4", "out_features": "2"}],
    }
    assert described(model) == {"modules": modules, "graphs": [], "config": None, "attention": None}
    model.config = SimpleNamespace(to_dict=lambda: {"layers": 2}, _attn_implementation="eager")
    assert described(model) == {"modules": modules, "graphs": [], "config": {"layers": 2}, "attention": "eager"}
    model.table = torch.ones(2)
    (dtype, shape, digest) = described(model)["modules"][""][1]["table"]
    assert (dtype, shape) == ("torch.float32", [2])
    model.table[0] = 2
    assert described(model)["modules"][""][1]["table"][2] != digest
    model.table = {"of": torch.float16, 2: (One(),)}
    model.config = {"layers": 2}
    assert described(model) == {"modules": modules, "graphs": [], "config": None, "attention": None}


def test_a_folder_or_none_is_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("theirs")
    for fit in (None, tmp_path, str(tmp_path / "new" / "below"), "new"):
        refuse_file(fit)
    for path in ("file", str(tmp_path / "file"), tmp_path / "file" / "below" / "it"):
        with pytest.raises(InputError, match="file is not a folder"):
            refuse_file(path)


def test_without_a_folder_nothing_is_kept():
    finished = Finished(None, "mark")
    finished.save(0, {"a": torch.ones(2)}, {"layer": 1})
    assert finished.load(0) is None


def test_a_stage_comes_back(tmp_path):
    finished = Finished(tmp_path / "new" / "below", "mark")
    assert finished.load(3) is None
    tensors = {"a": torch.arange(6.0).reshape(2, 3).t(), "b": torch.ones(2, dtype=torch.int8)}
    finished.save(3, tensors, {"layer": [1, None]})
    finished.save(12, {}, {})
    names = {"block_0003.json", "block_0003.safetensors", "block_0012.json", "block_0012.safetensors"}
    assert {path.name for path in finished.folder.iterdir()} == names
    assert Finished.tensors_file(12) in names
    assert load_file(finished.folder / finished.tensors_file(3)).keys() == tensors.keys()
    found = Finished(str(finished.folder), "mark").load(3)
    assert found is not None
    assert found[1] == {"layer": [1, None]}
    assert all(torch.equal(found[0][name], tensor) for name, tensor in tensors.items())
    assert finished.load(4) is None


@pytest.mark.parametrize("content", [["mark"], {"fingerprint": "other"}, {}])
def test_what_another_run_left_is_refused(tmp_path, content):
    Finished(tmp_path, "mark").save(1, {"a": torch.ones(2)}, {})
    (tmp_path / "block_0001.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="other options, weights or calibration data"):
        Finished(tmp_path, "mark").load(1)


def test_the_tensors_have_to_be_those_that_were_written(tmp_path):
    finished = Finished(tmp_path, "mark")
    finished.save(1, {"a": torch.ones(2)}, {})
    kept = json.loads((tmp_path / "block_0001.json").read_text())
    assert kept.keys() == {"fingerprint", "digest", "records"}
    del kept["digest"]
    (tmp_path / "block_0001.json").write_text(json.dumps(kept))
    with pytest.raises(InputError, match=r"block_0001\.safetensors is not what was written there"):
        finished.load(1)


def test_a_stage_whose_writing_broke_off_does_not_count(tmp_path, monkeypatch):
    def fail(*arguments: Any) -> None:
        raise OSError("disk full")

    finished = Finished(tmp_path, "mark")
    monkeypatch.setattr("splitquant_plugins.decoupleq.resume.write_tensors", fail)
    with pytest.raises(OSError, match="disk full"):
        finished.save(1, {"a": torch.ones(2)}, {})
    assert finished.load(1) is None
