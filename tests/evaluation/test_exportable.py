"""Models that programs are made from: where they come from, and what is refused."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from splitquant_plugins.errors import InputError
from splitquant_plugins.evaluation.exportable import load_exportable, logits_of_batches

FILE = """
import torch
from torch import nn

def load():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3)), [torch.ones(2, 4), torch.zeros(2, 4)]

def tuples():
    return nn.Linear(4, 3), [(torch.ones(1, 4),)]

def nothing():
    return nn.Linear(4, 3)

def broken():
    raise RuntimeError("no weights here")
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "net.py"
    path.write_text(FILE)
    return path


def test_a_function_of_a_file_is_called(file: Path) -> None:
    found = load_exportable(f"{file}:load")
    assert [tuple(batch[0].shape) for batch in found.batches] == [(2, 4), (2, 4)]
    assert logits_of_batches(found.model, found.batches).shape == (4, 3)
    assert len(load_exportable(f"{file}:tuples").batches) == 1


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("nothing", r"has to return a torch.nn.Module and a list of batches"),
        ("broken", r"broken\(\) fails: RuntimeError: no weights here"),
        ("absent", r"has no function 'absent'; it has load, tuples, nothing, broken"),
    ],
)
def test_functions_that_give_no_model_are_named(file: Path, function: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_exportable(f"{file}:{function}")


def test_an_exported_program_brings_its_inputs(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(4, 3)).eval(), torch.randn(2, 4)
    path = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(model, (x,)), path)
    found = load_exportable(str(path))
    torch.testing.assert_close(logits_of_batches(found.model, found.batches), model(x).detach().double())


def test_archives_that_hold_pickles_are_not_loaded(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(nn.Linear(4, 3), (torch.randn(2, 4),)), path)
    evil = tmp_path / "evil.pt2"
    with zipfile.ZipFile(path) as before, zipfile.ZipFile(evil, "w") as after:
        for name in before.namelist():
            content = before.read(name)
            if name.endswith("weights_config.json"):
                table = json.loads(content)
                for entry in table["config"].values():
                    entry["use_pickle"] = True
                content = json.dumps(table).encode()
            after.writestr(name, content)
    with pytest.raises(InputError, match="holds pickles, which would be run when loaded"):
        load_exportable(str(evil))
    old = tmp_path / "old.pt2"
    with zipfile.ZipFile(old, "w") as archive:
        archive.writestr("serialized_state_dict.pt", b"")
    with pytest.raises(InputError, match="holds pickles"):
        load_exportable(str(old))
    (tmp_path / "no.pt2").write_bytes(b"no archive")
    with pytest.raises(InputError, match=r"no archive of torch\.export\.save"):
        load_exportable(str(tmp_path / "no.pt2"))


def test_what_does_not_go_together_is_refused(file: Path) -> None:
    with pytest.raises(InputError, match="brings its own batches"):
        load_exportable(f"{file}:load", calibration="texts.csv")
    with pytest.raises(InputError, match="give --calibration FILE"):
        load_exportable("some/model")
    with pytest.raises(InputError, match="no such file"):
        load_exportable("missing.py:load")
