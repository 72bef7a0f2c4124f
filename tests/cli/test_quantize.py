"""`splitquant quantize`: where it writes to, and what it says of tokenizers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from splitquant_plugins.cli.main import run

pytest.importorskip("optimum.quanto")


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder that cannot be written")
@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_an_output_that_cannot_be_written_is_named(
    stream: str, classifier: Callable[..., Path], fails: Callable[..., str]
) -> None:
    line = fails("quantize", classifier(), stream, "--output", "/proc/out")
    assert "cannot write /proc/out: " in line
    assert "choose another --output" in line
    assert "/proc/." not in line


def test_a_failure_while_saving_names_the_output_and_leaves_nothing(
    classifier: Callable[..., Path], fails: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import PreTrainedModel

    def save(self: object, folder: Path) -> None:
        (folder / "half").write_text("")
        raise OSError(28, "No space left on device", str(folder / "model.safetensors"))

    folder = classifier()
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save)
    line = fails("quantize", folder, "--split", "residual", "--output", tmp_path / "made" / "out")
    assert f"cannot write {tmp_path / 'made' / 'out'}: No space left on device" in line
    assert not list((tmp_path / "made").iterdir())


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
@pytest.mark.parametrize("vocabulary", [True, False])
def test_a_model_without_a_tokenizer_is_said_to_be_one(
    vocabulary: bool,
    stream: str,
    classifier: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, output, rows = classifier(vocabulary=vocabulary), tmp_path / "out", tmp_path / "rows.json"
    quick = ["--split", "residual", "--json", str(rows)]
    assert run(["quantize", str(folder), stream, "--output", str(output), *quick]) == 0
    (row,) = json.loads(rows.read_text())
    assert row["tokenizer_files"] == (["vocab.txt"] if vocabulary else [])
    assert (output / "vocab.txt").exists() is vocabulary
    assert ("no tokenizer files" in capsys.readouterr().out) is not vocabulary


def test_the_tokenizer_of_a_hub_model_is_copied_too(
    classifier: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    from splitquant_plugins.evaluation.tasks import choose

    folder = classifier()
    task = choose.task_of(str(folder))
    model = task.load_model()
    task.model = "somebody/model"
    asked = []

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, "vocab.txt" in allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(task, "load_model", lambda: model)
    monkeypatch.setattr(choose, "task_of", lambda name, **_: task)
    assert run(["quantize", "somebody/model", "--split", "residual", "--output", str(tmp_path / "out")]) == 0
    assert asked == [("somebody/model", True)]
    assert (tmp_path / "out" / "vocab.txt").is_file()


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
@pytest.mark.parametrize("backend", ["quanto", "inc"])
@pytest.mark.filterwarnings("ignore")  # INC's own
def test_what_is_made_loads_with_from_pretrained_and_with_the_adapter(
    backend: str, stream: str, classifier: Callable[..., Path], tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForSequenceClassification

    adapter = pytest.importorskip(f"splitquant_{backend}")
    if backend == "inc":
        pytest.importorskip("neural_compressor")
    output, rows = tmp_path / "out", tmp_path / "rows.json"
    arguments = ["quantize", str(classifier()), "--backend", backend, "--weights", "int2", "--split", "kmeans", stream]
    assert run([*arguments, "--output", str(output), "--json", str(rows)]) == 0
    (row,) = json.loads(rows.read_text())
    # Of three codes of 2 bits, one is on disk, and 1.6 bits of which it is; INC fills words of 32 bits besides.
    saved = row["bits_per_weight"] - row["disk_bits_per_weight"]
    assert saved == (0 if stream == "--stream" else pytest.approx(6 - 3.6, abs=0.5 if backend == "inc" else 0.05))
    tokens = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        one, report = AutoModelForSequenceClassification.from_pretrained(output, output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        assert torch.equal(one(tokens).logits, adapter.load(output)(tokens).logits)
    one.save_pretrained(tmp_path / "again")
    assert [name for name in load_file(tmp_path / "again" / "model.safetensors") if name.endswith(".part_of")]
