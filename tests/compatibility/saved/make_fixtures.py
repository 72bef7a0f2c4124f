"""What was saved with release 0.1.0, made before the modules moved; the tests beside it load it with the code of today.

    python make_fixtures.py FOLDER

It runs with release 0.1.0 only, and is kept to say how each file was made. FOLDER gets a folder for each fixture, with
`input.safetensors` (the model's inputs, by name), `expected.safetensors` (`output`, what 0.1.0 computed from them on
one thread) and what was saved, and `index.json`, which lists them: `weights` are digests of what the layers' weights
dequantize to, parts summed.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import pickle
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file, save_model
from torch import Tensor, nn

with warnings.catch_warnings():  # torchao deprecates some of its own enums while it is imported
    warnings.simplefilter("ignore")
    import transformers  # INC wants it imported first
    from neural_compressor.torch.quantization import HQQConfig, RTNConfig
    from neural_compressor.torch.quantization import quantize as inc_quantize
    from optimum.quanto import freeze, qint2, qint4
    from optimum.quanto import quantize as quanto_quantize
    from splitquant_pt2e import LowBitWeightQuantizer, stored_weights
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

import splitquant_inc
import splitquant_pt2e
import splitquant_quanto

from splitquant_plugins import DecoupleQPass, Manifest, SplitQuantPass, apply_manifest, fuse, manifest_of, quantize
from splitquant_plugins.backends import WeightRequest
from splitquant_plugins.cli.main import run as splitquant
from splitquant_plugins.modules import SplitModule, dense_weight
from splitquant_plugins.plugins import Plugins
from splitquant_plugins.streaming.run import stream_model

RELEASE = "0.1.0"
PACKAGES = ("torch", "torchao", "transformers", "optimum-quanto", "neural-compressor", "safetensors")
FAST = {"rounds": 1, "starts": (1.0,), "sweeps": 1, "search_inputs": 0}
SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 48}


def settled(model: nn.Module) -> nn.Module:
    """Give some weights large values, and every BatchNorm statistics and an affine map that a fold can get wrong."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
                module.weight.view(-1)[::41] += 0.5
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(-1.5, 1.5)
                module.bias.normal_()
    return model.eval()


def bert() -> Any:
    torch.manual_seed(1)
    config = transformers.BertConfig(**SIZES, max_position_embeddings=16, num_labels=3)
    return settled(transformers.BertForSequenceClassification(config))


def llama() -> Any:
    """A causal language model whose head is its embedding."""
    torch.manual_seed(2)
    config = transformers.LlamaConfig(
        **SIZES, num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=True
    )
    return settled(transformers.LlamaForCausalLM(config))


def mlp() -> nn.Module:
    torch.manual_seed(3)
    return settled(
        nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16, bias=False), nn.GELU(), nn.Linear(16, 8))
    )


