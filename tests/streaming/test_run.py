"""A streamed checkpoint is what the same checkpoint becomes in memory, whatever happens on the way."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from splitquant_plugins.backends import WeightRequest
from splitquant_plugins.checkpoints.headers import read_header
from splitquant_plugins.cli.options import untied_for_head
from splitquant_plugins.errors import AlreadyQuantizedError, ConfigError, InputError, SplitFailedError
from splitquant_plugins.evaluation.tasks.choose import task_of
from splitquant_plugins.evaluation.tasks.language_model import head_sentences
from splitquant_plugins.manifest import Manifest
from splitquant_plugins.passes import split_layer
from splitquant_plugins.streaming import run, workplace, writer
from splitquant_plugins.streaming.quantize_model import quantize_model
from splitquant_plugins.streaming.shards import Shards

BESIDE = ("config.json", "quanto_qmap.json", "splitquant_storage.json", "splitquant_inc.json")
IDS = torch.arange(3, 15).reshape(1, 12)


INDEX = "model.safetensors.index.json"


def untimed(folder: Path) -> Manifest:
    """The manifest without times, and without the recipe that only `quantize_model` knows."""
    manifest = Manifest.load(folder)
    layers = [layer.model_copy(update={"seconds": 0.0}) for layer in manifest.layers]
    return manifest.model_copy(update={"seconds": 0.0, "layers": layers, "recipe": None})


def assert_same_folders(one: Path, other: Path, read_all) -> None:
    expected, found = read_all(one), read_all(other)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name
    assert {path.name for path in other.glob("*.json")} - {INDEX} == {path.name for path in one.glob("*.json")} - {
        INDEX
    }
    for name in BESIDE:
        if (one / name).exists():
            assert json.loads((other / name).read_text()) == json.loads((one / name).read_text()), name
    assert untimed(other) == untimed(one)


CASES = [
    ("llama", "int4", torch.bfloat16, {"hidden_size": 256, "num_hidden_layers": 1}, {}),
    ("llama", "int4", torch.float16, {"hidden_size": 256, "num_hidden_layers": 1}, {"untie_embeddings": True}),
    ("llama", "int2", torch.bfloat16, {"tie_word_embeddings": False}, {"exclude": "*.self_attn.*"}),
    ("llama", "int8", torch.float32, {}, {"k": 2, "granularity": "channel"}),
    ("bert", "int4", torch.float32, {"hidden_size": 192}, {}),
    ("bert", "int2", torch.float16, {"num_labels": 1}, {"split_bias": False, "include": "*.attention.*"}),
    ("masked", "int4", torch.float32, {}, {}),
    ("bert", "int8", torch.float32, {"num_labels": 1}, {"k": 4}),
]


@pytest.mark.parametrize(("kind", "weights", "dtype", "sizes", "options"), CASES)
def test_it_is_what_the_model_in_memory_becomes(
    plugins, checkpoints, tmp_path, read_all, monkeypatch, kind, weights, dtype, sizes, options
):
    from splitquant_quanto import load, packer

    monkeypatch.setattr(packer, "BLOCK", 1500)
    monkeypatch.setattr(run, "SHARD_BYTES", 20_000)
    folder = checkpoints.save(getattr(checkpoints, kind)(dtype, **sizes))
    (folder / "tokenizer.json").write_text("{}")
    rows = []
    for stream in (False, None):
        output = tmp_path / str(stream)
        request = WeightRequest(weights)
        rows.append(quantize_model(plugins, str(folder), "quanto", request, "kmeans", output, dict(options), stream))
    whole, streamed = rows
    assert (whole["streamed"], streamed["streamed"]) == (False, True)
    figures = ("layers_split", "layers_quantized", "bits_per_weight", "model_bytes", "k", "scheme")
    for column in (*figures, "split_share", "quantized_share", "left_float"):
        assert streamed[column] == whole[column]
    noted = Manifest.load(tmp_path / "None").coverage.model_dump(mode="json")
    assert noted["values"] > 0 < noted["quantized_share"] < 1
    assert noted["left_float"] == whole["left_float"]
    assert_same_folders(tmp_path / "False", tmp_path / "None", read_all)
    assert (tmp_path / "None" / "tokenizer.json").is_file()
    assert not (tmp_path / "None.partial").exists()
    one, other = load(tmp_path / "False"), load(tmp_path / "None")
    with torch.no_grad():
        assert torch.equal(one(IDS).logits, other(IDS).logits)


INC_CASES = [
    ("bert", "int2", torch.float32, {"num_labels": 1}, {}, {}),
    ("bert", "int4", torch.float16, {}, {"k": 2, "granularity": "channel"}, {"granularity": "group"}),
    ("bert", "int4", torch.float32, {}, {"exclude": "*.attention.*"}, {"scheme": "symmetric"}),
    ("masked", "int8", torch.float16, {}, {"split_bias": False}, {}),
    ("masked", "int4", torch.float32, {}, {"untie_embeddings": True}, {}),
    ("llama", "int4", torch.bfloat16, {}, {"k": 2}, {}),
    ("llama", "int2", torch.bfloat16, {"tie_word_embeddings": False}, {}, {"scheme": "symmetric"}),
    ("gpt2", "int4", torch.float32, {}, {"exclude": "*.mlp.*"}, {"granularity": "group", "group_size": 24}),
]


@pytest.mark.parametrize(("kind", "weights", "dtype", "sizes", "options", "form"), INC_CASES)
def test_with_inc_too(
    plugins, checkpoints, tmp_path, read_all, monkeypatch, kind, weights, dtype, sizes, options, form
):
    pytest.importorskip("neural_compressor.torch")
    from splitquant_inc import load, packer

    monkeypatch.setattr(packer, "BLOCK", 1500)
    monkeypatch.setattr(run, "SHARD_BYTES", 20_000)
    folder = checkpoints.save(getattr(checkpoints, kind)(dtype, **sizes))
    request = WeightRequest(weights, **form)
    whole, streamed = (
        quantize_model(plugins, str(folder), "inc", request, "kmeans", tmp_path / str(stream), dict(options), stream)
        for stream in (False, None)
    )
    assert (whole["streamed"], streamed["streamed"]) == (False, True)
    for column in ("layers_split", "layers_quantized", "bits_per_weight", "model_bytes", "k", "scheme"):
        assert streamed[column] == whole[column], column
    assert_same_folders(tmp_path / "False", tmp_path / "None", read_all)
    # INC computes in 32 bits on a CPU, and so must the layers that it leaves alone.
    one, other = load(tmp_path / "False").float(), load(tmp_path / "None").float()
    with torch.no_grad():
        assert torch.equal(one(IDS).logits, other(IDS).logits)


def test_a_quantized_head_stays_quantized_where_embeddings_are_tied(checkpoints, stream, tmp_path):
    from optimum.quanto import QTensor
    from splitquant_quanto import load

    stream(checkpoints.save(checkpoints.llama(torch.float32)))
    model = load(tmp_path / "streamed")
    assert isinstance(model.lm_head.weight, QTensor)
    assert not isinstance(model.model.embed_tokens.weight, QTensor)


HEADS = [
    ("quanto", "llama", {"tie_word_embeddings": True}, {}),
    ("quanto", "llama", {"tie_word_embeddings": False}, {}),
    ("quanto", "llama", {"tie_word_embeddings": True}, {"untie_embeddings": True}),
    ("quanto", "llama", {"tie_word_embeddings": False}, {"exclude": "*.mlp.*", "budget": 8.0}),
    ("inc", "llama", {"tie_word_embeddings": True}, {}),
    ("inc", "llama", {"tie_word_embeddings": False}, {}),
    ("inc", "gpt2", {}, {}),
]


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize(("backend", "kind", "sizes", "options"), HEADS)
def test_a_head_is_what_it_is_in_memory(
    plugins, checkpoints, tmp_path, read_all, monkeypatch, backend, kind, sizes, options, head
):
    if backend == "inc":
        pytest.importorskip("neural_compressor.torch")
    monkeypatch.setattr(run, "SHARD_BYTES", 20_000)
    folder = checkpoints.save(getattr(checkpoints, kind)(torch.float32, **sizes))
    options = untied_for_head(options, head=head)
    rows = [
        quantize_model(
            plugins,
            str(folder),
            backend,
            WeightRequest("int2"),
            "kmeans",
            tmp_path / str(stream),
            dict(options),
            stream,
            task=task_of(str(folder), head=head),
        )
        for stream in (False, True)
    ]
    assert [row["ignored"] for row in rows] == [[] if head else ["lm_head"]] * 2
    figures = ("layers_split", "layers_quantized", "bits_per_weight", "model_bytes")
    for column in (*figures, "split_share", "quantized_share", "left_float"):
        assert rows[1][column] == rows[0][column], column
    assert [head_sentences(row) for row in rows] == [head_sentences(rows[0])] * 2
    assert_same_folders(tmp_path / "False", tmp_path / "True", read_all)
    manifest = Manifest.load(tmp_path / "True")
    assert manifest.recipe == Manifest.load(tmp_path / "False").recipe
    assert ("lm_head" in {layer.name for layer in manifest.split}) is head
    assert ("lm_head" in {layer.name for layer in manifest.kept}) is not head
    stored = {name for name in read_all(tmp_path / "True") if name.startswith("lm_head.")}
    assert (stored <= {"lm_head.weight"}) is not head


def test_the_index_is_true_and_shards_are_small(checkpoints, stream, tmp_path):
    from splitquant_plugins.checkpoints.source import Source

    made = stream(checkpoints.save(checkpoints.llama()), shard_bytes=50_000)
    source = Source(tmp_path / "streamed")
    assert made.shards == len(source.files) > 2
    assert all(
        sum(p.spec.bytes for p in read_header(tmp_path / "streamed" / f).values()) < 50_000 for f in source.files
    )


def test_layers_that_cannot_be_split_stay_whole(checkpoints, stream, plugins, tmp_path, read_all):
    model = checkpoints.bert()
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight.fill_(0.5)
        model.classifier.weight.copy_((torch.arange(192) % 2).reshape(3, 64))
    folder = checkpoints.save(model)
    made = stream(folder, splitter="kmeans")
    (kept,) = [layer for layer in made.manifest.kept if layer.name == "bert.encoder.layer.0.output.dense"]
    assert "all its values are equal" in kept.reason
    request = WeightRequest("int4")
    quantize_model(plugins, str(folder), "quanto", request, "kmeans", tmp_path / "whole", {}, False)
    assert_same_folders(tmp_path / "whole", tmp_path / "streamed", read_all)


def test_a_checkpoint_in_another_dtype_than_the_configuration_says(checkpoints, plugins, tmp_path, read_all):
    folder = checkpoints.save(checkpoints.bert(torch.float32))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    request = WeightRequest("int4")
    for stream in (False, True):
        quantize_model(plugins, str(folder), "quanto", request, "kmeans", tmp_path / str(stream), {}, stream)
    assert_same_folders(tmp_path / "False", tmp_path / "True", read_all)


def test_several_threads_and_a_small_budget_give_the_same(checkpoints, stream, tmp_path, read_all):
    folder = checkpoints.save(checkpoints.llama())
    stream(folder, "one", weights="int2", splitter="auto", k=2)
    stream(folder, "two", weights="int2", splitter="auto", k=2, jobs=2, working_bytes=1)
    stream(folder, "three", weights="int2", splitter="auto", k=2, jobs=-1)
    assert_same_folders(tmp_path / "one", tmp_path / "two", read_all)
    assert_same_folders(tmp_path / "one", tmp_path / "three", read_all)


def test_a_budget_chooses_the_parts_that_it_chooses_in_memory(plugins, checkpoints, tmp_path, read_all, monkeypatch):
    monkeypatch.setattr(run, "SHARD_BYTES", 20_000)
    monkeypatch.setattr(split_layer, "_MEASURED", 1 << 11)
    folder = checkpoints.save(checkpoints.bert())
    request, options = WeightRequest("int4"), {"budget": 11.0, "jobs": 2}
    rows = [
        quantize_model(plugins, str(folder), "quanto", request, "kmeans", tmp_path / str(stream), dict(options), stream)
        for stream in (False, None)
    ]
    assert [row["streamed"] for row in rows] == [False, True]
    # Codes of the parts, and what the scales of parts and of layers left whole take beside them.
    assert rows[1]["bits_per_weight"] == rows[0]["bits_per_weight"] <= 11
    parts = {layer.name: layer.k for layer in Manifest.load(tmp_path / "None").split}
    assert len(set(parts.values())) > 1
    assert_same_folders(tmp_path / "False", tmp_path / "None", read_all)


def test_what_goes_on_keeps_the_parts_that_the_budget_gave(
    checkpoints, stream, tmp_path, read_all, monkeypatch, stopped_after_two_shards
):
    folder = checkpoints.save(checkpoints.bert())
    options = {"splitter": "kmeans", "budget": 11.0}
    stream(folder, "expected", **options)
    with stopped_after_two_shards():
        stream(folder, "stopped", **options)

    def never(*arguments, **keywords):
        raise AssertionError("measured again")

    monkeypatch.setattr(Shards, "candidates", never)
    assert stream(folder, "stopped", **options).shards_found_done == 2
    assert_same_folders(tmp_path / "expected", tmp_path / "stopped", read_all)
    (tmp_path / "damaged.partial").mkdir()
    (tmp_path / "damaged.partial" / "parts.json").write_text("[]")
    with pytest.raises(InputError, match=r"parts.json is damaged"):
        stream(folder, "damaged", **options)


class Stop(BaseException):
    """Ends a run as an interrupt does."""


def test_it_goes_on_wherever_it_was_stopped(checkpoints, stream, tmp_path, read_all, monkeypatch):
    folder = checkpoints.save(checkpoints.bert())
    shards = stream(folder, "expected", shard_bytes=60_000).shards
    assert shards > 2
    replace, left = os.replace, [0]

    def stopping(path, target):
        left[0] -= 1
        if left[0] == 0:
            raise Stop
        replace(path, target)

    monkeypatch.setattr(os, "replace", stopping)  # everything appears by being renamed
    for moment in range(1, 100):
        left[0] = moment
        output = tmp_path / f"stopped {moment}"
        try:
            stream(folder, output.name, shard_bytes=60_000)
            break
        except Stop:
            pass
        assert not output.exists()
        half = output.with_name(f"{output.name}.partial") / "model"
        whole = sorted(half.glob("model-*.safetensors"))
        for path in whole:
            read_header(path)
        dates = [path.stat().st_mtime_ns for path in whole]
        left[0] = 0
        made = stream(folder, output.name, shard_bytes=60_000)
        assert made.shards_found_done == len(whole)
        if whole:
            assert [(output / path.name).stat().st_mtime_ns for path in whole] == dates
        assert_same_folders(tmp_path / "expected", output, read_all)
    # The plan; each shard and its record; five files beside them; the folder; and once it was not stopped.
    assert moment == 1 + 2 * shards + 5 + 1 + 1


KILLED = """
import os, signal, sys
from pathlib import Path
from splitquant_plugins import SplitQuantPass
from splitquant_plugins.backends import WeightRequest
from splitquant_plugins.plugins import Plugins
from splitquant_plugins.streaming.run import stream_model
from splitquant_plugins.streaming.writer import ShardWriter
plugins = Plugins.load()
backend = plugins.backend("quanto")
form = backend.resolve(WeightRequest("int4"))
append, written = ShardWriter._append, [0]
def killing(self, *arguments):
    append(self, *arguments)
    written[0] += 1
    if written[0] == 40:
        self._file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
