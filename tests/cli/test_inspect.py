from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

from splitquant_plugins.cli.inspect import inspect, inspections
from splitquant_plugins.errors import ConfigError, InputError, SplitFailedError
from splitquant_plugins.manifest import FILE_NAME
from splitquant_plugins.passes.splitquant import SplitQuantPass
from splitquant_plugins.plugins import Plugins


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16
    )
    folder = tmp_path_factory.mktemp("model")
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    return folder


def run(plugins: Plugins, *arguments: object) -> Result:
    """Run the command as `splitquant inspect` does; errors come through as they are raised."""
    result = CliRunner().invoke(inspect, [str(argument) for argument in arguments], obj=plugins, standalone_mode=False)
    if result.exception:
        raise result.exception
    return result


def rows_of(plugins: Plugins, tmp_path: Path, *arguments: object) -> list[dict[str, Any]]:
    run(plugins, *arguments, "--json", tmp_path / "rows.json")
    rows: list[dict[str, Any]] = json.loads((tmp_path / "rows.json").read_text())
    return rows


def test_the_curve_falls_as_bits_are_added(plugins: Plugins, model: Path) -> None:
    from splitquant_plugins.cli.inspect import curve_of
    from splitquant_plugins.grid import UniformGrid

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 12))
    steps = curve_of(net, SplitQuantPass(splitter="kmeans", plugins=plugins), UniformGrid(2))
    plain = sum(UniformGrid(2).stored_bits(layer.weight.shape) for layer in net) / (2 * 12 * 16)
    assert steps[0]["bits_per_weight"] == pytest.approx(plain)
    assert len(steps) > 2
    for before, after in pairwise(steps):
        assert after["bits_per_weight"] > before["bits_per_weight"]
        assert after["error"] < before["error"]
        assert after["weight_sqnr_db"] > before["weight_sqnr_db"]
    assert "bits/weight" in run(plugins, model, "--curve", "--granularity", "tensor").output


def test_every_layer_of_any_architecture_is_a_row(plugins: Plugins, model: Path, tmp_path: Path) -> None:
    rows = rows_of(plugins, tmp_path, model)
    assert [row["layer"] for row in rows][:2] == [
        f"bert.encoder.layer.0.attention.self.{name}" for name in ("query", "key")
    ]
    assert "cls.predictions.transform.dense" in {row["layer"] for row in rows}
    for row in rows:
        assert len(row["parts"]) == row["k"] == 3
        assert row["channel_split_bits_per_weight"] == pytest.approx(3 * row["channel_plain_bits_per_weight"])
        assert row["channel_gain_db"] > 0
        assert row["least_part_scaling_factor"] == min(part["scaling_factor"] for part in row["parts"])
        assert row["reason"] is None


def test_options_reach_the_pass_and_the_grid(plugins: Plugins, model: Path, tmp_path: Path) -> None:
    two = rows_of(plugins, tmp_path, model, "--k", 2, "--bits", 2, "--layer", "*query")
    four = rows_of(plugins, tmp_path, model, "--k", 2, "--bits", 4, "--layer", "*query")
    assert [len(row["parts"]) for row in two] == [2]
    assert four[0]["scaling_factor"] == pytest.approx(5 * two[0]["scaling_factor"])
    assert four[0]["channel_plain_bits_per_weight"] > two[0]["channel_plain_bits_per_weight"] + 2 - 1e-9
    exact = rows_of(plugins, tmp_path, model, "--layer", "*query")
    sklearn = rows_of(plugins, tmp_path, model, "--layer", "*query", "--splitter", "kmeans", "-O", "method=sklearn")
    assert len(exact) == len(sklearn) == 1


def test_table_names_every_layer(plugins: Plugins, model: Path) -> None:
    output = run(plugins, model).output
    assert "bert.encoder.layer.0.output.dense" in output
    assert "S split" in output


@pytest.mark.parametrize("name", ["picture.png", "picture.html"])
def test_picture_files(plugins: Plugins, model: Path, tmp_path: Path, name: str) -> None:
    pytest.importorskip("matplotlib")
    run(plugins, model, "--picture", tmp_path / "new" / name)
    content = (tmp_path / "new" / name).read_bytes()
    if name.endswith(".png"):
        assert content.startswith(b"\x89PNG")
    else:
        text = content.decode()
        assert text.count("<figure>") == len(rows_of(plugins, tmp_path, model))
        assert not re.search(r"(src|href)=\"(?!data:)", text)
        assert "http" not in text


def test_picture_folder_has_a_file_for_each_layer(plugins: Plugins, model: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "pictures"
    rows = rows_of(plugins, tmp_path, model, "--layer", "*attention.self*", "--picture", folder)
    assert {path.stem for path in folder.iterdir()} == {row["layer"] for row in rows}


def test_wrong_picture_name_is_refused_before_the_model_is_loaded(plugins: Plugins, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ConfigError, match=r"choose a \.png, a \.html, or a folder"):
        run(plugins, "no/such-model", "--picture", tmp_path / "picture.pdf")


def test_bad_input_is_an_error_that_says_what_is_wrong(plugins: Plugins, model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such model"):
        run(plugins, tmp_path / "missing")
    with pytest.raises(ConfigError, match="unknown splitter 'kmaens': choose from"):
        run(plugins, model, "--splitter", "kmaens")
    with pytest.raises(ConfigError, match="matches no module"):
        run(plugins, model, "--layer", "decoder.*")
    with pytest.raises(click.BadParameter, match="9 is not in the range"):
        run(plugins, model, "--bits", 9)
    with pytest.raises(InputError, match="no layer that the pass would split"):
        run(plugins, model, "--layer", "*LayerNorm")


def test_a_split_model_is_refused(plugins: Plugins, model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((model / "config.json").read_text())
    (tmp_path / FILE_NAME).write_text("{}")
    with pytest.raises(InputError, match="was split before"):
        run(plugins, tmp_path)


def test_a_layer_that_stays_whole_says_why(plugins: Plugins) -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    with torch.no_grad():
        net[1].weight.fill_(1.0)
    found = list(inspections(net, SplitQuantPass(plugins=plugins, splitter="kmeans"), 2, progress=False))
    assert found[0].reason is None
    assert found[1].reason is not None
    assert "equal" in found[1].reason
    assert [part.name for part in found[1].parts] == ["whole"]


def test_convolutions_are_inspected_with_batchnorm_folded(plugins: Plugins) -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)).eval()
    with torch.no_grad():
        net[1].weight.fill_(8.0)
    before = net[0].weight.detach().clone()
    (found,) = inspections(net, SplitQuantPass(plugins=plugins), 2, progress=False)
    assert found.max == pytest.approx(8 * float(before.max()), rel=1e-4)


def test_nan_names_the_layer(plugins: Plugins) -> None:
    net = nn.Sequential(nn.Linear(4, 3))
    with torch.no_grad():
        net[0].weight[0, 0] = float("nan")
    with pytest.raises(SplitFailedError, match=r"0\.weight has 1 NaN"):
        list(inspections(net, SplitQuantPass(plugins=plugins), 2, progress=False))


def test_a_splitter_that_looks_at_the_grid_sees_both(with_splitter: Any) -> None:
    net = nn.Sequential(nn.Linear(4, 3))
    halves = with_splitter(lambda tensor, plan: [tensor / 2, tensor / 2])
    (found,) = inspections(net, SplitQuantPass(splitter="test", k=2, plugins=halves), 2, progress=False)
    assert set(found.gains) == {"channel", "tensor"}
    assert found.boundaries == ()