def conv_net() -> nn.Module:
    """A BatchNorm that is folded, one that cannot be, activations to split, a depthwise convolution."""
    torch.manual_seed(4)
    return settled(
        nn.Sequential(
            nn.BatchNorm2d(3),
            nn.Conv2d(3, 6, 3, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(inplace=True),
            nn.Conv2d(6, 6, 3, stride=2, groups=6, padding=1, padding_mode="reflect"),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Linear(96, 5),
        )
    )


def conv_stack() -> nn.Module:
    torch.manual_seed(5)
    return settled(nn.Sequential(nn.Conv1d(2, 4, 3), nn.Tanh(), nn.Unflatten(2, (3, 2, 1)), nn.Conv3d(4, 2, (2, 2, 1))))


def tied_net() -> nn.Module:
    """One module in two places, and another one with the same weight."""
    torch.manual_seed(6)
    first, twin = nn.Linear(8, 8), nn.Linear(8, 8)
    twin.weight = first.weight
    return settled(nn.Sequential(first, nn.ReLU(), first, nn.ReLU(), twin))


def tokens() -> dict[str, Tensor]:
    ids = torch.randint(1, 48, (2, 10), generator=torch.Generator().manual_seed(7))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def values(*shape: int) -> dict[str, Tensor]:
    return {"input": torch.randn(shape, generator=torch.Generator().manual_seed(8))}


def calibration() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(9)
    ids = [torch.randint(1, 48, (8, 10), generator=generator) for _ in range(3)]
    return [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in ids]


def output_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        output = model(**inputs)
    return getattr(output, "logits", output)


def digest(weight: Tensor) -> str:
    data = weight.detach().float().contiguous()
    return hashlib.sha256(repr(tuple(data.shape)).encode() + data.numpy().tobytes()).hexdigest()


def weights_of(model: nn.Module) -> dict[str, str]:
    """Digests of the float weight of each layer that is split or solved: parts dequantized, then summed in order."""
    if isinstance(model, torch.fx.GraphModule):
        stored = {name: [one.weight for one in parts] for name, parts in stored_weights(model).items()}
        return {name: digest(sum(parts[1:], parts[0])) for name, parts in stored.items()}
    found = {}
    for record in manifest_of(model).layers:
        module = model.get_submodule(record.name)
        if isinstance(module, SplitModule):
            found[record.name] = digest(module.weight)
        elif record.values is not None:
            found[record.name] = digest(dense_weight(module))
    return found


class Fixtures:
    """The folder, and the index that grows with each fixture."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: list[dict[str, Any]] = []

    def path(self, name: str, saved: str) -> Path:
        (self.folder / name).mkdir(parents=True)
        return self.folder / name / saved

    def add(
        self,
        name: str,
        loader: str,
        saved: str,
        what: str,
        model: nn.Module,
        inputs: dict[str, Tensor],
        load: Callable[[], nn.Module],
        unsplit: str | None = None,
    ) -> None:
        """Write inputs and outputs, and make sure that what was saved comes back bit for bit with this release."""
        output, weights = output_of(model, inputs), weights_of(model)
        again = load()
        assert torch.equal(output_of(again, inputs), output), name
        assert weights_of(again) == weights, name
        assert weights, name
        save_file(inputs, self.folder / name / "input.safetensors")
        save_file({"output": output.contiguous()}, self.folder / name / "expected.safetensors")
        entry = {"name": name, "loader": loader, "saved": f"{name}/{saved}", "what": what}
        self.entries.append({**entry, "unsplit": unsplit, "weights": weights})

    def write_index(self) -> None:
        made_with = {package: importlib.metadata.version(package) for package in PACKAGES}
        index = {"release": RELEASE, "made_with": made_with, "fixtures": self.entries}
        (self.folder / "index.json").write_text(json.dumps(index, indent=1) + "\n")


def quanto(fixtures: Fixtures) -> None:
    model = SplitQuantPass()(bert())
    quanto_quantize(model, weights=qint2)
    freeze(model)
    path = fixtures.path("quanto", "model")
    splitquant_quanto.save(model, path)
    what = "BertForSequenceClassification, SplitQuantPass(), quanto qint2, splitquant_quanto.save"
    fixtures.add("quanto", "quanto", "model", what, model, tokens(), lambda: splitquant_quanto.load(path))

    model = SplitQuantPass(k=2, splitter="percentile")(mlp())
    quanto_quantize(model, weights=qint4)
    freeze(model)
    path = fixtures.path("quanto_own_module", "model")
    splitquant_quanto.save(model, path)
    what = "nn.Sequential, SplitQuantPass(k=2, splitter='percentile'), quanto qint4, splitquant_quanto.save"
    fixtures.add(
        "quanto_own_module", "quanto", "model", what, model, values(4, 16),
        lambda: splitquant_quanto.load(path, mlp()), "mlp",
    )  # fmt: skip


def inc(fixtures: Fixtures) -> None:
    recipe = SplitQuantPass() + RTNConfig(bits=2, use_sym=False, group_size=-1, use_layer_wise=False)
    model = inc_quantize(llama(), recipe)
    path = fixtures.path("inc", "model")
    splitquant_inc.save(model, path)
    what = (
        "LlamaForCausalLM with tied embeddings, SplitQuantPass() + RTNConfig(bits=2, use_sym=False, group_size=-1), "
        "splitquant_inc.save"
    )
    fixtures.add("inc", "inc", "model", what, model, tokens(), lambda: splitquant_inc.load(path))

    model = inc_quantize(mlp(), SplitQuantPass() + HQQConfig(bits=2, group_size=16))
    path = fixtures.path("inc_hqq", "model")
    splitquant_inc.save(model, path)
    what = "nn.Sequential, SplitQuantPass() + HQQConfig(bits=2, group_size=16), splitquant_inc.save"
    fixtures.add("inc_hqq", "inc", "model", what, model, values(4, 16), lambda: splitquant_inc.load(path, mlp()), "mlp")


def pt2e(fixtures: Fixtures) -> None:
    for name, what, options in (
        ("pt2e", "int2 weights per tensor", {"granularity": "tensor"}),
        ("pt2e_activations", "symmetric int4 weights per channel, int8 activations", {"activations": "int8"}),
    ):
        inputs = values(2, 3, 8, 8)
        quantizer = (
            LowBitWeightQuantizer("int2", **options)
            if name == "pt2e"
            else LowBitWeightQuantizer("int4", scheme="symmetric", **options)
        )
        exported = torch.export.export(conv_net(), (inputs["input"],)).module()
        prepared = prepare_pt2e(exported, SplitQuantPass() + quantizer)
        prepared(**inputs)
        model = convert_pt2e(prepared)
        path = fixtures.path(name, "model")
        splitquant_pt2e.save(model, path)
        made = (
            f"nn.Sequential with convolutions, SplitQuantPass() + LowBitWeightQuantizer: {what}; splitquant_pt2e.save"
        )
        fixtures.add(name, "pt2e", "model", made, model, inputs, lambda path=path: splitquant_pt2e.load(path))


def decoupleq(fixtures: Fixtures) -> None:
    recipe = RTNConfig(bits=2, use_sym=False, group_size=-1, use_layer_wise=False)
    solver = DecoupleQPass(calibration=calibration(), **FAST)
    model = inc_quantize(bert(), SplitQuantPass(k=2) + solver + recipe)
    path = fixtures.path("decoupleq_inc", "model")
    splitquant_inc.save(model, path)
    what = (
        "BertForSequenceClassification, SplitQuantPass(k=2) + DecoupleQPass(calibration=...) + RTNConfig(bits=2, ...), "
        "splitquant_inc.save"
    )
    fixtures.add("decoupleq_inc", "inc", "model", what, model, tokens(), lambda: splitquant_inc.load(path))

    backend = Plugins.load().backend("quanto")
    form = backend.resolve(WeightRequest("int2"))
    quantized = backend.quantize(bert(), form, DecoupleQPass(calibration=calibration(), **FAST), [tokens()])
    path = fixtures.path("decoupleq_quanto", "model")
    backend.save(quantized, path)
    what = "BertForSequenceClassification, DecoupleQPass(calibration=...) alone, quanto int2, splitquant_quanto.save"
    fixtures.add(
        "decoupleq_quanto", "quanto", "model", what, quantized.model, tokens(), lambda: splitquant_quanto.load(path)
    )


def streamed(fixtures: Fixtures) -> None:
    path = fixtures.path("streamed", "model")
    checkpoint = Path("checkpoint")  # relative, since its name is kept in config.json
    llama().save_pretrained(checkpoint, max_shard_size="22KB")
    assert len(list(checkpoint.glob("*.safetensors"))) == 2, "the checkpoint is to have two shards"
    quantize.stream_model = partial(stream_model, shard_bytes=12_000)  # the command has no option for it
    arguments = ["--backend", "quanto", "--weights", "int4", "--split", "kmeans", "--k", "3", "--stream"]
    arguments += ["--head", "-O", "untie_embeddings=false"]
    assert splitquant(["quantize", str(checkpoint), *arguments, "--output", str(path)]) == 0
    assert len(list(path.glob("*.safetensors"))) > 1, "what was streamed is to have several shards"
    for file in checkpoint.iterdir():
        file.unlink()
    checkpoint.rmdir()
    model = SplitQuantPass()(llama())
    quanto_quantize(model, weights=qint4)
    freeze(model)
    what = (
        "LlamaForCausalLM with tied embeddings, in two shards: splitquant quantize CHECKPOINT --backend quanto "
        "--weights int4 --split kmeans --k 3 --stream --head -O untie_embeddings=false; the expected output is that of "
        "the model split in memory"
    )
    fixtures.add("streamed", "quanto", "model", what, model, tokens(), lambda: splitquant_quanto.load(path))


def float_models(fixtures: Fixtures) -> None:
    def with_torch(name: str, saved: str, what: str, model: nn.Module, inputs: dict[str, Tensor]) -> None:
        path = fixtures.path(name, saved)
        torch.save(model, path)
        load = lambda: torch.load(path, weights_only=False)  # noqa: E731
        fixtures.add(name, "torch", saved, what, model, inputs, load)

    what = "Linear, convolutions, BatchNorm and activations, SplitQuantPass(activations=True), torch.save of the model"
    images = values(2, 3, 8, 8)
    with_torch("float_split", "float_split.pt", what, SplitQuantPass(activations=True)(conv_net()), images)
    what = "nn.Sequential of Linear layers, SplitQuantPass(k=4), fused, torch.save of the model"
    with_torch("float_fused", "float_fused.pt", what, fuse(SplitQuantPass(k=4)(mlp())), values(4, 16))

    def with_pickle(name: str, saved: str, what: str, model: nn.Module, inputs: dict[str, Tensor]) -> None:
        path = fixtures.path(name, saved)
        path.write_bytes(pickle.dumps(model))
        fixtures.add(name, "pickle", saved, what, model, inputs, lambda: pickle.loads(path.read_bytes()))

    what = "a module in two places and a shared weight, SplitQuantPass(), pickle.dumps of the model"
    with_pickle("float_pickle", "float_split.pkl", what, SplitQuantPass()(tied_net()), values(4, 8))
    what = "Conv1d and Conv3d, SplitQuantPass(k=2), pickle.dumps of the model"
    with_pickle("float_convolutions", "float_split.pkl", what, SplitQuantPass(k=2)(conv_stack()), values(3, 2, 8))
    what = "nn.Sequential of Linear layers, SplitQuantPass(k=2) + DecoupleQPass(bits=2), pickle.dumps of the model"
    batches = [torch.randn(16, 16, generator=torch.Generator().manual_seed(10)) for _ in range(2)]
    solved = (SplitQuantPass(k=2) + DecoupleQPass(calibration=batches, bits=2, **FAST)).apply(mlp())
    with_pickle("float_solved", "float_solved.pkl", what, solved, values(4, 16))

    def rebuilt(path: Path, unsplit: nn.Module) -> nn.Module:
        from safetensors.torch import load_model

        model = apply_manifest(unsplit, Manifest.load(path))
        load_model(model, path / "parts.safetensors")
        return model.eval()

    for name, make, options, inputs in (
        ("float_manifest", conv_net, {"activations": True}, images),
        ("float_manifest_tied", tied_net, {}, values(4, 8)),
    ):
        path = fixtures.path(name, "split")
        model = SplitQuantPass(**options)(make())
        path.mkdir()
        manifest_of(model).save(path)
        save_model(model, str(path / "parts.safetensors"))
        what = (
            f"nn.Sequential ({make.__name__}), SplitQuantPass(**{options}), Manifest.save and safetensors' save_model"
        )
        load = lambda path=path, make=make: rebuilt(path, make())  # noqa: E731
        fixtures.add(name, "manifest", "split", what, model, inputs, load, make.__name__)


def main() -> None:
    installed = importlib.metadata.version("splitquant-plugins")
    if len(sys.argv) != 2 or Path(sys.argv[1]).exists() or installed != RELEASE:
        sys.exit(f"usage, with release {RELEASE} installed: {sys.argv[0]} FOLDER, which must not exist yet")
    torch.set_num_threads(1)
    fixtures = Fixtures(Path(sys.argv[1]).absolute())
    fixtures.folder.mkdir(parents=True)
    os.chdir(fixtures.folder)
    for make in (quanto, inc, pt2e, decoupleq, streamed, float_models):
        make(fixtures)
    fixtures.write_index()


if __name__ == "__main__":
    main()