ShardWriter._append = killing
first = SplitQuantPass(splitter="kmeans", plugins=plugins)
stream_model(Path(sys.argv[1]), Path(sys.argv[2]), first, backend, form, shard_bytes=20_000)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL")
def test_it_goes_on_after_a_kill(checkpoints, stream, tmp_path, read_all, python_path):
    folder = checkpoints.save(checkpoints.bert())
    command = [sys.executable, "-c", KILLED, str(folder), str(tmp_path / "killed")]
    assert subprocess.run(command, env=python_path(), stderr=subprocess.DEVNULL).returncode == -signal.SIGKILL
    half = tmp_path / "killed.partial" / "model"
    whole = list(half.glob("model-*.safetensors"))
    assert whole
    assert len(list(half.glob(".*.partial"))) == 1
    assert not (tmp_path / "killed").exists()
    made = stream(folder, "killed")
    assert made.shards_found_done == len(whole)
    stream(folder, "expected")
    assert_same_folders(tmp_path / "expected", tmp_path / "killed", read_all)


@pytest.fixture
def half_done(checkpoints, stream, stopped_after_two_shards):
    """Return the checkpoint of a run that was stopped after its second shard."""
    folder = checkpoints.save(checkpoints.bert())
    with stopped_after_two_shards():
        stream(folder)
    return folder


def test_other_options_are_not_mixed_in(half_done, stream, tmp_path):
    with pytest.raises(InputError, match=r"streamed\.partial is half done, and was begun with another options"):
        stream(half_done, k=2)
    with pytest.raises(InputError, match="begun with another options"):
        stream(half_done, splitter="range")
    with pytest.raises(InputError, match="begun with another weight format"):
        stream(half_done, weights="int2")
    with pytest.raises(InputError, match="begun with another choice of layers that stay float"):
        stream(half_done, ignore=("classifier",))
    with pytest.raises(InputError, match="begun with another shard size"):
        stream(half_done, shard_bytes=30_000)
    assert stream(half_done).shards_found_done == 2


def test_another_checkpoint_is_not_mixed_in(half_done, stream):
    (shard, *_) = sorted(half_done.glob("*.safetensors"))
    tensors = load_file(shard)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, shard, metadata={"format": "pt"})
    with pytest.raises(InputError, match="begun with another checkpoint"):
        stream(half_done)


def test_a_finished_shard_that_was_cut_short_or_lost_is_made_again(half_done, stream, tmp_path, read_all):
    one, two = sorted((tmp_path / "streamed.partial" / "model").glob("model-*.safetensors"))
    one.write_bytes(one.read_bytes()[:-1])
    two.unlink()
    assert stream(half_done).shards_found_done == 0
    stream(half_done, "expected")
    assert_same_folders(tmp_path / "expected", tmp_path / "streamed", read_all)


def test_two_at_once_are_refused(half_done, stream, tmp_path):
    if workplace.fcntl is None:
        pytest.skip("no file locks here")
    with workplace.Workplace(tmp_path / "streamed").locked(), pytest.raises(InputError, match="another process"):
        stream(half_done)


@pytest.mark.parametrize(
    ("number", "said"),
    [(errno.ENOSPC, "is full; free some space"), (errno.EFBIG, r"takes no file of that size; .*ulimit")],
)
def test_a_full_disk_is_one_clear_line_and_nothing_is_lost(
    checkpoints, stream, tmp_path, read_all, monkeypatch, number, said
):
    folder = checkpoints.save(checkpoints.bert())
    append, left = writer.ShardWriter._append, [60]

    def full(self, *arguments):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(number, os.strerror(number))
        append(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(writer.ShardWriter, "_append", full)
        with pytest.raises(InputError, match=rf"the disk of .*streamed\.partial {said}"):
            stream(folder)
    assert not list((tmp_path / "streamed.partial").rglob(".*.partial"))
    assert stream(folder).shards_found_done > 0
    stream(folder, "expected")
    assert_same_folders(tmp_path / "expected", tmp_path / "streamed", read_all)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_device_that_really_is_full(checkpoints, stream, monkeypatch):
    folder = checkpoints.save(checkpoints.bert())
    open_path = Path.open
    monkeypatch.setattr(
        Path, "open", lambda path, *a, **k: open_path(Path("/dev/full") if path.suffix == ".partial" else path, *a, **k)
    )
    with pytest.raises(InputError, match="is full"):
        stream(folder)


def test_a_disk_that_is_too_small_is_refused_before_work_begins(checkpoints, stream, tmp_path, monkeypatch):
    folder = checkpoints.save(checkpoints.bert())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 10**3, 10**3))
    with pytest.raises(InputError, match=r"needs up to \d+\.\d [kM]B more, and its disk has 1\.0 kB free"):
        stream(folder)
    assert not list((tmp_path / "streamed.partial" / "model").iterdir())


def edit(folder: Path, change) -> None:
    """Change the tensors of a checkpoint, and write it as one file."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(path))
        path.unlink()
    (folder / "model.safetensors.index.json").unlink()
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


QUERY = "bert.encoder.layer.0.attention.self.query.weight"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_names_the_tensor(checkpoints, stream, value):
    folder = checkpoints.save(checkpoints.bert())
    edit(folder, lambda tensors: tensors[QUERY][3].fill_(value))
    with pytest.raises(SplitFailedError, match=f"{QUERY} has 64 NaN or infinite values"):
        stream(folder)


MISFITS = {
    f"has no tensor {QUERY}, which BertForSequenceClassification needs": lambda t: t.pop(QUERY),
    "has a tensor surprise, which BertForSequenceClassification does not": lambda t: t.update(surprise=torch.ones(1)),
    rf"{QUERY} is \[64, 65\], and \[64, 64\]": lambda t: t.update({QUERY: torch.ones(64, 65)}),
    f"{QUERY} is torch.int64, and torch.float32": lambda t: t.update({QUERY: torch.ones(64, 64).long()}),
}


@pytest.mark.parametrize("message", MISFITS)
def test_tensors_that_do_not_fit_the_model(checkpoints, stream, tmp_path, message):
    folder = checkpoints.save(checkpoints.bert())
    edit(folder, MISFITS[message])
    with pytest.raises(InputError, match=message) as caught:
        stream(folder)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "streamed.partial").exists()


def test_tied_tensors_that_differ(checkpoints, stream):
    folder = checkpoints.save(checkpoints.llama())
    edit(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    stream(folder, "equal")
    (folder / "model.safetensors.index.json").write_text("{}")
    (folder / "model.safetensors.index.json").unlink()
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"tied in LlamaForCausalLM, and differ here"):
        stream(folder, "different")


def test_what_needs_the_whole_model_is_refused(checkpoints, stream, plugins, tmp_path):
    folder = checkpoints.save(checkpoints.bert())
    with pytest.raises(ConfigError, match="activations needs the whole model"):
        stream(folder, activations=True)
    with pytest.raises(InputError, match="is not a folder, and only local checkpoints are streamed"):
        quantize_model(plugins, "some/model", "quanto", WeightRequest("int4"), "kmeans", tmp_path / "x", {}, True)


def test_backends_that_cannot_stream_say_so(checkpoints, plugins, tmp_path, monkeypatch):
    from splitquant_quanto.backend import QuantoBackend

    folder = checkpoints.save(checkpoints.bert())
    monkeypatch.delattr(QuantoBackend, "packer")
    arguments = (plugins, str(folder), "quanto", WeightRequest("int4"), "kmeans")
    with pytest.raises(ConfigError, match="backend quanto cannot stream"):
        quantize_model(*arguments, tmp_path / "x", {}, True)
    assert quantize_model(*arguments, tmp_path / "x", {}, None)["streamed"] is False


def test_a_quantized_checkpoint_is_refused(checkpoints, stream):
    folder = checkpoints.save(checkpoints.bert())
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(AlreadyQuantizedError, match="is quantized, says its config"):
        stream(folder)


def test_the_command_line(checkpoints, tmp_path, capsys):
    from splitquant_plugins.cli.main import run as command

    folder = checkpoints.save(checkpoints.bert())
    arguments = ["quantize", str(folder), "--output", str(tmp_path / "out"), "--json", str(tmp_path / "row.json")]
    assert command(arguments) == 0
    (row,) = json.loads((tmp_path / "row.json").read_text())
    assert row["streamed"] is True
    printed = capsys.readouterr().out.splitlines()
    lines = [line for line in printed if "Of the model's values" in line or "stays float" in line]
    shares = f"{row['quantized_share']:.1%} quantized and {row['split_share']:.1%} split."
    assert lines[0] == f"Of the model's values, {shares}"
    assert len(lines) == 1 + len(row["left_float"])
    assert "looked up" in lines[1]
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    assert command([*arguments[:3], str(tmp_path / "memory"), "--no-stream"]) == 0
    assert (tmp_path / "memory" / "model.safetensors").is_file()
    (folder / "model.safetensors.index.json").write_text("{")
    capsys.readouterr()
    assert command([*arguments[:3], str(tmp_path / "broken"), "--stream"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_what_quanto_could_not_load_is_refused_by_name(checkpoints, stream, tmp_path):
    folder = checkpoints.save(checkpoints.bert(torch.bfloat16, hidden_size=256, intermediate_size=256))
    with pytest.raises(ConfigError, match=r"classifier: .*multiple of 16 outputs, not 3"):
        stream(folder)
    assert not (tmp_path / "streamed").exists()
    stream(folder, weights="int8")


def test_modules_that_transformers_keeps_in_float32_are_kept_so(tmp_path):
    """T5's `wo` in float16: what is streamed has the dtypes of what is loaded."""
    from transformers import T5Config, T5ForConditionalGeneration

    from splitquant_plugins.checkpoints.source import Source
    from splitquant_plugins.streaming.layout import empty_skeleton
    from splitquant_plugins.streaming.parameters import Parameters

    config = T5Config(vocab_size=96, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=2)
    for dtype in (torch.float16, torch.bfloat16):
        folder = tmp_path / str(dtype)
        T5ForConditionalGeneration(config).to(dtype).save_pretrained(folder)
        model, stated = empty_skeleton(folder)
        parameters = Parameters(model, Source(folder), stated)
        loaded = T5ForConditionalGeneration.from_pretrained(folder).state_dict()
        found = {name: parameters.dtypes[parameters.source_of(name)] for name in loaded}
        assert found == {name: tensor.dtype for name, tensor in loaded.items()}
    assert any(dtype == torch.bfloat16 for dtype in found.values())
